"""Hides how one level of the cache is used without anybody waiting for it long, or at all once it is slow or down."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import NamedTuple, Protocol

from app.domain import Space
from app.storage.level import Level, LevelDown

PIECE_ITEMS = 256
"""As many values are asked for or written at once."""

_FAILURES = 3
_REST_S = 1.0
_PATIENCE_S = 5.0  # how long those wait for a slow level who have time
_GATHER_S = 0.1  # how long a value waits for company before it is written


class CacheTelemetry(Protocol):
    """What can be seen of the cache below memory; `level` is the name of one."""

    def cache_level(self, *, level: str, hits: int, misses: int, seconds: float) -> None:
        """A level was asked for `hits + misses` texts."""

    def cache_level_changed(self, *, level: str, up: bool, reason: str) -> None:
        """A level is left alone, or used again."""

    def cache_value_rejected(self, *, level: str, items: int) -> None:
        """What was found under these many keys was not what had been put there."""

    def cache_writes_dropped(self, *, level: str, items: int, reason: str) -> None:
        """Values will not be kept there: too many wait (`full`), or it is `down`."""

    def loop_crashed(self, *, loop: str, error: BaseException) -> None:
        """A bug in a supervised loop, which goes on."""


class Write(NamedTuple):
    """What shall be under a key: `sealed` makes it when it is written, about `size_bytes`; None: nothing."""

    space: Space
    size_bytes: int
    sealed: Callable[[], bytes] | None


class GuardedLevel:
    """One `Level` with a time budget for reads, and writes that are gathered, bounded in bytes and never waited for.

    After three reads in a row that failed or took longer than `budget_s` it rests: nobody waits for it, and once a
    second one read that nobody waits for tries it again. A write that fails takes all that wait with it, and the next
    second's. Its tasks, which belong to `tasks`, do what is asked of the store: no caller's cancellation reaches it.
    """

    def __init__(
        self,
        level: Level,
        telemetry: CacheTelemetry,
        tasks: asyncio.TaskGroup,
        *,
        budget_s: float,
        most_waiting_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.level = level
        self._telemetry = telemetry
        self._tasks = tasks
        self._budget_s = budget_s
        self._most_bytes = most_waiting_bytes
        self._clock = clock
        self._failures = 0
        self._next_try = 0.0
        self._writes: dict[bytes, Write] = {}
        self._waiting_bytes = 0
        self._no_writes_before = -float("inf")
        self._wake = asyncio.Event()
        self._enough = asyncio.Event()
        self._closing = False

    # ── reads ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self, space: Space, keys: Sequence[bytes], *, patient: bool = False) -> dict[bytes, bytes] | None:
        """What is kept under at most `PIECE_ITEMS` `keys`; None if the level cannot say in time.

        Who is `patient` asks also while the level rests, since one that is down says so at once, and waits for one that
        is slow; that it answered says nothing to those who have no time.
        """
        if patient or self._failures < _FAILURES:
            return await self._try(space, keys, patient=patient)
        if self._clock() >= self._next_try:
            self._next_try = self._clock() + _REST_S
            self._tasks.create_task(self._try(space, keys))
        return None

    async def _try(self, space: Space, keys: Sequence[bytes], *, patient: bool = False) -> dict[bytes, bytes] | None:
        budget_s = _PATIENCE_S if patient else None
        reading = self._tasks.create_task(self._read(space, keys, budget_s))
        await asyncio.wait([reading], timeout=budget_s or self._budget_s)
        found = reading.result() if reading.done() else None
        if found is None:
            self._failed("down" if reading.done() else "slow")
        elif not patient:
            self._succeeded()
        return found

    async def _read(self, space: Space, keys: Sequence[bytes], within_s: float | None) -> dict[bytes, bytes] | None:
        """Never raises: what it is in belongs to everybody."""
        started = self._clock()
        try:
            found = await self.level.read(space, keys, within_s=within_s)
        except LevelDown:
            return None
        except Exception as bug:  # supervision is for the errors that nobody thought of
            self._telemetry.loop_crashed(loop="cache read", error=bug)
            return None
        seconds = self._clock() - started
        self._telemetry.cache_level(
            level=self.level.name, hits=len(found), misses=len(keys) - len(found), seconds=seconds
        )
        return found

    def _succeeded(self) -> None:
        if self._failures >= _FAILURES:
            self._telemetry.cache_level_changed(level=self.level.name, up=True, reason="answered")
        self._failures = 0

    def _failed(self, reason: str) -> None:
        self._failures += 1
        if self._failures == _FAILURES:
            self._next_try = self._clock() + _REST_S
            self._telemetry.cache_level_changed(level=self.level.name, up=False, reason=reason)

    # ── writes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, writes: Iterable[tuple[bytes, Write]]) -> None:
        """Lets `writes`, by key, wait for the level; what does not fit is dropped. The last for a key counts."""
        dropped, resting = 0, self._clock() < self._no_writes_before
        for key, write in writes:
            if resting or self._waiting_bytes + write.size_bytes > self._most_bytes:
                dropped += 1
                continue
            before = self._writes.get(key)
            self._waiting_bytes += write.size_bytes - (before.size_bytes if before else 0)
            self._writes[key] = write
        self._wake.set()
        if len(self._writes) >= PIECE_ITEMS:
            self._enough.set()
        self._count_dropped(dropped, "down" if resting else "full")

    def close(self) -> None:
        """Lets `drain` end as soon as nothing waits any more."""
        self._closing = True
        self._wake.set()
        self._enough.set()

    async def drain(self) -> None:
        """Writes what waits until the level is closed: not each by itself, since who asks next would pay for that."""
        while not self._closing or self._writes:
            await self._wake.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_S):
                    await self._enough.wait()
            self._wake.clear()
            self._enough.clear()
            writes, self._writes = self._writes, {}
            taken_bytes = sum(write.size_bytes for write in writes.values())
            try:
                await self._write(writes)
            except LevelDown:
                self._drop(writes)
            except Exception as bug:  # as in _read
                self._telemetry.loop_crashed(loop="cache writes", error=bug)
                self._drop(writes)
            self._waiting_bytes -= taken_bytes

    async def _write(self, writes: dict[bytes, Write]) -> None:
        """In pieces of one space and kind; what is written is taken out of `writes`."""
        for _, group in groupby(sorted(writes.items(), key=_kind), key=_kind):
            of_a_kind = [*group]
            for start in range(0, len(of_a_kind), PIECE_ITEMS):
                piece = of_a_kind[start : start + PIECE_ITEMS]
                keys, space = [key for key, _ in piece], piece[0][1].space
                if values := [(key, write.sealed()) for key, write in piece if write.sealed is not None]:
                    await self.level.write(space, values)
                else:
                    await self.level.delete(space, keys)
                for key in keys:
                    del writes[key]

    def _drop(self, writes: dict[bytes, Write]) -> None:
        """Gives up what is left of `writes`, and what has gathered since."""
        self._no_writes_before = self._clock() + _REST_S
        waiting, self._writes = self._writes, {}
        self._waiting_bytes -= sum(write.size_bytes for write in waiting.values())
        self._count_dropped(len(writes) + len(waiting), "down")

    def _count_dropped(self, items: int, reason: str) -> None:
        if items:
            self._telemetry.cache_writes_dropped(level=self.level.name, items=items, reason=reason)


def _kind(item: tuple[bytes, Write]) -> tuple[str, bool]:
    _, write = item
    return write.space.id, write.sealed is None
