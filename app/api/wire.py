"""Hides the wire words of POST /v1/embeddings: what a body may say, what it gets for it, how vectors are written."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec
import orjson

from app import vectors
from app.api import bulky, wrong
from app.api.errors import Header
from app.directory import NAME
from app.domain import EmbeddingRequest, EmbeddingResult, InputType, Priority, Spender, Tenant, Text
from app.errors import InvalidRequest
from app.tokens import Cl100k

_PIECE_BYTES = 524_288
"""How much of an answer, as float32 bytes, is written in one go: a few milliseconds as JSON numbers."""

_LONGEST_USER = 256
_MOST_DEADLINE_MS = 3_600_000
CHOICES: Mapping[str, tuple[str, ...]] = {
    "encoding_format": ("float", "base64"),
    "service_tier": ("auto", "default", "flex", "priority"),
    "input_type": ("query", "document"),
    "truncate": ("none", "end"),
}
_TIERS = {"priority": Priority.INTERACTIVE, "flex": Priority.BULK}
_PRIORITIES = {priority.name.lower().encode(): priority for priority in Priority}
_TRUTHS: Mapping[bytes, bool] = {b"true": True, b"false": False, b"1": True, b"0": False}
_DEADLINE = re.compile(rb"[0-9]{1,7}").fullmatch
_PROJECT = re.compile(NAME.encode()).fullmatch
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]").search


class Asked(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A body, field by field; `input` is still as it came."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    input_type: InputType | None = None
    truncate: Literal["none", "end"] | None = None

    @property
    def base64(self) -> bool:
        """Whether the answer's vectors are base64; no format given means numbers."""
        return self.encoding_format == "base64"


_FAST = msgspec.json.Decoder(Asked)


# ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(body: bytes, vocabulary: Cl100k) -> tuple[Asked, tuple[Text, ...]]:
    """What `body` asks for, and its texts. Raises InvalidRequest for the first thing that is wrong with it."""
    if len(body) > bulky.BYTES:
        bulky.refuse_too_many(body)
    try:
        asked = _FAST.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        asked = _read_carefully(body)
    if asked.dimensions is not None and not -(2**63) <= asked.dimensions < 2**63:
        raise wrong.kind("dimensions", "an integer", 0.5)
    if asked.user is not None:
        _check_user(asked.user)
    return asked, _texts(asked.input, vocabulary)


def request(
    asked: Asked, texts: tuple[Text, ...], tenant: Tenant, headers: Mapping[bytes, bytes], *, spender: Spender,
    now_s: float, deadline_s: float,
) -> EmbeddingRequest:  # fmt: skip
    """The request in the engine's nouns; `deadline_s` holds if the headers name none. Raises InvalidRequest."""
    wait_ms = headers.get(b"x-embedgate-deadline-ms")
    wanted = headers.get(b"x-embedgate-priority")
    degraded = headers.get(b"x-embedgate-allow-degraded")
    return EmbeddingRequest(
        tenant=tenant,
        model=asked.model,
        texts=texts,
        deadline=now_s + (deadline_s if wait_ms is None else _deadline_s(wait_ms)),
        priority=_TIERS.get(asked.service_tier or "", tenant.priority) if wanted is None else _priority(wanted),
        dimensions=asked.dimensions,
        input_type=asked.input_type,
        truncation=asked.truncate,
        allow_degraded=degraded is not None and _truth("x-embedgate-allow-degraded", degraded),
        spender=spender,
    )


def project(headers: Mapping[bytes, bytes], *, of_key: str) -> str:
    """The project that the headers name, or ""; a key that has one is good for no other. Raises InvalidRequest."""
    named = headers.get(b"x-embedgate-project")
    if named is None:
        return ""
    if not _PROJECT(named) or of_key not in {"", named.decode()}:
        text = "Invalid value for 'x-embedgate-project'. Must be "
        text += f"the key's own project, '{of_key}', or left off." if of_key else "1 to 128 of A-Z a-z 0-9 . _ : @ + -."
        raise InvalidRequest(text, param="x-embedgate-project", code="invalid_value")
    return named.decode()


def _deadline_s(value: bytes) -> float:
    if not _DEADLINE(value) or not 1 <= int(value) <= _MOST_DEADLINE_MS:
        raise InvalidRequest(
            f"Invalid value for 'x-embedgate-deadline-ms'. Must be an integer from 1 to {_MOST_DEADLINE_MS}.",
            param="x-embedgate-deadline-ms",
            code="invalid_value",
        )
    return int(value) / 1000


def _truth(name: str, value: bytes) -> bool:
    if value not in _TRUTHS:
        raise wrong.value(name, value.decode("latin-1"), ("true", "false"))
    return _TRUTHS[value]


def _priority(value: bytes) -> Priority:
    if value not in _PRIORITIES:
        raise wrong.value("x-embedgate-priority", value.decode("latin-1"), tuple(map(bytes.decode, _PRIORITIES)))
    return _PRIORITIES[value]


# ── what is wrong with it ───────────────────────────────────────────────────────────────────────────────────────────


