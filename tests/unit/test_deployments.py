"""Which deployment gets what, and what its refusals, throttles and latencies change; in virtual time."""

import asyncio
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from app.domain import Attempts, Deployment, Limits, Space, Text
from app.errors import (
    BadCredential,
    EmbedgateError,
    InputRefused,
    InvalidRequest,
    ProviderError,
    ProviderUnavailable,
    RejectedInput,
    Throttled,
    Transient,
    UpstreamFailed,
)
from app.ports import Reply
from tests.rig import MODEL, Rig, ScriptedProvider, engine

pytestmark = pytest.mark.looptime

REFUSED = InputRefused("status 400")


def now() -> float:
    """The loop's clock."""
    return asyncio.get_running_loop().time()


async def outcomes_of(*asking: object) -> list[object]:
    """Results and errors alike."""
    return await asyncio.gather(*asking, return_exceptions=True)  # type: ignore[call-overload, no-any-return]


async def ask_together(rig: Rig, texts: Sequence[str], within_s: float = 100.0) -> list[object]:
    """One caller for each text, all while a first call is in flight, so that they travel together."""
    warm = asyncio.ensure_future(rig.ask("warm", within_s=within_s))
    await asyncio.sleep(0.01)
    outcomes = await outcomes_of(*(rig.ask(text, within_s=within_s) for text in texts))
    await warm
    return outcomes


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 16, 40, 128, 255, 256])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_k_bad_texts_of_256_cost_their_bound_and_nobody_else(k: int, seed: int) -> None:
    """At most 2·k·log2(256)+1 extra calls, wherever the bad ones are, and 256−k callers get their vectors."""
    bad = frozenset(f"t{at}" for at in random.Random(seed * 1000 + k).sample(range(256), k))
    provider = ScriptedProvider(poison=bad, refusal=REFUSED)
    async with engine(provider, limits=Limits(max_in_flight=1)) as rig:
        outcomes = await ask_together(rig, [f"t{at}" for at in range(256)])
        failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert [type(error) for error in failed] == [RejectedInput] * k
        assert len(provider.calls) - 2 <= 2 * k * math.log2(256) + 1
        assert rig.gates["d0"].breaker.state == "closed"


async def test_halves_need_quota_and_cost_no_attempt() -> None:
    """With three calls a minute a bad text among eight is found in minutes, within the limit, at the first attempt."""
    provider = ScriptedProvider(poison=frozenset({"bad"}), refusal=REFUSED)
    deployment = Deployment("", MODEL, Limits(requests_per_minute=3, max_in_flight=4), Attempts(most=1))
    async with engine(provider, deployment=deployment) as rig:
        rig.gates["d0"].proven = True
        texts = [*(f"t{at}" for at in range(7)), "bad"]
        outcomes = await outcomes_of(*(rig.ask(text, within_s=600) for text in texts))
        assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [RejectedInput]
        times = [at for at, _ in provider.calls]
        assert all(later - earlier >= 60 for earlier, later in zip(times[:-3], times[3:], strict=True))


async def test_four_bad_texts_one_in_each_quarter_are_not_mistaken_for_a_bad_deployment() -> None:
    """Both halves and all quarters refused look like a deployment that refuses everything; a harmless text decides."""
    provider = ScriptedProvider(poison=frozenset({"t10", "t70", "t130", "t200"}), refusal=REFUSED)
    async with engine(provider, limits=Limits(max_in_flight=1)) as rig:
        outcomes = await ask_together(rig, [f"t{at}" for at in range(256)])
        assert sum(isinstance(outcome, RejectedInput) for outcome in outcomes) == 4
        assert provider.texts.count("hello") == 1


async def test_a_deployment_that_refuses_everything_is_to_blame_not_the_texts() -> None:
    """Halving stops, nobody is told that the text was bad, and the next deployment answers all."""
    first, second = ScriptedProvider(), ScriptedProvider()
    async with engine(first, second, limits=Limits(max_in_flight=1)) as rig:
        warm = asyncio.ensure_future(rig.ask("proves that it accepts"))
        await asyncio.sleep(0.01)
        first.always = REFUSED
        outcomes = await outcomes_of(*(rig.ask(f"t{at}") for at in range(256)), warm)
        assert [o for o in outcomes if isinstance(o, Exception)] == []
        assert len(first.calls) <= 20
        assert rig.gates["d0"].breaker.state == "closed"


async def test_a_deployment_that_never_accepted_anything_blames_no_caller() -> None:
    """A wrong setting answers 400 to the very first text: that is a 502, not the caller's 400."""
    async with engine(ScriptedProvider(always=REFUSED)) as rig:
        with pytest.raises(UpstreamFailed):
            await rig.ask("innocent")


