"""What becomes of callers when a database freezes, dies, fills up, crawls, or its callers leave."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain import Space
from app.storage.level import LevelDown
from app.storage.sql.cache import SqlLevel
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import facts
from tests.servers import PostgresProcess
from tests.tcp_proxy import TcpProxy

SPACE = Space("m", 8)
SLACK_S = 0.15
"""What two busy cores may add to a time."""

SOON_S = 5.0


async def ping(connection: AsyncConnection) -> int:
    """Asks for one number."""
    return int((await connection.execute(select(literal(7)))).scalar_one())


async def insert(connection: AsyncConnection, names: list[str]) -> None:
    """A fact for each of `names`."""
    await connection.execute(facts.insert(), [{"name": name, "value": ""} for name in names])


async def sleep(connection: AsyncConnection, seconds: float) -> None:
    """Keeps a connection busy."""
    await connection.execute(text(f"SELECT pg_sleep({seconds})"))


async def count(database: Database) -> int:
    """How many facts there are but the schema's own."""
    statement = select(func.count()).select_from(facts).where(facts.c.name.not_like("schema.%"))
    rows = await database.read(lambda connection: connection.execute(statement), within_s=SOON_S)
    return int(rows.scalar_one())


async def refused(asked: Awaitable[Any]) -> float:
    """How many seconds it took to be refused."""
    started = time.monotonic()
    with pytest.raises(DatabaseDown):
        await asked
    return time.monotonic() - started


async def until(holds: Callable[[], bool]) -> float:
    """How many seconds it took to hold."""
    started = time.monotonic()
    while not holds():  # noqa: ASYNC110 — what is waited for tells nobody
        await asyncio.sleep(0.01)
    return time.monotonic() - started


async def idle(database: Database) -> None:
    """Nothing is under way any more."""
    await until(lambda: not database._errands)


def our_tasks() -> set[asyncio.Task[Any]]:
    """All but those of a proxy, which ends a connection a little later than its client."""
    return {task for task in asyncio.all_tasks() if "TcpProxy" not in repr(task.get_coro())}


@asynccontextmanager
async def migrated(url: str) -> AsyncIterator[Database]:
    """A database whose connections and tasks are counted when it is closed."""
    before = our_tasks()
    async with Database(url) as database:
        await migrate(database)
        yield database
        await idle(database)
        assert [engine.pool.checkedout() for engine in engines(database)] == [0, 0]
    assert our_tasks() == before


def engines(database: Database) -> list[Any]:
    """Those under its two lanes."""
    return [database._engines.single.engine, database._engines.transactions.engine]


async def warm(database: Database, connections: int = 5) -> None:
    """Has connections made, so that what is measured is not how long that takes."""
    await asyncio.gather(*(database.read(partial(sleep, seconds=0.05), within_s=SOON_S) for _ in range(connections)))


@pytest.mark.parametrize("how", ["frozen", "deaf"])
async def test_a_server_that_does_not_answer_costs_its_budget_and_then_nothing(
    own_postgres: PostgresProcess, how: str
) -> None:
    """Reads fail in time, after a second whatever comes fails at once; back within three seconds with all it had."""
    changes: list[bool] = []
    parts = urlsplit(own_postgres.url)
    async with TcpProxy(own_postgres.port) as proxy:
        url = parts._replace(netloc=f"user@127.0.0.1:{proxy.port}").geturl()
        async with migrated(url) as database:
            database._on_change = lambda up, reason: changes.append(up)
            await warm(database)
            await database.write(partial(insert, names=["before"]), within_s=SOON_S)
            if how == "frozen":
                own_postgres.freeze()
            else:
                proxy.black_hole = True
            try:
                for _ in range(3):
                    assert await refused(database.read(ping, within_s=0.05)) < 0.05 + SLACK_S
                assert await until(lambda: not database.up) < 1 + SLACK_S
                for _ in range(100):
                    assert await refused(database.write(ping, within_s=SOON_S)) < 0.01 + SLACK_S
                await asyncio.sleep(2.5)  # a real server's time: long enough for a probe to fail
                assert changes == [False]
            finally:
                own_postgres.thaw()
                proxy.black_hole = False
            assert await until(lambda: database.up) < 3 + SLACK_S
            assert await database.read(ping, within_s=SOON_S) == 7
            assert await count(database) == 1
    assert changes == [False, True]


