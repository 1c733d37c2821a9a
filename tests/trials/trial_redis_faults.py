"""Redis fails in seven ways under a steady load: callers hardly notice, and replicas tell how they count meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import pytest_asyncio
import redis

from tests.emulators.judge import Judge
from tests.servers import PostgresProcess
from tests.trials.replicas import (
    Callers,
    Course,
    Stage,
    per_minute,
    side_by_side,
    small_texts,
    stage,
    through,
)

PER_SECOND = 60.0
QUOTA = 12_000, 600_000
AT_ONCE = 2
"""So many stages share this machine."""

Fault = Callable[[Stage], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def frozen(on: Stage) -> AsyncIterator[None]:
    """Its connections stay, nothing is answered."""
    on.valkey.freeze()
    yield
    on.valkey.thaw()


@asynccontextmanager
async def black_holed(on: Stage) -> AsyncIterator[None]:
    """Whatever is sent arrives nowhere."""
    on.to_valkey.black_hole = True
    yield
    on.to_valkey.black_hole = False


@asynccontextmanager
async def killed(on: Stage) -> AsyncIterator[None]:
    """It is gone, and comes back empty."""
    await asyncio.to_thread(on.valkey.kill)
    yield
    await asyncio.to_thread(on.valkey.start)


@asynccontextmanager
async def distant(on: Stage) -> AsyncIterator[None]:
    """Every answer takes 400 ms."""
    on.to_valkey.latency_s = 0.2
    yield
    on.to_valkey.latency_s = 0.0


@asynccontextmanager
async def without_scripts(on: Stage) -> AsyncIterator[None]:
    """Somebody forbids scripts; everything else is answered."""
    with redis.Redis.from_url(on.valkey.url) as client:
        client.execute_command("ACL SETUSER default -@scripting")
        yield
        client.execute_command("ACL SETUSER default +@scripting")


@asynccontextmanager
async def lossy(on: Stage) -> AsyncIterator[None]:
    """Each hundredth command is carried out and its answer lost."""
    on.to_valkey.drop_reply(100)
    yield
    on.to_valkey.drop_reply(0)


@asynccontextmanager
async def scripts_flushed(on: Stage) -> AsyncIterator[None]:
    """It has forgotten all scripts."""
    with redis.Redis.from_url(on.valkey.url) as client:
        client.script_flush()
    yield


FAULTS: dict[Fault, float] = {
    frozen: 30.0, black_holed: 8.0, killed: 8.0, distant: 8.0, without_scripts: 8.0, lossy: 8.0, scripts_flushed: 4.0,
}  # fmt: skip
"""And how many seconds each lasts."""

HARMLESS = {lossy, scripts_flushed}
"""Those that are no reason to count alone."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The course of one fault, and how many calls the provider's judge refused in it."""

    course: Course
    refusals: int

    @property
    def shared_s(self) -> float:
        """How soon after the fault all counted together again."""
        return self.course.watch.all_s(self.course.ended_s, alone=False)

    @property
    def slow(self) -> str:
        """That it was not in time, if so."""
        return "" if self.in_time else "late"

    @property
    def in_time(self) -> bool:
        """Whether all of this is within bounds."""
        return self.course.added_s <= 0.150 and self.course.worst_s <= 1.0 and self.shared_s <= 3.0


async def take_place(fault: Fault, on: Stage) -> Seen:
    """The fault, within a steady load."""
    texts = small_texts(f"{fault.__name__} {time.monotonic()}")
    callers = Callers(on.urls, texts, per_second=PER_SECOND)
    course = await through(fault(on), FAULTS[fault], on, callers)
    return Seen(course, on.emulator.judge.refusals)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresProcess
) -> AsyncIterator[Callable[[str], Seen]]:
    """What came of every fault. All stages are set before the first begins, for starting them takes the machine."""
    folder = tmp_path_factory.mktemp("redis")
    async with AsyncExitStack() as stack:
        works = {}
        for fault in FAULTS:
            on = await stack.enter_async_context(
                stage(folder / fault.__name__, postgres.new_database(), Judge(*QUOTA), per_minute(*QUOTA))
            )
            works[fault.__name__] = partial(take_place, fault, on)
        results = await side_by_side(works, at_once=AT_ONCE, again_at_once=1, slow=lambda each: each.slow)
    yield results


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_callers_hardly_notice(seen: Callable[[str], Seen], fault: Fault) -> None:
    """T6, T9, T10: all answered as ever, no one hangs, no quota is broken, and the replicas stay in service."""
    result = seen(fault.__name__)
    course = result.course
    answers = [*course.faulty, *course.after]
    good = sum(answer.as_it_should_be for answer in answers) / len(answers)
    alone_s = course.watch.all_s(course.began_s, alone=True)
    print(
        f"\n{fault.__name__}: {good:.2%} of {len(answers)} answered, p99 {course.added_s * 1000:+.0f} ms, worst "
        f"{course.worst_s * 1000:.0f} ms, {result.refusals} refused by the provider; alone after {alone_s:.2f} s, "
        f"shared again after {result.shared_s:.2f} s"
    )
    assert all(answer.right for answer in answers if answer.status == 200)
    assert good >= 0.99
    assert result.in_time
    assert result.refusals == 0
    assert all(sight.ready for sight in course.watch.sights)
    if fault not in HARMLESS:
        assert alone_s <= 1.0
