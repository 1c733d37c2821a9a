"""What a tenant's limits let in, in process and shared by three replicas: to the unit, and nothing for what is kept."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from app.domain import Limits, Priority, Tenant, Vector
from app.engine.workqueue import QueueBound
from app.errors import DeadlineExceeded, Overloaded, RateLimited
from app.ports import Claim, Grant, Limiter, NotYet
from app.storage.limiter import InProcessLimiter
from app.storage.memory import MemoryCache
from tests.replicas import replica, timeless
from tests.rig import Rig, ScriptedProvider, engine

pytestmark = pytest.mark.looptime(start=1000.0)

DEPLOYMENT = Limits(max_in_flight=2, window_s=0.0)
Rigs = Callable[..., AbstractAsyncContextManager[list[Rig]]]


def limited(requests: int = 0, tokens: int = 0, slots: int = 0) -> Tenant:
    """A tenant that may use so much."""
    return Tenant("t", limits=Limits(requests, tokens, max_in_flight=slots))


@pytest.fixture(params=["in process", "shared"])
def rigs(request: pytest.FixtureRequest) -> Rigs:
    """Makes engines whose tenant `t` is limited: one by itself, or three replicas with one limit."""

    @asynccontextmanager
    async def made(tenant: Tenant, **parts: object) -> AsyncIterator[list[Rig]]:
        limits = {"d0": DEPLOYMENT, tenant.account: tenant.limits or Limits()}
        async with AsyncExitStack() as stack:
            limiters: list[Limiter] = [InProcessLimiter(limits)]
            if request.param == "shared":
                server = stack.enter_context(timeless(request.getfixturevalue("redis_url")))
                limiters = [await stack.enter_async_context(replica(server, limits)) for _ in range(3)]
            each = [engine(ScriptedProvider(), limits=DEPLOYMENT, limiter=made, **parts) for made in limiters]  # type: ignore[arg-type]
            yield [await stack.enter_async_context(rig) for rig in each]

    return made


def words(count: int, name: object = "w") -> str:
    """A text of so many tokens."""
    return f"{name}" + " x" * (count - 1)


async def spent(rig: Rig, tenant: Tenant) -> tuple[int, int]:
    """The tokens and requests that now count for `tenant`, none of whose slots may be held."""
    assert tenant.limits is not None
    limiter, limits = rig.gateway._parts.limiter, tenant.limits
    every_slot = []
    for _ in range(max(1, limits.max_in_flight)):
        wish = Claim(
            tenant.account, 0, limits.tokens_per_minute, Priority.INTERACTIVE,
            requests=0, requests_max=limits.requests_per_minute, waits=False,
        )  # fmt: skip
        answer = await limiter.reserve(wish)
        assert isinstance(answer, Grant), "a slot is held"
        every_slot.append(answer)
    for grant in every_slot:
        await limiter.settle(grant, 0, requests_used=0)
    left = every_slot[0]
    return limits.tokens_per_minute - left.tokens, limits.requests_per_minute - left.requests


async def refusal(rig: Rig, tenant: Tenant, *texts: str) -> RateLimited:
    """The answer to a request that must be refused."""
    with pytest.raises(RateLimited) as caught:
        await rig.ask(*texts, tenant=tenant)
    return caught.value


# ── to the unit ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def burst(engines: Sequence[Rig], tenant: Tenant, sizes: Sequence[int], name: str) -> list[int]:
    """Asks for texts of such sizes at one moment, anywhere: the sizes of those that were let in."""
    rng = random.Random(4)

    async def one(number: int, size: int) -> int:
        with suppress(RateLimited):
            await rng.choice(engines).ask(words(size, f"{name}{number}"), tenant=tenant)
            return size
        return 0

    answers = await asyncio.gather(*(one(number, size) for number, size in enumerate(sizes)))
    return [size for size in answers if size]


def sent(engines: Sequence[Rig]) -> int:
    """How many tokens the provider has seen."""
    return sum(len(str(text).split()) for rig in engines for text in rig.provider.texts)


async def test_no_burst_gets_through(rigs: Rigs) -> None:
    """Of fifty requests at one moment as many get in as the limit has room for, and when that is free again (T2)."""
    tenant, rng = limited(tokens=100), random.Random(1)
    sizes = [rng.choice([58, 80, 175]) for _ in range(50)]
    async with rigs(tenant, max_input_tokens=200) as engines:
        first = await burst(engines, tenant, sizes, "first")
        assert first in ([58], [80])
        assert await burst(engines, tenant, [1] * 60, "rest") == [1] * (100 - sum(first))
        assert sent(engines) == 100
        await asyncio.sleep(61.0)
        assert await burst(engines, tenant, [1] * 120, "later") == [1] * 100
        assert sent(engines) == 200


async def test_requests_are_counted_too(rigs: Rigs) -> None:
    """However many texts each has."""
    tenant = limited(requests=10)
    async with rigs(tenant) as engines:
        assert len(await burst(engines, tenant, [5] * 30, "r")) == 10
        error = await refusal(engines[0], tenant, "one", "more")
        assert error.kind == "requests"
        assert str(error).startswith("Rate limit reached for requests. Limit 10/min, requested 1. Please try again in ")


async def test_a_refusal_says_when_there_is_room_again(rigs: Rigs) -> None:
    """E32: the limit, the wish and an honest time, after which the same request passes."""
    tenant = limited(tokens=100)
    async with rigs(tenant) as engines:
        await engines[0].ask(words(60, "a"), tenant=tenant)
        error = await refusal(engines[-1], tenant, words(30, "b"), words(20, "c"))
        wait_s = error.retry_after_s or 0.0
        assert wait_s == pytest.approx(60.6, abs=0.5)
        said = f"Rate limit reached for tokens. Limit 100/min, requested 50. Please try again in {wait_s:.1f}s."
        assert (str(error), error.kind, error.code) == (said, "tokens", "rate_limit_exceeded")
        await asyncio.sleep(wait_s)
        await engines[-1].ask(words(30, "b"), words(20, "c"), tenant=tenant)


async def test_what_never_fits_is_told_so(rigs: Rigs) -> None:
    """E33: a request for more than the whole limit costs nothing and is not worth another try."""
    tenant = limited(tokens=100)
    async with rigs(tenant) as engines:
        error = await refusal(engines[0], tenant, words(60, "a"), words(41, "b"))
        assert (str(error), error.kind, error.code, error.retry_after_s) == (
            "Request too large. Limit 100 tokens/min, requested 101.", "tokens", "rate_limit_exceeded", None,
        )  # fmt: skip
        assert await spent(engines[0], tenant) == (0, 0)
        await engines[0].ask(words(60, "a"), words(40, "b"), tenant=tenant)


async def test_so_many_requests_at_once_and_no_more(rigs: Rigs) -> None:
    """E35; whoever is answered, or leaves, makes room."""
    tenant = limited(slots=2)
    async with rigs(tenant) as engines, asyncio.TaskGroup() as group:
        first = group.create_task(engines[0].ask("first", tenant=tenant))
        second = group.create_task(engines[-1].ask("second", tenant=tenant))
        await asyncio.sleep(0.01)
        error = await refusal(engines[0], tenant, "third")
        assert (str(error), error.kind, error.code) == (
            "Too many concurrent requests. Limit 2.", "requests", "concurrency_limit_exceeded",
        )  # fmt: skip
        assert error.retry_after_s == 1.0
        second.cancel()
        await asyncio.sleep(0.001)
        await engines[0].ask("fourth", tenant=tenant)
        await first
        assert await spent(engines[0], tenant) == (0, 0)


# ── what is not bought is given back ────────────────────────────────────────────────────────────────────────────────


async def test_what_is_kept_costs_nothing(rigs: Rigs) -> None:
    """Hits pass a limit that is used up; a request that hits in part claims its misses only."""
    tenant = limited(requests=2, tokens=100)
    async with rigs(tenant) as (rig, *_):
        await rig.ask(words(70, "a"), tenant=tenant)
        await rig.ask(words(70, "a"), words(30, "b"), tenant=tenant)
        assert await spent(rig, tenant) == (100, 2)
        result = await rig.ask(words(30, "b"), words(70, "a"), tenant=tenant)
        assert result.cache_hits == 2
        await refusal(rig, tenant, "c")


async def test_a_text_that_is_joined_is_paid_by_who_came_first(rigs: Rigs) -> None:
    """Whoever asks for what flies already makes a request but buys no tokens."""
    tenant = limited(requests=5, tokens=100)
    async with rigs(tenant) as (rig, *_), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(rig.ask(words(30), tenant=tenant))
        await asyncio.sleep(1.0)
        assert await spent(rig, tenant) == (30, 3)


async def test_a_full_queue_costs_nothing(rigs: Rigs) -> None:
    """What was not even queued is given back, the request too."""
    tenant = limited(requests=5, tokens=100)
    async with rigs(tenant, bound=QueueBound(max_items=1)) as (rig, *_), asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(rig.ask(f"before {number}"))
            await asyncio.sleep(0.001)
        with pytest.raises(Overloaded):
            await rig.ask(words(30), tenant=tenant)
        assert await spent(rig, tenant) == (0, 0)


@pytest.mark.parametrize("leaves", [False, True], ids=["expires", "leaves"])
async def test_what_never_left_the_queue_costs_no_tokens(rigs: Rigs, leaves: bool) -> None:
    """Its deadline passed, or its caller went: it was never sent, so only the request counts."""
    tenant = limited(requests=5, tokens=100, slots=1)
    async with rigs(tenant) as (rig, *_), asyncio.TaskGroup() as group:
        rig.provider.always = 5.0
        for number in range(3):
            group.create_task(rig.ask(f"before {number}"))
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError if leaves else DeadlineExceeded):
            async with asyncio.timeout(0.5 if leaves else None):
                await rig.ask(words(30), tenant=tenant, within_s=1.0)
        assert await spent(rig, tenant) == (0, 1)


class Slow:
    """A limiter that thinks for a while before and after it decides about tenants."""

    def __init__(self, inner: Limiter) -> None:
        self._inner = inner
        self.settle, self.throttled, self.allow = inner.settle, inner.throttled, inner.allow

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """See `ports.Limiter`."""
        if claim.account != "d0":
            await asyncio.sleep(0.2)
        return await self._inner.reserve(claim)


async def test_what_was_kept_meanwhile_is_not_bought_again() -> None:
    """While one waits to be let in, another buys the same text."""
    tenant = limited(requests=5, tokens=100)
    limiter = Slow(InProcessLimiter({tenant.account: tenant.limits or Limits()}))
    async with engine(ScriptedProvider(), limiter=limiter) as rig, asyncio.TaskGroup() as group:
        group.create_task(rig.ask(words(30), tenant=tenant))
        await asyncio.sleep(0.01)
        await rig.ask(words(30))
        await asyncio.sleep(1.0)
        assert len(rig.provider.calls) == 1
        assert await spent(rig, tenant) == (0, 1)


class Yielding(MemoryCache):
    """A cache that lets others have a turn."""

    async def get_many(self, *asked: Any, **how: Any) -> list[Vector | None]:
        """See `ports.Cache`."""
        await asyncio.sleep(0)
        return await super().get_many(*asked, **how)


async def test_a_caller_that_leaves_at_any_moment_is_charged_what_was_sent(rigs: Rigs) -> None:
    """At whatever step it is cancelled: its slot is free, and counted are its tokens once they left, not before."""
    tenant = limited(requests=1000, tokens=100_000, slots=1)
    outcomes = set()
    async with rigs(tenant, cache=Yielding(1 << 20)) as (rig, *_):
        for steps in range(40):
            before, calls = await spent(rig, tenant), len(rig.provider.calls)
            task = asyncio.ensure_future(rig.ask(words(7, f"n{steps}"), tenant=tenant))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await asyncio.sleep(1.0)
            tokens, requests = (now - then for now, then in zip(await spent(rig, tenant), before, strict=True))
            assert tokens == 7 * (len(rig.provider.calls) - calls)
            outcomes.add((tokens, requests))
            assert not any(rig.leftovers()[name] for name in ("slots", "table", "queued", "waiting tokens"))
    assert outcomes - {(0, 1)} == {(0, 0), (7, 1)}  # between: it waited, and left before its text did