async def test_a_server_killed_in_a_transaction_leaves_nothing_of_it(own_postgres: PostgresProcess) -> None:
    """The callers are told, the pool recovers by itself, what was committed is there."""

    async def half(connection: AsyncConnection) -> None:
        await insert(connection, ["half"])
        own_postgres.kill()
        await insert(connection, ["whole"])

    async with migrated(own_postgres.url) as database:
        await warm(database)
        await database.write(partial(insert, names=["before"]), within_s=SOON_S)
        assert await refused(database.write(half, within_s=SOON_S)) < 1
        for _ in range(3):
            assert await refused(database.read(ping, within_s=SOON_S)) < 1
        assert not database.up
        own_postgres.start()
        assert await until(lambda: database.up) < 3 + SLACK_S
        assert await count(database) == 1
        await warm(database)


async def test_a_restart_between_two_calls_goes_unnoticed(own_postgres: PostgresProcess) -> None:
    """Connections that died while nobody used them are made anew."""
    async with migrated(own_postgres.url) as database:
        await warm(database)
        await asyncio.to_thread(own_postgres.restart)
        await asyncio.gather(*(database.read(ping, within_s=SOON_S) for _ in range(5)))


async def test_a_locked_table_holds_up_nobody(own_postgres: PostgresProcess) -> None:
    """Reads of the cache fail in their time; the lock gone, they find what was there."""
    entry = (b"k" * 32, b"value")
    async with migrated(own_postgres.url) as database, Database(own_postgres.url) as other:
        level = SqlLevel(database, within_s=0.05)
        await level.write(SPACE, [entry])
        await warm(database)

        async def lock(connection: AsyncConnection) -> None:
            await connection.execute(text("LOCK TABLE cache"))
            for _ in range(4):
                started = time.monotonic()
                with pytest.raises(LevelDown):
                    await level.read(SPACE, [entry[0]])
                assert time.monotonic() - started < 0.05 + SLACK_S

        await other.write(lock, within_s=SOON_S)
        await until(lambda: database.up)
        assert await SqlLevel(database, within_s=SOON_S).read(SPACE, [entry[0]]) == dict([entry])


async def test_a_distant_server_is_asked_once_for_a_whole_piece(own_postgres: PostgresProcess) -> None:
    """One round trip for 256 texts; connections are made and warmed, however great the hurry of who asks first."""
    kept = [(number.to_bytes(32, "big"), b"v" * 50) for number in range(256)]
    async with TcpProxy(own_postgres.port) as proxy:
        url = urlsplit(own_postgres.url)._replace(netloc=f"user@127.0.0.1:{proxy.port}").geturl()
        async with migrated(own_postgres.url) as near:
            await SqlLevel(near).write(SPACE, kept)
        async with Database(url) as far:
            proxy.latency_s = 0.03
            level, keys = SqlLevel(far, within_s=0.1), [key for key, _ in kept]
            for _ in range(2):  # ten round trips before the first question, and two more to prepare it
                with pytest.raises(LevelDown, match="slow"):
                    await level.read(SPACE, keys)
                await idle(far)
            before, started = proxy._requests, time.monotonic()
            assert await SqlLevel(far, within_s=SOON_S).read(SPACE, keys) == dict(kept)
            assert proxy._requests - before == 1
            assert time.monotonic() - started >= 0.06
            assert proxy.connections == 1


