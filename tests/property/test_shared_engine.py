"""Fairness over replicas: a tenant's share of a quota is one, wherever its requests arrive."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest

from app.domain import Limits, Tenant
from app.errors import DeadlineExceeded, Overloaded
from app.storage.redis_limiter import RedisLimiter
from app.storage.redis_server import RedisServer
from tests.replicas import TimelessServer, replica, timeless
from tests.rig import Noticeboard, Rig, ScriptedProvider, engine

pytestmark = pytest.mark.looptime(noop_cycles=1)  # all I/O is blocking here

QUOTA = Limits(tokens_per_minute=600_000, max_in_flight=64)
SECOND_TOKENS = QUOTA.tokens_per_minute // 60
HEAVY_TOKENS, LIGHT_TOKENS = 2000, 20
LIGHT = "BCDEFGHIJK"


@pytest.fixture
def server(redis_url: str) -> Iterator[TimelessServer]:
    """An empty server in virtual time."""
    with timeless(redis_url) as found:
        yield found


@asynccontextmanager
async def replicas(server: TimelessServer, *, new: bool = False, deaf: bool = False) -> AsyncIterator[list[Rig]]:
    """Three engines on one quota, saved up; where they are all `new` it counts as used, and comes back evenly.

    The `deaf` do not hear each other.
    """
    board, loop = Noticeboard(), asyncio.get_running_loop()
    board.torn = deaf
    if new:
        server.client.flushall()
    async with AsyncExitStack() as stack:
        rigs = []
        for number in range(3):
            limiter = replica(server, {"d0": QUOTA})
            if new:
                limiter = RedisLimiter(
                    cast("RedisServer", server), {"d0": QUOTA},
                    replica=f"new{number}", max_replicas=4, clock=lambda: 1e6 + loop.time(),
                )  # fmt: skip
            made = engine(
                ScriptedProvider(), limits=QUOTA, limiter=await stack.enter_async_context(limiter),
                max_input_tokens=4000, several_tenants=True, shares=board.seat(),
            )  # fmt: skip
            rigs.append(await stack.enter_async_context(made))
        yield rigs


# ── one heavy tenant, ten light ones ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Log:
    """What the requests came to that were made once the first window was over, by tenant."""

    since_s: float
    refused: Counter[str] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)

    @property
    def p99_s(self) -> float:
        """The wait that one request of the light tenants in a hundred exceeds."""
        return sorted(self.waits_s)[int(len(self.waits_s) * 0.99)]

    def complaints(self, solo: "Log") -> set[str]:
        """Which promises to the light tenants were broken."""
        broken = {"refused"} if any(self.refused[name] for name in LIGHT) else set()
        return broken | ({"slow"} if self.p99_s > 2 * solo.p99_s + QUOTA.window_s else set())


async def arrive(rigs: Sequence[Rig], name: str, log: Log, *, until_s: float, tenant: str) -> None:
    """Sends texts at an even rate, whatever becomes of them, to `rigs` by turns."""
    loop = asyncio.get_running_loop()
    per_s, tokens = (20, HEAVY_TOKENS) if name == "A" else (2, LIGHT_TOKENS)

    async def send(rig: Rig, number: int) -> None:
        began_s = loop.time()
        try:
            await rig.ask(f"{name}{number}" + " x" * (tokens - 1), tenant=Tenant(tenant))
        except (Overloaded, DeadlineExceeded):
            log.refused[name] += began_s >= log.since_s
        else:
            if name in LIGHT and began_s >= log.since_s:
                log.waits_s.append(loop.time() - began_s)

    await asyncio.sleep(ord(name) % 16 * 0.037)
    turns = itertools.cycle(rigs)
    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            if loop.time() >= until_s:
                return
            group.create_task(send(next(turns), number))
            await asyncio.sleep(1 / per_s)


async def crowd(
    server: TimelessServer, heavy_at: slice, *, warm_s: float = 65.0, lasts_s: float = 15.0, together: bool = False
) -> Log:
    """Tenant A offers four times the quota at some replicas, the light ones 2 texts a second each at all of them.

    `together`: as one tenant, so that whoever came first is served first.
    """
    server.client.flushall()
    loop = asyncio.get_running_loop()
    log = Log(loop.time() + warm_s)
    async with replicas(server) as rigs, asyncio.TaskGroup() as group:
        for name in "A" + LIGHT:
            at = rigs[heavy_at] if name == "A" else rigs
            tenant = "everybody" if together else name
            if at:
                group.create_task(arrive(at, name, log, until_s=log.since_s + lasts_s, tenant=tenant))
    print(f"p99 {log.p99_s * 1000:.0f} ms of {len(log.waits_s)}, refused {dict(log.refused)}")
    return log


NOWHERE, PINNED, SPREAD = slice(0), slice(1), slice(3)


@pytest.mark.parametrize("heavy_at", [PINNED, SPREAD], ids=["pinned", "spread"])
async def test_light_tenants_do_not_notice_a_heavy_one(server: TimelessServer, heavy_at: slice) -> None:
    """At a quota that binds, who wants less than a share gets all of it, nearly as fast as alone (T16)."""
    solo = await crowd(server, NOWHERE, warm_s=0.0)
    log = await crowd(server, heavy_at)
    assert not log.complaints(solo)
    assert log.refused["A"] > 0


async def test_without_tenants_the_heavy_one_would_be_noticed(server: TimelessServer) -> None:
    """The control: where all are one tenant, the light ones wait for as long as the heavy one."""
    solo = await crowd(server, NOWHERE, warm_s=0.0)
    log = await crowd(server, PINNED, together=True)
    assert "slow" in log.complaints(solo)


# ── backlogged tenants ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Backlog:
    """A tenant of so much weight that always has 120,000 tokens waiting, at some replicas together."""

    name: str
    at: slice
    weight: float = 1.0
    tokens: int = HEAVY_TOKENS

    async def wait(self, rigs: Sequence[Rig], until_s: float) -> None:
        """Asks again whenever it is answered."""
        loop, numbers = asyncio.get_running_loop(), itertools.count()

        async def caller(rig: Rig) -> None:
            while loop.time() < until_s:
                said = f"{self.name} {next(numbers)}" + " x" * (self.tokens - 2)
                await rig.ask(said, tenant=Tenant(self.name, self.weight), within_s=1000.0)

        async with asyncio.TaskGroup() as group:
            for rig in itertools.islice(itertools.cycle(rigs[self.at]), 120_000 // self.tokens):
                group.create_task(caller(rig))


@dataclass
class Course:
    """Who was served when, until the backlogs ended; `spread_tokens` is the largest difference, weights allowed for."""

    served: Counter[str]
    spread_tokens: float
    largest_tokens: int

    @classmethod
    def of(cls, rigs: Sequence[Rig], backlogs: Sequence[Backlog], until_s: float) -> "Course":
        """What the providers saw."""
        weights = {backlog.name: backlog.weight for backlog in backlogs}
        calls = sorted(
            (call for rig in rigs for call in rig.provider.calls if call[0] <= until_s), key=lambda it: it[0]
        )
        served, spread, largest = Counter(dict.fromkeys(weights, 0)), 0.0, 0
        for _, texts in calls:
            words = [str(text).split() for text in texts]
            for text in words:
                served[text[0]] += len(text)
            largest = max(largest, sum(map(len, words)))
            levels = [tokens / weights[name] for name, tokens in served.items()]
            spread = max(spread, max(levels) - min(levels))
        return cls(served, spread, largest)


async def compete(server: TimelessServer, *backlogs: Backlog, for_s: float = 70.0, deaf: bool = False) -> Course:
    """How the quota was divided."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + for_s
    async with replicas(server, new=True, deaf=deaf) as rigs, asyncio.TaskGroup() as group:
        for backlog in backlogs:
            group.create_task(backlog.wait(rigs, until_s))
    course = Course.of(rigs, backlogs, until_s)
    print(f"{dict(course.served)}, apart by {course.spread_tokens:.0f}, largest batch {course.largest_tokens}")
    assert course.served.total() >= 0.95 * SECOND_TOKENS * for_s
    return course