def _read_carefully(body: bytes) -> Asked:
    """The same as the fast decoder, slower, but with the exact error."""
    fields = bulky.fields(body)
    for name in fields:
        if name not in Asked.__struct_fields__:
            raise wrong.unknown(name)
    if "model" not in fields:
        raise InvalidRequest("you must provide a model parameter")
    if "input" not in fields:
        raise wrong.missing("input")
    if not isinstance(fields["model"], str):
        raise wrong.kind("model", "a string", fields["model"])
    for name, choices in CHOICES.items():
        _check_choice(name, fields.get(name), choices)
    dimensions, user = fields.get("dimensions"), fields.get("user")
    if dimensions is not None and type(dimensions) is not int:
        raise wrong.kind("dimensions", "an integer", dimensions)
    if user is not None and not isinstance(user, str):
        raise wrong.kind("user", "a string", user)
    return Asked(**fields)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is None or value in choices:
        return
    if isinstance(value, str):
        raise wrong.value(name, value, choices)
    if name == "encoding_format":
        shown = value if isinstance(value, int | float) else bulky.json_type(value)
        raise wrong.value(name, str(shown).lower(), choices)
    raise wrong.kind(name, "a string", value)


def _check_user(user: str) -> None:
    if len(user) > _LONGEST_USER:
        raise InvalidRequest(
            f"Invalid 'user': string too long. Expected a string with maximum length {_LONGEST_USER}, "
            f"but got a string with length {len(user)} instead.",
            param="user",
            code="string_above_max_length",
        )
    if _CONTROL(user):
        raise InvalidRequest(
            "Invalid type for 'user': expected a string of text, but got one with control characters instead.",
            param="user",
            code="invalid_type",
        )


def _texts(value: Any, vocabulary: Cl100k) -> tuple[Text, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        expected = "one of a string, array of strings, array of integers, or array of integer arrays"
        raise wrong.kind("input", expected, value)
    if not value:
        raise _empty_array("input")
    kind = type(value[0])
    if kind in {int, float, bool}:
        return (_ids(value, "input", vocabulary),)
    if len(value) > bulky.MOST_ITEMS:
        raise bulky.too_many_items(str(len(value)))
    if kind is str:
        return _strings(value)
    if kind is list:
        return _arrays(value, vocabulary)
    raise wrong.kind("input[0]", "one of a string, an integer, or an array of integers", value[0])


def _strings(items: list[Any]) -> tuple[str, ...]:
    for at, item in enumerate(items):
        if not isinstance(item, str):
            raise wrong.kind(f"input[{at}]", "a string", item)
        if not item:
            path = f"input[{at}]"
            raise InvalidRequest(f"Invalid '{path}': input cannot be an empty string.", param=path, code="empty_string")
    return tuple(items)


def _arrays(items: list[Any], vocabulary: Cl100k) -> tuple[tuple[int, ...], ...]:
    texts = []
    for at, item in enumerate(items):
        path = f"input[{at}]"
        if not isinstance(item, list):
            raise wrong.kind(path, "an array of integers", item)
        if not item:
            raise _empty_array(path)
        texts.append(_ids(item, path, vocabulary))
    return tuple(texts)


def _ids(ids: Sequence[Any], path: str, vocabulary: Cl100k) -> tuple[int, ...]:
    pure = len(ids)
    if set(map(type, ids)) != {int}:
        pure = next(at for at, id_ in enumerate(ids) if type(id_) is not int)
    bad = vocabulary.first_invalid(ids[:pure])
    if bad is None and pure == len(ids):
        return tuple(ids)
    at = pure if bad is None else bad
    where = f"{path}[{at}]"
    if not isinstance(ids[at], int | float):
        raise wrong.kind(where, "an integer", ids[at])
    raise InvalidRequest(f"Invalid token id in '{where}'.", param=where, code="invalid_token_id")


def _empty_array(path: str) -> InvalidRequest:
    message = f"Invalid '{path}': empty array. Expected an array with minimum length 1, but got an empty array instead."
    return InvalidRequest(message, param=path, code="empty_array")


# ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pieces(asked: Asked, result: EmbeddingResult) -> Iterator[bytes]:
    """The body of an answer, in order; each piece takes a few milliseconds to make."""
    encode, quote = (vectors.encode_base64, b'"') if asked.base64 else (vectors.encode_json, b"")
    form = b'{"object":"embedding","index":%d,"embedding":' + quote + b"%b" + quote + b"}"
    rows, step = result.vectors, max(1, _PIECE_BYTES // len(result.vectors[0]))
    tail = b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        _quoted(result.model or asked.model), result.tokens, result.tokens,
    )  # fmt: skip
    if len(rows) == 1:
        yield b'{"object":"list","data":[' + form % (0, encode(rows[0])) + tail
        return
    for start in range(0, len(rows), step):
        written = b",".join([form % (at, encode(row)) for at, row in enumerate(rows[start : start + step], start)])
        head = b"," if start else b'{"object":"list","data":['
        yield head + written + (tail if start + step >= len(rows) else b"")


@lru_cache(maxsize=256)
def _quoted(model: str) -> bytes:
    return orjson.dumps(model)


def is_large(result: EmbeddingResult) -> bool:
    """Whether `pieces` are several."""
    return len(result.vectors) * len(result.vectors[0]) > _PIECE_BYTES


def headers(result: EmbeddingResult) -> list[Header]:
    """What an answer tells beside its body; of calls only if there were some."""
    hits, all_ = result.cache_hits, len(result.vectors)
    told = [
        (b"x-embedgate-cache", b"hit=%d,miss=%d" % (hits, all_ - hits)),
        (b"x-embedgate-space", result.space.id.encode()),
    ]
    if result.model is not None:
        told.append((b"x-embedgate-degraded", result.model.encode()))
    if result.deployments:
        told += [
            (b"x-embedgate-deployment", ",".join(result.deployments).encode()),
            (b"x-embedgate-queue-ms", b"%d" % (result.queue_s * 1000)),
            (b"x-embedgate-batch-items", b"%d" % result.batch_items),
        ]
    return told
