"""Hides the words in which /openapi.json describes files and batches."""

from app.api import batch_wire, file_wire
from app.api.openapi import CREATE, KEYED, NO_KEY, UNAVAILABLE, WAIT, Schema, answer, refusal


def _batch(
    name: str, says: str, *parameters: Schema, shown: str = "Batch", more: Schema | None = None
) -> Schema:  # fmt: skip
    answers = {
        200: answer(says, shown), 400: refusal("The request is not understood; `param` says where."), 401: NO_KEY,
        403: refusal("The key is not made for this: it lacks the scope `batch`."),
        404: refusal("There is no such thing for you."), 503: UNAVAILABLE,
    }  # fmt: skip
    extra = {"security": KEYED, "parameters": [*parameters], **(more or {})}
    return {"operation_id": name, "responses": answers, "openapi_extra": extra}


BATCH_CREATE = _batch(
    "createBatch", "The batch.",
    {"name": "idempotency-key", "in": "header", "schema": {"type": "string", "minLength": 1, "maxLength": 255},
     "description": "Asked again with the same key and body, it is the batch of before."},
    *[parameter for parameter in CREATE["parameters"] if parameter["name"] == "x-embedgate-project"],
    more={"requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/BatchRequest"}}},
    }},
)  # fmt: skip
BATCH_CREATE["responses"] |= {
    422: refusal("The idempotency key came with another body."), 429: refusal("Too many batches are open."),
}  # fmt: skip
BATCHES = _batch(
    "listBatches", "Batches, the newest first.",
    {"name": "limit", "in": "query", "schema": batch_wire.PAGE_SCHEMA},
    {"name": "after", "in": "query", "schema": {"type": "string"}, "description": "The last id of the page before."},
    shown="BatchList",
)  # fmt: skip
BATCH = _batch("retrieveBatch", "The batch.")
BATCH_CANCEL = _batch("cancelBatch", "The batch, which will be `cancelled`.")
BATCH_CANCEL["responses"][409] = refusal("It has ended.")
BATCH_EVENTS = _batch("followBatch", "Events `batch` with the batch as data, until it has ended.")
BATCH_EVENTS["responses"][200]["content"] = {"text/event-stream": {}}
BATCH_EVENTS["responses"][429] = refusal("Too many batches are followed at once.", WAIT)

FILE_CREATE = _batch(
    "createFile", "The file.", shown="File",
    more={"requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/FileRequest"}}},
    }},
)  # fmt: skip
FILE_CREATE["responses"] |= {
    413: refusal("The file is too large; the connection is closed."), 415: refusal("It is compressed."),
    429: refusal("Your files would take more bytes than they may."),
}  # fmt: skip
FILES = _batch("listFiles", "Files, the newest first.", *file_wire.PAGE, shown="FileList")
FILE = _batch("retrieveFile", "The file.", shown="File")
FILE_CONTENT = _batch("downloadFile", "Its bytes.")
FILE_CONTENT["responses"][200]["content"] = {"application/octet-stream": {}}
FILE_DELETE = _batch("deleteFile", "That it is deleted.", shown="FileDeleted")
FILE_DELETE["responses"][409] = refusal("A batch that has not ended reads it.")
