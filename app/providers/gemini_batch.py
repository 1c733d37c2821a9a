"""Hides Gemini's batches: resumable uploads, long-running operations, counts in strings, answers under keys."""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import urlencode, urlsplit

import msgspec
import orjson

from app.domain import Space, Text
from app.errors import MalformedReply, ProviderError
from app.job_ports import BatchLimits, BatchState, BatchStatus
from app.providers.dialect import Ask, Said
from app.providers.http import Upload
from app.providers.refusals import Answer
from app.providers.vendor_batches import (
    CALL_S,
    PAGE_ITEMS,
    SEND_S,
    Answered,
    Lines,
    Page,
    VendorBatches,
    count,
    identifier,
    listed,
    object_at,
    word,
)

_FILE = re.compile(r"files/[A-Za-z0-9_-]{1,128}")
_QUERY = re.compile(r"[A-Za-z0-9_.~%&=-]{1,4096}")
_JSONL = "application/jsonl"
_STATUS_OF = {
    1: 499, 3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 13: 500, 14: 503, 16: 401
}  # fmt: skip
"""What Google's numbers for errors would have been in HTTP."""


class _Embedding(msgspec.Struct):
    values: msgspec.Raw


class _Response(msgspec.Struct, rename="camel"):
    embedding: _Embedding
    token_count: Any = None
    usage_metadata: Any = None


class _Line(msgspec.Struct):
    key: str
    response: _Response | None = None
    error: Any = None


_line_decoder = msgspec.json.Decoder(_Line)


class GeminiBatches(VendorBatches):
    """Gemini's; see `VendorBatches`."""

    # Neither texts nor tokens are bounded by what Google publishes; these are OpenAI's, and what was seen in tier 1.
    limits: ClassVar[BatchLimits] = BatchLimits(50_000, 2_000_000_000, 2_000_000)
    statuses: ClassVar[Mapping[str, BatchStatus]] = {
        "BATCH_STATE_PENDING": "running", "BATCH_STATE_RUNNING": "running", "BATCH_STATE_SUCCEEDED": "done",
        "BATCH_STATE_FAILED": "failed", "BATCH_STATE_CANCELLED": "cancelled", "BATCH_STATE_EXPIRED": "expired",
    }  # fmt: skip
    id_pattern = re.compile(r"batches/[A-Za-z0-9_-]{1,128}")

    def line(self, key: str, text: Text, space: Space) -> object:
        """See `VendorBatches`; the model stands in the URL alone."""
        requests: Any = self.dialect.ask([text], space).body["requests"]
        return {"key": key, "request": {name: value for name, value in requests[0].items() if name != "model"}}

    async def send(self, name: str, lines: Lines, size_bytes: int) -> str:
        """See `VendorBatches`; of the URL that the vendor names only the query is believed."""
        path = f"../upload/{self.endpoint.version}/files"
        start = orjson.dumps({"file": {"displayName": name, "mimeType": _JSONL}})
        headers = {
            "content-type": "application/json",
            "x-goog-upload-protocol": "resumable",
            "x-goog-upload-command": "start",
            "x-goog-upload-header-content-length": str(size_bytes),
            "x-goog-upload-header-content-type": _JSONL,
        }
        begun = await self.endpoint.send(
            path, Upload(_once(start), len(start), headers), most_bytes=65_536, timeout_s=CALL_S
        )
        query = _query(self.honoured(begun))
        headers = {
            "content-type": _JSONL,
            "x-goog-upload-command": "upload, finalize",
            "x-goog-upload-offset": "0",
        }
        sent = await self.endpoint.send(
            f"{path}?{query}", Upload(lines.pieces(), size_bytes, headers), most_bytes=65_536, timeout_s=SEND_S
        )
        return identifier(_FILE, object_at(self.told(sent), "file").get("name"))

    async def create(self, name: str, file_id: str, space: Space) -> Mapping[str, Any]:
        """See `VendorBatches`."""
        body = {"batch": {"displayName": name, "inputConfig": {"file_name": file_id}}}
        return await self.call(Ask(f"models/{self.dialect.target.model}:asyncBatchEmbedContent", body))

    async def page(self, after: str) -> Page:
        """See `VendorBatches`."""
        query = {"pageSize": PAGE_ITEMS, **({"pageToken": after} if after else {})}
        said = await self.fetch(f"batches?{urlencode(query)}")
        token = said.get("nextPageToken")
        # An empty page is left out, and may still not be the last.
        operations = listed(said, "operations") if said.keys() - {"nextPageToken"} else []
        return Page(operations, token if isinstance(token, str) and len(token) < 4096 else "")

    def id_of(self, batch: Mapping[str, Any]) -> object:
        """See `VendorBatches`."""
        return batch.get("name")

    def batch_path(self, vendor_id: str) -> str:
        """See `VendorBatches`; the id is the path."""
        return vendor_id

    def cancel_path(self, vendor_id: str) -> str:
        """See `VendorBatches`."""
        return f"{vendor_id}:cancel"

    def name_of(self, batch: Mapping[str, Any]) -> object:
        """See `VendorBatches`."""
        return object_at(batch, "metadata").get("displayName")

    def state_of(self, batch: Mapping[str, Any]) -> BatchState | None:
        """See `VendorBatches`."""
        metadata, error = object_at(batch, "metadata"), object_at(batch, "error")
        status = self.statuses.get(str(metadata.get("state")))
        if status is None:
            return None
        counts = object_at(metadata, "batchStats")
        return BatchState(
            status, count(counts.get("successfulRequestCount")), count(counts.get("failedRequestCount")),
            reason=word(error.get("status")) or word(str(error.get("code", ""))), crowded=error.get("code") == 8,
        )  # fmt: skip

    def outputs(self, batch: Mapping[str, Any]) -> Sequence[str]:
        """See `VendorBatches`."""
        file = object_at(object_at(batch, "metadata"), "output").get("responsesFile")
        return [f"{identifier(_FILE, file)}:download?alt=media"] if file else []

    def answered(self, line: bytes) -> Answered:
        """See `VendorBatches`."""
        said = _line_decoder.decode(line)
        return Answered(said.key, self._refusal(said.error) if said.response is None else _said(said.response))

    def _refusal(self, error: object) -> ProviderError:
        code = error.get("code") if isinstance(error, dict) else None
        status = _STATUS_OF.get(code, code) if type(code) is int else 500
        return self.dialect.refusal(Answer(status, {}, bytearray(orjson.dumps({"error": error}))))


def _said(response: _Response) -> Said:
    usage = response.usage_metadata if isinstance(response.usage_metadata, dict) else {}
    return Said(
        [response.embedding.values], [None], count(response.token_count or usage.get("promptTokenCount")) or None
    )


def _query(answer: Answer) -> str:
    """The query of the URL to which a file is to be sent."""
    try:
        query = urlsplit(answer.headers.get("x-goog-upload-url", "")).query
    except ValueError:
        query = ""
    if not _QUERY.fullmatch(query):
        raise MalformedReply("no URL to send a file to")
    return query


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
