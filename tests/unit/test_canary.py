"""A deployment whose vectors drift is noticed, left out, and welcome again; in virtual time, over the real engine."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.domain import Deployment, Limits, Space
from app.engine.canary import Canary, Watch, probes
from app.engine.gate import Bell
from app.errors import Transient
from app.storage.landmarks import FileLandmarks
from app.storage.limiter import InProcessLimiter
from app.tokens import Cl100k, Estimate
from tests.rig import MODEL, Rig, ScriptedProvider, bend, engine

pytestmark = pytest.mark.looptime

HOUR_S = 3600.0


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
        yield rig, Canary([watch], FileLandmarks(folder), limiter, Bell(), rig.telemetry, clock=clock)


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
            states.append(rig.gates["d1"].strange)
        assert states == [False, True]
        rig.provider.always = Transient("500")
        rig.providers["d1"].always = None
        await canary.probe()
        assert not rig.gates["d1"].strange
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
        assert not rig.gates["d1"].strange


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
        assert rig.gates["d1"].strange
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


async def test_a_broken_file_of_landmarks_counts_as_none(tmp_path: Path) -> None:
    """What does not read back is probed and accepted anew, and a folder that cannot be written stops nothing."""
    landmarks = FileLandmarks(tmp_path / "kept")
    await landmarks.accept("place", np.ones((3, 8), np.float32))
    for content in (b"", b"garbage", b"\x93NUMPY"):
        (tmp_path / "kept" / "place.npy").write_bytes(content)
        assert await FileLandmarks(tmp_path / "kept").vectors("place") is None
    (tmp_path / "file").write_text("")
    unwritable = FileLandmarks(tmp_path / "file" / "kept")
    await unwritable.accept("place", np.ones((3, 8), np.float32))
    assert await unwritable.vectors("place") is not None
    assert await unwritable.claim("place", HOUR_S)
    assert not await unwritable.claim("place", HOUR_S)


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
