"""What every `Limiter` promises, judged in virtual time by a provider that counts strictly."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

import pytest

from app.domain import Limits, Priority
from app.ports import Grant, Limiter, NotYet, Stated
from app.storage.limiter import InProcessLimiter
from tests.quotas import NAME, Judge, claim, granted, offer, patiently, refused
from tests.replicas import replica, timeless

pytestmark = pytest.mark.looptime

SHORT = Limits(max_in_flight=0, tokens_per_minute=60_000, judged_spans_s=(1.0, 10.0, 60.0))
MakeLimiter = Callable[[Mapping[str, Limits]], Awaitable[Limiter]]


@pytest.fixture(params=["in process", "redis"])
async def make_limiter(request: pytest.FixtureRequest) -> AsyncIterator[MakeLimiter]:
    """Every implementation of the port."""
    if request.param == "in process":

        async def in_process(limits: Mapping[str, Limits]) -> Limiter:
            return InProcessLimiter(limits)

        yield in_process
        return
    url = request.getfixturevalue("redis_url")
    async with AsyncExitStack() as stack:
        server = stack.enter_context(timeless(url))

        async def shared(limits: Mapping[str, Limits]) -> Limiter:
            return await stack.enter_async_context(replica(server, limits))

        yield shared


# ── the quota is used, not broken ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("priority", Priority)
async def test_a_strict_judge_of_a_minute_sees_all_of_the_tokens_and_never_one_too_many(
    make_limiter: MakeLimiter, priority: Priority
) -> None:
    """With backlog at least 95 % of the tokens per minute are used, and in no span of a minute more than 100 %."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=60_000, requests_per_minute=600)})
    judge = await offer(limiter, for_s=350.0, late_s=0.5, sizes=(1, 1000), priority=priority)
    used = judge.rate() / 60_000
    print(f"tokens used at {priority.name}: {used:.1%} … {judge.most(60.0) / 60_000:.1%}")
    assert judge.most(60.0) <= 60_000
    assert judge.most(60.0, requests=True) <= 600
    assert used >= 0.95


@pytest.mark.parametrize("priority", [Priority.INTERACTIVE, Priority.BULK])
async def test_a_strict_judge_of_a_minute_sees_all_of_the_requests_and_never_one_too_many(
    make_limiter: MakeLimiter, priority: Priority
) -> None:
    """When requests are what is scarce, at least 95 % of them are used and never more than 100 %."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1_000_000, requests_per_minute=600)})
    judge = await offer(limiter, for_s=350.0, late_s=0.5, sizes=(1, 40), priority=priority)
    used = judge.rate(requests=True) / 600
    print(f"requests used at {priority.name}: {used:.1%}")
    assert judge.most(60.0, requests=True) <= 600
    assert used >= 0.95


async def test_a_judge_of_shorter_spans_is_not_broken_either(make_limiter: MakeLimiter) -> None:
    """A vendor that also checks 1 s and 10 s of its quota sees no span above its part, and most of it used."""
    limiter = await make_limiter({NAME: SHORT})
    judge = await offer(limiter, for_s=350.0, late_s=0.025, sizes=(1, 500), least_used=1.0)
    used = judge.rate() / 60_000
    print(f"tokens used beside short spans: {used:.1%}")
    assert [judge.most(span_s) <= 1000 * span_s for span_s in (1.0, 10.0, 60.0)] == [True] * 3
    assert used >= 0.92


async def test_what_is_not_known_or_not_limited_is_always_granted(make_limiter: MakeLimiter) -> None:
    """Unknown deployments and dimensions of 0 never wait."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, requests_per_minute=0, tokens_per_minute=0)})
    for to in (NAME, "stranger"):
        for _ in range(50):
            grant = await granted(limiter, claim(1, 10**6, to=to, priority=Priority.BULK))
            assert (grant.tokens, grant.start_in_s) == (10**6, 0.0)
            await limiter.settle(grant, 10**9)


