"""Measures what writing down a purchase costs: the engine's loop at each call, and everything until it is in SQL.

`python -m tests.bench.ledger` prints a line for each; `DATABASE_URL` names an empty Postgres, else it is a SQLite file.
"""

import asyncio
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from app.ports import Part, Purchase
from app.storage.journal import Journal
from app.storage.ledger import BookedLedger
from app.storage.sql.database import Database
from app.storage.sql.ledger import SqlLedger
from app.storage.sql.migrations import migrate
from app.telemetry import Telemetry

_PARTS = tuple(Part(f"tenant-{n}", "project", f"key{n}", "0123456789abcdef", "miss", 8, 900) for n in range(3))
_AT_ONCE, _ROUNDS = 1000, 20
_PER_S, _SECONDS = 500, 5.0
_POLL_S = 0.01

_numbers = itertools.count(1)


def main() -> None:
    """Purchases of three parts each, in a loop as the server has it."""
    sys.setswitchinterval(0.001)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_measure())


async def _measure() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with _books(Path(folder), ready=False) as books:
            us = min(_bought_us(books) for _ in range(_ROUNDS))
            print(f"begin and end of a purchase of {len(_PARTS)} parts: {us:.1f} µs (target 25)")
            frames_bytes = books.journal_bytes / (_ROUNDS * _AT_ONCE)
            per_s = 2**30 / frames_bytes / 3600
            print(f"in the journal: {frames_bytes:.0f} bytes, so 1 GiB is an hour of {per_s:.0f} a second")
            alone, _ = await _steadily(books)
        async with _books(Path(folder), ready=True) as books:
            await _booked(books)
            together, gap_ms = await _steadily(books)
            print(f"booking {_PER_S} a second: {together - alone:.1%} of a core; the loop was late by {gap_ms:.0f} ms")
            took_s = await _booked(books)
            print(f"catching up: {_ROUNDS * _AT_ONCE / took_s:.0f} a second")


@asynccontextmanager
async def _books(folder: Path, *, ready: bool) -> AsyncIterator[BookedLedger]:
    """A ledger whose database is there, or (not `ready`) away."""
    journals = folder / f"journal-{ready}"
    await asyncio.to_thread(journals.mkdir)
    async with Database(os.environ.get("DATABASE_URL") or f"sqlite:///{folder}/{ready}.db") as database:
        await migrate(database)
        journal, sql = Journal(journals, f"bench-{ready}", max_bytes=2**30), SqlLedger(database, "bench")
        async with BookedLedger(journal, sql, Telemetry(stream=io.BytesIO()), ready=lambda: ready) as books:
            yield books


def _purchase() -> Purchase:
    call, at_ms = f"0123456789abcdef-{next(_numbers)}", int(time.time() * 1000)
    space = "s1-0123456789abcdef01234567"
    return Purchase(call, at_ms, "openai-main", "text-embedding-3-small", space, 20_000, _PARTS)


def _bought_us(books: BookedLedger) -> float:
    """Microseconds for each of a thousand."""
    purchases = [_purchase() for _ in range(_AT_ONCE)]
    started = time.thread_time()
    for purchase in purchases:
        books.begin(purchase)
        books.end(purchase, 2701, "billed")
    return (time.thread_time() - started) / _AT_ONCE * 1e6


async def _booked(books: BookedLedger) -> float:
    """Seconds until many that came at once are all in SQL."""
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        _bought_us(books)
    while books.waiting:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
    return time.perf_counter() - started


async def _steadily(books: BookedLedger) -> tuple[float, float]:
    """Buys so many in every second; what part of a core that took, and the milliseconds that a call came too late."""
    late_s, began_s, cpu_s = 0.0, time.perf_counter(), time.process_time()
    for number in range(int(_PER_S * _SECONDS)):
        due_s = began_s + number / _PER_S
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        late_s = max(late_s, time.perf_counter() - due_s)
        purchase = _purchase()
        books.begin(purchase)
        books.end(purchase, 2701, "billed")
    return (time.process_time() - cpu_s) / (time.perf_counter() - began_s), late_s * 1000


if __name__ == "__main__":
    main()
