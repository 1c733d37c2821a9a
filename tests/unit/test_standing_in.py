"""Who waits for whom when deployments stumble, hang or go out: nobody in vain, and nobody for ever; in virtual time."""

import asyncio
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from app.domain import Attempts, Deployment, Limits, Priority
from app.errors import BadCredential, EmbedgateError, InputRefused, Misconfigured, Throttled, Transient
from app.ports import Claim, Grant, NotYet
from app.storage.limiter import InProcessLimiter
from tests.rig import MODEL, ScriptedProvider, engine

pytestmark = pytest.mark.looptime

ONE_A_MINUTE = Limits(requests_per_minute=1, max_in_flight=4)


def now() -> float:
    """The loop's clock."""
    return asyncio.get_running_loop().time()


async def outcomes_of(*asking: object) -> list[object]:
    """Results and errors alike."""
    return await asyncio.gather(*asking, return_exceptions=True)  # type: ignore[call-overload, no-any-return]


class Spins(BaseException):
    """Somebody asks for quota again and again at one moment."""


class Asked(InProcessLimiter):
    """A limiter that ends the test when it is asked a hundred times at one moment, and knows what became of grants."""

    def __init__(self, *limits: Limits) -> None:
        super().__init__({f"d{at}": each for at, each in enumerate(limits)})
        self.times: Counter[float] = Counter()
        self.granted: list[str] = []
        self.settled: list[str] = []

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """Counts."""
        self.times[now()] += 1
        if self.times[now()] > 100:
            raise Spins
        answer = await super().reserve(claim)
        if isinstance(answer, Grant):
            self.granted.append(answer.id)
        return answer

    async def settle(self, grant: Grant, *used: Any, **more: Any) -> None:
        """Remembers."""
        self.settled.append(grant.id)
        await super().settle(grant, *used, **more)


async def test_a_text_returns_to_whom_it_avoids_when_nobody_else_is_left() -> None:
    """Its fallback goes out before it has a slot there: after a back-off the first one answers, and nothing spins."""
    first, second = ScriptedProvider(), ScriptedProvider(always=BadCredential("401"), latency_s=2.0)
    first.script.extend([Transient("500")] * 2)
    limits = [Limits(max_in_flight=4), Limits(max_in_flight=1)]
    async with engine(first, second, each=limits, limiter=Asked(*limits)) as rig:
        one = asyncio.ensure_future(rig.ask("a"))
        await asyncio.sleep(0.2)
        assert (await rig.ask("b")).deployments == ("d0",)
        assert [at for at, texts in first.calls if texts == ["b"]] == pytest.approx([0.2, 2.05])
        await outcomes_of(one)


async def test_a_text_rests_before_it_returns_to_whom_it_avoids() -> None:
    """If the fallback is already gone when the text gets there, the first one is not asked again at once."""
    first, second = ScriptedProvider(), ScriptedProvider()
    deployment = Deployment("", MODEL, attempts=Attempts(backoff_base_s=3.0, jitter=0.0))
    async with engine(first, second, deployment=deployment) as rig:
        first.script.append(Transient("500"))
        asking = asyncio.ensure_future(rig.ask("a"))
        await asyncio.sleep(0.01)
        second_gate = rig.gates["d1"]
        second_gate.enter(Priority.DEFAULT, now())
        second_gate.in_flight = second_gate.deployment.limits.max_in_flight  # busy until it is found to be out
        await asyncio.sleep(0.09)
        second_gate.breaker.condemn("quota")
        assert (await asking).deployments == ("d0",)
        first_call, second_call = (at for at, _ in first.calls)
        assert second_call - first_call == pytest.approx(3.05)
        second_gate.in_flight = 0


