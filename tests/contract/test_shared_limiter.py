"""What replicas promise together: one quota, whoever asks, comes, goes, is cut off or finds the server empty."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain import Limits, Priority
from app.ports import Claim, Grant, NotYet, Stated
from app.storage.quota import Quota
from app.storage.redis_limiter import RedisLimiter
from app.storage.redis_server import Script, StoreDown
from tests.quotas import NAME, Judge, claim, granted, offer, patiently, refused
from tests.replicas import TimelessServer, replica, timeless

pytestmark = pytest.mark.looptime

SMALL = {NAME: Limits(max_in_flight=0, tokens_per_minute=1000)}
VENDOR = {NAME: Limits(max_in_flight=0, tokens_per_minute=60_000, requests_per_minute=600)}


@pytest.fixture
def server(redis_url: str) -> Iterator[TimelessServer]:
    """An empty server in virtual time."""
    with timeless(redis_url) as found:
        yield found


@asynccontextmanager
async def replicas(
    server: TimelessServer, count: int, limits: Mapping[str, Limits], *, most: int = 4
) -> AsyncIterator[list[RedisLimiter]]:
    """So many, of at most `most`."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(replica(server, limits, max_replicas=most)) for _ in range(count)]


def overdrawn(judge: Judge, limit: int, *, since_s: float = 0.0) -> int:
    """How much more than the limit ever arrived in a minute."""
    judge.arrivals = [arrival for arrival in judge.arrivals if arrival[0] >= since_s]
    return max(0, judge.most(60.0) - limit)


# ── T1, T2: used, not broken ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 3, 10])
async def test_replicas_use_one_quota_and_never_break_it(server: TimelessServer, count: int) -> None:
    """600 s of three times the demand: in no minute more than the limit, in every full one at least 95 %."""
    async with replicas(server, count, VENDOR, most=10) as limiters:
        judge = await offer(*limiters, for_s=600.0, late_s=0.5, callers=12, paced=True)
    minutes = [sum(n for at, n in judge.arrivals if start <= at < start + 60.0) for start in range(60, 540, 60)]
    print(f"{count} replicas: " + " ".join(f"{used / 60_000:.1%}" for used in minutes))
    assert judge.most(60.0) <= 60_000
    assert judge.most(60.0, requests=True) <= 600
    assert min(minutes) >= 0.95 * 60_000


async def test_a_replica_that_joins_or_leaves_changes_nothing(server: TimelessServer) -> None:
    """One is there from the third minute on, one until the fifth."""
    async with replicas(server, 3, VENDOR) as limiters:
        spells = [(0.0, 600.0), (180.0, 600.0), (0.0, 300.0)]
        judge = await offer(*limiters, for_s=600.0, late_s=0.5, callers=12, paced=True, spells=spells)
    minutes = [sum(n for at, n in judge.arrivals if start <= at < start + 60.0) for start in range(60, 540, 60)]
    print("joining and leaving: " + " ".join(f"{used / 60_000:.1%}" for used in minutes))
    assert judge.most(60.0) <= 60_000
    assert min(minutes) >= 0.95 * 60_000


async def test_no_burst_gets_through(server: TimelessServer) -> None:
    """Fifty requests at three replicas at one moment get the limit, to the unit, and later what became free."""
    limits = {NAME: Limits(max_in_flight=0, tokens_per_minute=100)}
    rng = random.Random(1)
    async with replicas(server, 3, limits) as limiters:
        wanted = [claim(rng.choice([58, 80, 175]), waits=False) for _ in range(50)]
        answers = await asyncio.gather(*(limiters[at % 3].reserve(one) for at, one in enumerate(wanted)))
        first = sum(answer.tokens for answer in answers if isinstance(answer, Grant))
        assert first in (58, 80)
        await asyncio.sleep(60.9)
        answers = await asyncio.gather(*(limiters[at % 3].reserve(one) for at, one in enumerate(wanted)))
        again = [answer.tokens for answer in answers if isinstance(answer, Grant)]
        assert sum(again) <= 175
        assert len(again) == 1


async def test_the_largest_legal_request_is_not_slowed_on_an_idle_deployment(server: TimelessServer) -> None:
    """300,000 tokens of a million a minute go at once."""
    async with replicas(server, 3, {NAME: Limits(tokens_per_minute=1_000_000)}) as limiters:
        assert (await granted(limiters[0], claim(300_000, paced=True))).start_in_s == 0.0


