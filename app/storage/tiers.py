"""Hides that vectors are kept in several places: this process's memory, and below it stores that replicas share."""

import asyncio
import random
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Self

from app.domain import Space, Vector
from app.storage.guarded_level import PIECE_ITEMS, CacheTelemetry, GuardedLevel, Write
from app.storage.level import Epoch, Epochs, Level, LevelDown, LevelStats, epochs_of
from app.storage.memory import MemoryCache
from app.storage.sealing import Sealer, made_at_s

CLOSE_S = 2.0
"""How long what waits to be written may take when the cache is closed."""

_POLL_S = 2.0
_OVERHEAD_BYTES = 512  # of a value that waits to be written
_BASE = struct.Struct("<QQQ")


class TieredCache:
    """A `Cache` over memory and `levels`, nearest first; an async context manager that owns its tasks.

    Each level comes with the seconds that a request may wait for its answer (to 256 texts; more are asked for in
    turn). Whatever a level does, the request goes on: what is missing, late or not what was put there is looked for
    further down, and what is found is put into all levels above, later. Values of at most `most_waiting_bytes` wait to
    be written to each. While everything is in memory nothing is awaited.

    Nothing shared is used before `epochs` were read once; what they invalidate is out of reach about two seconds later.
    """

    def __init__(
        self,
        memory: MemoryCache,
        levels: Sequence[tuple[Level, float]],
        sealer: Sealer,
        telemetry: CacheTelemetry,
        *,
        epochs: Epochs | None = None,
        most_waiting_bytes: int = 1 << 25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._sealer = sealer
        self._telemetry = telemetry
        self._source = epochs
        self._epochs: Mapping[str, Epoch] | None = {} if epochs is None else None
        self._own_base = secrets.token_bytes(_BASE.size)
        self._bases: dict[str, bytes] = {}
        self._tasks = asyncio.TaskGroup()
        self._levels = [
            GuardedLevel(
                level, telemetry, self._tasks,
                budget_s=budget_s, most_waiting_bytes=most_waiting_bytes, clock=clock,
            )
            for level, budget_s in levels
        ]  # fmt: skip
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.refresh()
        await self._tasks.__aenter__()
        for level in self._levels:
            self._tasks.create_task(level.drain(), name=f"cache writes {level.level.name}")
        if self._source is not None:
            self._watching = self._tasks.create_task(self._watch(), name="cache epochs")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """What waits to be written has `CLOSE_S` to get there."""
        if self._watching is not None:
            self._watching.cancel()
        for level in self._levels:
            level.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._tasks.__aexit__(None, None, None)

    # ── the port ────────────────────────────────────────────────────────────────────────────────────────────────────

    def base(self, space: Space) -> bytes:
        """See `ports.Cache`; until epochs were read it is one that no other process has."""
        base = self._bases.get(space.id)
        if base is None:
            base = self._bases[space.id] = self._base(space)
        return base

    async def get_many(
        self, space: Space, keys: Sequence[bytes], *, patient: bool = False
    ) -> list[Vector | None]:  # fmt: skip
        """See `ports.Cache`."""
        found = self._memory.recall(keys)
        if None not in found or self._epochs is None or not self._levels:
            return found
        missing = dict.fromkeys(key for key, vector in zip(keys, found, strict=True) if vector is None)
        below = await self._look_below(space, [*missing], patient=patient)
        # Meanwhile others may have bought what is nowhere below: whoever asks again now must not buy it once more.
        late = [key for key in missing if key not in below]
        have = below | dict(zip(late, self._memory.recall(late), strict=True))
        return [have[key] if vector is None else vector for key, vector in zip(keys, found, strict=True)]

    def recall(self, keys: Sequence[bytes]) -> list[Vector | None]:
        """See `ports.Cache`."""
        return self._memory.recall(keys)

    def put_many(self, space: Space, entries: Iterable[tuple[bytes, Vector]]) -> None:
        """See `ports.Cache`; the shared levels get them later."""
        kept = [*entries]
        self._memory.put_many(space, kept)
        if self._epochs is None or not self._levels:
            return
        writes = [  # sealed once, for all levels, by the first that writes it
            (key, Write(space, len(vector.data) + _OVERHEAD_BYTES, cache(partial(self._sealer.seal, key, vector))))
            for key, vector in kept
        ]
        for level in self._levels:
            level.put(writes)

    # ── for operators ───────────────────────────────────────────────────────────────────────────────────────────────

    async def stats(self) -> dict[str, LevelStats | None]:
        """How full each level is, by name, nearest first; None: it cannot say now."""
        stats: dict[str, LevelStats | None] = {"memory": self._memory.stats()}
        for level in self._levels:
            try:
                stats[level.level.name] = await level.level.stats()
            except LevelDown:
                stats[level.level.name] = None
        return stats

    async def refresh(self) -> None:
        """Learns now what was invalidated; as far as it cannot, what is known stays."""
        if self._source is None:
            return
        try:
            read = await self._source.read()
        except LevelDown:
            return
        except Exception as bug:  # supervision is for the errors that nobody thought of
            self._telemetry.loop_crashed(loop="cache epochs", error=bug)
            return
        epochs = _newest(self._epochs or {}, read)
        if epochs != self._epochs:
            self._epochs = epochs
            self._bases.clear()
            self._memory.clear()

    # ── below memory ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _look_below(self, space: Space, keys: Sequence[bytes], *, patient: bool) -> dict[bytes, Vector]:
        """What the levels have of `keys`; it is in memory, and on its way to the levels above, when this returns."""
        vectors: dict[bytes, Vector] = {}
        for depth, level in enumerate(self._levels):
            missing = [key for key in keys if key not in vectors]
            for start in range(0, len(missing), PIECE_ITEMS):
                sealed = await level.read(space, missing[start : start + PIECE_ITEMS], patient=patient)
                if sealed is None:
                    break
                opened = self._opened(level, space, sealed)
                self._memory.put_many(space, opened.items())
                for above in self._levels[:depth]:
                    above.put((key, _promotion(space, sealed[key])) for key in opened)
                vectors |= opened
        return vectors

    def _opened(self, level: GuardedLevel, space: Space, sealed: Mapping[bytes, bytes]) -> dict[bytes, Vector]:
        """The vectors that `level` had and that are wanted; the rest is deleted there."""
        not_before_s = max(self._epoch(name).not_before_s for name in epochs_of(space))
        recent = sealed
        if not_before_s:
            recent = {key: value for key, value in sealed.items() if made_at_s(value) >= not_before_s}
        opened = self._sealer.open_many(recent, space)
        if unwanted := sealed.keys() - opened.keys():
            level.put((key, Write(space, _OVERHEAD_BYTES, None)) for key in unwanted)
        if rejected := len(recent) - len(opened):
            self._telemetry.cache_value_rejected(level=level.level.name, items=rejected)
        return opened

    # ── epochs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _base(self, space: Space) -> bytes:
        if self._epochs is None:
            return self._own_base
        return _BASE.pack(*(self._epoch(name).number for name in epochs_of(space)))

    def _epoch(self, of: str) -> Epoch:
        return (self._epochs or {}).get(of, Epoch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S * random.uniform(0.8, 1.2))  # noqa: S311 — jitter
            await self.refresh()


def _newest(known: Mapping[str, Epoch], read: Mapping[str, Epoch]) -> dict[str, Epoch]:
    """What `read` adds to what is known: of two readings under way at once the older may come last."""
    newest = {**known}
    for name, epoch in read.items():
        before = known.get(name, Epoch())
        newest[name] = Epoch(max(before.number, epoch.number), max(before.not_before_s, epoch.not_before_s))
    return newest


def _promotion(space: Space, sealed: bytes) -> Write:
    """As it was found, so that it does not get younger on its way."""
    return Write(space, len(sealed) + _OVERHEAD_BYTES, lambda: sealed)
