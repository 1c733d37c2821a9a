"""Hides the wire words of /v1/batches: what a body and a query may say, and what a job looks like from outside."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple, get_args

from app import money
from app.api import bulky, wrong
from app.api.errors import body_too_large
from app.domain import Tier
from app.errors import InvalidRequest
from app.job import Job, Status

_ENDPOINT: Final = "/v1/embeddings"
_WINDOWS: Final[Mapping[str, int]] = {"24h": 86_400}
_TIERS: Final[tuple[Tier, ...]] = get_args(Tier)
_TIER: Final = "embedgate_tier"
_PAUSED: Final = "embedgate_paused"
_FIELDS: Final = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")
_EXPIRY: Final = "output_expires_after"
_MOST_PAIRS, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512
_LEAST_EXPIRY_S, _MOST_EXPIRY_S = 3_600, 2_592_000
_LIMIT, _MOST_LIMIT = 20, 100
_INTEGER = re.compile(r"-?[0-9]{1,9}", re.ASCII).fullmatch
_COUNTS = ("total", "completed", "failed")
_MOMENTS = (
    "created", "in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
)  # fmt: skip


class Wanted(NamedTuple):
    """What a body asks for; `tier` None: it does not say."""

    input_file_id: str
    window_s: int
    metadata: dict[str, str]
    tier: Tier | None
    output_expires_after_s: int | None


class Page(NamedTuple):
    """What of a list is asked for: so many, from behind `after`, "": from the start."""

    after: str
    limit: int


# ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(body: bytes) -> Wanted:
    """What `body` asks for. Raises InvalidRequest for the first thing that is wrong with it."""
    if len(body) > bulky.BYTES:
        raise body_too_large(bulky.BYTES)
    fields = bulky.fields(body)
    _refuse_unknown(fields, _FIELDS)
    file_id = _string(fields, "input_file_id")
    _choice(fields, "endpoint", (_ENDPOINT,))
    window = _choice(fields, "completion_window", _WINDOWS)
    metadata = _metadata(fields.get("metadata"))
    return Wanted(file_id, _WINDOWS[window], metadata, _tier(metadata), _expiry_s(fields.get(_EXPIRY)))


def page(query: Iterable[tuple[str, str]]) -> Page:
    """What of a list is asked for. Raises InvalidRequest."""
    given = dict(query)
    _refuse_unknown(given, Page._fields)
    limit = given.get("limit", str(_LIMIT))
    if not _INTEGER(limit):
        raise wrong.kind("limit", "an integer", limit)
    return Page(given.get("after", ""), wrong.within("limit", int(limit), 1, _MOST_LIMIT))


def _refuse_unknown(given: Iterable[str], known: Collection[str], of: str = "") -> None:
    for name in given:
        if name not in known:
            raise wrong.unknown(name, of)


def _string(fields: Mapping[str, Any], name: str, of: str = "") -> str:
    if name not in fields:
        raise wrong.missing(of + name)
    value = fields[name]
    if not isinstance(value, str):
        raise wrong.kind(of + name, "a string", value)
    return value


def _choice(fields: Mapping[str, Any], name: str, choices: Collection[str], of: str = "") -> str:
    value = _string(fields, name, of)
    if value not in choices:
        raise wrong.value(of + name, value, choices)
    return value


def _metadata(value: Any) -> dict[str, str]:
    """The caller's own words; whatever is wrong with them, the parameter is `metadata`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong.kind("metadata", "an object", value)
    if len(value) > _MOST_PAIRS:
        message = f"too many properties. Expected an object with at most {_MOST_PAIRS} properties"
        message = f"Invalid 'metadata': {message}, but got an object with {len(value)} properties instead."
        raise InvalidRequest(message, param="metadata", code="object_above_max_properties")
    for name, said in value.items():
        if not isinstance(said, str):
            raise wrong.kind("metadata", "an object of strings", said)
        for what, text, most in (("key", name, _LONGEST_KEY), ("value", said, _LONGEST_VALUE)):
            if len(text) > most:
                message = f"{what} too long. Expected a string with maximum length {most}"
                message = f"Invalid 'metadata': {message}, but got a string with length {len(text)} instead."
                raise InvalidRequest(message, param="metadata", code="string_above_max_length")
    return value


def asks_for_vendor(metadata: Mapping[str, str]) -> bool:
    """Whether a body with this metadata said itself that it wants the vendor's own batches."""
    return metadata.get(_TIER) == "vendor_batch"


def _tier(metadata: Mapping[str, str]) -> Tier | None:
    said = metadata.get(_TIER)
    if said is None:
        return None
    for tier in _TIERS:
        if said == tier:
            return tier
    raise wrong.value("metadata", said, _TIERS)


