"""Postgres fails in four ways under a load: callers do not notice, kept texts are found, and nothing piles up."""

import asyncio
import itertools
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
import redis

from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator
from tests.servers import PostgresProcess, ValkeyProcess
from tests.tcp_proxy import TcpProxy
from tests.trials.replicas import (
    CALM_S,
    WARM_S,
    Answer,
    Callers,
    Course,
    Stage,
    ask,
    replicas,
    session,
    side_by_side,
    small_texts,
    stage,
    through,
)
from tests.trials.service import close_books, deployment, model

FAULT_S = 10.0
NEW_PER_S, KEPT_PER_S = 40.0, 20.0
AT_ONCE = 2
KEPT = [f"kept text {number}" for number in range(50)]
MOST_FILE_BYTES = 17 * 2**20


@dataclass(frozen=True, slots=True)
class Site:
    """A Postgres to break, and the proxy through which the replicas reach it."""

    postgres: PostgresProcess
    proxy: TcpProxy


Fault = Callable[[Site], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def frozen(at: Site) -> AsyncIterator[None]:
    """Its connections stay, nothing is answered."""
    at.postgres.freeze()
    yield
    at.postgres.thaw()


@asynccontextmanager
async def killed(at: Site) -> AsyncIterator[None]:
    """It is gone, and comes back with its data."""
    await asyncio.to_thread(at.postgres.kill)
    yield
    await asyncio.to_thread(at.postgres.start)


@asynccontextmanager
async def distant(at: Site) -> AsyncIterator[None]:
    """Every answer takes 400 ms."""
    at.proxy.latency_s = 0.2
    yield
    at.proxy.latency_s = 0.0


@asynccontextmanager
async def full(at: Site) -> AsyncIterator[None]:
    """Its table cannot grow any more, for the system makes no file of its larger; then somebody makes room in it."""
    connection = await asyncpg.connect(at.postgres.url)
    with pytest.raises(asyncpg.PostgresError, match="File too large"):
        await _fill(connection)
    yield
    await connection.execute("DELETE FROM cache WHERE space = 'filler'")
    await connection.execute("VACUUM cache")
    await connection.close()


async def _fill(connection: asyncpg.Connection) -> None:
    while True:
        filler = [(os.urandom(32), "filler", os.urandom(8000), 8000, 0, 0) for _ in range(100)]
        await connection.copy_records_to_table("cache", records=filler)


@contextmanager
def small_files() -> Iterator[None]:
    """What is started meanwhile makes no file that is larger than the 16 MiB which Postgres's log of writes needs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FAULTS: Sequence[Fault] = (frozen, killed, distant, full)
REFUSES_WRITES = {frozen, killed, full}
REPEATABLE = {frozen, killed, distant}


@dataclass(frozen=True, slots=True)
class Seen:
    """What callers with new texts got, and those with kept ones during the fault; what became of what was to be kept.

    `dropped` vectors were not; `found` are the cache's answers to texts that were bought `BACK_S` after the fault,
    from the database, since nothing else knew them any more.
    """

    fault: Fault
    course: Course
    kept: Sequence[Answer]
    dropped: float
    found: Sequence[Answer]

    @property
    def slow(self) -> str:
        """That it was not in time, if so; of a fault that may be had again."""
        return "" if self.in_time or self.fault not in REPEATABLE else "late"

    @property
    def in_time(self) -> bool:
        """Whether both are within bounds."""
        return self.course.added_s <= 0.100 and self.course.worst_s <= 1.0


async def take_place(fault: Fault, at: Site, on: Stage) -> Seen:
    """The fault, within a steady load of new and of kept texts."""
    await Callers(on.urls, small_texts(f"warm {time.monotonic()}"), per_second=NEW_PER_S).run(2.0)
    await Callers(on.urls[:1], iter(KEPT), per_second=len(KEPT)).run(1.0)
    await asyncio.sleep(0.5)
    before, name = await dropped_writes(on), f"{fault.__name__} {time.monotonic()}"
    new = Callers(on.urls, small_texts(name), per_second=NEW_PER_S)
    kept = Callers(on.urls, itertools.cycle(KEPT), per_second=KEPT_PER_S)
    async with asyncio.TaskGroup() as group:
        group.create_task(kept.run(WARM_S + CALM_S + FAULT_S))
        course = await through(fault(at), FAULT_S, on, new)
    dropped = await dropped_writes(on) - before
    bought = [f"{name} bought afterwards {number}" for number in range(10)]
    await Callers(on.urls[:1], iter(bought), per_second=50).run(0.2)
    await asyncio.sleep(1.0)
    with redis.Redis.from_url(on.valkey.url) as client:
        client.flushall()
    afterwards = Callers(on.urls[1:], iter(bought), per_second=10)
    await afterwards.run(1.0)
    return Seen(fault, course, kept.between(course.began_s, course.ended_s), dropped, afterwards.answers)


async def dropped_writes(on: Stage) -> float:
    """How many vectors the database was not given, by the replicas' own count."""
    total = 0.0
    async with session() as http:
        for url in on.urls:
            async with http.get(f"{url}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            dropped = (line for line in lines if line.startswith('embedgate_cache_writes_dropped_total{level="sql"'))
            total += sum(float(line.split()[-1]) for line in dropped)
    return total


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callable[[str], Seen]]:
    """What came of every fault. All stages are set before the first begins, for starting them takes the machine."""
    folder = tmp_path_factory.mktemp("sql")
    async with AsyncExitStack() as stack:
        works = {}
        for fault in FAULTS:
            with small_files() if fault is full else nullcontext():
                postgres = stack.enter_context(PostgresProcess())
            proxy = await stack.enter_async_context(TcpProxy(postgres.port))
            database_url = postgres.url.replace(str(postgres.port), str(proxy.port))
            on = await stack.enter_async_context(stage(folder / fault.__name__, database_url, Judge()))
            works[fault.__name__] = partial(take_place, fault, Site(postgres, proxy), on)
        yield await side_by_side(
            works,
            at_once=AT_ONCE,
            again_at_once=1,
            slow=lambda each: each.slow,
        )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_callers_do_not_notice(seen: Callable[[str], Seen], fault: Fault) -> None:
    """New texts are bought and kept ones found, as fast as ever; what cannot be written is dropped until it can be."""
    result = seen(fault.__name__)
    course = result.course
    answers = [*course.faulty, *course.after]
    hits = sum(is_hit(answer) for answer in result.kept) / len(result.kept)
    found = sum(map(is_hit, result.found))
    print(
        f"\n{fault.__name__}: p99 {course.added_s * 1000:+.0f} ms of {len(answers)}, worst "
        f"{course.worst_s * 1000:.0f} ms, "
        f"{hits:.1%} of the kept texts found, {result.dropped:.0f} writes dropped, then {found} of 10 kept"
    )
    assert all(answer.right for answer in (*answers, *result.kept, *result.found))
    assert result.in_time
    assert hits >= 0.99
    assert (result.dropped > 0) is (fault in REFUSES_WRITES)
    assert found >= 9
    assert all(sight.ready for sight in course.watch.sights)


def is_hit(answer: Answer) -> bool:
    """Whether the cache had it."""
    return answer.headers.get("x-embedgate-cache") == "hit=1,miss=0"


async def test_ten_replicas_start_at_once(tmp_path: Path, valkey: ValkeyProcess, postgres: PostgresProcess) -> None:
    """On an empty database; every one of them comes up and serves."""
    async with OpenAIEmulator() as emulator:
        served = deployment("only", emulator.base_url) + model("only")
        stores = {"redis_url": valkey.url, "database_url": postgres.new_database()}
        async with replicas(tmp_path / "ten", served, **stores, count=10) as urls, session() as http:
            for url in urls:
                async with http.get(f"{url}/readyz") as ready:
                    assert ready.status == 200
            answers = [await ask(http, url, f"text for {url}") for url in urls]
        journals = tmp_path / "ten.data" / "journal"
        await close_books("ten", stores["database_url"], {"only": emulator}, journals=journals, replicas=len(urls))
    assert all(answer.right for answer in answers)
