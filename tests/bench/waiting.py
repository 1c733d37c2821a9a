"""Measures what waiting costs: time and memory per text in the queue, and the whole service with its queue full."""

import asyncio
import time
from contextlib import AsyncExitStack

import psutil

from app.domain import EmbeddingRequest, Priority, Tenant
from app.engine.workitem import Fit, WorkItem
from app.engine.workqueue import QueueBound, WorkQueue
from app.telemetry import Telemetry
from app.tokens import Cl100k
from tests.bench.callers import request
from tests.bench.figures import Figure
from tests.bench.processes import (
    LOADING,
    SERVING,
    UPSTREAM_MODEL,
    Server,
    apart,
    configured,
    embedgate,
    read,
    server,
    upstream,
)
from tests.bench.prose import passages, relabelled

_TEXTS, _TENANTS = 100_000, 100
_TEXT_TOKENS, _REQUEST_TEXTS = 200, 1_500
_FOREVER_MS = 600_000


async def measure() -> list[Figure]:
    """Put, take and memory at 100,000 waiting texts; RSS of the service at both bounds of its queue."""
    put_us, take_us, text_bytes = await apart(_queue)
    rss_bytes, waiting = await _service_at_its_bound()
    return [
        Figure("100,000 waiting: put", put_us, 20, "µs"),
        Figure("100,000 waiting: take", take_us, 20, "µs"),
        Figure("100,000 waiting: memory beside the text", text_bytes / 1000, 1.5, "KB/text"),
        Figure("service with 100,000 texts of 200 tokens waiting: RSS", rss_bytes / 1e6, 1000, "MB", details=waiting),
    ]


def _queue() -> tuple[float, float, float]:
    """Microseconds to put and to take one of 100,000 texts, each of a request of its own, and the bytes it holds."""
    loop = asyncio.new_event_loop()
    queue, process = WorkQueue(QueueBound(), Telemetry(), clock=loop.time), psutil.Process()
    texts = [f"text {number}" for number in range(_TEXTS)]
    tenants = [Tenant(f"tenant {number}") for number in range(_TENANTS)]
    before_bytes = process.memory_info().rss
    waiting = [_item(number, text, tenants, loop) for number, text in enumerate(texts)]
    started_s = time.perf_counter()
    for item in waiting:
        queue.put(item.waiters[0], [item])
    put_s = time.perf_counter() - started_s
    grown_bytes = process.memory_info().rss - before_bytes
    started_s, taken = time.perf_counter(), 0
    while len(queue):
        taken += len(queue.take(Fit(2048, 300_000, 8_000_000), queue.demands()[0]).items)
    take_s = time.perf_counter() - started_s
    loop.close()
    assert taken == _TEXTS
    return put_s / _TEXTS * 1e6, take_s / _TEXTS * 1e6, grown_bytes / _TEXTS


def _item(number: int, text: str, tenants: list[Tenant], loop: asyncio.AbstractEventLoop) -> WorkItem:
    now_s = loop.time()
    wanted = EmbeddingRequest(tenants[number % _TENANTS], "model", (text,), now_s + 1000, Priority(number % 3))
    return WorkItem(number.to_bytes(32, "big"), text, 20, len(text), loop.create_future(), [wanted], now_s)


async def _service_at_its_bound() -> tuple[int, dict[str, object]]:
    """The serving process's RSS in bytes when its queue is full behind an upstream that does not answer."""
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(_FOREVER_MS), cores=LOADING))
        limits = f"max_in_flight = 1\nmax_batch_items = 1\ntimeout_s = {_FOREVER_MS / 1000}"
        configuration = configured("waiting", {UPSTREAM_MODEL: (stand_in, limits)})
        ours = await stack.enter_async_context(server(*embedgate(configuration), cores=SERVING))
        process = psutil.Process(ours.pid)
        idle_bytes = process.memory_info().rss
        await _fill(ours, stack)
        waiting = await _full(ours)
        return process.memory_info().rss, {"idle_mb": idle_bytes / 1e6, **waiting}


async def _fill(ours: Server, stack: AsyncExitStack) -> None:
    """Sends 100,000 texts in the largest legal requests and stays connected."""
    loop, base = asyncio.get_running_loop(), passages(Cl100k(), [_TEXT_TOKENS] * _REQUEST_TEXTS)
    for label, start in enumerate(range(0, _TEXTS, _REQUEST_TEXTS)):
        texts = relabelled(base[: _TEXTS - start], label)
        asked = request(texts, headers=f"x-embedgate-deadline-ms: {_FOREVER_MS}\r\n")
        transport, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", ours.port)
        stack.callback(transport.abort)
        transport.write(asked)


async def _full(ours: Server) -> dict[str, float]:
    """What waits, once all is counted and queued but the one text whose call is in flight."""
    async with asyncio.timeout(60):
        while True:
            waiting = await _waiting(ours)
            if waiting["items"] >= _TEXTS - 1:
                return waiting
            await asyncio.sleep(0.5)


async def _waiting(ours: Server) -> dict[str, float]:
    """How many texts and tokens wait, by the service's own metrics."""
    lines = (await read(ours, "/metrics")).text.splitlines()
    return {
        unit: sum(float(line.split()[-1]) for line in lines if line.startswith(f"embedgate_queue_{unit}{{"))
        for unit in ("items", "tokens")
    }