async def test_a_named_text_fails_alone_at_once() -> None:
    """Where the provider says which text is bad, nothing is halved: the others fly again together."""

    class Telling(ScriptedProvider):
        """Says which text is bad."""

        async def embed(self, texts: Sequence[Text], space: Space, *, timeout_s: float) -> Reply:
            """Refuses by position."""
            if "bad" in texts:
                self.calls.append((now(), list(texts)))
                raise InputRefused("400", position=list(texts).index("bad"), too_long=True)
            return await super().embed(texts, space, timeout_s=timeout_s)

    provider = Telling()
    async with engine(provider, limits=Limits(max_in_flight=1)) as rig:
        outcomes = await ask_together(rig, ["a", "b", "bad", "c"])
        assert [type(outcome).__name__ for outcome in outcomes].count("EmbeddingResult") == 3
        assert isinstance(outcomes[2], InvalidRequest)
        assert "maximum context length is 100 tokens" in str(outcomes[2])
        assert [texts for _, texts in provider.calls][1:] == [["a", "b", "bad", "c"], ["a", "b", "c"]]


async def test_a_provider_that_names_a_text_outside_the_batch_is_not_believed() -> None:
    """Then the batch is halved as if nothing had been named."""
    provider = ScriptedProvider(poison=frozenset({"bad"}), refusal=InputRefused("400", position=99))
    async with engine(provider, limits=Limits(max_in_flight=1)) as rig:
        outcomes = await ask_together(rig, ["a", "b", "bad", "c"])
        assert [isinstance(outcome, RejectedInput) for outcome in outcomes] == [False, False, True, False]


@pytest.mark.parametrize(
    "failure",
    [Throttled("429", 20.0), Transient("500"), BadCredential("401"), 1000.0],
    ids=["429", "500", "401", "hang"],
)
async def test_a_harmless_text_that_fails_itself_blames_nobody(failure: ProviderError | float) -> None:
    """The deployment refused all, but whether it would refuse anything was not found out: others answer the texts."""
    first, second = ScriptedProvider(always=REFUSED), ScriptedProvider()
    async with engine(first, second, limits=Limits(max_in_flight=1)) as rig:
        first.script.extend([REFUSED, failure])
        started = now()
        outcomes = await outcomes_of(rig.ask("a"), rig.ask("b"))
        assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []
        assert now() - started <= 16
        assert first.texts == ["a", "b", "hello"]
        breaker, cooling = rig.gates["d0"].breaker, rig.gates["d0"].cooling
        assert (breaker.state == "credential", cooling > 0) == (
            isinstance(failure, BadCredential),
            isinstance(failure, Throttled),
        )


async def test_a_lone_deployment_is_asked_again_when_it_could_not_be_asked_who_is_to_blame() -> None:
    """The bad text and its neighbours come back after the 429 of the harmless one, and only the bad one fails."""
    provider = ScriptedProvider(poison=frozenset({"bad"}), refusal=REFUSED)
    async with engine(provider, limits=Limits(max_in_flight=1)) as rig:
        provider.script.extend([REFUSED, Throttled("429", 5.0)])
        outcomes = await outcomes_of(*(rig.ask(text) for text in ("bad", "x", "y")))
        assert [type(outcome).__name__ for outcome in outcomes] == ["RejectedInput", *["EmbeddingResult"] * 2]
        times = [at for at, _ in provider.calls]
        assert times[2] - times[1] >= 5.0


async def test_nobody_waits_for_the_quota_of_a_harmless_text() -> None:
    """Where the minute is used up, it stays open who is to blame, and the next deployment answers at once."""
    first, second = ScriptedProvider(poison=frozenset({"bad"}), refusal=REFUSED), ScriptedProvider()
    limits = [Limits(requests_per_minute=1, max_in_flight=1), Limits()]
    async with engine(first, second, each=limits) as rig:
        started = now()
        results = await asyncio.gather(rig.ask("bad"), rig.ask("good"))
        assert {result.deployments for result in results} == {("d1",)}
        assert now() - started < 1.0
        assert first.texts == ["bad", "good"]


# ── throttles ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_429s_in_a_row_make_the_pauses_longer_up_to_the_cap() -> None:
    """Without a longer time named, a deployment rests 1, 2, 4, 4 … seconds, and one call at a time asks again."""
    deployment = Deployment("", MODEL, attempts=Attempts(most=10))
    provider = ScriptedProvider(always=Throttled("429"), latency_s=0.0)
    async with engine(provider, deployment=deployment) as rig:
        with pytest.raises(EmbedgateError):
            await rig.ask("a", within_s=20)
        times = [at for at, _ in provider.calls]
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert pauses[:3] == pytest.approx([1, 2, 4], abs=0.5)
        assert max(pauses) < 5
        assert rig.gates["d0"].breaker.state == "closed"


