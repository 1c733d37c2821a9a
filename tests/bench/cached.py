"""Measures how much of a bare server is left when all is on and the vector is in the cache."""

import itertools
import statistics
from contextlib import AsyncExitStack

from tests.bench.callers import Load, ask, drive, request
from tests.bench.contenders import serving
from tests.bench.figures import Figure
from tests.bench.processes import LOADING, SERVING, UPSTREAM_MODEL, Server, configured, embedgate, server, upstream
from tests.bench.prose import prose

_CALLERS, _ROUNDS, _ROUND_S = 32, 3, 1.7
_TURNS, _TURN_S = 31, 0.4  # of two that should be alike


async def measure() -> list[Figure]:
    """Requests per second of processor time over those of the contenders, for a short and a long text."""
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(0), cores=LOADING))
        configuration = configured("cached", {UPSTREAM_MODEL: (stand_in, "")})
        bare = await stack.enter_async_context(server(*serving("bare"), cores=SERVING))
        fastapi = await stack.enter_async_context(server(*serving("fastapi"), cores=SERVING))
        ours = await stack.enter_async_context(server(*embedgate(configuration), cores=SERVING))
        figures = [figure for chars in (50, 1600) for figure in await _compare(chars, bare, fastapi, ours)]
        budget = "budget_usd_per_day = 10\nbudget_usd_per_month = 100"
        bounded = configured("cached-budget", {UPSTREAM_MODEL: (stand_in, "")}, tenant=budget)
        theirs = await stack.enter_async_context(server(*embedgate(bounded), cores=SERVING))
        return [*figures, await _budgeted(ours, theirs)]


async def _budgeted(without: Server, with_: Server) -> Figure:
    """The same of a tenant with a budget over one without."""
    text = prose()[:50]
    for each in (without, with_):
        await ask(each, request(text, headers="connection: close\r\n"))
    ratios = []
    for _ in range(_TURNS):
        loads = [await drive(each, itertools.repeat(request(text)), callers=_CALLERS, seconds=_TURN_S, awake=True)
                 for each in (with_, without)]  # fmt: skip
        ratios.append(loads[0].core_rate / loads[1].core_rate)
    name = "cached text with a budget: requests/core-s over without"
    return Figure(name, statistics.median(ratios), 0.95, "×", at_least=True, details={"ratios": ratios})


async def _compare(chars: int, bare: Server, fastapi: Server, ours: Server) -> list[Figure]:
    text = prose()[:chars]
    await ask(ours, request(text, headers="connection: close\r\n"))
    loads: dict[str, list[Load]] = {"bare": [], "fastapi": [], "embedgate": []}
    for _ in range(_ROUNDS):
        for name, contender in zip(loads, (bare, fastapi, ours), strict=True):
            asked = itertools.repeat(request(text))
            loads[name].append(await drive(contender, asked, callers=_CALLERS, seconds=_ROUND_S, awake=True))
    details = {
        name: {
            "requests_per_s": [round(load.rate) for load in seen],
            "requests_per_core_s": [round(load.core_rate) for load in seen],
        }
        for name, seen in loads.items()
    }
    return [
        Figure(
            f"cached text of {chars} characters: requests/core-s over {name}",
            statistics.median(
                mine.core_rate / other.core_rate
                for mine, other in zip(loads["embedgate"], loads[name], strict=True)
            ),
            target, "×", at_least=True, details=details,
        )
        for name, target in (("bare", 0.5), ("fastapi", 1.5))
    ]  # fmt: skip
