"""Hides the words in which /openapi.json describes the API, the hot route in full: it is no route of the framework."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from app.api import wire
from app.api.exchange import MOST_BODY_BYTES

Schema = dict[str, Any]

# ── schemas ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_TOKEN_IDS: Schema = {
    "type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1,
    "description": "Token ids in the vocabulary of the model (cl100k_base).",
}  # fmt: skip

_INPUT: Schema = {
    "description": "One text or many; a lone empty string is a text, inside a list it is refused.",
    "oneOf": [
        {"type": "string", "title": "One text"},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 2048,
         "title": "Texts"},
        {**_TOKEN_IDS, "title": "One text as token ids"},
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": 2048, "title": "Texts as token ids"},
    ],
}  # fmt: skip


def _optional(schema: Schema, description: str) -> Schema:
    return {"anyOf": [schema, {"type": "null"}], "description": description}


def _choice(field: str, description: str) -> Schema:
    return _optional({"type": "string", "enum": list(wire.CHOICES[field])}, description)


_REQUEST: Schema = {
    "type": "object",
    "required": ["input", "model"],
    "additionalProperties": False,
    "properties": {
        "input": _INPUT,
        "model": {"type": "string", "description": "A name that GET /v1/models lists."},
        "encoding_format": _choice("encoding_format", "How vectors are written; `float` unless named. `base64` is "
                                   "float32, little-endian, in standard padded base64."),
        "dimensions": _optional({"type": "integer", "minimum": 1}, "A smaller width, for models that have it."),
        "user": _optional({"type": "string", "maxLength": 256}, "Your end user; only a keyed hash of it is kept, "
                          "beside what was bought."),
        "service_tier": _choice("service_tier", "`priority` goes first, `flex` is bulk; `auto` and `default` mean the "
                                "priority of your key."),
        "input_type": _choice("input_type", "For models that put a prompt in front of queries or documents."),
        "truncate": _choice("truncate", "`end` cuts a text that is too long; `none` (unless named) refuses it."),
    },
}  # fmt: skip

_EMBEDDING: Schema = {
    "type": "object",
    "required": ["object", "index", "embedding"],
    "properties": {
        "object": {"const": "embedding"},
        "index": {"type": "integer", "description": "The place of its text in `input`; `data` is in that order."},
        "embedding": {
            "oneOf": [
                {"type": "array", "items": {"type": "number"}},
                {"type": "string", "contentEncoding": "base64"},
            ]
        },
    },
}

_RESPONSE: Schema = {
    "type": "object",
    "required": ["object", "data", "model", "usage"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Embedding"}},
        "model": {"type": "string", "description": "The model as you named it."},
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "total_tokens"],
            "properties": {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
        },
    },
}

_WIDTH: Schema = {"type": "integer", "minimum": 1}
_SPACE: Schema = {"type": "string", "description": "As x-embedgate-space names it."}

_ABOUT: Schema = {
    "type": "object",
    "description": "What a client needs to know before it asks.",
    "required": [
        "space", "input_types", "dimensions", "sizes", "unit_length", "max_input_tokens", "long_input", "tokenizer",
        "usd_per_million_tokens",
    ],
    "properties": {
        "space": _SPACE,
        "input_types": {"type": "object", "additionalProperties": _SPACE,
                        "description": "The space of each `input_type` that is told apart."},
        "dimensions": _WIDTH,
        "sizes": {"type": "array", "items": {"type": "array", "items": _WIDTH, "minItems": 2, "maxItems": 2},
                  "description": "What `dimensions` may be, in spans with both ends; none: leave it off."},
        "unit_length": {"type": "boolean", "description": "Whether every vector is."},
        "max_input_tokens": {"type": "integer", "minimum": 1},
        "long_input": {"type": "string", "enum": ["error", "truncate", "mean"],
                       "description": "What becomes of a text that is longer."},
        "tokenizer": _optional({"type": "string", "enum": ["cl100k_base"]}, "null: not one that you have."),
        "usd_per_million_tokens": _optional({"type": "number"}, "null: not known."),
    },
}  # fmt: skip

_MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "embedgate"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer", "description": "Unix time, seconds."},
        "owned_by": {"type": "string"},
        "embedgate": _ABOUT,
    },
}

_MODEL_LIST: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}

_USAGE_LIST: Schema = {
    "type": "object",
    "required": ["object", "data", "has_more", "next"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"type": "object"}},
        "has_more": {"type": "boolean"},
        "next": {"type": ["string", "null"], "description": "`after` of the next page."},
        "totals": {"type": "object", "description": "The sums of all pages."},
    },
}

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The path of the first bad field: `input[1]`."},
                "code": {"type": ["string", "null"], "description": "A stable word to key on."},
            },
        }
    },
}

_STATUS: Schema = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}

# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _header(description: str, kind: str = "string") -> Schema:
    return {"description": description, "schema": {"type": kind}}


_ALWAYS = {
    "x-request-id": _header("Yours if it was well-formed (1 to 64 of `A-Za-z0-9_.-`), else a new one."),
    "openai-processing-ms": _header("From the last byte in to the first byte out, in milliseconds.", "integer"),
}
WAIT = {
    "retry-after": _header("Seconds to wait before another try, 60 at most.", "integer"),
    "retry-after-ms": _header("The same in milliseconds, more exactly.", "integer"),
}
_TOLD = {
    "x-embedgate-cache": _header("How many texts came from the cache: `hit=3,miss=1`."),
    "x-embedgate-space": _header("Vectors of one space may be compared."),
    "x-embedgate-degraded": _header("The model that answered in place of yours, which is out; as in the body."),
    "x-embedgate-deployment": _header("Who answered, in order of first use; absent if all came from the cache."),
    "x-embedgate-queue-ms": _header("The longest wait of a text before its call left; as above.", "integer"),
    "x-embedgate-batch-items": _header("The size of the largest batch that carried a text; as above.", "integer"),
}


def answer(description: str, schema: str, *more: dict[str, Schema]) -> Schema:
    """A JSON answer, with these headers beside those of every answer."""
    headers = {name: header for group in (_ALWAYS, *more) for name, header in group.items()}
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "headers": headers, "content": content}


def refusal(description: str, *more: dict[str, Schema]) -> Schema:
    """The same in the one envelope of errors."""
    return answer(description, "Error", *more)


NO_KEY = refusal("No API key, or a wrong one.", {"www-authenticate": _header("`Bearer`")})
UNAVAILABLE = refusal("Overloaded, without a provider, or shutting down: try again later.", WAIT)

CREATE: Schema = {
    "operationId": "createEmbedding",
    "summary": "Embed texts",
    "description": "One vector per text, in order: OpenAI's route, for any OpenAI client.",
    "security": [{"ApiKey": []}, {}],
    "parameters": [
        {"name": "x-request-id", "in": "header", "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
         "description": "A name for this request; one that is not well-formed is replaced."},
        {"name": "x-embedgate-priority", "in": "header",
         "schema": {"type": "string", "enum": ["interactive", "default", "bulk"]},
         "description": "Goes before `service_tier` and the priority of your key."},
        {"name": "x-embedgate-deadline-ms", "in": "header",
         "schema": {"type": "integer", "minimum": 1, "maximum": 3_600_000},
         "description": "How long an answer is of use; later it is a 504."},
        {"name": "x-embedgate-project", "in": "header", "schema": {"type": "string", "maxLength": 128},
         "description": "On whose account in your tenant this is bought; a key that has a project takes no other."},
        {"name": "x-embedgate-allow-degraded", "in": "header", "schema": {"type": "boolean"},
         "description": "Whether, when every deployment of the model is out, vectors of another model are welcome."},
    ],
    "requestBody": {
        "required": True,
        "description": f"At most {MOST_BODY_BYTES} bytes, not compressed.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/EmbeddingRequest"}}},
    },
    "responses": {
        "200": answer("The vectors.", "EmbeddingResponse", _TOLD),
        "400": refusal("The request cannot be served as it stands; `param` says where."),
        "401": NO_KEY,
        "403": refusal("The key is not made for this: it lacks the scope `embed`."),
        "404": refusal("The model does not exist or this key may not use it."),
        "405": refusal("Another method than POST.", {"allow": _header("`POST`")}),
        "413": refusal("The body is too large; the connection is closed."),
        "415": refusal("Not JSON, or compressed."),
        "429": refusal("Your tenant is over its limit of tokens, requests or concurrent requests, or of money.", WAIT),
        "500": refusal("A bug of ours."),
        "502": refusal("All attempts failed at the provider."),
        "503": UNAVAILABLE,
        "504": refusal("The deadline passed."),
    },
}  # fmt: skip

KEYED: list[Schema] = [{"ApiKey": []}, {}]

MODELS: Schema = {
    "operation_id": "listModels",
    "responses": {200: answer("The models.", "ModelList"), 401: NO_KEY},
    "openapi_extra": {"security": KEYED},
}
MODEL: Schema = {
    "operation_id": "retrieveModel",
    "responses": {200: answer("The model.", "Model"), 401: NO_KEY, 404: refusal("There is no such model for you.")},
    "openapi_extra": {"security": KEYED},
}
HEALTH: Schema = {"operation_id": "health", "responses": {200: answer("It lives.", "Status")}}
READINESS: Schema = {
    "operation_id": "readiness",
    "responses": {200: answer("It serves.", "Status"), 503: refusal("It should get no requests now.", WAIT)},
}
METRICS: Schema = {
    "operation_id": "metrics",
    "responses": {
        200: {"description": "Prometheus' text format.", "headers": _ALWAYS, "content": {"text/plain": {}}},
        401: NO_KEY,
    },
    "openapi_extra": {"security": [{"AdminKey": []}, {}]},
}

ADMIN: list[Schema] = [{"AdminKey": []}, {}]
_OBJECT: Schema = {"type": "object"}
_COUNTS: Schema = {"type": "object", "additionalProperties": {"type": "integer"}}


def _admin(name: str, description: str, body: Schema | None = None) -> Schema:
    extra: Schema = {"security": ADMIN}
    answers: dict[int | str, Schema] = {200: answer(description, "Counts"), 401: NO_KEY}
    if body is not None:
        schema = {"type": "object", "additionalProperties": False, **body}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        answers |= {400: refusal("The body is not understood."), 404: refusal("There is no such model."),
                    413: refusal("The body is too large."), 503: UNAVAILABLE}  # fmt: skip
    return {"operation_id": name, "responses": answers, "openapi_extra": extra}


CACHE_STATS = _admin("cacheStats", "Entries, bytes and bound in bytes of each level.")
CACHE_INVALIDATE = _admin(
    "invalidateCache", "How many rows left the database.",
    {"properties": {
        "model": {"type": "string"}, "space": {"type": "string", "description": "As x-embedgate-space names it."},
        "all": {"type": "boolean"}, "older_than_s": {"type": "integer", "minimum": 0},
    }},
)  # fmt: skip
CACHE_WARM = _admin(
    "warmCache", "How many texts, of these already kept, refused, and their tokens.",
    {"required": ["model", "input"], "properties": {
        "model": {"type": "string"}, "input": {"type": "array", "items": {"type": "string"}},
        "input_type": _choice("input_type", "For models that tell them apart."), "cache_group": {"type": "string"},
    }},
)  # fmt: skip

_WHEN = "A date, with a time as in 2026-11-21T09:30:00Z, or Unix seconds; widened to whole hours or days of UTC."
_SPAN: list[Schema] = [
    {"name": "start", "in": "query", "schema": {"type": "string"}, "description": f"{_WHEN} Default: this month's."},
    {"name": "end", "in": "query", "schema": {"type": "string"}, "description": f"{_WHEN} It is no part of the span."},
]
_PAGE: list[Schema] = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 1000}},
    {"name": "after", "in": "query", "schema": {"type": "string"}, "description": "`next` of the page before."},
]
_GROUPS = ["tenant", "project", "model", "deployment", "cause"]


def _only(*groups: str) -> list[Schema]:
    return [
        {"name": group, "in": "query", "schema": {"type": "string"}, "description": f"Only of this {group}."}
        for group in groups
    ]


def _usage(name: str, security: list[Schema], *parameters: Schema) -> Schema:
    return {
        "operation_id": name,
        "responses": {
            200: answer("The lines, in order.", "UsageList"), 400: refusal("A parameter is wrong; `param` says which."),
            401: NO_KEY, 503: UNAVAILABLE,
        },
        "openapi_extra": {"security": security, "parameters": [*parameters]},
    }  # fmt: skip


USAGE = _usage(
    "listUsage", [*KEYED, *ADMIN[:1]], *_SPAN,
    {"name": "by", "in": "query",
     "schema": {"type": "string", "enum": ["hour", "day", "month", "total"], "default": "day"}},
    {"name": "group", "in": "query", "explode": False,
     "schema": {"type": "array", "items": {"type": "string", "enum": _GROUPS}, "default": ["model"]}},
    *_only(*_GROUPS), *_PAGE,
)  # fmt: skip
USAGE_UNCONFIRMED = _usage("listUnconfirmedUsage", ADMIN, *_SPAN, *_only("tenant"), *_PAGE)


def complete(api: FastAPI, schemas: Mapping[str, Schema], *, embeds: bool) -> None:
    """Makes `api` describe the errors and the keys too, and the embeddings route if it `embeds`; in every document."""
    described = api.openapi

    def document() -> Schema:
        found = described()
        if embeds:
            found["paths"]["/v1/embeddings"] = {"post": CREATE}
        for methods in found["paths"].values():
            for operation in methods.values():
                if operation["responses"].get("422", {}).get("description") == "Validation Error":
                    del operation["responses"]["422"]  # the framework's; nothing here answers so
        found["components"] = {
            "schemas": {
                "EmbeddingRequest": _REQUEST, "EmbeddingResponse": _RESPONSE, "Embedding": _EMBEDDING, "Model": _MODEL,
                "ModelList": _MODEL_LIST, "Status": _STATUS, "Error": _ERROR, "Counts": _COUNTS, "Object": _OBJECT,
                "UsageList": _USAGE_LIST, **schemas,
            },
            "securitySchemes": {
                "ApiKey": {"type": "http", "scheme": "bearer", "description": "Needed if any key is configured."},
                "AdminKey": {"type": "http", "scheme": "bearer",
                             "description": "Needed unless on loopback, or on an admin port while there is none."},
            },
        }  # fmt: skip
        return found

    api.openapi = document  # type: ignore[method-assign]
