"""Hides the wire words of /v1/files: what a form and a query may say, and what a file looks like from outside."""

import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple, cast, get_args

from app.api import wrong
from app.api.errors import body_too_large
from app.api.form import Form, Part, bad_form
from app.errors import InvalidRequest
from app.job import Purpose, StoredFile

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS: Final = {"purpose": "purpose", _ANCHOR: "expires_after.anchor", _SECONDS: "expires_after.seconds"}
"""What a form may have beside its file, and what it is called in errors."""

_CHOICES: Final[Mapping[str, Collection[str]]] = {"purpose": ("batch",), _ANCHOR: ("created_at",)}
_PURPOSES: Final[tuple[Purpose, ...]] = get_args(Purpose)
_MOST_FIELD_BYTES, _LONGEST_NAME, _SUFFIX = 1_024, 255, ".jsonl"
_LEAST_LIFE_S, _MOST_LIFE_S = 3_600, 2_592_000
_QUERY, _ORDERS = ("purpose", "limit", "order", "after"), ("asc", "desc")
_MOST_ROWS: Final = 10_000
_INTEGER = re.compile(r"-?[0-9]{1,9}", re.ASCII).fullmatch

Write = Callable[[bytes], Awaitable[None]]


class Upload(NamedTuple):
    """What a form said of its file, whose bytes were passed on; `lives_s` None: it did not say."""

    filename: str
    size_bytes: int
    lives_s: int | None


class Page(NamedTuple):
    """What of a list is asked for: so many, from behind `after`, "": from the start."""

    purpose: Purpose | None
    after: str
    limit: int
    ascending: bool


# ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def read(form: Form, write: Write, *, most_bytes: int) -> Upload:
    """Reads the form and writes the file's bytes as they come; in whatever order, what is wrong ends it at once.

    Raises InvalidRequest, HttpRefusal for a file of more than `most_bytes`, and CallerLeft. A part of the file may
    have been written then.
    """
    fields: dict[str, str] = {}
    file: tuple[str, int] | None = None
    while (part := await form.next()) is not None:
        if part.name != "file":
            await _take(part, fields)
        elif file is not None:
            raise bad_form("It must have one file.")
        else:
            file = _filename(part.filename), await _pass_on(part, write, most_bytes)
    if file is None:
        raise wrong.missing("file")
    if "purpose" not in fields:
        raise wrong.missing("purpose")
    return Upload(*file, _lives_s(fields))


async def _pass_on(part: Part, write: Write, most_bytes: int) -> int:
    """How many bytes there were."""
    size_bytes = 0
    async for data in part.chunks():
        size_bytes += len(data)
        if size_bytes > most_bytes:
            raise body_too_large(most_bytes)
        await write(data)
    return size_bytes


async def _take(part: Part, fields: dict[str, str]) -> None:
    if not part.name:
        raise bad_form("Every part of it must have a name.")
    if part.name not in _FIELDS:
        raise wrong.unknown(part.name)
    path, text = _FIELDS[part.name], bytearray()
    async for data in part.chunks():
        text += data
        if len(text) > _MOST_FIELD_BYTES:
            message = f"Invalid '{path}': string too long. Expected a string with maximum length {_MOST_FIELD_BYTES}."
            raise InvalidRequest(message, param=path, code="string_above_max_length")
    if part.name in fields:
        raise InvalidRequest(f"Invalid value for '{path}'. It must be given once.", param=path, code="invalid_value")
    value = text.decode(errors="replace")
    fields[part.name] = _choice(path, value, _CHOICES[part.name]) if part.name in _CHOICES else value


def _filename(given: str) -> str:
    """What is kept of a name: neither folders nor what cannot be shown, and its end where it is too long."""
    bare = "".join(c for c in re.split(r"[/\\]", given)[-1] if c.isprintable())
    if not bare.lower().endswith(_SUFFIX):
        message = "Invalid file format for Batch API. Must be .jsonl"
        raise InvalidRequest(message, param="file", code="invalid_value")
    return bare[-_LONGEST_NAME:]


