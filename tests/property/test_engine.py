"""What must hold whatever callers, texts, limits and faults come together."""

import asyncio
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import Limits, Priority, Tenant
from app.engine.workqueue import QueueBound
from app.errors import EmbedgateError, InputRefused, MalformedReply, Throttled, Transient, Unreachable
from tests.rig import ScriptedProvider, bend, engine

pytestmark = pytest.mark.looptime


@dataclass(frozen=True)
class Caller:
    """One request of a scenario."""

    at_s: float
    texts: tuple[str, ...]
    tenant: str
    priority: Priority
    within_s: float
    leaves_after_s: float | None


TEXTS = st.integers(0, 12).map(lambda number: " ".join([f"w{number}"] * (1 + number % 4)))
CALLERS = st.builds(
    Caller,
    at_s=st.floats(0, 1),
    texts=st.lists(TEXTS, min_size=1, max_size=12).map(tuple),
    tenant=st.sampled_from("abc"),
    priority=st.sampled_from(Priority),
    within_s=st.sampled_from([0.05, 1.0, 20.0]),
    leaves_after_s=st.none() | st.floats(0, 0.5),
)
LIMITS = st.builds(
    Limits,
    requests_per_minute=st.sampled_from([0, 600]),
    tokens_per_minute=st.sampled_from([0, 3000]),
    max_in_flight=st.integers(1, 4),
    max_batch_items=st.integers(1, 8),
    max_batch_tokens=st.integers(4, 20),
    max_batch_bytes=st.integers(20, 200),
    window_s=st.sampled_from([0.0, 0.005]),
)
FAULTS = st.sampled_from(
    [None, None, None, Transient("status 500"), Throttled("status 429", 0.3), Unreachable("refused"),
     MalformedReply("short"), bend(lambda v: v[:-1]), bend(lambda v: v * 0), 0.4]
)  # fmt: skip


async def play(callers: list[Caller], limits: Limits, faults: list[object], poison: str) -> None:
    """Runs one scenario and checks every promise that can be checked from outside."""
    providers = [
        ScriptedProvider(poison=frozenset({poison}), refusal=InputRefused("status 400"))
        for _ in range(1 + len(faults) % 2)
    ]
    providers[0].script.extend(faults)  # type: ignore[arg-type]
    async with engine(*providers, limits=limits, bound=QueueBound(max_items=60)) as rig:

        async def call(caller: Caller) -> None:
            await asyncio.sleep(caller.at_s)
            asking = rig.ask(
                *caller.texts, tenant=Tenant(caller.tenant), priority=caller.priority, within_s=caller.within_s
            )
            started = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(caller.leaves_after_s):
                    result = await asking  # checks order and identity of every vector
                assert poison not in caller.texts
                assert result.cache_hits + result.joined <= len(caller.texts)
                assert result.tokens == sum(len(text.split()) for text in caller.texts)
            except (TimeoutError, EmbedgateError):
                pass
            assert asyncio.get_running_loop().time() - started <= caller.within_s + 0.05

        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(call(caller))
        await asyncio.sleep(60)
        assert set(rig.leftovers().values()) == {0}, rig.leftovers()
        for provider in providers:
            assert provider.most_in_flight <= limits.max_in_flight
            for _, batch in provider.calls:
                assert len(batch) <= limits.max_batch_items
                tokens = [len(str(text).split()) for text in batch]
                assert sum(tokens) <= max(limits.max_batch_tokens, tokens[0])
                sizes = [len(str(text).encode()) for text in batch]
                assert sum(sizes) <= limits.max_batch_bytes or len(batch) == 1
        if not faults:
            bought = Counter(text for provider in providers for text in provider.texts)
            split = poison in bought  # then good texts flew twice, around the bad one
            assert split or set(bought.values()) <= {1}


@settings(max_examples=150, deadline=None)
@given(
    callers=st.lists(CALLERS, min_size=1, max_size=25),
    limits=LIMITS,
    faults=st.lists(FAULTS, max_size=8),
    poison=st.sampled_from(["w3 w3 w3 w3", "none of these"]),
)
async def test_every_caller_gets_its_own_vectors_or_a_clear_error(
    callers: list[Caller], limits: Limits, faults: list[object], poison: str
) -> None:
    """In order, by the deadline, within every limit, bought once, and nothing is left behind."""
    await play(callers, limits, faults, poison)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 20), min_size=4, max_size=4),
)
async def test_no_tenant_starves(weights: list[int], sizes: list[int]) -> None:
    """Backlogged tenants are served tokens in proportion to their weights, whatever their texts."""
    limits = Limits(max_in_flight=1, max_batch_items=4, max_batch_tokens=1000)
    async with engine(ScriptedProvider(), limits=limits) as rig:
        busy = asyncio.ensure_future(rig.ask("busy"))
        await asyncio.sleep(0.01)
        tenants = [Tenant(f"t{at}", weight) for at, weight in enumerate(weights)]
        asks = [
            asyncio.ensure_future(
                rig.ask(*(f"{tenant.name}-{at} " * size for at in range(100)), tenant=tenant, within_s=10_000)
            )
            for tenant, size in zip(tenants, sizes, strict=False)
        ]
        await asyncio.sleep(0.05 * 20)
        served = Counter[str]()
        for text in rig.provider.texts[1:]:
            served[str(text).split("-")[0]] += len(str(text).split())
        shares = [served[tenant.name] / tenant.weight for tenant in tenants]
        assert max(shares) - min(shares) <= 2 * max(sizes)
        for ask in asks:
            ask.cancel()
        await asyncio.gather(busy, *asks, return_exceptions=True)