async def test_after_a_429_calls_go_one_by_one_until_one_lands() -> None:
    """A crowd that waited for the end of the pause does not storm the deployment."""
    provider = ScriptedProvider(latency_s=0.2)
    async with engine(provider, limits=Limits(max_in_flight=8, max_batch_items=1)) as rig:
        provider.script.extend([Throttled("429", 1.0)] * 4)
        asking = [asyncio.ensure_future(rig.ask(f"t{at}", within_s=60)) for at in range(40)]
        await asyncio.gather(*asking)
        after = sorted(at for at, _ in provider.calls if at > provider.calls[0][0] + 0.5)
        assert after[1] - after[0] >= 0.19
        assert provider.most_in_flight == 8


async def test_calls_that_were_in_flight_together_are_throttled_once() -> None:
    """Eight 429s of one moment are one reason to rest, not eight."""
    provider = ScriptedProvider(latency_s=0.1)
    async with engine(provider, limits=Limits(max_in_flight=8, max_batch_items=1)) as rig:
        provider.script.extend([Throttled("429")] * 8)
        started = now()
        await asyncio.gather(*(rig.ask(f"t{at}", within_s=60) for at in range(8)))
        assert now() - started < 3.5


async def test_a_throttled_deployment_is_no_reason_to_wait_while_another_could_answer() -> None:
    """A 429 is a failure, not a full minute of ours: texts go elsewhere at once, and back when it is over."""
    primary, second = ScriptedProvider(always=Throttled("429", 2.0)), ScriptedProvider()
    async with engine(primary, second) as rig:
        for at in range(20):
            started = now()
            assert (await rig.ask(f"t{at}")).deployments == ("d1",)
            assert now() - started < 0.2
        assert len(primary.calls) <= 2
        primary.always = None
        await asyncio.sleep(2.1)
        assert (await rig.ask("healed")).deployments == ("d0",)


# ── back-off ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("attempts", "waits"),
    [
        (Attempts(7, 1.0, 32.0, 0.2), [(0.8 * 2**n, 1.2 * 2**n) for n in range(6)]),
        (Attempts(4, 4.0, 16.0, 0.0), [(4, 4), (8, 8), (16, 16)]),
        (Attempts(3, 0.5, 8.0, None), [(0, 0.5), (0, 1.0)]),
    ],
    ids=["1 to 32 s, a fifth either way", "4, 8, 16 s", "full jitter"],
)
async def test_back_off_is_as_the_operator_says(attempts: Attempts, waits: list[tuple[float, float]]) -> None:
    """Base, cap, jitter and attempts; the waits between the tries of one text."""
    provider = ScriptedProvider(always=Transient("500"), latency_s=0.0)
    deployment = Deployment("", MODEL, attempts=attempts)
    async with engine(provider, deployment=deployment) as rig:
        rig.gates["d0"].breaker._policy = deployment.breaker.__class__(failures_in_a_row=100, ratio_min_calls=100)
        with pytest.raises(UpstreamFailed):
            await rig.ask("a", within_s=1000)
        times = [at for at, _ in provider.calls]
        assert len(times) == attempts.most
        for (earlier, later), (least, most) in zip(itertools.pairwise(times), waits, strict=True):
            assert least - 0.01 <= later - earlier <= most + 0.01


# ── which deployment ────────────────────────────────────────────────────────────────────────────────────────────────

ONE_A_MINUTE = Limits(requests_per_minute=1, max_in_flight=4)


async def test_waiting_for_quota_is_the_default() -> None:
    """The dearer deployment is not used only because the first one's minute is full."""
    async with engine(ScriptedProvider(), ScriptedProvider(), each=[ONE_A_MINUTE, Limits()]) as rig:
        await rig.ask("a")
        started = now()
        assert (await rig.ask("b", within_s=300)).deployments == ("d0",)
        assert now() - started > 55


async def test_nobody_waits_past_half_of_his_time_for_quota() -> None:
    """Where waiting would use up the deadline, the next deployment answers although waiting is the rule."""
    async with engine(ScriptedProvider(), ScriptedProvider(), each=[ONE_A_MINUTE, Limits()]) as rig:
        await rig.ask("a")
        started = now()
        assert (await rig.ask("b", within_s=30)).deployments == ("d1",)
        assert now() - started < 1


@pytest.mark.parametrize(("spill_s", "used"), [(0.0, "d1"), (5.0, "d1"), (100.0, "d0")])
async def test_spill_says_how_long_a_wait_for_quota_may_be(spill_s: float, used: str) -> None:
    """A longer wait than that goes to the next deployment at once, a shorter one is waited."""
    async with engine(ScriptedProvider(), ScriptedProvider(), each=[ONE_A_MINUTE, Limits()], spill_s=spill_s) as rig:
        await rig.ask("a")
        assert (await rig.ask("b", within_s=600)).deployments == (used,)
        await asyncio.sleep(70)
        assert (await rig.ask("c", within_s=600)).deployments == ("d0",)


