"""A deployment whose vectors drift is noticed, left out, and welcome again; in virtual time, over the real engine."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from app.domain import Deployment, Limits, Space
from app.engine.canary import Canary, Watch, probes
from app.engine.gate import Bell
from app.errors import BadCredential, ProviderError, QuotaExhausted, Throttled, Transient
from app.ports import Claim, Grant, NotYet
from app.storage.limiter import InProcessLimiter
from app.tokens import Cl100k, Estimate
from tests.rig import MODEL, Rig, ScriptedProvider, bend, engine

pytestmark = pytest.mark.looptime

HOUR_S = 3600.0
SPACE = Space(MODEL, 8)


def turned(cosine: float) -> Callable[[np.ndarray], np.ndarray]:
    """Turns every vector so far that its cosine to what it was is this."""

    def turn(vectors: np.ndarray) -> np.ndarray:
        other = np.roll(vectors, 1, axis=1)
        other -= (vectors * other).sum(axis=1, keepdims=True) * vectors
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        turned_so: np.ndarray = (cosine * vectors + np.sqrt(1 - cosine**2) * other).astype(np.float32)
        return turned_so

    return turn


STRANGE, NEAR = bend(turned(0.9)), bend(turned(0.9995))


class Kept:
    """The landmarks that processes with the same `folder` share."""

    _folders: ClassVar[dict[Path, tuple[dict[str, np.ndarray], dict[str, float]]]] = {}

    def __init__(self, folder: Path) -> None:
        self._accepted, self._claimed = self._folders.setdefault(folder, ({}, {}))

    async def vectors(self, place: str) -> np.ndarray | None:
        """See `ports.Landmarks`."""
        return self._accepted.get(place)

    async def accept(self, place: str, vectors: np.ndarray) -> None:
        """See `ports.Landmarks`."""
        self._accepted[place] = vectors

    async def claim(self, place: str, interval_s: float) -> bool:
        """See `ports.Landmarks`."""
        now = asyncio.get_running_loop().time()
        if now < self._claimed.get(place, -math.inf) + interval_s:
            return False
        self._claimed[place] = now
        return True

    async def release(self, place: str) -> None:
        """See `ports.Landmarks`."""
        self._claimed.pop(place, None)


def canary_of(rig: Rig, watch: Watch, folder: Path) -> Canary:
    """One that shares limiter and bell with the engine."""
    gateway, clock = rig.gateway, asyncio.get_running_loop().time
    return Canary(
        [watch], Kept(folder), gateway._parts.limiter, gateway._parts.ledger, gateway._bell, rig.telemetry, clock=clock
    )  # fmt: skip


@asynccontextmanager
async def watched(
    folder: Path, *providers: ScriptedProvider, deployment: Deployment | None = None
) -> AsyncIterator[tuple[Rig, Canary]]:
    """An engine whose model is watched every hour; the canary is not started."""
    async with engine(*providers, deployment=deployment) as rig:
        gates = list(rig.gates.values())
        clock = asyncio.get_running_loop().time
        watch = Watch(
            MODEL, rig.gateway.routes[MODEL].space, gates, ("one", "два три", "long " * 50), 53, HOUR_S, 0.999
        )
        limiter = InProcessLimiter({gate.name: gate.deployment.limits for gate in gates})
        yield rig, Canary(
            [watch], Kept(folder), limiter, rig.gateway._parts.ledger, Bell(), rig.telemetry, clock=clock
        )  # fmt: skip


async def test_the_first_vectors_are_accepted_and_the_next_compared(tmp_path: Path) -> None:
    """The primary's are the landmarks, the fallback's are measured against them, also by the next process."""
    async with watched(tmp_path, ScriptedProvider(), ScriptedProvider(always=NEAR)) as (_, canary):
        first, second = await canary.probe()
        assert (first.cosine, first.dimensions) == (None, 8)
        assert second.cosine == pytest.approx(0.9995, abs=1e-4)
    async with watched(tmp_path, ScriptedProvider(always=STRANGE)) as (_, canary):
        [again] = await canary.probe()
        assert again.cosine == pytest.approx(0.9, abs=1e-4)


async def test_a_fallback_that_drifts_twice_in_a_row_is_left_out(tmp_path: Path) -> None:
    """Once is not enough; twice takes it out of the route; near again, it is back."""
    fallback = ScriptedProvider(always=STRANGE)
    async with watched(tmp_path, ScriptedProvider(), fallback) as (rig, canary):
        states = []
        for _ in range(2):
            await canary.probe()
            states.append(rig.gates["d1"].is_strange(SPACE))
        assert states == [False, True]
        rig.provider.always = Transient("500")
        rig.providers["d1"].always = None
        await canary.probe()
        assert not rig.gates["d1"].is_strange(SPACE)
        assert (await rig.ask("a")).deployments == ("d1",)
        rig.telemetry.close()
        assert len(re.findall(rb'"space.strange"', rig.log.getvalue())) == 1
        assert len(re.findall(rb'"space.sound"', rig.log.getvalue())) == 1
        assert 'embedgate_canary_cosine{deployment="d1",model="model-a"}' in rig.metrics()


async def test_one_that_cannot_be_reached_is_unknown_not_strange(tmp_path: Path) -> None:
    """A failure is a finding in our words and changes nothing."""
    broken = ScriptedProvider(always=Transient("HTTP 500"))
    async with watched(tmp_path, ScriptedProvider(), broken) as (rig, canary):
        for _ in range(3):
            _, finding = await canary.probe()
            assert finding.error == "Transient: HTTP 500"
        assert not rig.gates["d1"].is_strange(SPACE)


async def test_another_width_or_no_vectors_at_all_are_an_error(tmp_path: Path) -> None:
    """What the dispatcher would refuse, the canary does not take for a landmark either."""
    async with watched(tmp_path, ScriptedProvider(always=bend(lambda v: v * np.float32(np.nan)))) as (_, canary):
        [finding] = await canary.probe()
        assert finding.error.startswith("MalformedReply")


async def test_it_sings_once_an_hour_whatever_restarts(tmp_path: Path) -> None:
    """A second process within the hour probes nothing; the first goes on every hour."""
    provider = ScriptedProvider()
    async with watched(tmp_path, provider) as (_, canary), canary:
        await asyncio.sleep(1)
        assert len(provider.calls) == 1
    async with watched(tmp_path, provider) as (_, canary), canary:
        await asyncio.sleep(1)
        assert len(provider.calls) == 1


async def test_a_doubt_is_looked_at_again_soon(tmp_path: Path) -> None:
    """After the first low cosine the next probe comes within a minute or so, not after an hour."""
    fallback = ScriptedProvider(always=STRANGE)
    async with watched(tmp_path, ScriptedProvider(), fallback) as (rig, canary), canary:
        await asyncio.sleep(200)
        assert rig.gates["d1"].is_strange(SPACE)
        assert len(fallback.calls) == 2


async def test_accepting_again_makes_the_new_vectors_the_landmarks(tmp_path: Path) -> None:
    """After a change that the operator wants, `accept` ends the alarm."""
    provider = ScriptedProvider()
    async with watched(tmp_path, provider) as (_, canary):
        await canary.probe()
        provider.always = STRANGE
        assert (await canary.probe())[0].cosine == pytest.approx(0.9, abs=1e-4)
        assert (await canary.probe(accept=True))[0].cosine is None
        assert (await canary.probe())[0].cosine == pytest.approx(1.0)


async def test_it_keeps_to_slots_and_quota(tmp_path: Path) -> None:
    """A probe takes a slot and quota like any bulk call, and gives the slot back."""
    deployment = Deployment("", MODEL, limits=Limits(max_in_flight=1, requests_per_minute=60))
    provider = ScriptedProvider(latency_s=5.0)
    async with watched(tmp_path, provider, deployment=deployment) as (rig, canary):
        asking = asyncio.ensure_future(rig.ask("a"))
        await asyncio.sleep(0.1)
        await canary.probe()
        await asking
        assert provider.most_in_flight == 1
        assert rig.gates["d0"].in_flight == 0


async def test_a_probe_that_waits_for_quota_holds_no_slot(tmp_path: Path) -> None:
    """The only slot stays free for callers while the probe's tokens are not there yet."""
    limits = Limits(max_in_flight=1, tokens_per_minute=100)
    provider = ScriptedProvider()
    async with engine(provider, limits=limits) as rig:
        watch = Watch(MODEL, rig.gateway.routes[MODEL].space, [rig.gates["d0"]], ("a", "b", "c " * 50), 52, HOUR_S, 0.9)
        canary = canary_of(rig, watch, tmp_path)
        await rig.ask("w " * 60)
        probing = asyncio.ensure_future(canary.probe())
        await asyncio.sleep(1)
        started = asyncio.get_running_loop().time()
        await rig.ask("small")
        assert asyncio.get_running_loop().time() - started == pytest.approx(0.05)
        [finding] = await probing
        assert finding.error == ""