# ── leases ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_killed_replica_frees_its_slots_by_itself(server: TimelessServer) -> None:
    """Those of a living one are kept for as long as its calls take."""
    limits = {NAME: Limits(max_in_flight=4)}
    async with replicas(server, 1, limits) as (alive,):
        kept = await granted(alive, claim(1))
        async with replicas(server, 1, limits) as (killed,):
            for _ in range(3):
                await granted(killed, claim(1))
            await refused(alive, claim(1))
        await asyncio.sleep(5.5)
        for _ in range(3):
            await granted(alive, claim(1))
        await asyncio.sleep(100.0)
        await refused(alive, claim(2))
        await alive.settle(kept, 1)
        await granted(alive, claim(2))


# ── T6: gone and back ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_frozen_server_leaves_each_replica_its_part(server: TimelessServer) -> None:
    """Three of at most four replicas use three quarters meanwhile, nobody breaks the limit, and the rest comes back."""
    async with replicas(server, 3, VENDOR) as limiters:
        loop = asyncio.get_running_loop()

        async def freeze() -> None:
            await asyncio.sleep(120.0)
            server.asleep = True
            await asyncio.sleep(120.0)
            server.asleep = False

        async with asyncio.TaskGroup() as group:
            group.create_task(freeze())
            judge = await offer(*limiters, for_s=420.0, late_s=0.5, callers=20, sizes=(1, 500), paced=True)
        assert loop.time() >= 420.0
    minutes = [sum(n for at, n in judge.arrivals if start <= at < start + 60.0) for start in range(60, 420, 60)]
    print("frozen from 120 s to 240 s: " + " ".join(f"{used / 60_000:.1%}" for used in minutes))
    assert judge.most(60.0) <= 60_000
    assert min(minutes[1:3]) >= 0.6 * 60_000
    assert minutes[4] >= 0.9 * 60_000


async def test_alone_from_the_start_the_quota_is_earned_first(server: TimelessServer) -> None:
    """Nobody knows what was granted before, so it counts as used up, and comes back as it is earned."""
    server.asleep = True
    loop = asyncio.get_running_loop()
    async with RedisLimiter(server, SMALL, replica="new", max_replicas=1, clock=lambda: 1e6 + loop.time()) as limiter:  # type: ignore[arg-type]
        assert await refused(limiter, claim(500)) == pytest.approx(30.0, abs=1.0)


async def test_alone_nobody_grants_what_is_more_than_its_part(server: TimelessServer) -> None:
    """Each would grant the same to another one: three parts of a half are more than the whole."""
    async with replicas(server, 3, SMALL) as limiters:
        for limiter in limiters:
            await limiter.settle(await granted(limiter, claim(1)), 1)
        await asyncio.sleep(61.0)
        server.asleep = True
        for limiter in limiters:
            await refused(limiter, claim(500))
            await granted(limiter, claim(200))


# ── T7: empty ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["flushed", "an older copy"])
async def test_a_server_that_forgot_is_told(server: TimelessServer, fault: str) -> None:
    """While the minute is used up: in no minute more than one percent above the limit, and it goes on within 10 s."""
    copies: dict[str, bytes] = {}

    async def lose() -> None:
        await asyncio.sleep(148.0)
        keys = list(server.client.scan_iter("eg:*"))
        copies.update({key: server.client.dump(key) for key in keys})
        await asyncio.sleep(2.0)
        server.client.flushall()
        for key, copy in copies.items() if fault == "an older copy" else ():
            server.client.restore(key, 0, copy)

    async with replicas(server, 3, VENDOR) as limiters, asyncio.TaskGroup() as group:
        group.create_task(lose())
        judge = await offer(*limiters, for_s=300.0, late_s=0.5, callers=20, sizes=(1, 500), paced=True)
    soon = sum(n for at, n in judge.arrivals if 150.0 <= at < 160.0)
    print(f"{fault}: {judge.most(60.0) / 60_000:.2%} at most, {soon / 10_000:.1%} in the 10 s after")
    assert judge.most(60.0) <= 1.01 * 60_000
    assert soon >= 0.9 * 10_000


