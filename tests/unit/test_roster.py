"""Who waits for a deployment is told when to ask again, also where that moment comes while it is being asked."""

import asyncio
import random

import pytest

from app.domain import ANONYMOUS, Deployment, EmbeddingRequest, Limits, Priority, Space
from app.engine.breaker import CircuitBreaker
from app.engine.gate import Gate
from app.engine.roster import Roster
from app.engine.workitem import Demand, WorkItem
from tests.rig import MODEL, WIDTH, ScriptedProvider

TICK_S = 1e-5


class Clock:
    """Goes on with every look at it, as real ones do."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """A tick later than the last time."""
        self.now += TICK_S
        return self.now


def bench(clock: Clock) -> tuple[Gate, Roster, Demand]:
    """One deployment, and a text that wants it."""
    deployment = Deployment("d0", MODEL, limits=Limits(max_in_flight=4))
    breaker = CircuitBreaker(deployment.breaker, clock=clock, rng=random.Random(7), on_change=lambda *_: None)
    gate = Gate(deployment, ScriptedProvider(), breaker, None)
    roster = Roster(Space(MODEL, WIDTH), [gate], clock=clock, spread=False, spill_s=float("inf"))
    request = EmbeddingRequest(ANONYMOUS, MODEL, ("text",), deadline=1e9)
    item = WorkItem(b"", "text", 1, 1, asyncio.get_running_loop().create_future(), [request], 0.0)
    return gate, roster, Demand(item, 1, 1, Priority.BULK)


@pytest.mark.parametrize("ticks", range(40))
async def test_quota_that_comes_back_meanwhile_is_not_missed(ticks: int) -> None:
    """Who is not let in at any moment around the one at which it may ask is told to come again."""
    clock = Clock()
    gate, roster, wish = bench(clock)
    roster.refused(gate, wish, 0.5)
    clock.now = 1000.5 + TICK_S * (5 - ticks)
    if roster.enter([wish]) is None:
        wait_s = roster.next_change_s([wish])
        assert wait_s is not None
        assert wait_s <= 40 * TICK_S


@pytest.mark.parametrize("ticks", range(40))
async def test_a_probe_that_falls_due_meanwhile_is_not_missed(ticks: int) -> None:
    """The same of a deployment that was left alone until now."""
    clock = Clock()
    gate, roster, wish = bench(clock)
    gate.breaker.condemn("credential")
    clock.now += gate.breaker.retry_in_s() + TICK_S * (5 - ticks)
    if roster.enter([wish]) is None:
        assert roster.next_change_s([wish]) is not None
