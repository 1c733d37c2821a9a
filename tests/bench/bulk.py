"""Measures bulk work: how much of the engine's speed a job keeps, and the memory that it takes.

`python -m tests.bench bulk` is the first, `python -m tests.bench.bulk` the second: 200 MB, then a million lines.
"""

import asyncio
import base64
import itertools
import os
import secrets
import statistics
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import orjson
import psutil
import uvloop

from app.api import bulk
from app.domain import EmbeddingRequest, Priority
from app.job import ENDED, Order, StoredFile, file_blob
from app.runtime import Runtime
from app.settings import load
from tests.bench.figures import Figure
from tests.bench.processes import (
    KEY,
    LOADING,
    RESULTS,
    SERVING,
    UPSTREAM_MODEL,
    Server,
    apart,
    configured,
    embedgate,
    server,
    upstream,
)

_LINES, _ROUNDS, _AT_ONCE = 50_000, 3, 1024
_LIMITS = "max_in_flight = 8\nmax_batch_items = 2048"
_numbers = itertools.count()


async def measure() -> list[Figure]:
    """Texts per second of jobs over those of the same engine fed directly, in one process with one core."""
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(0), cores=LOADING))
        path = configured("bulk", {UPSTREAM_MODEL: (stand_in, _LIMITS)})
        direct, jobs = await apart(_Rates(path))
    ratio = statistics.median(job / straight for job, straight in zip(jobs, direct, strict=True))
    details = {"direct_texts_per_s": direct, "job_texts_per_s": jobs, "lines": _LINES}
    return [Figure("a job's texts/s over the engine's own", ratio, 0.6, "×", at_least=True, details=details)]


class _Rates:
    """What runs in a process of its own; it can be pickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> tuple[list[float], list[float]]:
        os.sched_setaffinity(0, SERVING)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_rates(self._path))


async def _rates(path: Path) -> tuple[list[float], list[float]]:
    """Texts per second of each round, straight and as jobs, in turns."""
    straight, jobs = [], []
    async with Runtime(load(path, {})) as runtime, bulk.runner(runtime):
        for _ in range(_ROUNDS):
            straight.append(await _straight(runtime))
            jobs.append(await _job(runtime))
    return straight, jobs


async def _straight(runtime: Runtime) -> float:
    tenant, todo = runtime.tenants[KEY], iter(_texts(_LINES))

    async def feed() -> None:
        for text in todo:
            deadline = time.monotonic() + 600.0
            await runtime.gateway.embed(EmbeddingRequest(tenant, UPSTREAM_MODEL, (text,), deadline, Priority.BULK))

    started = time.perf_counter()
    await asyncio.gather(*(feed() for _ in range(_AT_ONCE)))
    return _LINES / (time.perf_counter() - started)


async def _job(runtime: Runtime) -> float:
    """From when it is begun until its files are there."""
    jobs, blobs, tenant = runtime.stores.jobs, runtime.stores.blobs, runtime.tenants[KEY]
    file = StoredFile(f"file-{secrets.token_hex(12)}", tenant.name, "batch", "in.jsonl", 1, int(time.time()))
    async with blobs.writing(file_blob(file.id)) as writer:
        for piece in _pieces(_LINES):
            await writer.write(b"".join(piece))
    await jobs.add_file(file, most_bytes=0)
    order = Order(f"batch_{secrets.token_hex(12)}", tenant.name, "", "", file.id, 86_400, {})
    started = time.perf_counter()
    job = await jobs.create(order, most_open=0)
    while job.status not in ENDED:
        await asyncio.sleep(0.02)
        job = await jobs.job(tenant.name, job.id) or job
    assert (job.status, job.completed) == ("completed", _LINES), job
    return _LINES / (time.perf_counter() - started)


def _texts(count: int) -> Iterator[str]:
    for _ in range(count):
        yield f"text number {next(_numbers)} of {os.getpid()}"


def _lines(count: int) -> Iterator[bytes]:
    for at, text in enumerate(_texts(count)):
        wanted = {"model": UPSTREAM_MODEL, "input": text, "encoding_format": "base64"}
        line = {"custom_id": f"line-{at}", "method": "POST", "url": "/v1/embeddings", "body": wanted}
        yield orjson.dumps(line) + b"\n"


def _pieces(count: int) -> Iterator[list[bytes]]:
    lines = _lines(count)
    while piece := list(itertools.islice(lines, 1000)):
        yield piece


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _memory() -> None:
    """Prints the resident memory of a whole service while it works on large files."""
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(0), cores=LOADING))
        path = configured("bulk-memory", {UPSTREAM_MODEL: (stand_in, _LIMITS)})
        bounds = "max_lines = 2000000\nmax_inputs = 2000000\nmax_file_bytes = 2000000000"
        bounds += "\n[cache]\nmemory_bytes = 67108864"  # it fills up whatever is done: so the rest is seen
        await asyncio.to_thread(lambda: path.write_text(f"{path.read_text()}[bulk]\n{bounds}\n"))
        ours = await stack.enter_async_context(server(*embedgate(path), cores=SERVING))
        http = await stack.enter_async_context(_client(ours))
        filler = base64.b64encode(os.urandom(2800)).decode()
        for what, count, width in (("50,000 lines", 50_000, None), ("1,000,000 lines", 1_000_000, 64)):
            file, body = RESULTS / "bulk.jsonl", {} if width is None else {"dimensions": width}
            await asyncio.to_thread(_write, file, count, filler if width is None else "", body)
            await _watch(http, ours, what, file, count)
            file.unlink()


def _client(ours: Server) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{ours.port}", headers=headers, timeout=600.0)


def _write(file: Path, count: int, filler: str, body: dict[str, int]) -> None:
    with file.open("wb") as kept:
        for at in range(count):
            wanted = {"model": UPSTREAM_MODEL, "encoding_format": "base64", **body, "input": f"{at} {filler}"}
            line = {"custom_id": f"line-{at}", "method": "POST", "url": "/v1/embeddings", "body": wanted}
            kept.write(orjson.dumps(line) + b"\n")


async def _watch(http: httpx.AsyncClient, ours: Server, what: str, file: Path, count: int) -> None:
    process, peak = psutil.Process(ours.pid), 0
    before = process.memory_info().rss
    with file.open("rb") as stream:
        uploaded = await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", stream)})
    wish = {"input_file_id": uploaded.json()["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    started = time.perf_counter()
    job, marks = (await http.post("/v1/batches", json=wish)).json(), {10: 0, 50: 0, 100: 0}
    while job["status"] not in ENDED:
        await asyncio.sleep(0.2)
        peak = max(peak, rss := process.memory_info().rss)
        job = (await http.get(f"/v1/batches/{job['id']}")).json()
        done = 100 * job["request_counts"]["completed"] // count
        marks = {mark: seen or (rss if done >= mark else 0) for mark, seen in marks.items()}
    took_s = time.perf_counter() - started
    assert job["status"] == "completed", job
    at = ", ".join(f"{seen / 2**20:.0f} MiB at {mark} %" for mark, seen in marks.items())
    size = (await asyncio.to_thread(file.stat)).st_size / 1e6
    print(
        f"{what} ({size:.0f} MB): {before / 2**20:.0f} MiB before, {at}, peak {peak / 2**20:.0f} MiB; "
        f"{count / took_s:.0f} lines/s"
    )


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as main:
        main.run(_memory())