async def test_spread_adds_up_the_quotas_of_several_keys() -> None:
    """Three keys with ten requests a minute serve thirty texts without waiting, and share them evenly."""
    each = [Limits(requests_per_minute=10, max_batch_items=1)] * 3
    async with engine(*(ScriptedProvider() for _ in range(3)), each=each, spread=True) as rig:
        started = now()
        results = await asyncio.gather(*(rig.ask(f"t{at}") for at in range(30)))
        assert now() - started < 5
        assert Counter(result.deployments[0] for result in results) == {"d0": 10, "d1": 10, "d2": 10}


async def test_spread_goes_on_without_one_of_them() -> None:
    """A key that fails is left out and the others carry the load."""
    dead = ScriptedProvider(always=Transient("500"))
    async with engine(ScriptedProvider(), dead, ScriptedProvider(), spread=True) as rig:
        results = [await rig.ask(f"t{at}") for at in range(60)]
        assert {result.deployments[0] for result in results} == {"d0", "d2"}
        assert len(dead.calls) <= 15


async def test_a_strange_deployment_is_left_out_as_long_as_another_stays() -> None:
    """Vectors of another meaning answer nobody, not even when the sound one is down; alone it still serves."""
    sound, strange = ScriptedProvider(), ScriptedProvider()
    async with engine(strange, sound) as rig:
        rig.gates["d0"].judge(rig.gateway.routes[MODEL].space, MODEL, strange=True)
        assert (await rig.ask("a")).deployments == ("d1",)
        sound.always = Transient("500")
        outcomes = [await outcomes_of(rig.ask(f"t{at}", within_s=2)) for at in range(12)]
        assert all(isinstance(outcome, UpstreamFailed | ProviderUnavailable) for [outcome] in outcomes)
        assert strange.calls == []
    async with engine(ScriptedProvider()) as rig:
        rig.gates["d0"].judge(rig.gateway.routes[MODEL].space, MODEL, strange=True)
        assert (await rig.ask("a")).deployments == ("d0",)


# ── how much in a call ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_where_each_text_is_a_request_the_quota_counts_texts() -> None:
    """Sixty texts a minute are sixty texts in whatever calls, and what is left of a minute makes a smaller call."""
    limits = Limits(requests_per_minute=60, counts_texts=True, max_in_flight=4)
    provider = ScriptedProvider()
    async with engine(provider, limits=limits) as rig:
        await rig.ask(*(f"a{at}" for at in range(50)))
        started = now()
        await rig.ask(*(f"b{at}" for at in range(30)), within_s=200)
        assert 55 < now() - started < 70
        minute = [len(texts) for at, texts in provider.calls if at < started + 50]
        assert sum(minute) == 60


@dataclass
class Slowing(ScriptedProvider):
    """A stand-in whose latency grows with the tokens of a call: 20 ms and a millisecond per token."""

    async def embed(self, texts: Sequence[Text], space: Space, *, timeout_s: float) -> Reply:
        """A call as slow as it is large."""
        tokens = sum(len(str(text).split()) for text in texts)
        self.script.append(0.02 + 0.001 * tokens)
        return await super().embed(texts, space, timeout_s=timeout_s)


@pytest.mark.parametrize("target_s", [0.1, 0.3])
async def test_batches_shrink_and_grow_to_keep_calls_under_the_target(target_s: float) -> None:
    """Nine calls of ten stay below the target, though not by making them tiny: they carry most of what would fit."""
    provider = Slowing()
    limits = Limits(max_in_flight=2, max_batch_tokens=2000, min_batch_tokens=10, target_latency_s=target_s)
    durations: list[float] = []
    async with engine(provider, limits=limits) as rig:

        async def caller(name: int) -> None:
            for turn in range(40):
                await rig.ask(*(f"{name} {turn} {at}" for at in range(5)), within_s=1000)

        await asyncio.gather(*(caller(name) for name in range(200)))
        tokens = [sum(len(str(text).split()) for text in texts) for _, texts in provider.calls]
        durations = [0.02 + 0.001 * count for count in tokens]
    steady, fits = durations[30:-10], (target_s - 0.02) / 0.001
    assert np.quantile(steady, 0.9) <= target_s
    assert np.mean(tokens[30:-10]) >= 0.6 * fits


async def test_without_a_target_batches_are_as_large_as_they_may_be() -> None:
    """The ceiling adapts only where it was asked to."""
    provider = Slowing()
    async with engine(provider, limits=Limits(max_in_flight=1, max_batch_tokens=2000)) as rig:
        await ask_together(rig, [f"t {at}" for at in range(900)])
        assert max(len(texts) for _, texts in provider.calls) == 900
