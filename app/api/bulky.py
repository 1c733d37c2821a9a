"""Hides how a JSON body is judged without paying for what is wrong with it: a refusal is cheap, however large the body.

A document of a few megabytes can hold millions of tiny values, each of them an object once it is decoded. So of a
bulky body, what is too many is counted, not built, and where only the JSON type of a value matters, nothing else of it
is looked at.
"""

import re
from typing import Any

import msgspec
import numpy as np

from app.errors import InvalidRequest

BYTES = 1_048_576
"""Bodies above this are bulky."""

MOST_ITEMS = 2_048
_MOST_IDS = 300_000
_MOST_COUNTED = 65_536
_DEEPEST = 64

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_ITEM = re.compile(rb"\s*+(?:" + _STRING + rb'|\[[^][{}"]*+\]|[^][{},"\s]++)\s*+,?', re.DOTALL)
_WORDS: dict[type[Any], str] = {
    bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object",
    type(None): "null",
}  # fmt: skip


class _Head(msgspec.Struct):
    input: msgspec.Raw = msgspec.Raw(b"null")


_HEAD = msgspec.json.Decoder(_Head)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STEPS = np.zeros(256, np.int8)
_STEPS[[ord("["), ord("{")]], _STEPS[[ord("]"), ord("}")]] = 1, -1
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def json_type(value: Any) -> str:
    """What JSON calls `value`, with its article; an integer that no machine word holds is just a number."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        return "a number"
    return _WORDS[type(value)]


def too_many_items(count: str) -> InvalidRequest:
    """There are more inputs than one request may have."""
    return InvalidRequest(
        f"Invalid 'input': array too long. Expected an array with maximum length {MOST_ITEMS}, "
        f"but got an array with length {count} instead.",
        param="input",
        code="array_above_max_length",
    )


def refuse_too_many(body: bytes) -> None:
    """Raises InvalidRequest if the `input` of a bulky `body` has more texts or token ids than any request may have."""
    try:
        array = bytes(_HEAD.decode(body).input)
    except _UNREADABLE:
        return  # another look finds out why
    if array[:1] != b"[":
        return
    flat = array[1:].lstrip()[:1] not in {b"[", b'"'}
    if not flat and _has_many(array):
        _refuse_too_many_items(array)
    ids = array.count(b",") + 1
    if ids > _MOST_IDS and b'"' not in array and b"{" not in array:
        raise InvalidRequest(
            f"Requested {ids} tokens, max {_MOST_IDS} tokens per request",
            code="max_tokens_per_request",
            kind="max_tokens_per_request",
        )


def _has_many(array: bytes) -> bool:
    """Whether there are more strings or more arrays in `array` than one request may have texts."""
    brackets = array.count(b"[")
    if array.count(b'"') - array.count(b'\\"') <= 2 * MOST_ITEMS >= 2 * brackets:
        return False  # at worst half of the strings end in a backslash and were not seen
    plain = array.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left begins or ends a string
    if plain.count(b'"') // 2 > MOST_ITEMS:
        return True
    chars = np.frombuffer(plain, np.uint8)
    outside = np.cumsum(chars == ord('"'), dtype=np.uint8) & 1 == 0
    return int(np.count_nonzero(outside & (chars == ord("[")))) > MOST_ITEMS


def _refuse_too_many_items(array: bytes) -> None:
    """Counts the items of an array of strings, scalars and flat arrays, with an early stop."""
    at, count = 1, 0
    while count < _MOST_COUNTED and (item := _ITEM.match(array, at)) is not None:
        at, count = item.end(), count + 1
    if count < _MOST_COUNTED and array[at : at + 1] in {b"[", b"{"}:
        _refuse_nested(array, at, count)
    if count > MOST_ITEMS:
        raise too_many_items(str(count) if count < _MOST_COUNTED else f"{count} or more")


def _refuse_nested(array: bytes, at: int, item: int) -> None:
    """Raises for the item that starts `at` and holds more than numbers."""
    if _depth(array) >= _DEEPEST:  # inside the document's own braces
        raise _unreadable()
    inner = re.compile(rb'[][{}"]').search(array, at + 1)
    path, expected, kind = f"input[{item}]", "a string or an array of integers", "an object"
    if array[at : at + 1] == b"[" and inner is not None:
        path, expected = f"{path}[{array.count(b',', at, inner.start())}]", "an integer"
        kind = {b"[": "an array", b"{": "an object"}.get(inner.group(), "a string")
    message = f"Invalid type for '{path}': expected {expected}, but got {kind} instead."
    raise InvalidRequest(message, param=path, code="invalid_type")


def fields(body: bytes) -> dict[str, Any]:
    """The members of the JSON object `body`; of a bulky body's arrays and objects, but `input`, only the type.

    Raises InvalidRequest when it is no JSON object, or one that is nested too deeply.
    """
    try:
        if body.count(b"[") + body.count(b"{") > _DEEPEST and _depth(body) > _DEEPEST:
            raise _unreadable()
        found = msgspec.json.decode(body) if len(body) <= BYTES else _stand_ins(body)
    except _UNREADABLE as error:
        raise _unreadable() from error
    if not isinstance(found, dict):
        raise _unreadable()
    return found


def _stand_ins(body: bytes) -> dict[str, Any]:
    empty: dict[bytes, Any] = {b"[": [], b"{": {}}
    found = {}
    for name, raw in _FIELDS.decode(body).items():
        first = bytes(memoryview(raw)[:1])
        whole = name == "input" and first == b"["
        found[name] = empty[first] if first in empty and not whole else msgspec.json.decode(raw)
    return found


def _unreadable() -> InvalidRequest:
    return InvalidRequest("We could not parse the JSON body of your request.")


def _depth(body: bytes) -> int:
    """How deeply the arrays and objects of the JSON text `body` are nested; anything at all if it is no JSON."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    deepest = depth = quotes = 0
    for start in range(0, len(plain), BYTES):
        chars = np.frombuffer(plain, np.uint8, min(BYTES, len(plain) - start), start)
        steps = _STEPS[chars]
        opened = np.cumsum(chars == ord('"'), dtype=np.int32) + quotes
        steps[opened & 1 == 1] = 0
        depths = depth + np.cumsum(steps, dtype=np.int32)
        deepest, depth, quotes = max(deepest, int(depths.max())), int(depths[-1]), int(opened[-1])
    return deepest