async def test_texts_that_wait_for_a_slot_of_the_fallback_hold_up_nobody() -> None:
    """A primary that stumbled twice is well again; its callers do not queue behind those two."""
    first, second = ScriptedProvider(), ScriptedProvider(latency_s=3.0)
    first.script.extend([Transient("500")] * 2)
    async with engine(first, second, each=[Limits(max_in_flight=4), Limits(max_in_flight=1)]) as rig:
        stumbled = []
        for name in ("a", "b"):
            stumbled.append(asyncio.ensure_future(rig.ask(name)))
            await asyncio.sleep(0.1)
        for at in range(6):
            started = now()
            assert (await rig.ask(f"t{at}")).deployments == ("d0",)
            assert now() - started == pytest.approx(0.05)
        assert [result.deployments for result in await asyncio.gather(*stumbled)] == [("d1",)] * 2


async def test_texts_that_wait_for_quota_of_the_fallback_hold_up_nobody() -> None:
    """Its minute is used up: the primary's callers go on, and who waits too long for it returns to the primary."""
    first, second = ScriptedProvider(), ScriptedProvider()
    limits = [Limits(max_in_flight=4), ONE_A_MINUTE]
    async with engine(first, second, each=limits, limiter=Asked(*limits)) as rig:
        first.script.append(Transient("500"))
        assert (await rig.ask("warm")).deployments == ("d1",)
        first.script.extend([Transient("500")] * 2)
        patient = asyncio.ensure_future(rig.ask("patient", within_s=300))
        await asyncio.sleep(0.1)
        hasty = asyncio.ensure_future(rig.ask("hasty", within_s=20))
        await asyncio.sleep(0.1)
        for at in range(20):
            started = now()
            assert (await rig.ask(f"t{at}")).deployments == ("d0",)
            assert now() - started < 0.06
        assert (await hasty).deployments == ("d0",)
        assert not patient.done()
        assert (await patient).deployments == ("d1",)


async def test_whoever_waits_for_the_primary_holds_up_nobody_who_came_back() -> None:
    """While others wait for the primary's minute, a text that failed there is answered by the fallback at once."""
    first, second = ScriptedProvider(latency_s=2.0), ScriptedProvider()
    first.script.append(Transient("500"))
    limits = [ONE_A_MINUTE, Limits()]
    async with engine(first, second, each=limits, limiter=Asked(*limits)) as rig:
        failing = asyncio.ensure_future(rig.ask("fails", within_s=300))
        await asyncio.sleep(0.1)
        waiting = asyncio.ensure_future(rig.ask("waits", within_s=300))
        assert (await failing).deployments == ("d1",)
        assert now() == pytest.approx(2.05)
        assert (await waiting).deployments == ("d0",)


async def test_a_text_waits_for_the_fallback_where_it_can_never_be_served_otherwise() -> None:
    """It does not spend its attempts on a deployment that does not know the model."""
    first, second = ScriptedProvider(always=Misconfigured("404")), ScriptedProvider()
    async with engine(first, second, each=[Limits(), ONE_A_MINUTE]) as rig:
        await rig.ask("a")
        assert (await rig.ask("b", within_s=100)).deployments == ("d1",)
        assert len(first.calls) == 2


async def test_whoever_waits_for_quota_holds_no_slot() -> None:
    """A place in a call is of no use to who may not call yet."""
    async with engine(ScriptedProvider(), limits=ONE_A_MINUTE) as rig:
        await rig.ask("a")
        waiting = asyncio.ensure_future(rig.ask("b", within_s=300))
        await asyncio.sleep(5)
        assert rig.gates["d0"].in_flight == 0
        await waiting


