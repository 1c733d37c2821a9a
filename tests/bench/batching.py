"""Measures how well texts of many callers travel together, and what that costs each of them."""

import itertools
import statistics
from contextlib import AsyncExitStack

from tests.bench.callers import drive, request, unique
from tests.bench.contenders import serving
from tests.bench.figures import Figure
from tests.bench.processes import (
    LOADING,
    SERVING,
    UPSTREAM_MODEL,
    configured,
    embedgate,
    read,
    server,
    upstream,
)
from tests.bench.prose import prose

_CALLERS, _ROUNDS, _ROUND_S = 256, 3, 2.0
_LATENCY_MS = 50.0


async def measure() -> list[Figure]:
    """Uncached single texts of 256 callers, an upstream of 50 ms, four calls in flight."""
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(_LATENCY_MS), cores=LOADING))
        configuration = configured("batching", {UPSTREAM_MODEL: (stand_in, "max_in_flight = 4")})
        bare = await stack.enter_async_context(server(*serving("bare"), cores=SERVING))
        ours = await stack.enter_async_context(server(*embedgate(configuration), cores=SERVING))
        text = prose()[:200]
        loads = []
        for _ in range(_ROUNDS):
            least = await drive(bare, itertools.repeat(request(text)), callers=_CALLERS, seconds=_ROUND_S)
            loads.append((least, await drive(ours, unique(text), callers=_CALLERS, seconds=_ROUND_S)))
        bill = (await read(stand_in, "/bill")).json()
    ratio = statistics.median(mine.ms(50) / (_LATENCY_MS + least.ms(50)) for least, mine in loads)
    details = {
        "bare_p50_ms": [round(least.ms(50), 1) for least, _ in loads],
        "embedgate_p50_ms": [round(mine.ms(50), 1) for _, mine in loads],
        "embedgate_p99_ms": [round(mine.ms(99), 1) for _, mine in loads],
        "embedgate_requests_per_s": [round(mine.rate) for _, mine in loads],
        "upstream_calls": bill["requests"],
    }
    return [
        Figure("uncached, 256 callers: texts per call", bill["items"] / bill["requests"], 20, "texts", at_least=True),
        Figure("uncached, 256 callers: p50 over upstream + bare", ratio, 2, "×", details=details),
    ]
