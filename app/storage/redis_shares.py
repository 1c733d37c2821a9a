"""Hides how replicas tell each other, once a second, whom they served: a short stream that everybody reads."""

import time
from collections.abc import Sequence
from typing import Final

import msgspec
from redis.asyncio import Redis

from app.ports import Served
from app.storage.redis_server import RedisServer, StoreDown

_STREAM: Final = "eg:{shares}:stream"
_REPLICAS: Final = "eg:{shares}:replicas"
_MOST = 1000  # messages kept: a replica that reads less often than that has missed some
_ALIVE_S = 5
_KEEP_S = 600


class _News(msgspec.Struct):
    replica: str
    served: dict[str, Served]


class RedisShares:
    """See `ports.Shares`."""

    def __init__(self, server: RedisServer, replica: str) -> None:
        self._server = server
        self._replica = replica
        self._read_upto = b"$"
        self.replicas = 1
        """How many were there lately."""

    async def exchange(self, own: dict[str, Served]) -> Sequence[dict[str, Served]] | None:
        """See `ports.Shares`."""

        async def use(client: Redis) -> tuple[list[tuple[bytes, dict[bytes, bytes]]], int]:
            now_s = time.time()
            async with client.pipeline(transaction=False) as pipe:
                if self._read_upto == b"$":
                    pipe.xrevrange(_STREAM, count=1)
                else:
                    pipe.xrange(_STREAM, min=b"(" + self._read_upto, count=_MOST)
                if own:
                    news = msgspec.msgpack.encode(_News(self._replica, own))
                    pipe.xadd(_STREAM, {b"n": news}, maxlen=_MOST, approximate=True)
                    pipe.expire(_STREAM, _KEEP_S)
                pipe.zadd(_REPLICAS, {self._replica: now_s})
                pipe.zremrangebyscore(_REPLICAS, "-inf", now_s - _KEEP_S)
                pipe.zcount(_REPLICAS, now_s - _ALIVE_S, "+inf")
                answers = await pipe.execute()
            return answers[0], answers[-1]

        try:
            messages, self.replicas = await self._server.call(use)
        except StoreDown:
            return None
        first = self._read_upto == b"$"
        if messages:
            self._read_upto = messages[0][0] if first else messages[-1][0]
        elif first:
            self._read_upto = b"0-0"
        heard = [] if first else [msgspec.msgpack.decode(fields[b"n"], type=_News) for _, fields in messages]
        return [news.served for news in heard if news.replica != self._replica]
