"""Measures what a lone caller pays for the gateway in between."""

import statistics
from contextlib import AsyncExitStack

from tests.bench.callers import drive, unique
from tests.bench.figures import Figure
from tests.bench.processes import LOADING, SERVING, UPSTREAM_MODEL, configured, embedgate, server, upstream
from tests.bench.prose import prose

_ROUNDS, _ROUND_S = 3, 1.0


async def measure() -> list[Figure]:
    """The p50 of uncached single texts, less the p50 of asking the upstream itself."""
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(10), cores=LOADING))
        configuration = configured("idle", {UPSTREAM_MODEL: (stand_in, "")})
        ours = await stack.enter_async_context(server(*embedgate(configuration), cores=SERVING))
        text = prose()[:200]
        p50s_ms = []
        for _ in range(_ROUNDS):
            loads = [await drive(to, unique(text), callers=1, seconds=_ROUND_S) for to in (stand_in, ours)]
            p50s_ms.append([load.ms(50) for load in loads])
    details = {
        "direct_p50_ms": [round(direct, 2) for direct, _ in p50s_ms],
        "embedgate_p50_ms": [round(mine, 2) for _, mine in p50s_ms],
    }
    added_ms = statistics.median(mine - direct for direct, mine in p50s_ms)
    return [Figure("idle, one caller: added p50", added_ms, 2, "ms", details=details)]
