"""Hides how replicas tell each other, again and again, whom they served: a short stream that everybody reads."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from app.ports import Served
from app.storage.redis_server import RedisServer, StoreDown

_STREAM: Final = "eg:{shares}:stream"
_MOST = 1000  # messages kept: a replica that reads less often than that has missed some
_ALIVE_S = 5.0
_KEEP_S = 600


class _News(msgspec.Struct):
    """What `replica` served since it had been told for sure that it was heard so many times."""

    replica: str
    times_heard: int
    served: dict[str, Served]


class RedisShares:
    """See `ports.Shares`."""

    def __init__(self, server: RedisServer, replica: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._replica = replica
        self._clock = clock
        self._read_upto: bytes | None = None
        self._times_heard = 0
        self._others: dict[str, tuple[_News, float]] = {}  # the last of each, and when it was read

    @property
    def replicas(self) -> int:
        """How many there were lately."""
        since_s = self._clock() - _ALIVE_S
        return 1 + sum(read_at > since_s for _, read_at in self._others.values())

    async def exchange(self, own: dict[str, Served]) -> Sequence[dict[str, Served]] | None:
        """See `ports.Shares`. What may have been told is told again, with what came since, and heard once."""
        news = msgspec.msgpack.encode(_News(self._replica, self._times_heard, own))

        async def use(client: Redis) -> Any:
            async with client.pipeline(transaction=False) as pipe:
                if self._read_upto is None:
                    pipe.xrevrange(_STREAM, count=1)
                else:
                    pipe.xrange(_STREAM, min=b"(" + self._read_upto, count=_MOST)
                pipe.xadd(_STREAM, {b"n": news}, maxlen=_MOST, approximate=True)
                pipe.expire(_STREAM, _KEEP_S)
                return (await pipe.execute())[0]

        try:
            messages = await self._server.call(use)
        except StoreDown:
            return None
        self._times_heard += 1
        begins = self._read_upto is None
        self._read_upto = messages[-1][0] if messages else self._read_upto or b"0-0"
        return [] if begins else self._heard([fields[b"n"] for _, fields in messages])

    def _heard(self, messages: Sequence[bytes]) -> list[dict[str, Served]]:
        now_s = self._clock()
        heard = []
        for message in messages:
            news = msgspec.msgpack.decode(message, type=_News)
            if news.replica != self._replica:
                heard.append(self._unheard(news))
                self._others[news.replica] = (news, now_s)
        self._others = {name: last for name, last in self._others.items() if last[1] > now_s - _KEEP_S}
        return [served for served in heard if served]

    def _unheard(self, news: _News) -> dict[str, Served]:
        """What of it was not in the last message of the same replica."""
        last, _ = self._others.get(news.replica, (news, 0.0))
        if last is news or last.times_heard != news.times_heard:
            return news.served
        return {queue: _less(served, last.served.get(queue)) for queue, served in news.served.items()}


def _less(served: Served, known: Served | None) -> Served:
    before = {} if known is None else known.tokens
    more = {name: tokens - before.get(name, 0.0) for name, tokens in served.tokens.items()}
    return Served({name: tokens for name, tokens in more.items() if tokens > 0.0}, served.level, served.waiting)