async def test_a_file_that_is_full_still_answers(tmp_path: Path) -> None:
    """What does not fit is refused whole; reads go on, and so do writes once there is room."""
    async with migrated(f"sqlite:///{tmp_path / 'x.db'}") as database:
        level = SqlLevel(database, within_s=SOON_S)
        kept = [(number.to_bytes(32, "big"), b"v" * 2000) for number in range(50)]
        await level.write(SPACE, kept)

        async def bound(connection: AsyncConnection, pages: int) -> None:
            await connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        await database.write(partial(bound, pages=1), within_s=SOON_S)  # as many as it has
        more = [(number.to_bytes(32, "big"), b"v" * 2000) for number in range(50, 150)]
        for _ in range(5):
            with pytest.raises(LevelDown, match="SQLITE_FULL"):
                await level.write(SPACE, more)
        assert database.up
        assert (await level.stats()).entries == 50
        assert await level.read(SPACE, [key for key, _ in kept]) == dict(kept)
        await database.write(partial(bound, pages=10_000), within_s=SOON_S)
        await level.write(SPACE, more)
        assert (await level.stats()).entries == 150


async def test_a_file_that_another_program_writes_makes_nobody_wait_longer_than_they_said(tmp_path: Path) -> None:
    """Readers do not notice; writers are refused in time, and write again once it is free."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    async with migrated(url) as database, Database(url) as other:

        async def hold(connection: AsyncConnection) -> None:
            await insert(connection, ["theirs"])
            assert await refused(database.write(partial(insert, names=["ours"]), within_s=0.1)) < 0.1 + SLACK_S
            assert await count(database) == 0

        await other.write(hold, within_s=SOON_S)
        await database.write(partial(insert, names=["ours again"]), within_s=SOON_S)
        rows = await database.read(lambda connection: connection.execute(select(facts.c.name)), within_s=SOON_S)
        assert {"ours again", "theirs"} <= {*rows.scalars()}


async def test_a_storm_of_callers_that_leave_hurts_nobody(database_url: str) -> None:
    """Two hundred at random points of reads and transactions: those begun are finished, whole, and the pool too."""
    rng = random.Random(19)

    async def both(connection: AsyncConnection, name: str) -> None:
        await insert(connection, [f"{name} a"])
        await connection.execute(select(1))
        await insert(connection, [f"{name} b"])

    async with migrated(database_url) as database:
        callers = []
        for number in range(200):
            use: Any = partial(both, name=str(number)) if number % 2 else ping
            ask = database.write if number % 2 else database.read
            callers.append(asyncio.create_task(ask(use, within_s=SOON_S)))
        for caller in rng.sample(callers, 200):
            await asyncio.sleep(0)
            if rng.random() < 0.3:
                await asyncio.sleep(0.001)
            caller.cancel()
        ended = await asyncio.gather(*callers, return_exceptions=True)
        assert any(isinstance(each, asyncio.CancelledError) for each in ended)
        await idle(database)
        assert await count(database) % 2 == 0
        assert database.up
        assert await asyncio.gather(*(database.read(ping, within_s=SOON_S) for _ in range(50))) == [7] * 50


async def test_more_callers_than_may_wait_are_refused_at_once(database_url: str) -> None:
    """The others are served."""
    async with migrated(database_url) as database:
        await idle(database)
        ended = await asyncio.gather(
            *(database.read(ping, within_s=SOON_S) for _ in range(1500)), return_exceptions=True
        )
        told = [each for each in ended if isinstance(each, DatabaseDown)]
        assert (len(told), {str(each) for each in told}) == (500, {"busy"})
        assert [each for each in ended if each == 7] == [7] * 1000


async def test_closing_waits_for_no_server(own_postgres: PostgresProcess) -> None:
    """Not even for one that is frozen in the middle of a transaction; whoever waited is told."""
    async with Database(own_postgres.url) as database:
        await migrate(database)
        await warm(database)
        asked = asyncio.create_task(database.write(partial(sleep, seconds=60), within_s=60))
        await asyncio.sleep(0.05)
        own_postgres.freeze()
        started = time.monotonic()
    try:
        with pytest.raises(DatabaseDown, match="closed"):
            await asked
        assert time.monotonic() - started < 2
    finally:
        own_postgres.thaw()


async def test_an_error_of_the_server_is_no_reason_to_leave_it_alone(own_postgres: PostgresProcess) -> None:
    """It is told with its code, however often."""
    async with migrated(own_postgres.url) as database:
        for _ in range(5):
            with pytest.raises(DatabaseDown, match="22012"):
                await database.read(lambda c: c.execute(text("SELECT 1 / 0")), within_s=SOON_S)
        assert database.up