async def test_an_empty_server_and_a_new_replica_begin_with_an_empty_bucket(server: TimelessServer) -> None:
    """Never with a full one: whatever had been granted is not known to anybody."""
    loop = asyncio.get_running_loop()
    server.client.flushall()
    async with RedisLimiter(server, SMALL, replica="new", max_replicas=1, clock=lambda: 1e6 + loop.time()) as limiter:  # type: ignore[arg-type]
        assert await refused(limiter, claim(500)) == pytest.approx(30.0, abs=1.0)
        grant = await patiently(limiter, claim(10))
        assert grant.tokens == 10
        await asyncio.sleep(61.0)
        assert (await granted(limiter, claim(1, 1000))).tokens >= 980


async def test_what_the_first_to_come_did_not_know_is_told_by_the_next(server: TimelessServer) -> None:
    """An emptied server hears from everybody what they had seen of the memory it lost, once."""
    async with replicas(server, 3, SMALL) as (first, second, third):
        for limiter in (first, second, third):
            await granted(limiter, claim(10))
        await asyncio.sleep(1.5)
        await granted(second, claim(800))
        await granted(third, claim(20))
        server.client.flushall()
        for limiter in (first, second, third, first, second, third):
            await granted(limiter, claim(1))
        assert (await granted(second, claim(1, 1000))).tokens == 1000 - 856


async def test_an_account_that_nobody_used_is_free_on_a_server_that_remembers(server: TimelessServer) -> None:
    """Also for a replica that has only just begun; on a server that has only just begun it is earned first."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(100.0)
    async with RedisLimiter(server, SMALL, replica="new", max_replicas=1, clock=lambda: 1e6 + loop.time()) as limiter:  # type: ignore[arg-type]
        assert (await granted(limiter, claim(1000))).tokens == 1000


async def test_who_has_not_listened_cannot_tell_an_empty_server(server: TimelessServer) -> None:
    """What others used since then is not known to it: the bucket begins empty, not full."""
    async with replicas(server, 2, SMALL) as (idle, busy):
        await idle.settle(await granted(idle, claim(10)), 10)
        await asyncio.sleep(100.0)
        await granted(busy, claim(900))
        server.client.flushall()
        assert await refused(idle, claim(500)) == pytest.approx(30.0, abs=1.0)


# ── T8, T9, T12 ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_clock_that_jumps_back_gives_nothing_away(server: TimelessServer) -> None:
    """Redis' own time steps back by 30 s: the same is granted, no wait is negative."""
    async with replicas(server, 2, VENDOR) as limiters, asyncio.TaskGroup() as group:

        async def jump() -> None:
            await asyncio.sleep(150.0)
            server.offset_s = -30.0

        group.create_task(jump())
        judge = await offer(*limiters, for_s=330.0, late_s=0.5, callers=20, sizes=(1, 500), paced=True)
    minutes = [sum(n for at, n in judge.arrivals if start <= at < start + 60.0) for start in range(60, 300, 60)]
    assert judge.most(60.0) <= 60_000
    assert min(minutes) >= 0.95 * 60_000


class Forgetful(TimelessServer):
    """Carries out every third admission and loses its answer."""

    admissions = 0

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> object:
        """See `TimelessServer`."""
        answer = await super().run(script, keys, arguments)
        self.admissions += len(keys) > 1
        if len(keys) > 1 and self.admissions % 3 == 0:
            raise StoreDown("lost")
        return answer


async def test_a_lost_answer_is_asked_for_again_and_counted_once(redis_url: str) -> None:
    """The reservation's id makes it the same wish, and a settlement once made stays the only one."""
    with timeless(redis_url) as plain:
        server = Forgetful(plain.client)
        async with replicas(server, 1, SMALL) as (limiter,):
            for _ in range(20):
                await limiter.settle(await granted(limiter, claim(10)), 5)
            answer = await limiter.reserve(claim(1, 1000))
            assert isinstance(answer, Grant)
            assert 880 <= answer.tokens <= 900


class Distant(TimelessServer):
    """Takes its time."""

    async def run(self, script: Script, keys: object, arguments: object) -> object:
        """See `TimelessServer`."""
        answer = await super().run(script, keys, arguments)  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        return answer