# ── one claim ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_gets_as_much_as_fits_between_its_least_and_its_most(make_limiter: MakeLimiter) -> None:
    """Everything when there is room, the rest when there is less, nothing below the least."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    assert (await granted(limiter, claim(1, 700))).tokens == 700
    assert (await granted(limiter, claim(100, 700))).tokens == 300
    await refused(limiter, claim(1, 700))


async def test_a_refused_claim_has_taken_nothing(make_limiter: MakeLimiter) -> None:
    """Tokens are not touched when the requests are used up."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, requests_per_minute=1, tokens_per_minute=100)})
    first = await granted(limiter, claim(10))
    await refused(limiter, claim(90))
    await limiter.settle(first, 0, requests_used=0)
    assert (await granted(limiter, claim(90, 100))).tokens == 100


async def test_the_told_wait_is_true(make_limiter: MakeLimiter) -> None:
    """The same claim is refused shortly before its wait is over, and starts exactly then."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await granted(limiter, claim(600))
    await asyncio.sleep(10.0)
    await granted(limiter, claim(400))
    wait_s = await refused(limiter, claim(700))
    assert wait_s > 60.0
    await asyncio.sleep(wait_s - 0.3)
    await refused(limiter, claim(700))
    await asyncio.sleep(0.1)
    assert (await granted(limiter, claim(700))).start_in_s == pytest.approx(0.2, abs=1e-5)


async def test_short_waits_are_booked_ahead_in_order_of_asking(make_limiter: MakeLimiter) -> None:
    """Who asked later never starts earlier, not even with a claim that would have fitted at once."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await granted(limiter, claim(900))
    await asyncio.sleep(await refused(limiter, claim(500)) - 0.2)
    large = await granted(limiter, claim(500))
    small = await granted(limiter, claim(1, priority=Priority.INTERACTIVE))
    assert large.start_in_s == pytest.approx(0.2, abs=1e-5)
    assert small.start_in_s == large.start_in_s


async def test_a_claim_above_the_whole_limit_is_granted_when_nothing_else_is_counted(make_limiter: MakeLimiter) -> None:
    """It can never fit better, so it goes alone, with its least; then its window belongs to it."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await granted(limiter, claim(1))
    await asyncio.sleep(await refused(limiter, claim(5000, 9000)))
    assert (await granted(limiter, claim(5000, 9000))).tokens == 5000
    assert await refused(limiter, claim(1)) > 60.0


@pytest.mark.parametrize("priority", Priority)
async def test_limits_too_small_for_their_spans_still_let_single_calls_pass(
    make_limiter: MakeLimiter, priority: Priority
) -> None:
    """One request a minute judged over a second too is one request a minute, not none."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, requests_per_minute=1, judged_spans_s=(1.0, 60.0))})
    await granted(limiter, claim(10, priority=priority))
    wait_s = await refused(limiter, claim(10, priority=priority))
    assert 60.0 < wait_s < 61.0
    await asyncio.sleep(wait_s)
    await granted(limiter, claim(10, priority=priority))


# ── who goes first ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_large_claim_is_not_starved_by_small_ones(make_limiter: MakeLimiter) -> None:
    """Small claims that were asked later leave room for the large one, so it is granted within a window."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    loop, large_at_s = asyncio.get_running_loop(), math.inf

    async def small() -> None:
        while loop.time() < 200.0:
            await patiently(limiter, claim(10))

    async def large() -> None:
        nonlocal large_at_s
        await asyncio.sleep(50.0)
        await patiently(limiter, claim(900))
        large_at_s = loop.time()

    async with asyncio.TaskGroup() as group:
        for one in (small(), small(), small(), large()):
            group.create_task(one)
    assert large_at_s <= 50.0 + 65.0


async def test_a_place_does_not_hold_back_a_higher_priority(make_limiter: MakeLimiter) -> None:
    """A waiting claim of lower priority is overtaken by a higher one, and by nobody else."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await granted(limiter, claim(500))
    await refused(limiter, claim(600, priority=Priority.DEFAULT))
    await refused(limiter, claim(10, priority=Priority.BULK))
    await refused(limiter, claim(11, priority=Priority.DEFAULT))
    await granted(limiter, claim(400, priority=Priority.INTERACTIVE))


