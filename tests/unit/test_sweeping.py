"""Bytes that nobody needs leave the blobs in turns, and nothing that goes wrong ends that; in virtual time."""

import asyncio
import io
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import cast

import pytest

from app.job_ports import JobStore, Writer
from app.jobs.sweeping import SWEEP_S, sweep
from app.storage.level import LevelDown
from app.telemetry import Telemetry

pytestmark = pytest.mark.looptime


class Kept:
    """Blobs of which only the names matter."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.broken: Exception | None = None

    def writing(self, name: str) -> AbstractAsyncContextManager[Writer]:
        """See `Blobs`."""
        raise AssertionError(name)

    def reading(self, name: str, *, offset_bytes: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """See `Blobs`."""
        raise AssertionError((name, offset_bytes, size_bytes))

    async def delete(self, names: Collection[str]) -> None:
        """See `Blobs`."""
        if self.broken:
            raise self.broken
        self.names -= {*names}

    async def delete_under(self, prefix: str) -> None:
        """See `Blobs`."""
        self.names = {name for name in self.names if not name.startswith(f"{prefix}/")}


class Books:
    """What of a `JobStore` the sweeper asks."""

    def __init__(self, files: Sequence[str] = (), jobs: Sequence[str] = ()) -> None:
        self.files, self.jobs = [*files], [*jobs]
        self.broken: Exception | None = None

    async def gone_files(self, limit: int) -> Sequence[str]:
        """See `FileStore`."""
        if self.broken:
            raise self.broken
        return self.files[:limit]

    async def forget_files(self, file_ids: Sequence[str]) -> None:
        """See `FileStore`."""
        self.files = [each for each in self.files if each not in file_ids]

    async def gone_parts(self, limit: int) -> Sequence[str]:
        """See `JobStore`."""
        return self.jobs[:limit]

    async def forget_parts(self, job_ids: Sequence[str]) -> None:
        """See `JobStore`."""
        self.jobs = [each for each in self.jobs if each not in job_ids]


@asynccontextmanager
async def sweeping(books: Books, kept: Kept) -> AsyncIterator[io.BytesIO]:
    """The sweeper at work, after its first turn, and its log."""
    log = io.BytesIO()
    telemetry = Telemetry(stream=log)
    task = asyncio.ensure_future(sweep(cast("JobStore", books), kept, telemetry))
    await asyncio.sleep(SWEEP_S / 2)
    yield log
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    telemetry.close()


async def test_what_is_gone_goes() -> None:
    """Files and pieces of jobs, and nothing else; it is forgotten afterwards."""
    kept = Kept("files/a", "files/b", "files/c", "parts/j/000001/000000-1.out", "parts/j/x.err", "parts/k/x")
    books = Books(["a", "c", "none"], ["j"])
    async with sweeping(books, kept):
        assert kept.names == {"files/b", "parts/k/x"}
        assert (books.files, books.jobs) == ([], [])


async def test_a_turn_is_not_endless() -> None:
    """What is too much for one is left to the next, a minute later."""
    books = Books([str(number) for number in range(2500)])
    async with sweeping(books, Kept()):
        for left in (1500, 500, 0, 0):
            assert len(books.files) == left
            await asyncio.sleep(SWEEP_S)


@pytest.mark.parametrize("broken", [LevelDown("away"), OSError("full of holes"), ZeroDivisionError()])
async def test_what_goes_wrong_is_done_in_a_later_turn(broken: Exception) -> None:
    """Nothing is forgotten before it is gone; what is no outage of a database is told."""
    kept, books = Kept("files/a"), Books(["a"])
    if isinstance(broken, LevelDown):
        books.broken = broken
    else:
        kept.broken = broken
    async with sweeping(books, kept) as log:
        assert (kept.names, books.files) == ({"files/a"}, ["a"])
        kept.broken = books.broken = None
        await asyncio.sleep(SWEEP_S)
        assert (kept.names, books.files) == (set(), [])
    assert bool(log.getvalue()) is not isinstance(broken, LevelDown)
