"""Hides what a vendor's reply must be to be believed: its count, order, width, unit length, model and tokens."""

import asyncio
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from app.domain import Space, Text
from app.errors import MalformedReply
from app.providers.dialect import Dialect, Said, Target
from app.vectors import Matrix, decode_base64, normalised

_SLICE_FLOATS = 32 * 1536
"""Numbers that are read before the loop gets its turn: about 3 ms."""
_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}")


class Believed(NamedTuple):
    """Row i of `vectors` answers text i; `tokens` is None where the vendor names none that may be true."""

    vectors: Matrix
    tokens: int | None
    as_base64: bool


def understood(dialect: Dialect, content: bytearray) -> Said:
    """What the body of a 2xx says; raises MalformedReply for one that is not the vendor's."""
    try:
        return dialect.read(content)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise MalformedReply("a body that is no list of embeddings") from None


async def believed(said: Said, target: Target, texts: Sequence[Text], space: Space) -> Believed:
    """The vectors in the order of `texts`, whatever order they came in; raises MalformedReply.

    What the vendor does not send at unit length, as its card says, is brought to it.
    """
    _check_model(said.model, target)
    places = _places(said, len(texts))
    vectors = np.empty((len(texts), space.dimensions), dtype=np.float32)
    step = max(1, _SLICE_FLOATS // space.dimensions)
    as_base64 = True
    for start in range(0, len(texts), step):
        for place, raw in zip(places[start : start + step], said.embeddings[start : start + step], strict=True):
            embedding = _embedding(raw)
            as_base64 = as_base64 and isinstance(embedding, str)
            vectors[place] = _row(embedding, space.dimensions)
        await asyncio.sleep(0)
    if _leaves_length_to_us(target, space.dimensions):
        vectors = normalised(vectors)
    return Believed(vectors, _likely(said.tokens, sum(_most_tokens(text, space) for text in texts)), as_base64)


def _check_model(named: object, target: Target) -> None:
    names = target.names
    if not names or named is None:
        return
    if not isinstance(named, str) or not any(
        named == name or (named.startswith(name) and _DATED.fullmatch(named[len(name) :])) for name in names
    ):
        raise MalformedReply("a reply that names another model")


def _leaves_length_to_us(target: Target, width: int) -> bool:
    card = target.card
    if card is None or card.normalised in (None, "always"):
        return False
    return card.normalised == "never" or width != card.dimensions


_embedding_decoder: msgspec.json.Decoder[str | list[float]] = msgspec.json.Decoder(str | list[float])


def _embedding(raw: msgspec.Raw) -> str | list[float]:
    try:
        return _embedding_decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # NaN, 1e400, null, "0.5", a list of lists
        raise MalformedReply("an embedding that is neither base64 nor numbers") from None


def _row(embedding: str | list[float], dimensions: int) -> Matrix:
    if isinstance(embedding, str):
        row = decode_base64(embedding)
    else:
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused by who checks
            row = np.array(embedding, dtype=np.float32)
    if row.size != dimensions:
        raise MalformedReply(f"a vector of {row.size} dimensions instead of {dimensions}")
    return row


def _places(said: Said, count: int) -> Sequence[int]:
    """Whose vector each embedding is: its index, or its position where none has one."""
    if len(said.embeddings) != count:
        raise MalformedReply(f"{len(said.embeddings)} vectors for {count} texts")
    places = [place for place in said.places if place is not None]
    if not places:
        return range(count)
    if sorted(places) != list(range(count)):
        raise MalformedReply("indices that are not one for each text")
    return places


def _most_tokens(text: Text, space: Space) -> int:
    """No token is shorter than a byte; special tokens and the vendor's own prompt come on top."""
    own = len(text) if not isinstance(text, str) else len(text.encode())
    return own + len(space.prompt.encode()) + 16


def _likely(tokens: object, most: int) -> int | None:
    """The tokens that a vendor names, if that may be true."""
    return tokens if type(tokens) is int and 0 <= tokens <= most else None
