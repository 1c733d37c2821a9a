"""Hides how a refused value is put into words: what is wrong and how to mend it, never what a key holds."""

import difflib
import re
from collections.abc import Iterable

from pydantic_core import ErrorDetails

from app.settings.grammar import FIELDS
from app.settings.later import LATER, LATER_SECTIONS
from app.settings.places import KeyPath

NOT_YET = "is not supported by this version yet"

_TYPES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "missing": "is required",
    "model_attributes_type": "must be a table",
    "model_type": "must be a table",
    "string_pattern_mismatch": "must be 1 to 128 printable ASCII characters without spaces",
    "string_too_short": "must not be empty",
    "string_type": "must be a text in quotes",
    "too_long": "has too many elements",
    "too_short": "must not be empty",
    "tuple_type": "must be a list in square brackets",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def guess(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'this'?`, or nothing when nothing known is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def in_words(error: ErrorDetails) -> tuple[KeyPath, str] | None:
    """Where to mend and why; None for what only follows from another error."""
    path, kind, context = _path(error), error["type"], error.get("ctx", {})
    if kind == "default_factory_not_called":
        return None
    if kind == "extra_forbidden":
        return path, _unknown_key(path)
    if kind == "literal_error":
        return path, _unknown_value(path[-1], error["input"], context["expected"])
    if kind == "value_error":
        return path, str(context["error"])
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        given = f", not {error['input']}" if abs(error["input"]) < 10**15 else ""
        return path, f"must be {words} {context[key]:g}{given}"
    return path, _TYPES.get(kind, error["msg"])


def _path(error: ErrorDetails) -> KeyPath:
    """Without what pydantic puts in between: the kind of a deployment, positions in lists, `[key]`."""
    path = tuple(part for part in error["loc"] if isinstance(part, str) and part != "[key]")
    return path[:2] + path[3:] if path[:1] == ("deployments",) else path


def _unknown_key(path: KeyPath) -> str:
    if len(path) == 1:
        later = path[0] in LATER_SECTIONS
        return NOT_YET if later else f"unknown section{guess(path[0], [*FIELDS, *LATER_SECTIONS])}"
    known = FIELDS[path[0]]
    if path[-1] in known:
        return "belongs to deployments of another dialect"
    return f"unknown key{guess(path[-1], [*known, *LATER.get(path[0], ())])}"


def _unknown_value(name: str, value: object, expected: str) -> str:
    known = [choice for choice in re.findall(r"'([^']*)'", expected) if choice]
    if not isinstance(value, str):
        return _TYPES["string_type"]
    shown = "".join(c for c in value[:40] if c.isprintable())
    return f"unknown {name} '{shown}'" + (guess(value, known) or f"; it may be {', '.join(known)}")