@pytest.mark.parametrize(
    ("failure", "state", "cooling"),
    [
        (Throttled("429", 3.0), "closed", 1),
        (BadCredential("401"), "credential", 0),
        (QuotaExhausted("402"), "quota", 0),
    ],
)
async def test_what_a_probe_meets_holds_for_everybody(
    tmp_path: Path, failure: ProviderError, state: str, cooling: int
) -> None:
    """A 429 pauses the deployment, a refused key or an empty purse takes it out, whoever found it out."""
    async with engine(ScriptedProvider(always=failure), ScriptedProvider()) as rig:
        watch = Watch(MODEL, SPACE, [rig.gates["d0"]], ("a", "b", "c"), 3, HOUR_S, 0.999)
        await canary_of(rig, watch, tmp_path).probe()
        assert (rig.gates["d0"].breaker.state, rig.gates["d0"].cooling) == (state, cooling)
        assert (await rig.ask("x")).deployments == ("d1",)
        assert len(rig.provider.calls) == 1


async def test_a_probe_cancelled_before_its_start_gives_its_quota_back(tmp_path: Path) -> None:
    """Booked ahead, then cancelled: nothing was used, nothing is held."""
    limits = Limits(max_in_flight=1, tokens_per_minute=100)
    settled: list[tuple[object, ...]] = []

    class Later(InProcessLimiter):
        """Grants what may begin a fifth of a second later."""

        async def reserve(self, claim: Claim) -> Grant | NotYet:
            """Books ahead."""
            answer = await super().reserve(claim)
            assert isinstance(answer, Grant)
            return replace(answer, start_in_s=0.2)

        async def settle(self, grant: Grant, tokens_used: int | None, **more: Any) -> None:
            """Remembers."""
            settled.append((tokens_used, more["requests_used"]))

    async with engine(ScriptedProvider(), limits=limits, limiter=Later({"d0": limits})) as rig:
        watch = Watch(MODEL, SPACE, [rig.gates["d0"]], ("a", "b", "c"), 3, HOUR_S, 0.999)
        probing = asyncio.ensure_future(canary_of(rig, watch, tmp_path).probe())
        await asyncio.sleep(0.1)
        probing.cancel()
        await asyncio.wait([probing])
        assert settled == [(0, 0)]
        assert (rig.gates["d0"].in_flight, rig.provider.calls) == (0, [])


