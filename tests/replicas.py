"""Several replicas' limiters on one real server whose scripts live in the test's virtual time."""

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from redis import Redis

from app.domain import Limits
from app.storage.redis_limiter import RedisLimiter
from app.storage.redis_server import RedisServer, Script, StoreDown

_TIME, _NOW = "redis.call('TIME')", "redis.call('HMGET', 'now', 's', 'us')"
_BEGAN_S = 1_700_000_000  # so that the server's time has its usual size


class TimelessServer:
    """What `RedisServer` is to a limiter, but answering in no time: for the virtual clock does not stand still for I/O.

    `asleep` is a server that cannot be asked; `offset_s` moves its clock.
    """

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.asleep = False
        self.up_since = -float("inf")
        self.offset_s = 0.0
        self.calls = 0
        self._scripts: dict[str, str] = {}

    @property
    def up(self) -> bool:
        """See `RedisServer`."""
        return not self.asleep

    @property
    def doubted(self) -> bool:
        """See `RedisServer`."""
        return self.asleep

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> Any:
        """See `RedisServer`."""
        if self.asleep:
            raise StoreDown("asleep")
        self.calls += 1
        now_us = int((asyncio.get_running_loop().time() + self.offset_s) * 1_000_000)
        with self.client.pipeline(transaction=False) as pipe:
            pipe.hset("now", mapping={"s": _BEGAN_S + now_us // 1_000_000, "us": now_us % 1_000_000})
            pipe.evalsha(self._loaded(script), len(keys), *keys, *arguments)
            return pipe.execute()[1]

    def _loaded(self, script: Script) -> str:
        """The script as the server knows it, in virtual time."""
        if script.sha1 not in self._scripts:
            assert _TIME in script.text
            self._scripts[script.sha1] = str(self.client.script_load(script.text.replace(_TIME, _NOW)))
        return self._scripts[script.sha1]


@contextmanager
def timeless(url: str) -> Iterator[TimelessServer]:
    """The server at `url`, which has known for an hour that nothing was granted."""
    client = Redis.from_url(url)
    try:
        client.flushall()
        client.set("eg:{memory}:since", (_BEGAN_S - 3600) * 1_000_000)
        yield TimelessServer(client)
    finally:
        client.close()


_names = itertools.count(1)


def replica(server: TimelessServer, limits: Mapping[str, Limits], *, max_replicas: int = 4) -> RedisLimiter:
    """One more replica, which has been there for a while: it knows that nothing was granted."""
    loop = asyncio.get_running_loop()
    born_s = loop.time() - 3600.0
    clock = itertools.chain([born_s], iter(loop.time, None))
    return RedisLimiter(
        cast("RedisServer", server), limits, replica=f"r{next(_names)}", max_replicas=max_replicas,
        clock=lambda: next(clock),
    )  # fmt: skip