async def test_a_place_that_nobody_asks_for_any_more_is_given_up(make_limiter: MakeLimiter) -> None:
    """A caller that left holds the others back for seconds, not for a window."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await granted(limiter, claim(500))
    await refused(limiter, claim(600))
    await refused(limiter, claim(10))
    await asyncio.sleep(6.0)
    await granted(limiter, claim(10))


async def test_bulk_keeps_to_the_pace_and_the_others_need_not(make_limiter: MakeLimiter) -> None:
    """Bulk gets a minute's tokens over a minute; an interactive claim may have them at once."""
    limiter = await make_limiter(dict.fromkeys((NAME, "other"), Limits(max_in_flight=0, tokens_per_minute=60_000)))
    loop, taken = asyncio.get_running_loop(), 0
    while loop.time() < 30.0:
        taken += (await patiently(limiter, claim(50, 10_000, priority=Priority.BULK))).tokens
        assert taken <= 1000 * (loop.time() + 1.0) + 50
    assert taken >= 29_000
    assert (await granted(limiter, claim(1, 60_000, priority=Priority.INTERACTIVE, to="other"))).tokens == 60_000


async def test_bulk_leaves_a_level_to_the_others(make_limiter: MakeLimiter) -> None:
    """However much bulk waits, two percent of the quota are free for a claim of the higher priorities."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=60_000)})
    loop = asyncio.get_running_loop()
    while loop.time() < 100.0:
        await patiently(limiter, claim(50, 10_000, priority=Priority.BULK))
    await refused(limiter, claim(1000, 10_000, priority=Priority.BULK))
    assert (await granted(limiter, claim(1000, priority=Priority.DEFAULT))).start_in_s <= 0.25


async def test_bulk_goes_on_soon_after_a_burst_of_the_others(make_limiter: MakeLimiter) -> None:
    """What the others overdrew holds bulk back for ten seconds, not for all that they took."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=60_000)})
    await granted(limiter, claim(40_000, priority=Priority.INTERACTIVE))
    assert await refused(limiter, claim(100, priority=Priority.BULK)) == pytest.approx(10.1)


# ── settlement ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_settlement_gives_back_what_was_not_used_and_only_once(make_limiter: MakeLimiter) -> None:
    """A second settlement of one grant changes nothing."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    first, second = await granted(limiter, claim(400)), await granted(limiter, claim(600))
    await limiter.settle(second, 500)
    for _ in range(3):
        await limiter.settle(first, 100)
    assert (await granted(limiter, claim(1, 1000))).tokens == 400


async def test_settlement_charges_what_was_used_beyond_the_grant(make_limiter: MakeLimiter) -> None:
    """The provider has counted it, so it counts here."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await limiter.settle(await granted(limiter, claim(400)), 700)
    assert (await granted(limiter, claim(1, 1000))).tokens == 300


async def test_unknown_usage_counts_in_full(make_limiter: MakeLimiter) -> None:
    """After a timeout nothing is given back, not even later."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000, requests_per_minute=4)})
    lost = await granted(limiter, claim(400, requests=3))
    await limiter.settle(lost, None)
    await limiter.settle(lost, 0, requests_used=0)
    assert (await granted(limiter, claim(1, 1000))).tokens == 600
    await refused(limiter, claim(1))


async def test_requests_that_were_not_made_are_given_back(make_limiter: MakeLimiter) -> None:
    """A call that never left costs neither tokens nor requests."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, requests_per_minute=3)})
    await limiter.settle(await granted(limiter, claim(1, requests=3)), 0, requests_used=0)
    await granted(limiter, claim(1, requests=3))


# ── 429 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("told_s", "pause_s"), [(None, 1.0), (7.5, 7.5), (-5.0, 0.0), (1e9, 120.0), (math.nan, 0.0), (math.inf, 120.0)]
)
async def test_a_429_pauses_everyone_for_as_long_as_the_provider_said(
    make_limiter: MakeLimiter, told_s: float | None, pause_s: float
) -> None:
    """Whatever a provider says, the pause is from 0 to 120 s, and 1 s when it says nothing."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await limiter.throttled(NAME, told_s)
    answer = await limiter.reserve(claim(1, priority=Priority.INTERACTIVE))
    assert (answer.start_in_s if isinstance(answer, Grant) else answer.wait_s) == pytest.approx(pause_s)


async def test_a_429_lowers_the_rate_which_comes_back_slowly(make_limiter: MakeLimiter) -> None:
    """Rate × 0.85, then one percent of the configured rate per 10 s."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await limiter.throttled(NAME, 0.0)
    assert (await granted(limiter, claim(1, 1000))).tokens == 850
    for tokens in (910, 970, 1000):
        await asyncio.sleep(61.0)
        assert (await granted(limiter, claim(1, 1000))).tokens == tokens