@pytest.mark.parametrize("tokens", [HEAVY_TOKENS, 200], ids=["equal texts", "shorter texts"])
async def test_backlogged_tenants_get_the_same_wherever_they_ask(server: TimelessServer, tokens: int) -> None:
    """One at one replica, the other at all: never further apart than a second of quota and two batches."""
    course = await compete(server, Backlog("A", PINNED), Backlog("C", SPREAD, tokens=tokens))
    assert course.spread_tokens <= SECOND_TOKENS + 2 * course.largest_tokens


async def test_replicas_that_do_not_hear_each_other_are_unfair(server: TimelessServer) -> None:
    """The control: who asks everywhere gets more."""
    course = await compete(server, Backlog("A", PINNED), Backlog("C", SPREAD), deaf=True)
    assert course.spread_tokens > 3 * (SECOND_TOKENS + 2 * course.largest_tokens)


@pytest.mark.parametrize("at", [[slice(0, 1), slice(1, 2), slice(2, 3)], [SPREAD] * 3], ids=["one each", "everywhere"])
async def test_weights_hold_over_replicas(server: TimelessServer, at: Sequence[slice]) -> None:
    """Weights of 1, 2 and 4 bring 1, 2 and 4 parts of seven, within 10 %."""
    tenants = [Backlog(f"W{weight}", part, weight) for weight, part in zip((1, 2, 4), at, strict=True)]
    course = await compete(server, *tenants)
    for tenant in tenants:
        fair = course.served.total() * tenant.weight / 7
        assert course.served[tenant.name] == pytest.approx(fair, rel=0.1)
