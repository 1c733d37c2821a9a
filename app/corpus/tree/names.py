"""Hides which words people would look for: those that names are made of, and those that a question is about."""

import re
from collections.abc import Iterator
from typing import Final

from app.corpus.tree.pieces import Chunk

_PART: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_a-zA-Z]+|\d+")
_WORD: Final = re.compile(r"\w+")
_MIXED: Final = re.compile(r"\b[A-Za-z_]*[a-z0-9][A-Z]\w*|\b[A-Z]{2,}[a-z]\w*")
_ASKING: Final = frozenset(
    """
    a about an and any are can could did do does for from happen happens has have how i if in is it its me my of on or
    our should so that the their there they this to was we what when where which who why will with would you your
    """.split()  # noqa: SIM905 — easier to read and to add to
)


def parts(text: str) -> Iterator[str]:
    """Its words in lower case, and those that its names are made of: `HTTPServer` and `http_server` have two."""
    return (part.lower() for part in _PART.findall(text))


def words_of(chunk: Chunk) -> str:
    """What a chunk is found by beside its text: path and symbol, and the names in it that have capitals inside."""
    mixed = " ".join(_MIXED.findall(chunk.text))
    return " ".join(dict.fromkeys([*parts(chunk.path), chunk.symbol, *parts(f"{chunk.symbol} {mixed}")]))


def asked(question: str) -> str:
    """The words that a question is about; if there are none, all of its words."""
    words = _WORD.findall(question)
    return " ".join([word for word in words if word.lower() not in _ASKING] or words)