def _expiry_s(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong.kind(_EXPIRY, "an object", value)
    within = f"{_EXPIRY}."
    _refuse_unknown(value, ("anchor", "seconds"), within)
    _choice(value, "anchor", ("created_at",), within)
    if "seconds" not in value:
        raise wrong.missing(f"{within}seconds")
    seconds = value["seconds"]
    if type(seconds) is not int:
        raise wrong.kind(f"{within}seconds", "an integer", seconds)
    return wrong.within(f"{within}seconds", seconds, _LEAST_EXPIRY_S, _MOST_EXPIRY_S)


# ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def written(job: Job) -> dict[str, Any]:
    """The job as OpenAI's batch object, with one field more: `embedgate`. For what it waits is in its metadata, too."""
    order, pause = job.order, {_PAUSED: job.pause} if job.pause else {}
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": _ENDPOINT,
        "model": job.model or None,
        "errors": _errors(job),
        "input_file_id": order.input_file_id,
        "completion_window": f"{order.window_s // 3600}h",
        "status": job.status,
        "output_file_id": job.output_file_id or None,
        "error_file_id": job.error_file_id or None,
        **{f"{moment}_at": _seconds(getattr(job, f"{moment}_at_ms")) for moment in _MOMENTS},
        "request_counts": {count: getattr(job, count) for count in _COUNTS},
        "usage": None if job.in_progress_at_ms is None else _usage(job.tokens),
        "metadata": order.metadata | pause or None,
        "embedgate": _own(job),
    }


def _own(job: Job) -> dict[str, Any]:
    """What OpenAI's object has no words for; of a call that others shared, `calls` counts the part."""
    work = job.work
    return {
        "tier": job.order.tier,
        "paused": job.pause or None,
        "output_is_ordered": True,
        "texts": work.texts,
        "cached_texts": max(0, work.cached),  # what a vendor brought is taken off before it is used
        "calls": round(work.calls),
        "cost_usd": None if work.nano_usd is None else money.usd(work.nano_usd),
    }


def _errors(job: Job) -> dict[str, Any] | None:
    found = [{"code": e.code, "message": e.message, "param": e.param, "line": e.line} for e in job.errors]
    return {"object": "list", "data": found} if found else None


def _usage(tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }


def _seconds(moment_ms: int | None) -> int | None:
    return None if moment_ms is None else moment_ms // 1000


# ── as described ────────────────────────────────────────────────────────────────────────────────────────────────────

_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
_MAYBE_TEXT = {"type": ["string", "null"]}
_PAIRS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": _LONGEST_VALUE}}
_SECONDS = {"type": "integer", "minimum": _LEAST_EXPIRY_S, "maximum": _MOST_EXPIRY_S}

SCHEMAS: Final[Mapping[str, Any]] = {
    "BatchRequest": {
        "type": "object",
        "required": ["input_file_id", "endpoint", "completion_window"],
        "additionalProperties": False,
        "properties": {
            "input_file_id": _TEXT | {"description": "An uploaded file of purpose `batch`."},
            "endpoint": {"const": _ENDPOINT},
            "completion_window": {"enum": list(_WINDOWS)},
            "metadata": _PAIRS | {
                "maxProperties": _MOST_PAIRS,
                "description": f"Yours. `{_TIER}`: `online`, or `vendor_batch` for the vendor's own batches and price; "
                "without it your tenant's `bulk_tier`.",
            },
            _EXPIRY: {
                "type": "object", "required": ["anchor", "seconds"], "additionalProperties": False,
                "properties": {"anchor": {"const": "created_at"}, "seconds": _SECONDS},
            },
        },
    },
    "Batch": {
        "type": "object",
        "required": ["id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at"],
        "properties": {
            **dict.fromkeys(("id", "endpoint", "input_file_id", "completion_window"), _TEXT),
            "object": {"const": "batch"},
            "status": {"enum": list(get_args(Status))},
            **dict.fromkeys(("model", "output_file_id", "error_file_id"), _MAYBE_TEXT),
            **{f"{moment}_at": {"type": ["integer", "null"], "description": "Unix seconds."} for moment in _MOMENTS},
            "errors": {"type": ["object", "null"], "description": "What is wrong with the lines of the file."},
            "request_counts": {"type": "object", "properties": dict.fromkeys(_COUNTS, _NUMBER)},
            "usage": {"type": ["object", "null"]},
            "metadata": {"type": ["object", "null"], "description": f"`{_PAUSED}` says for what the batch waits."},
            "embedgate": {
                "type": "object",
                "properties": {
                    "tier": {"enum": list(_TIERS)}, "paused": _MAYBE_TEXT,
                    "output_is_ordered": {"const": True, "description": "Lines come in the order of the input's."},
                    **dict.fromkeys(("texts", "cached_texts", "calls"), _NUMBER),
                    "cost_usd": _MAYBE_TEXT | {"description": "About; null: a price is not known."},
                },
            },
        },
    },
    "BatchList": {
        "type": "object",
        "required": ["object", "data", "has_more"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Batch"}},
            **dict.fromkeys(("first_id", "last_id"), _MAYBE_TEXT),
            "has_more": {"type": "boolean"},
        },
    },
}  # fmt: skip
PAGE_SCHEMA: Final = {"type": "integer", "minimum": 1, "maximum": _MOST_LIMIT, "default": _LIMIT}
