"""Hides what stands around a cache of several levels in its tests: levels to watch, and who sees what happens."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest

from app.domain import Space, Vector
from app.storage.level import Epoch, Epochs, Level, LevelDown, LevelStats
from app.storage.memory import MemoryCache
from app.storage.redis_level import RedisLevel
from app.storage.redis_server import RedisServer
from app.storage.sealing import Sealer
from app.storage.sql.cache import SqlLevel
from app.storage.sql.database import Database
from app.storage.sql.tables import metadata
from app.storage.tiers import TieredCache
from tests.identity import identifying_vector

T = TypeVar("T")

SECRET = bytes(range(32))
BUDGET_S = 0.05
SPACE = Space("m", 8)
WIDE = replace(SPACE, dimensions=1536)


def entry(text: str, space: Space = SPACE) -> tuple[bytes, Vector]:
    """The one entry that only `text` has, under a key like the gateway's."""
    data = identifying_vector(text, space.model, space.dimensions).tobytes()
    return text.encode().ljust(32, b"."), Vector(data, len(text))


def entries(texts: Sequence[str], space: Space = SPACE) -> dict[bytes, Vector]:
    """The one entry of each."""
    return dict(entry(text, space) for text in texts)


class DictLevel:
    """A `Level` in a dictionary that several caches may share; it can be `down`, `slow_s`, or raise a `bug`."""

    def __init__(self, name: str = "sql") -> None:
        self.name = name
        self.values: dict[bytes, bytes] = {}
        self.asked: list[list[bytes]] = []
        self.written: list[list[bytes]] = []
        self.slow_s = 0.0
        self.down = False
        self.bug: Exception | None = None

    async def read(
        self, space: Space, keys: Sequence[bytes], *, within_s: float | None = None
    ) -> dict[bytes, bytes]:  # fmt: skip
        """See `Level`."""
        self.asked.append([*keys])
        await self._answer(space)
        return {key: self.values[key] for key in keys if key in self.values}

    async def write(self, space: Space, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """See `Level`."""
        await self._answer(space)
        self.written.append([key for key, _ in entries])
        self.values.update(entries)

    async def delete(self, space: Space, keys: Sequence[bytes]) -> None:
        """See `Level`."""
        await self._answer(space)
        for key in keys:
            self.values.pop(key, None)

    async def stats(self) -> LevelStats:
        """See `Level`."""
        await self._answer(SPACE)
        return LevelStats(len(self.values), sum(map(len, self.values.values())))

    async def _answer(self, space: Space) -> None:
        assert isinstance(space, Space)
        if self.slow_s:
            await asyncio.sleep(self.slow_s)
        if self.bug is not None:
            raise self.bug
        if self.down:
            raise LevelDown("down")


class DictEpochs:
    """`Epochs` in a dictionary, or out of reach."""

    def __init__(self) -> None:
        self.epochs: dict[str, Epoch] = {}
        self.down = False

    async def read(self) -> Mapping[str, Epoch]:
        """See `Epochs`."""
        if self.down:
            raise LevelDown("down")
        return {**self.epochs}


class Seen:
    """What a cache said of itself."""

    def __init__(self) -> None:
        self.rejected: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.changes: list[tuple[str, bool, str]] = []
        self.crashes: list[str] = []

    def cache_level(self, *, level: str, hits: int, misses: int, seconds: float) -> None:
        """See `CacheTelemetry`."""
        assert seconds >= 0
        self.hits[level] += hits
        self.misses[level] += misses

    def cache_level_changed(self, *, level: str, up: bool, reason: str) -> None:
        """See `CacheTelemetry`."""
        self.changes.append((level, up, reason))

    def cache_value_rejected(self, *, level: str, items: int) -> None:
        """See `CacheTelemetry`."""
        self.rejected[level] += items

    def cache_writes_dropped(self, *, level: str, items: int, reason: str) -> None:
        """See `CacheTelemetry`."""
        self.dropped[level, reason] += items

    def loop_crashed(self, *, loop: str, error: BaseException) -> None:
        """See `CacheTelemetry`."""
        assert isinstance(error, Exception)
        self.crashes.append(loop)


def cache(
    *levels: Level,
    seen: Seen | None = None,
    epochs: Epochs | None = None,
    budget_s: float = BUDGET_S,
    most_waiting_bytes: int = 1 << 26,
    made_at_s: float = 1000.0,
) -> TieredCache:
    """One process's cache over `levels`, memory empty."""
    return TieredCache(
        MemoryCache(1 << 26),
        [(level, budget_s) for level in levels],
        Sealer(SECRET, clock=lambda: made_at_s),
        seen or Seen(),
        epochs=epochs,
        most_waiting_bytes=most_waiting_bytes,
        clock=asyncio.get_running_loop().time,
    )


async def fill(level: Level, kept: dict[bytes, Vector], space: Space = SPACE) -> None:
    """Another process puts `kept` there."""
    async with cache(level) as other:
        other.put_many(space, kept.items())


async def timed(work: Awaitable[T]) -> tuple[T, float]:
    """What came of it, and after how many seconds."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    return await work, loop.time() - started


def poisons() -> dict[str, bytes]:
    """What must never be taken for the vector of the key `poisoned`, by what is wrong with it."""
    (key, vector), sealer = entry("poisoned"), Sealer(SECRET)
    sound = sealer.seal(key, vector)
    rows = {
        "nan": [np.nan] * 8, "infinite": [np.inf] + [0.0] * 7, "zero": [0.0] * 8, "too long": [1.0] * 8,
        "narrow": [1.0], "wide": [0.25] * 16,
    }  # fmt: skip
    return {
        "empty": b"", "garbage": b"\0" * 100, "cut": sound[:-1], "flipped": sound[:20] + b"\0" + sound[21:],
        "another key's": sealer.seal(*entry("other")), "another secret's": Sealer(b"?").seal(key, vector),
        **{name: sealer.seal(key, Vector(np.array(row, "<f4").tobytes(), 1)) for name, row in rows.items()},
    }  # fmt: skip


@asynccontextmanager
async def level_at(kind: str, url: str) -> AsyncIterator[Level]:
    """One that holds whatever the server or file there holds: `redis`, `sqlite`, `postgres`."""
    if kind == "redis":
        async with RedisServer(url) as server:
            yield RedisLevel(server, ttl_s=600)
        return
    async with Database(url) as database:
        await database.write(lambda connection: connection.run_sync(metadata.create_all), within_s=10)
        yield SqlLevel(database)


@asynccontextmanager
async def shared_level(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Level]:
    """An empty one of that kind."""
    async with level_at(kind, request.getfixturevalue(f"{kind}_url")) as level:
        yield level