@pytest.mark.parametrize("seed", range(5))
async def test_every_grant_is_settled_once_whatever_happens(seed: int) -> None:
    """Failures, refusals, hangs, short deadlines and callers that leave: no quota is lost and none given twice."""
    chance = random.Random(seed)
    limits = [Limits(max_in_flight=3, requests_per_minute=600, tokens_per_minute=6000)] * 2
    limiter = Asked(*limits)
    steps: list[Any] = [None] * 3
    steps += [Transient("500"), Throttled("429", 0.5), InputRefused("400"), InputRefused("400", position=0), 5.0]
    providers = [ScriptedProvider(), ScriptedProvider()]
    for provider in providers:
        provider.script.extend(chance.choice(steps) for _ in range(100))
    async with engine(*providers, each=limits, limiter=limiter) as rig:

        async def caller(name: int) -> None:
            await asyncio.sleep(chance.random() * 10)
            texts = [f"{name}-{at}" for at in range(chance.randint(1, 6))]
            asking = asyncio.ensure_future(
                rig.ask(*texts, within_s=chance.choice([0.5, 3, 20]), priority=chance.choice(list(Priority)))
            )
            await asyncio.wait([asking], timeout=chance.choice([0.2, 60]))
            asking.cancel()
            await outcomes_of(asking)

        await asyncio.gather(*(caller(name) for name in range(100)))
        await asyncio.sleep(60)
        assert set(rig.leftovers().values()) == {0}
        assert Counter(limiter.settled) == Counter(limiter.granted)
        assert 'loop_crashes_total{loop="' not in rig.metrics()


@pytest.mark.parametrize("moment_s", [0.05, 0.15])
async def test_a_grant_that_has_not_begun_is_given_back_at_the_end(moment_s: float) -> None:
    """Shutting down while a call waits for the start it was promised settles it with nothing used."""

    class Later(Asked):
        """Grants what may begin a fifth of a second later."""

        async def reserve(self, claim: Claim) -> Grant | NotYet:
            """Books ahead."""
            answer = await super().reserve(claim)
            assert isinstance(answer, Grant)
            return replace(answer, start_in_s=0.2)

    limiter = Later(Limits())
    async with engine(ScriptedProvider(), limiter=limiter) as rig:
        asking = asyncio.ensure_future(rig.ask("a", within_s=1.0))
        await asyncio.sleep(moment_s)
    assert limiter.settled == limiter.granted != []
    await outcomes_of(asking)


# ── impatient callers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("known", [False, True], ids=["cold", "warm"])
async def test_impatient_callers_make_no_deployment_look_dead(known: bool) -> None:
    """A deployment that takes 1.5 s is well, although callers with 1.9 s left never see an answer of it."""
    async with engine(ScriptedProvider(latency_s=1.5)) as rig:
        if known:
            await rig.ask("patient")
        for at in range(6):
            with pytest.raises(EmbedgateError):
                await rig.ask(f"t{at}", within_s=1.9)
        assert rig.gates["d0"].breaker.state == "closed"
        started = now()
        await rig.ask("honest")
        assert now() - started == pytest.approx(1.5)


async def test_a_deployment_that_answers_nobody_is_found_out_by_impatient_callers_too() -> None:
    """Silences add up: after as long as one whole call may take, they go to the fallback at once."""
    deployment = Deployment("", MODEL, Limits(max_in_flight=1), timeout_s=10.0)
    async with engine(ScriptedProvider(always=1000.0), ScriptedProvider(), deployment=deployment) as rig:
        for at in range(11):
            assert (await rig.ask(f"t{at}", within_s=2.0)).deployments == ("d1",)
        assert rig.gates["d0"].breaker.state == "open"
        assert rig.gates["d0"].breaker.reason in ("stall", "probe")
        started = now()
        await rig.ask("quick", within_s=2.0)
        assert now() - started == pytest.approx(0.05)


async def test_a_deployment_known_to_be_quick_is_found_out_at_once_when_it_hangs() -> None:
    """Whoever waited longer than its answers take counts, however short his deadline."""
    async with engine(ScriptedProvider(), ScriptedProvider(), limits=Limits(max_in_flight=8)) as rig:
        await rig.ask("warm")
        rig.providers["d0"].always = 1000.0
        await asyncio.gather(*(rig.ask(f"t{at}", within_s=2.0) for at in range(5)))
        for at in range(5):
            await rig.ask(f"u{at}", within_s=2.0)
        assert rig.gates["d0"].breaker.state == "open"
