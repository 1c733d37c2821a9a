"""Who spent what in a month is told at once, however much the ledger holds: it is read from sums, never from rows."""

import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import orjson
import pytest

from app.storage.sql.database import Database
from app.storage.sql.migrations import migrate
from app.storage.sql.usage import SqlUsage
from app.usage_desk import UsageDesk
from tests.contract.summed import overheard
from tests.servers import PostgresProcess

TENANTS, MOST_MS, TRIES = 10_000, 200.0, 7
SIZES = [3_000_000, *([30_000_000] if os.environ.get("EMBEDGATE_TRIAL_LARGE") else [])]
MONTH = [("start", "2026-11-01"), ("end", "2026-12-01")]
OPTIONS = {"shared_buffers": "1GB", "maintenance_work_mem": "1GB", "work_mem": "256MB", "autovacuum": "off"}
TABLES, INDEXES = ("ledger", "usage_days", "usage_totals"), ("ledger_pkey", "ledger_by_time", "ledger_uncertain")

# Rows of all tenants throughout November 2026, of two models; one in a thousand is not confirmed by the vendor.
LEDGER = """
INSERT INTO ledger SELECT 'c' || n, 0, 1793491200000 + n * 2592000000 / {rows}, 'r', 'tenant-' || n % {tenants}, '',
    'k', '', (ARRAY['small', 'large'])[1 + n / {tenants} % 2], 's1-0123456789abcdef01234567', 'openai', 'miss',
    CASE WHEN n % 1000 = 7 THEN 'unconfirmed' ELSE 'billed' END, 8, 400, 400, 20000, 8000
FROM generate_series({first}::bigint, {rows} - 1, 2) n
"""
SUMS = """
INSERT INTO {table} SELECT at_ms / {unit_ms}, {groups}, count(*), sum(texts), sum(tokens), sum(nano_usd), 0,
    coalesce(sum(nano_usd) FILTER (WHERE state = 'unconfirmed'), 0), 0
FROM ledger GROUP BY at_ms / {unit_ms}, {groups}
"""
SPARED = """
INSERT INTO {table} SELECT {moment}, {named}, 0, 0, 0, 0, 0, 0, 0, sum(calls), 0, sum(tokens), sum(nano_usd), 0
FROM {table} GROUP BY {moment}, {kept}
"""
COUNTED = "SELECT count(*), pg_total_relation_size('ledger') FROM usage_days"
DAYS = {
    "table": "usage_days", "moment": "day", "unit_ms": 86_400_000, "kept": "tenant, model",
    "groups": "tenant, project, model, deployment, cause", "named": "tenant, '', model, '', ''",
}  # fmt: skip
TOTALS = {
    "table": "usage_totals", "moment": "hour", "unit_ms": 3_600_000, "kept": "model",
    "groups": "model, deployment, cause", "named": "model, '', ''",
}  # fmt: skip

Question = Callable[[UsageDesk], Awaitable[dict[str, Any]]]
QUESTIONS: Mapping[str, Question] = {
    "a tenant, by model": lambda desk: desk.usage([*MONTH, ("by", "month")], within="tenant-77"),
    "a tenant, by day and model": lambda desk: desk.usage(MONTH, within="tenant-77"),
    "all tenants, by model": lambda desk: desk.usage([*MONTH, ("by", "month")], within=None),
    "all tenants, by day and model": lambda desk: desk.usage(MONTH, within=None),
    "all tenants, by hour and model": lambda desk: desk.usage([*MONTH, ("by", "hour")], within=None),
    "what no vendor confirmed": lambda desk: desk.uncertain(MONTH),
}


async def fill(url: str, rows: int) -> None:
    """A month of raw rows, and their sums as the ledger's writer makes them; not those of each tenant's hours."""
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(connected(url)) for _ in range(2)]
        one, other = both
        indexes = await one.fetch("SELECT indexdef FROM pg_indexes WHERE indexname = ANY($1)", INDEXES)
        for table in TABLES:
            await one.execute(f"ALTER TABLE {table} SET UNLOGGED")
        await one.execute("ALTER TABLE ledger DROP CONSTRAINT ledger_pkey")
        await one.execute("DROP INDEX ledger_by_time, ledger_uncertain")
        halves = (LEDGER.format(first=first, rows=rows, tenants=TENANTS) for first in range(2))
        await asyncio.gather(*(each.execute(half) for each, half in zip(both, halves, strict=True)))
        for index in indexes:
            await one.execute(index["indexdef"])
        await one.execute("ALTER TABLE ledger ADD PRIMARY KEY USING INDEX ledger_pkey")
        await asyncio.gather(one.execute(SUMS.format(**DAYS)), other.execute(SUMS.format(**TOTALS)))
        await one.execute(SPARED.format(**DAYS))
        await one.execute(SPARED.format(**TOTALS))
        for table in TABLES:
            await one.execute(f"VACUUM ANALYZE {table}")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Past the service."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def measured(database: Database, connection: asyncpg.Connection, name: str) -> float:
    """Milliseconds of an answer, from the question to its JSON, half of the tries; with its plan, printed."""
    desk, took_ms, answer = UsageDesk(SqlUsage(database)), list[float](), dict[str, Any]()
    with overheard(database) as heard:
        for _ in range(TRIES):
            started = time.perf_counter()
            answer = await QUESTIONS[name](desk)
            orjson.dumps(answer)
            took_ms.append((time.perf_counter() - started) * 1000)
    middle = statistics.median(took_ms)
    print(f"\n{name}: {middle:.1f} ms (worst of {TRIES}: {max(took_ms):.1f}), {len(answer['data'])} lines")
    statement, parameters = heard[-1]
    for row in await connection.fetch(f"EXPLAIN (ANALYZE, COSTS, BUFFERS, TIMING OFF) {statement}", *parameters):
        print(f"    {row[0][:150]}")
    assert answer["data"]
    return middle


@pytest.mark.parametrize("rows", SIZES, ids=lambda rows: f"{rows // 10**6} million rows")
async def test_a_month_is_told_within_200_ms(rows: int) -> None:
    """Of one tenant and of all ten thousand: as quick with ten times as many rows behind it."""
    with PostgresProcess(OPTIONS) as server:
        async with connected(server.url) as connection, Database(server.url) as database:
            await migrate(database)
            started = time.monotonic()
            await fill(server.url, rows)
            sums, size_bytes = await connection.fetchrow(COUNTED)
            took_s = time.monotonic() - started
            print(f"\n{rows:,} rows, {size_bytes >> 20} MiB, {sums:,} sums of days, made in {took_s:.0f} s")
            took_ms = {name: await measured(database, connection, name) for name in QUESTIONS}
    assert max(took_ms.values()) <= MOST_MS
