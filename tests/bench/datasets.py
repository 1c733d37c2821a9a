"""Measures `embedgate embed`: how much of the engine's speed it keeps, and how much of a slow provider's."""

import asyncio
import json
import os
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop

from app.embed_desk import Asking, desk
from app.settings import load
from tests.bench.figures import Figure
from tests.bench.processes import (
    LOADING,
    RESULTS,
    ROOT,
    SERVING,
    UPSTREAM_MODEL,
    apart,
    configured,
    place,
    server,
    upstream,
)

_ROWS, _ROUNDS, _BATCH_ROWS, _AT_ONCE = 40_000, 3, 100, 40
_LATENCY_S, _POOL = 0.2, 8
_LIMITS = f"max_in_flight = {_POOL}\nmax_batch_items = {_BATCH_ROWS}"


async def measure() -> list[Figure]:
    """Rows per second from CSV to .npy over those of the engine itself; and over what a slow provider can take."""
    return [await _beside_the_engine(), await _beside_the_provider()]


async def _beside_the_engine() -> Figure:
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(0), cores=LOADING))
        path = configured("datasets", {UPSTREAM_MODEL: (stand_in, _LIMITS)})
        rates, straight = [], []
        for number in range(_ROUNDS):
            straight.append(await apart(_Straight(path, number)))
            rates.append(await _dataset(path, f"d{number}"))
    ratio = statistics.median(rate / direct for rate, direct in zip(rates, straight, strict=True))
    details = {"rows_per_s": rates, "engine_texts_per_s": straight, "rows": _ROWS}
    return Figure("a dataset's rows/s over the engine's own", ratio, 0.8, "×", at_least=True, details=details)


async def _beside_the_provider() -> Figure:
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(1000 * _LATENCY_S), cores=LOADING))
        path = configured("datasets", {UPSTREAM_MODEL: (stand_in, _LIMITS)})
        rate = await _dataset(path, "slow")
    most = _POOL * _BATCH_ROWS / _LATENCY_S
    details = {"rows_per_s": rate, "most_rows_per_s": most, "rows": _ROWS}
    name = "a dataset's rows/s over calls at once × batch / 200 ms"
    return Figure(name, rate / most, 0.8, "×", at_least=True, details=details)


def _texts(name: str) -> list[str]:
    return [f"text number {number} of {name} {os.getpid()}" for number in range(_ROWS)]


async def _dataset(path: Path, name: str) -> float:
    """Rows per second of the command, from its first row on."""
    source, out = RESULTS / "datasets.csv", RESULTS / "datasets.npy"
    await asyncio.to_thread(source.write_text, "\n".join(["text", *_texts(name)]) + "\n")
    command = ["embed", str(source), "--out", str(out), "--config", str(path), "--json", "--force"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *command, cwd=ROOT, stdout=PIPE, stderr=PIPE
    )
    place(SERVING, process.pid)
    said, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    report = json.loads(said)
    assert (report["rows"], report["cached"], report["kept"]) == (_ROWS, 0, 0), report
    return _ROWS / float(report["seconds"])


@dataclass
class _Straight:
    """What runs in a process of its own: the same texts by as many requests, answered into memory, and let go."""

    path: Path
    number: int

    def __call__(self) -> float:
        place(SERVING)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._rate())

    async def _rate(self) -> float:
        texts = _texts(f"s{self.number}")
        todo = iter([texts[at : at + _BATCH_ROWS] for at in range(0, len(texts), _BATCH_ROWS)])
        async with desk(load(self.path, {}), Asking(UPSTREAM_MODEL)) as at:

            async def feed() -> None:
                for batch in todo:
                    await at.runtime.gateway.embed(at.asking.request(batch, deadline=time.monotonic() + 600.0))

            started = time.perf_counter()
            await asyncio.gather(*(feed() for _ in range(_AT_ONCE)))
            return _ROWS / (time.perf_counter() - started)
