"""Measures what sharing costs as it grows: a permit among many tenants and replicas, a request from each level."""

import asyncio
import itertools
import statistics
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import asyncpg
import redis

from app.domain import Limits, Priority
from app.ports import Claim, Grant
from app.storage.redis_limiter import RedisLimiter
from app.storage.redis_server import RedisServer
from tests.bench.callers import Load, ask, drive, request
from tests.bench.figures import Figure
from tests.bench.processes import (
    KEY,
    LOADING,
    RESULTS,
    SERVING,
    UPSTREAM_MODEL,
    Server,
    embedgate,
    place,
    server,
    upstream,
)
from tests.bench.prose import prose
from tests.servers import PostgresProcess, ValkeyProcess

_DEPLOYMENT = "deployment"
_PERMITS, _AT_ONCE, _ROUNDS = 500, 8, 3
_TEXTS, _DIMENSIONS, _ASKED = 256, 384, 15
_CALLERS, _ROUND_S = 32, 1.7
_SELECTS = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query LIKE 'SELECT%FROM cache %'"


async def measure() -> list[Figure]:
    """Admission first, then the cache's levels behind the service."""
    with ValkeyProcess() as valkey, PostgresProcess({"shared_preload_libraries": "pg_stat_statements"}) as postgres:
        place(LOADING, valkey.pid)
        place(LOADING, postgres.pid)
        return [*await _admission(valkey), *await _levels(valkey, postgres)]


# ── admission ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _admission(valkey: ValkeyProcess) -> list[Figure]:
    """By how much the server's time for a script call grows with tenants, and with replicas."""
    scales = (
        {f"{count} tenants": (count, 1) for count in (1, 100, 10_000)},
        {f"{count} replicas": (100, count) for count in (1, 3, 10)},
    )
    figures = []
    for scale in scales:
        rounds = [{name: await _script_us(valkey, *of) for name, of in scale.items()} for _ in range(_ROUNDS)]
        times = {name: min(each[name] for each in rounds) for name in scale}
        title = f"admission: µs per script call, most over least of {', '.join(times)}"
        figures.append(Figure(title, max(times.values()) / min(times.values()), 1.5, "×", details=times))
    return figures


async def _script_us(valkey: ValkeyProcess, tenants: int, replicas: int) -> float:
    """The server's microseconds per script call, for permits of tenants in turn."""
    limits = {name: Limits(600_000, 6_000_000, 1000) for name in (_DEPLOYMENT, *map(str, range(tenants)))}
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
        async with AsyncExitStack() as stack:
            limiters = [await stack.enter_async_context(_limiter(valkey, limits, at)) for at in range(replicas)]
            turns = zip(itertools.cycle(limiters), itertools.cycle(map(str, range(tenants))), strict=False)
            # What was granted before is unknown, so each account begins with a minute full of slots: the worst case.
            await _permits(itertools.islice(turns, max(tenants, replicas)), ())
            client.config_resetstat()
            await _permits(itertools.islice(turns, _PERMITS), (_DEPLOYMENT,))
            return float(client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])


@asynccontextmanager
async def _limiter(valkey: ValkeyProcess, limits: Mapping[str, Limits], at: int) -> AsyncIterator[RedisLimiter]:
    async with (
        RedisServer(valkey.url, timeout_s=5.0) as shared,
        RedisLimiter(shared, limits, replica=f"replica {at}", max_replicas=10) as limiter,
    ):
        yield limiter


async def _permits(turns: Iterable[tuple[RedisLimiter, str]], deployments: Sequence[str]) -> None:
    """One for each, a few at once: the tenant's claim, those of the deployments, and all settled."""
    left = iter(turns)

    async def work() -> None:
        for limiter, tenant in left:
            for account in (tenant, *deployments):
                answer = await limiter.reserve(Claim(account, 100, 100, Priority.DEFAULT, waits=False))
                if isinstance(answer, Grant):
                    await limiter.settle(answer, 90)

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(work())


