"""Measures what the largest legal request does to everybody else: to the event loop, and to a lone text."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np
import orjson

from app.tokens import Cl100k
from tests.bench.callers import Load, ask, drive, request, unique
from tests.bench.figures import Figure
from tests.bench.processes import (
    LOADING,
    RESULTS,
    SERVING,
    UPSTREAM_MODEL,
    Server,
    configured,
    embedgate,
    server,
    upstream,
)
from tests.bench.prose import passages, prose, relabelled

_TEXTS, _TEXT_TOKENS = 2048, 146
_CALL_TEXTS, _LATENCY_MS = 128, 50.0
_REPEATS, _LONE_S = 2, 4.0
_labels = itertools.count(1)


async def measure() -> list[Figure]:
    """The loop's lag by answer and upstream format, then a lone text's p99 beside such requests."""
    base = passages(Cl100k(), [_TEXT_TOKENS] * _TEXTS)
    return [*await _lags(base), await _lone(base)]


def _largest(base: list[str], model: str, *, base64: bool = True) -> bytes:
    """The largest legal request, with texts that were never asked for before."""
    return request(relabelled(base, next(_labels)), model=model, base64=base64, headers="connection: close\r\n")


# ── the event loop ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Run:
    """When one request ran, by the system's clock."""

    began_s: float
    ended_s: float


async def _lags(base: list[str]) -> list[Figure]:
    samples = RESULTS / "lags.json"
    runs: dict[tuple[str, str], list[_Run]] = {}
    async with AsyncExitStack() as stack:
        texts = await stack.enter_async_context(server(*upstream(_LATENCY_MS), cores=LOADING))
        numbers = await stack.enter_async_context(server(*upstream(_LATENCY_MS, "--floats"), cores=LOADING))
        configuration = configured("largest", {"base64": (texts, ""), "floats": (numbers, "")})
        probed = ("tests.bench.probed", "{port}", str(configuration), str(samples))
        ours = await stack.enter_async_context(server(*probed, cores=SERVING))
        for _ in range(_REPEATS):
            for answer, bought in itertools.product(("base64", "floats"), repeat=2):
                asked = _largest(base, bought, base64=answer == "base64")
                runs.setdefault((answer, bought), []).append(await _timed(ours, asked))
    late = np.array(orjson.loads(samples.read_bytes()))
    return [_lag(f"answer {answer}, upstream {bought}", late, seen) for (answer, bought), seen in runs.items()]


async def _timed(ours: Server, asked: bytes) -> _Run:
    began_s = time.monotonic()
    answer = await ask(ours, asked)
    run = _Run(began_s, time.monotonic())
    assert b'"index":%d,' % (_TEXTS - 1) in answer[-100_000:]
    return run


def _lag(case: str, late: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", runs: list[_Run]) -> Figure:
    within = np.zeros(len(late), dtype=bool)
    for run in runs:
        within |= (late[:, 0] >= run.began_s) & (late[:, 0] <= run.ended_s)
    late_ms = late[within, 1] * 1000
    details = {
        "max_ms": round(float(late_ms.max()), 1),
        "samples": len(late_ms),
        "request_s": [round(run.ended_s - run.began_s, 2) for run in runs],
    }
    p99_ms = float(np.percentile(late_ms, 99))
    return Figure(f"largest request, {case}: loop lag p99", p99_ms, 50, "ms", details=details)


# ── a lone text ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def _lone(base: list[str]) -> Figure:
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(_LATENCY_MS), cores=LOADING))
        limits = f"max_in_flight = 4\nmax_batch_items = {_CALL_TEXTS}"
        configuration = configured("lone", {UPSTREAM_MODEL: (stand_in, limits)})
        ours = await stack.enter_async_context(server(*embedgate(configuration), cores=SERVING))
        call = request(base[:_CALL_TEXTS], headers="connection: close\r\n")
        calls_s = [run.ended_s - run.began_s for run in [await _direct(stand_in, call) for _ in range(20)]]
        lone = unique(prose()[:200])
        solo = await drive(ours, lone, callers=1, seconds=_LONE_S)
        beside, largest_s = await _beside(ours, lone, base)
    call_ms = float(np.median(calls_s)) * 1000
    details = {
        "solo_p99_ms": round(solo.ms(99), 1), "beside_p99_ms": round(beside.ms(99), 1),
        "beside_p50_ms": round(beside.ms(50), 1), "call_ms": round(call_ms, 1), "largest_request_s": largest_s,
    }  # fmt: skip
    ratio = beside.ms(99) / (2 * solo.ms(99) + call_ms)
    return Figure("lone text beside largest requests: p99 over 2 × solo p99 + a call", ratio, 1, "×", details=details)


async def _direct(stand_in: Server, call: bytes) -> _Run:
    began_s = time.monotonic()
    await ask(stand_in, call)
    return _Run(began_s, time.monotonic())


async def _beside(ours: Server, lone: Iterator[bytes], base: list[str]) -> tuple[Load, list[float]]:
    """A lone caller's load while the largest requests follow one another, and how long each of these took."""
    took_s: list[float] = []

    async def keep_asking() -> None:
        while True:
            run = await _timed(ours, _largest(base, UPSTREAM_MODEL))
            took_s.append(round(run.ended_s - run.began_s, 2))

    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(keep_asking())
        load = await drive(ours, lone, callers=1, seconds=_LONE_S)
        asking.cancel()
    return load, took_s
