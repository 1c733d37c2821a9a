"""Hides how a row becomes the text that is embedded: one of its columns, or a template over several."""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from app.corpus.rows import DataError

_TOKENS = re.compile(r"\{\{|\}\}|\\[nt\\]|\{([^{}]+)\}|[{}]")
_LITERALS = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t", "\\\\": "\\"}


class Template:
    r"""What is embedded of a row: a column's name, or a text with `{column}` fields.

    What holds a brace is such a text; `\n`, `\t` and `\\` in it are a line's end, a tab and a backslash, `{{` and `}}`
    are braces. Raises DataError for one that is none.
    """

    def __init__(self, text: str) -> None:
        self._start = ""
        self._fields: list[tuple[str, str]] = []
        """Each column, and what stands behind it."""
        if {"{", "}"} & set(text):
            self._parse(text)
        else:
            self._fields = [(text, "")]
        self.columns = tuple(name for name, _ in self._fields)
        if not any(self.columns):
            raise DataError(f"the text {text!r} names no column: give one, or a template such as '{{title}} {{body}}'")

    def _parse(self, text: str) -> None:
        at = 0
        for token in _TOKENS.finditer(text):
            self._append(text[at : token.start()])
            at = token.end()
            if token[1] is not None:
                self._fields.append((token[1], ""))
            elif token[0] in _LITERALS:
                self._append(_LITERALS[token[0]])
            else:
                raise DataError(f"the text {text!r} has a lone {token[0]!r}: a brace itself is written twice")
        self._append(text[at:])

    def _append(self, literal: str) -> None:
        if self._fields:
            name, behind = self._fields[-1]
            self._fields[-1] = name, behind + literal
        else:
            self._start += literal

    def __call__(self, record: Mapping[str, Any]) -> str:
        """The text of a row with these columns; one that is not there, or None, is empty."""
        parts = [self._start]
        for name, behind in self._fields:
            parts += (said(record.get(name)), behind)
        return "".join(parts)


def said(value: object) -> str:
    """A JSON value as text: a string as it is, None as nothing, others as JSON says them."""
    if isinstance(value, str):
        return value
    return "" if value is None else orjson.dumps(value).decode()
