"""Hides how sealed vectors are kept in Redis."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import OutOfMemoryError

from app.domain import Space
from app.storage.level import LevelDown, LevelStats
from app.storage.redis_server import RedisServer, StoreDown

_T = TypeVar("_T")

_PREFIX = b"eg:v:"
_PIECE_ITEMS = 256


class RedisLevel:
    """A `Level` on `server`, which may hold other things too; each value is forgotten `ttl_s` after it was written."""

    name = "redis"

    def __init__(self, server: RedisServer, *, ttl_s: int) -> None:
        self._server = server
        self._ttl_s = ttl_s

    async def read(
        self, space: Space, keys: Sequence[bytes], *, within_s: float | None = None
    ) -> dict[bytes, bytes]:  # fmt: skip
        """See `Level`; for how long the server is waited for is its own."""
        del space, within_s
        found: dict[bytes, bytes] = {}
        for piece in _pieces(keys):
            found |= await self._read(piece)
        return found

    async def write(self, space: Space, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """See `Level`; a server that is full is down for writing only."""
        del space
        for piece in _pieces(entries):
            await self._write(piece)

    async def delete(self, space: Space, keys: Sequence[bytes]) -> None:
        """See `Level`."""
        del space
        for piece in _pieces(keys):
            await self._delete(piece)

    async def stats(self) -> LevelStats:
        """See `Level`; counts all that the server holds."""
        nodes = await self._memory()
        entries: int = await self._call(lambda client: client.dbsize())
        return LevelStats(
            entries, sum(node["used_memory"] for node in nodes), sum(node.get("maxmemory", 0) for node in nodes)
        )

    async def maxmemory_warning(self, *, holds_limiter: bool) -> str | None:
        """What will go wrong once the server is full, for the operator; raises LevelDown.

        `holds_limiter`: the shared limiter's keys, which live for a minute or so, are on this server too.
        """
        for node in await self._memory():
            policy = str(node.get("maxmemory_policy", ""))
            if node.get("maxmemory") and (warning := _warning(policy, holds_limiter=holds_limiter)):
                return f"maxmemory-policy is {policy}: {warning}"
        return None

    async def _read(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        names = [_PREFIX + key for key in keys]

        async def use(client: Any) -> list[bytes | None]:
            # a cluster answers for one slot at a time; its client sends what that takes all at once
            get = client.mget_nonatomic if isinstance(client, RedisCluster) else client.mget
            return list(await get(names))

        values = await self._call(use)
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    async def _write(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        async def use(client: Any) -> bool:
            pipeline = client.pipeline(transaction=False)
            for key, value in entries:
                pipeline.set(_PREFIX + key, value, ex=self._ttl_s)
            errors = [each for each in await pipeline.execute(raise_on_error=False) if isinstance(each, Exception)]
            if errors and not isinstance(errors[0], OutOfMemoryError):
                raise errors[0]
            return not errors

        if not await self._call(use):
            raise LevelDown("full")

    async def _delete(self, keys: Sequence[bytes]) -> None:
        async def use(client: Any) -> None:
            await client.unlink(*(_PREFIX + key for key in keys))

        await self._call(use)

    async def _memory(self) -> list[dict[str, Any]]:
        """What each node says about its memory."""
        info: dict[str, Any] = await self._call(lambda client: client.info("memory"))
        return [info] if "used_memory" in info else [*info.values()]

    async def _call(self, use: Callable[[Redis], Awaitable[_T]]) -> _T:
        try:
            return await self._server.call(use)
        except StoreDown as error:
            raise LevelDown(str(error)) from error


def _warning(policy: str, *, holds_limiter: bool) -> str | None:
    if policy == "noeviction":
        return "once the server is full nothing new is cached" + (
            " and the shared limiter stops; let it evict, and keep the cache on a server of its own (cache_redis_url)"
            if holds_limiter
            else "; allkeys-lfu suits a cache"
        )
    if holds_limiter and (policy.startswith("allkeys-") or policy in {"volatile-ttl", "volatile-random"}):
        return "a full server may forget what the shared limiter granted; volatile-lru, or the cache on its own server"
    return None


def _pieces(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (items[start : start + _PIECE_ITEMS] for start in range(0, len(items), _PIECE_ITEMS))