async def test_calls_in_flight_that_meet_one_429_each_lower_the_rate_once(make_limiter: MakeLimiter) -> None:
    """Eight refusals of one moment are one observation."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    for _ in range(8):
        await limiter.throttled(NAME, 0.0)
    assert (await granted(limiter, claim(1, 1000))).tokens == 850
    await asyncio.sleep(5.0)
    await limiter.throttled(NAME, 0.0)
    await asyncio.sleep(61.0)
    assert (await granted(limiter, claim(1, 1000))).tokens == 782  # 850 × 0.85, and 6 % back


async def test_a_limiter_meets_a_lower_real_limit_and_finds_back(make_limiter: MakeLimiter) -> None:
    """A provider that grants only 70 % for a minute refuses few calls, and 90 % flow again a minute later."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=60_000)})
    judge, loop, refusals = Judge(), asyncio.get_running_loop(), 0
    while loop.time() < 300.0:
        grant = await patiently(limiter, claim(500, priority=Priority.BULK))
        now = loop.time()
        counted = [(when, tokens) for when, tokens in judge.arrivals if when > now - 60.0]
        if 60.0 < now < 120.0 and sum(tokens for _, tokens in counted) + 500 > 42_000:
            refusals += 1
            await limiter.throttled(NAME, counted[0][0] + 60.0 - now)
            await limiter.settle(grant, 0, requests_used=0)
        else:
            judge.saw(500)
    assert 1 <= refusals <= 30
    assert sum(tokens for when, tokens in judge.arrivals if 180.0 <= when < 240.0) >= 0.9 * 42_000


# ── slots ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_more_calls_are_under_way_than_there_are_slots(make_limiter: MakeLimiter) -> None:
    """A settled call makes room for one more; until then the answer names what is scarce, and is worth asking again."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=2)})
    first, _ = await granted(limiter, claim(1)), await granted(limiter, claim(1))
    assert await limiter.reserve(claim(1)) == NotYet(0.05, "slots")
    await limiter.settle(first, 1)
    await granted(limiter, claim(1))
    await refused(limiter, claim(1))


async def test_who_waits_for_a_slot_is_not_overtaken(make_limiter: MakeLimiter) -> None:
    """A freed slot is kept for the one who asked first, for as long as that one asks."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=1)})
    held = await granted(limiter, claim(1))
    await refused(limiter, claim(1000))
    await limiter.settle(held, 1)
    await refused(limiter, claim(1))
    await granted(limiter, claim(1000))


# ── sharing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_paced_begins_at_once_and_goes_on_at_the_pace(make_limiter: MakeLimiter) -> None:
    """The largest legal request passes on an idle account; what follows it waits until that is earned."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1_000_000)})
    first = await granted(limiter, claim(300_000, paced=True))
    assert first.start_in_s == 0.0
    assert await refused(limiter, claim(1000, 300_000, paced=True)) == pytest.approx(15.0, abs=0.1)
    assert (await granted(limiter, claim(1000))).start_in_s == 0.0


async def test_what_is_paced_uses_the_quota_and_leaves_a_level_to_the_others(make_limiter: MakeLimiter) -> None:
    """Backlog at the pace uses 95 %; whoever asks for little besides never waits for more than 25 ms."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=60_000)})
    loop, waits = asyncio.get_running_loop(), []

    async def light() -> None:
        while loop.time() < 340.0:
            grant = await patiently(limiter, claim(20, 20))
            asked = loop.time()
            waits.append(grant.start_in_s)
            await limiter.settle(grant, 20)
            await asyncio.sleep(max(0.0, asked + 0.5 - loop.time()))

    async with asyncio.TaskGroup() as group:
        group.create_task(light())
        judge = await offer(limiter, for_s=350.0, late_s=0.5, sizes=(1, 1000), paced=True)
    used = judge.rate() / 60_000 + 40 / 1000
    print(f"tokens used at the pace, beside a light tenant: {used:.1%}; {len(waits)} light calls")
    assert judge.most(60.0) <= 60_000
    assert used >= 0.95
    assert len(waits) >= 650
    assert max(waits) <= 0.025


