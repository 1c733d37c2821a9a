"""Hides what all remote providers share: one call, its bounds, how many texts are worth asking for at once."""

import asyncio
import functools
from collections.abc import Mapping, Sequence

import orjson

from app.domain import Space, Text
from app.ports import Reply, Stated
from app.providers.dialect import Ask, Dialect
from app.providers.http import Endpoint
from app.providers.reading import believed, understood
from app.providers.refusals import Answer

_MOST_ITEMS = 2048
_MOST_FLOATS = 256 * 1536
"""Numbers written as text that one reply may bring: finding where each vector ends takes about 10 ms at once."""
_USUAL_WIDTH = 1536


class RemoteProvider:
    """The `Provider` that speaks `dialect` over `endpoint`; see `ports.Provider`."""

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
        read = await believed(understood(self._dialect, answer.content), self._dialect.target, texts, space)
        self._max_items = _MOST_ITEMS if read.as_base64 else max(1, _MOST_FLOATS // space.dimensions)
        return Reply(read.vectors, read.tokens, self._stated(answer.headers))

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

    def _stated(self, headers: Mapping[str, str]) -> Stated:
        limits = self._dialect.limit_headers
        names = (*limits, *(name.replace("-limit-", "-remaining-") for name in limits))
        said = (headers.get(name, "") for name in names)
        return Stated(*(int(value) if value.isdecimal() and len(value) < 16 else None for value in said))