# ── levels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _levels(valkey: ValkeyProcess, postgres: PostgresProcess) -> list[Figure]:
    """The same service with its vectors in memory, in Redis and in Postgres."""
    redis_url, database_url = f"redis_url = '{valkey.url}'", f"database_url = '{postgres.url}'"
    stores = {
        "alone": ("", 2**28),
        "memory": (f"{redis_url}\n{database_url}", 2**28),
        "redis": (f"{redis_url}\n{database_url}", 0),
        "postgres": (database_url, 0),
    }
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(0), cores=LOADING))
        serving = {
            name: await stack.enter_async_context(
                server(*embedgate(_configured(name, stand_in, *of)), cores=SERVING)
            )
            for name, of in stores.items()
        }  # fmt: skip
        texts = [f"text {number} of {_TEXTS}" for number in range(_TEXTS)]
        for name in ("redis", "postgres", "memory"):
            await ask(serving[name], request(texts, headers="connection: close\r\n"))
            await asyncio.sleep(1.0)  # until it is written
        trips = await _round_trips(valkey, postgres, serving["redis"], request(texts, headers="connection: close\r\n"))
        return [*trips, *await _latencies(serving, request(texts)), await _throughput(serving)]


def _configured(name: str, stand_in: Server, stores: str, memory_bytes: int) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"growth-{name}"
    path.with_suffix(".toml").write_text(
        f"[server]\nlog_file = '{path}.log'\nsecret = 'nothing-but-benches-know-it'\n"
        f"[stores]\ndata_dir = '{path}.data'\n{stores}\n[cache]\nmemory_bytes = {memory_bytes}\n"
        f"[tenants.bench]\napi_key = '{KEY}'\n[deployments.only]\ndialect = 'openai'\nmodel = '{UPSTREAM_MODEL}'\n"
        f"base_url = 'http://127.0.0.1:{stand_in.port}/v1'\n"
        f"[models.'{UPSTREAM_MODEL}']\ndeployments = ['only']\ndimensions = {_DIMENSIONS}\ncanary_interval_s = 0\n"
    )
    return path.with_suffix(".toml")


async def _round_trips(valkey: ValkeyProcess, postgres: PostgresProcess, ours: Server, asked: bytes) -> list[Figure]:
    """How often each level is asked for the texts of one request that lie in the lowest."""
    database = await asyncpg.connect(postgres.url)
    with redis.Redis.from_url(valkey.url) as client:
        await database.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        client.flushall()
        client.config_resetstat()
        await database.execute("SELECT pg_stat_statements_reset()")
        await ask(ours, asked)
        reads = client.info("commandstats")["cmdstat_mget"]["calls"]
        selects = int(await database.fetchval(_SELECTS))
    await database.close()
    await asyncio.sleep(1.0)  # until what was found is in Redis again
    return [
        Figure(f"{_TEXTS} texts: reads of {level}", trips, 1, "per request")
        for level, trips in (("Redis", reads), ("Postgres", selects))
    ]


async def _latencies(serving: Mapping[str, Server], asked: bytes) -> list[Figure]:
    """The p50 of a request whose vectors are all in Redis, or in Postgres, over that of one from memory."""
    p50_ms: dict[str, list[float]] = {name: [] for name in ("memory", "redis", "postgres")}
    for _ in range(_ROUNDS):
        for name, rounds in p50_ms.items():
            load = await drive(serving[name], itertools.repeat(asked), callers=1, seconds=1.0)
            rounds.append(load.ms(50))
    return [
        Figure(
            f"{_TEXTS} cached texts × {_DIMENSIONS}: p50 from {name} over memory",
            statistics.median(slow / fast for slow, fast in zip(p50_ms[name], p50_ms["memory"], strict=True)),
            target, "×", details={"p50_ms": p50_ms},
        )
        for name, target in (("redis", 5), ("postgres", 10))
    ]  # fmt: skip


async def _throughput(serving: Mapping[str, Server]) -> Figure:
    """Answers from memory with Redis and Postgres beside it, over those of a service that has nothing else."""
    asked = request(prose()[:50])
    loads: dict[str, list[Load]] = {"alone": [], "memory": []}
    for name in loads:
        await ask(serving[name], request(prose()[:50], headers="connection: close\r\n"))
    for _ in range(_ROUNDS):
        for name, seen in loads.items():
            turn = partial(drive, serving[name], itertools.repeat(asked), callers=_CALLERS, seconds=_ROUND_S)
            seen.append(await turn(awake=True))
    return Figure(
        "cached text with Redis and Postgres: requests/core-s over without",
        statistics.median(m.core_rate / a.core_rate for m, a in zip(loads["memory"], loads["alone"], strict=True)),
        0.9, "×", at_least=True,
        details={name: [round(load.core_rate) for load in seen] for name, seen in loads.items()},
    )  # fmt: skip