async def test_of_those_who_wait_the_lower_rank_goes_first(make_limiter: MakeLimiter) -> None:
    """Who was served less goes before who asked earlier, within one priority."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await granted(limiter, claim(1000))
    await refused(limiter, claim(500, rank=7.0))
    await asyncio.sleep(await refused(limiter, claim(900, rank=2.0)) - 3.0)
    await refused(limiter, claim(500, rank=7.0))
    await refused(limiter, claim(900, rank=2.0))
    await asyncio.sleep(2.9)
    await refused(limiter, claim(500, rank=7.0))
    await granted(limiter, claim(900, rank=2.0))


async def test_a_no_to_who_does_not_wait_leaves_nothing_behind(make_limiter: MakeLimiter) -> None:
    """Nothing is booked ahead for it and nobody is held back by it."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await granted(limiter, claim(900))
    wait_s = await refused(limiter, claim(500, waits=False))
    await granted(limiter, claim(100))
    await asyncio.sleep(wait_s - 0.1)
    assert await refused(limiter, claim(500, waits=False)) == pytest.approx(0.1, abs=1e-5)


# ── what providers state ────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_a_provider_says_is_left_lowers_what_is_granted(make_limiter: MakeLimiter) -> None:
    """Somebody else uses the account too: what they took counts here for a minute."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000, requests_per_minute=10)})
    grant = await granted(limiter, claim(100))
    await limiter.settle(grant, 100, stated=Stated(10, 1000, 8, 300))
    assert (await granted(limiter, claim(1, 1000))).tokens == 300
    await asyncio.sleep(61.0)
    assert (await granted(limiter, claim(1, 1000))).tokens == 1000


async def test_what_a_provider_says_never_raises_anything(make_limiter: MakeLimiter) -> None:
    """More left than we think, or a higher limit, changes nothing; a lower limit holds for a minute."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    grant = await granted(limiter, claim(400))
    await limiter.settle(grant, 400, stated=Stated(None, 5000, None, 5000))
    second = await granted(limiter, claim(1, 1000))
    assert second.tokens == 600
    await asyncio.sleep(61.0)
    third = await granted(limiter, claim(10))
    await limiter.settle(third, 10, stated=Stated(None, 500))
    assert (await granted(limiter, claim(1, 1000))).tokens == 490


# ── other limits ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_other_limits_count_what_was_granted_before(make_limiter: MakeLimiter) -> None:
    """More lets the difference through at once, less waits until it fits, none lets everything through."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=0, tokens_per_minute=1000)})
    await limiter.settle(await granted(limiter, claim(900)), 900)
    limiter.allow(NAME, Limits(max_in_flight=0, tokens_per_minute=2000))
    await limiter.settle(await granted(limiter, claim(1000)), 1000)
    assert await refused(limiter, claim(200)) > 50.0
    limiter.allow(NAME, Limits(max_in_flight=0, tokens_per_minute=500))
    await asyncio.sleep(61.0)
    await limiter.settle(await granted(limiter, claim(500)), 500)
    assert await refused(limiter, claim(1)) > 50.0
    limiter.allow(NAME, None)
    assert (await granted(limiter, claim(10_000))).tokens == 10_000
    limiter.allow("newcomer", Limits(max_in_flight=0, tokens_per_minute=100))
    await granted(limiter, claim(100, to="newcomer"))
    assert await refused(limiter, claim(1, to="newcomer")) > 50.0


async def test_slots_are_kept_while_limits_change(make_limiter: MakeLimiter) -> None:
    """A call under way holds its slot, and gives it back, whatever the limits are by then."""
    limiter = await make_limiter({NAME: Limits(max_in_flight=1)})
    first = await granted(limiter, claim(1))
    limiter.allow(NAME, Limits(max_in_flight=2))
    second = await granted(limiter, claim(1))
    assert await refused(limiter, claim(1, waits=False)) > 0
    for each in (first, second):
        await limiter.settle(each, 1)
    await granted(limiter, claim(1))