def _lives_s(fields: Mapping[str, str]) -> int | None:
    if not fields.keys() & {_ANCHOR, _SECONDS}:
        return None
    for name in (_ANCHOR, _SECONDS):
        if name not in fields:
            raise wrong.missing(_FIELDS[name])
    return _integer(_FIELDS[_SECONDS], fields[_SECONDS], _LEAST_LIFE_S, _MOST_LIFE_S)


def page(query: Iterable[tuple[str, str]]) -> Page:
    """What of a list is asked for. Raises InvalidRequest."""
    given = dict(query)
    for name in given:
        if name not in _QUERY:
            raise wrong.unknown(name)
    purpose = _choice("purpose", given["purpose"], _PURPOSES) if "purpose" in given else None
    return Page(
        cast("Purpose | None", purpose),
        given.get("after", ""),
        _integer("limit", given.get("limit", str(_MOST_ROWS)), 1, _MOST_ROWS),
        _choice("order", given.get("order", "desc"), _ORDERS) == "asc",
    )


def _choice(path: str, value: str, choices: Collection[str]) -> str:
    if value not in choices:
        raise wrong.value(path, value, choices)
    return value


def _integer(path: str, value: str, least: int, most: int) -> int:
    if not _INTEGER(value):
        raise wrong.kind(path, "an integer", value)
    return wrong.within(path, int(value), least, most)


# ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def written(file: StoredFile) -> dict[str, Any]:
    """The file as OpenAI's object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at_s,
        "expires_at": file.expires_at_s,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


# ── as described ────────────────────────────────────────────────────────────────────────────────────────────────────

_TEXT = {"type": "string"}
_MAYBE_TEXT = {"type": ["string", "null"]}
_MOMENT = {"type": "integer", "description": "Unix seconds."}

PAGE: Final[list[dict[str, Any]]] = [
    {"name": "purpose", "in": "query", "schema": {"type": "string", "enum": list(_PURPOSES)}},
    {"name": "limit", "in": "query",
     "schema": {"type": "integer", "minimum": 1, "maximum": _MOST_ROWS, "default": _MOST_ROWS}},
    {"name": "order", "in": "query", "schema": {"type": "string", "enum": list(_ORDERS), "default": "desc"}},
    {"name": "after", "in": "query", "schema": _TEXT, "description": "The last id of the page before."},
]  # fmt: skip

SCHEMAS: Final[Mapping[str, Any]] = {
    "FileRequest": {
        "type": "object",
        "required": ["file", "purpose"],
        "additionalProperties": False,
        "properties": {
            "file": {"type": "string", "format": "binary", "description": f"Its name must end with `{_SUFFIX}`."},
            "purpose": {"const": "batch"},
            _ANCHOR: {"const": "created_at"},
            _SECONDS: {"type": "integer", "minimum": _LEAST_LIFE_S, "maximum": _MOST_LIFE_S},
        },
    },
    "File": {
        "type": "object",
        "required": ["id", "object", "bytes", "created_at", "filename", "purpose", "status"],
        "properties": {
            **dict.fromkeys(("id", "filename"), _TEXT),
            "object": {"const": "file"},
            "bytes": {"type": "integer"},
            "created_at": _MOMENT,
            "expires_at": _MOMENT | {"type": ["integer", "null"]},
            "purpose": {"enum": list(_PURPOSES)},
            "status": {"const": "processed"},
            "status_details": {"type": "null"},
        },
    },
    "FileList": {
        "type": "object",
        "required": ["object", "data", "first_id", "last_id", "has_more"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/File"}},
            **dict.fromkeys(("first_id", "last_id"), _MAYBE_TEXT),
            "has_more": {"type": "boolean"},
        },
    },
    "FileDeleted": {
        "type": "object",
        "required": ["id", "object", "deleted"],
        "properties": {"id": _TEXT, "object": {"const": "file"}, "deleted": {"const": True}},
    },
}