async def test_a_good_round_of_one_model_does_not_clear_another(tmp_path: Path) -> None:
    """Two models of one deployment are judged apart, and a strange one stays out until it is well itself."""
    strange = ScriptedProvider()
    async with engine(strange, ScriptedProvider()) as rig:
        gates = [rig.gates["d0"]]
        one = Watch(MODEL, SPACE, gates, ("a", "b", "c"), 3, HOUR_S, 0.999)
        other = Watch("other name", SPACE, gates, ("d", "e", "f"), 3, HOUR_S, 0.999)
        await canary_of(rig, one, tmp_path).probe()
        strange.always = STRANGE
        canary = canary_of(rig, one, tmp_path)
        await canary.probe()
        await canary.probe()
        await canary_of(rig, other, tmp_path).probe()
        assert rig.gates["d0"].is_strange(SPACE)
        assert not rig.gates["d0"].is_strange(Space("model-b", 8))
        assert (await rig.ask("x")).deployments == ("d1",)
        strange.always = None
        await canary.probe()
        assert not rig.gates["d0"].is_strange(SPACE)


def test_the_probes_are_short_foreign_and_nearly_too_long() -> None:
    """The long one fills most of the limit where tokens are counted exactly, and stays clear of it where guessed."""
    texts, tokens = probes(Cl100k(), 8192, 300_000)
    counts = [Cl100k().count(text) for text in texts]
    assert 0.85 * 8192 <= counts[2] <= 0.9 * 8192
    assert (len(texts), sum(counts)) == (3, tokens)
    guessed, _ = probes(Estimate(), 8192, 300_000)
    assert Cl100k().count(guessed[2]) < 8192 * 0.6
    small, _ = probes(Cl100k(), 8192, 1000)
    assert Cl100k().count(small[2]) <= 500


def test_other_probes_have_other_landmarks() -> None:
    """A probe that changed is not compared with what another text got."""
    watch = Watch("m", Space(MODEL, 8), [], ("a", "b", "c"), 3, HOUR_S, 0.999)
    assert watch.place != replace(watch, probes=("a", "b", "d")).place
