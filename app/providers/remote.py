"""Hides what all remote providers share: one call, its bounds, a long reply read in slices, order, unit length."""

import asyncio
import functools
import re
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import orjson

from app.domain import Space, Text
from app.errors import MalformedReply
from app.ports import Reply, Stated
from app.providers.dialect import Ask, Dialect, Said
from app.providers.http import Endpoint
from app.providers.refusals import Answer
from app.vectors import Matrix, decode_base64, normalised

_MOST_ITEMS = 2048
_MOST_FLOATS = 256 * 1536
"""Numbers written as text that one reply may bring: finding where each vector ends takes about 10 ms at once."""
_USUAL_WIDTH = 1536
_SLICE_FLOATS = 32 * 1536
"""Numbers that are read before the loop gets its turn: about 3 ms."""
_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}")


class RemoteProvider:
    """The `Provider` that speaks `dialect` over `endpoint`; see `ports.Provider`.

    Vectors that the vendor does not send at unit length, as its card says, are brought to it.
    """

    def __init__(self, dialect: Dialect, endpoint: Endpoint) -> None:
        self._dialect = dialect
        self._endpoint = endpoint
        card = dialect.target.card
        self._max_items = max(1, _MOST_FLOATS // (card.dimensions if card else _USUAL_WIDTH))

    @property
    def max_items(self) -> int:
        """See `ports.Provider`: few until the deployment has shown that it answers base64."""
        return self._max_items

    async def embed(self, texts: Sequence[Text], space: Space, *, timeout_s: float) -> Reply:
        """See `ports.Provider`; `texts` are all strings or all token ids."""
        if len({type(text) for text in texts}) > 1:
            raise RuntimeError("This is a bug: a batch mixes strings and token ids.")
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout_s
        post = functools.partial(self._post, most_bytes=65_536, ends=ends)
        await self._dialect.check(texts, space, post)
        ask = self._dialect.ask(texts, space)
        most_bytes = len(texts) * (space.dimensions * 32 + 256) + 65_536  # numbers with 17 digits, and an envelope
        most_bytes += sum(12 * len(text) for text in texts)  # some vendors repeat the texts, all characters escaped
        answer = await self._post(ask, most_bytes=most_bytes, ends=ends)
        said = self._read(answer.content)
        self._check_model(said.model)
        vectors = await self._vectors(said, len(texts), space.dimensions)
        most_tokens = sum(_most_tokens(text, space) for text in texts)
        return Reply(vectors, _believed(said.tokens, most_tokens), self._stated(answer.headers))

    async def aclose(self) -> None:
        """See `ports.Provider`."""
        await self._endpoint.aclose()

    async def _post(self, ask: Ask, *, most_bytes: int, ends: float) -> Answer:
        left_s = ends - asyncio.get_running_loop().time()
        body = orjson.dumps(ask.body)
        answer = await self._endpoint.post(ask.path, body, most_bytes=most_bytes, timeout_s=left_s)
        if not 200 <= answer.status < 300:
            raise self._dialect.refusal(answer)
        return answer

    def _read(self, content: bytearray) -> Said:
        try:
            return self._dialect.read(content)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise MalformedReply("a body that is no list of embeddings") from None

    def _check_model(self, named: object) -> None:
        names = self._dialect.target.names
        if not names or named is None:
            return
        if not isinstance(named, str) or not any(
            named == name or (named.startswith(name) and _DATED.fullmatch(named[len(name) :])) for name in names
        ):
            raise MalformedReply("a reply that names another model")

    async def _vectors(self, said: Said, count: int, dimensions: int) -> Matrix:
        places = _places(said, count)
        vectors = np.empty((count, dimensions), dtype=np.float32)
        step = max(1, _SLICE_FLOATS // dimensions)
        as_base64 = True
        for start in range(0, count, step):
            for place, raw in zip(places[start : start + step], said.embeddings[start : start + step], strict=True):
                embedding = _embedding(raw)
                as_base64 = as_base64 and isinstance(embedding, str)
                vectors[place] = _row(embedding, dimensions)
            await asyncio.sleep(0)
        self._max_items = _MOST_ITEMS if as_base64 else max(1, _MOST_FLOATS // dimensions)
        return normalised(vectors) if self._leaves_length_to_us(dimensions) else vectors

    def _leaves_length_to_us(self, width: int) -> bool:
        card = self._dialect.target.card
        if card is None or card.normalised == "always":
            return False
        return card.normalised == "never" or width != card.dimensions

    def _stated(self, headers: Mapping[str, str]) -> Stated:
        limits = self._dialect.limit_headers
        names = (*limits, *(name.replace("-limit-", "-remaining-") for name in limits))
        said = (headers.get(name, "") for name in names)
        return Stated(*(int(value) if value.isdecimal() and len(value) < 16 else None for value in said))


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def _believed(tokens: object, most: int) -> int | None:
    """The tokens that a vendor names, if that may be true."""
    return tokens if type(tokens) is int and 0 <= tokens <= most else None