async def test_a_grant_whose_caller_has_left_is_given_back(redis_url: str) -> None:
    """Cancelled while the answer is under way: neither its slot nor its tokens are lost."""
    with timeless(redis_url) as plain:
        async with replicas(Distant(plain.client), 1, {NAME: Limits(0, 1000, max_in_flight=2)}) as (limiter,):
            for _ in range(5):
                asked = asyncio.create_task(limiter.reserve(claim(300)))
                await asyncio.sleep(0.01)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                await asyncio.sleep(0.1)
            assert (await granted(limiter, claim(1, 1000))).tokens == 1000


async def test_all_keys_of_an_account_lie_in_one_slot_of_a_cluster(server: TimelessServer) -> None:
    """Whatever its name: braces, spaces, four thousand letters."""
    for name in ("plain", "{}", "a b", "tenant {x}", "é" * 2000):
        async with replicas(server, 1, {name: Limits(tokens_per_minute=10)}) as (limiter,):
            await granted(limiter, claim(1, to=name))
    tags = {key.split(b"{")[1].split(b"}")[0] for key in server.client.scan_iter("eg:*:state")}
    assert len(tags) == 5
    assert all(len(list(server.client.scan_iter(b"eg:{" + tag + b"}*"))) <= 4 for tag in tags)


# ── one arithmetic ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Step:
    """What one event of the comparison does."""

    after_s: float
    least: int
    more: int
    priority: Priority
    paced: bool
    rank: float
    waits: bool
    settle: int
    used: float | None
    throttle: float | None
    stated: Stated | None


STEPS = st.builds(
    Step,
    after_s=st.sampled_from([0.0, 0.01, 0.3, 2.0, 30.0, 70.0]),
    least=st.one_of(st.integers(1, 400), st.integers(900, 1500)),
    more=st.integers(0, 600),
    priority=st.sampled_from(Priority),
    paced=st.booleans(),
    rank=st.sampled_from([0.0, 0.0, 3.5]),
    waits=st.sampled_from([True, True, True, False]),
    settle=st.integers(0, 5),
    used=st.sampled_from([None, 0.0, 0.5, 1.0, 1.5]),
    throttle=st.sampled_from([None, None, None, None, 0.0, 5.0]),
    stated=st.sampled_from([None, None, Stated(5, 800, 2, 100), Stated(None, 500, None, None)]),
)
SPANS = st.sampled_from([(60.0,), (1.0, 60.0), (60.0, 10.0)])


@given(steps=st.lists(STEPS, min_size=5, max_size=40), spans_s=SPANS, slots=st.sampled_from([0, 0, 2]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_script_decides_as_the_process_does(
    redis_url: str, steps: list[Step], spans_s: tuple[float, ...], slots: int
) -> None:
    """Whatever happens in whatever order, both give the same answers, to the microsecond."""
    limits = Limits(1200, 1000, max_in_flight=slots, judged_spans_s=spans_s)
    loop = asyncio.get_running_loop()
    with timeless(redis_url) as server:
        async with replicas(server, 1, {NAME: limits}) as (shared,):
            offset_s = 1_700_000_000
            quota, open_grants = Quota(limits), list[tuple[Grant, Grant]]()
            for number, step in enumerate(steps):
                await asyncio.sleep(step.after_s)
                now_us = offset_s * 1_000_000 + int(loop.time() * 1_000_000)
                wish = Claim(
                    NAME, step.least, step.least + step.more, step.priority,
                    paced=step.paced, rank=step.rank, waits=step.waits,
                )  # fmt: skip
                theirs, ours = await shared.reserve(wish), quota.reserve(wish, str(number), now_us, "")
                assert type(theirs) is type(ours)
                if isinstance(theirs, NotYet) or isinstance(ours, NotYet):
                    assert theirs == ours
                else:
                    assert (theirs.tokens, theirs.requests, theirs.start_in_s) == (
                        ours.tokens, ours.requests, ours.start_in_s,
                    )  # fmt: skip
                    open_grants.append((theirs, ours))
                if step.throttle is not None:
                    await shared.throttled(NAME, step.throttle)
                    quota.throttled(int(step.throttle * 1e6), now_us)
                if open_grants and step.settle < 4:
                    theirs, ours = open_grants.pop(step.settle % len(open_grants))
                    used = None if step.used is None else int(step.used * ours.tokens)
                    await shared.settle(theirs, used, stated=step.stated)
                    await asyncio.sleep(0)
                    quota.settle(ours.id, used, 1, now_us, step.stated)
