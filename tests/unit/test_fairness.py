"""Fairness between tenants inside one priority, here and over replicas that hear each other now and then."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from app.domain import EmbeddingRequest, Priority, Tenant
from app.engine.fairness import Lane
from app.engine.sharing import SHARE_S
from app.engine.workitem import WorkItem
from app.ports import Served
from tests.rig import Noticeboard, ScriptedProvider, engine

pytestmark = pytest.mark.looptime


@dataclass
class Replica:
    """One replica's lane, and whom it served."""

    lane: Lane = field(default_factory=lambda: Lane(Priority.DEFAULT))
    served: Counter[str] = field(default_factory=Counter)

    def put(self, tenant: str, *tokens: int, weight: float = 1.0) -> None:
        """Lets texts of so many tokens wait, in a request of their own."""
        request = EmbeddingRequest(Tenant(tenant, weight), "m", ("",) * len(tokens), deadline=1e9)
        loop = asyncio.get_running_loop()
        items = [WorkItem(b"", "", size, size, loop.create_future(), [request], 0.0) for size in tokens]
        for item in items:
            item.place = Priority.DEFAULT
        self.lane.add(request, items)

    def serve(self, count: int = 1) -> str:
        """Lets so many texts go; says whose they were."""
        items = [self.lane.advance(charge=True) for _ in range(count)]
        names = [item.waiters[0].tenant.name for item in items]
        for name, item in zip(names, items, strict=True):
            self.served[name] += item.tokens
        return "".join(names)


def exchange(*replicas: Replica, lost: Sequence[Replica] = ()) -> None:
    """Everybody tells and hears, except those whose exchange is lost."""
    spoken = [each for each in replicas if each not in lost]
    told = [each.lane.news() for each in spoken]
    for each, own in zip(spoken, told, strict=True):
        if own is not None:
            each.lane.told(own)
        each.lane.hear([news for news in told if news is not None and news is not own])


async def test_in_bulk_the_oldest_request_goes_first() -> None:
    """Whole, before any text of a later one of the same tenant; in other priorities they take turns."""
    orders = {}
    for priority in (Priority.DEFAULT, Priority.BULK):
        lane = Lane(priority)
        for name in ("a", "b"):
            request = EmbeddingRequest(Tenant("t"), "m", ("",) * 3, deadline=1e9)
            loop = asyncio.get_running_loop()
            lane.add(request, [WorkItem(b"", name, 1, 1, loop.create_future(), [request], 0.0) for _ in range(3)])
        orders[priority] = "".join(str(lane.advance(charge=True).payload) for _ in range(6))
    assert orders == {Priority.DEFAULT: "ababab", Priority.BULK: "aaabbb"}


# ── one replica ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_short_text_does_not_wait_for_a_long_one_of_a_tenant_served_as_much() -> None:
    """Counted is what a tenant will have got with its next text, so who wants little need not wait for who wants much.

    The long text has its turn once the others have had as much.
    """
    one = Replica()
    one.put("a", *[2000] * 3)
    one.serve()
    one.put("b", *[500] * 10)
    assert one.serve(6) == "bbbabb"


async def test_newcomers_cannot_keep_a_long_text_waiting() -> None:
    """However many come after it: once each got what the long text costs, it goes."""
    one = Replica()
    one.put("a", 2000)
    order = ""
    for number in range(60):
        one.put("bc"[number % 2], 100)
        order += one.serve()
    assert 38 <= order.index("a") <= 40


async def test_levels_of_tenants_with_weight_rise_more_slowly() -> None:
    """Twice the weight, twice the tokens."""
    one = Replica()
    one.put("a", *[100] * 100)
    one.put("b", *[100] * 100, weight=2.0)
    one.serve(90)
    assert one.served == {"a": 3000, "b": 6000}


# ── replicas ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_others_served_counts_once() -> None:
    """A tenant that got something elsewhere gets that much less here, and no more of it however often they talk."""
    one, other = Replica(), Replica()
    one.put("a", *[100] * 100)
    other.put("a", *[100] * 100)
    other.put("c", *[100] * 100)
    one.serve(10)
    for _ in range(5):
        exchange(one, other)
    other.serve(30)
    assert other.served == {"a": 1000, "c": 2000}


async def test_it_counts_for_who_is_not_waiting_here_too() -> None:
    """A tenant that was served elsewhere, and then comes here, waits for those who were not."""
    one, other = Replica(), Replica()
    other.put("c", *[100] * 100)
    one.put("a", *[100] * 10)
    one.serve(10)
    exchange(one, other)
    other.put("a", *[100] * 100)
    other.serve(30)
    assert other.served == {"a": 1000, "c": 2000}


async def test_a_lost_exchange_loses_nothing() -> None:
    """What could not be told is told later, with what came since."""
    one, other = Replica(), Replica()
    other.put("a", *[100] * 100)
    other.put("c", *[100] * 100)
    one.put("a", *[100] * 100)
    for _ in range(5):
        one.serve(2)
        exchange(one, other, lost=[one])
    exchange(one, other)
    other.serve(30)
    assert other.served == {"a": 1000, "c": 2000}


async def test_what_is_served_while_telling_is_told_next() -> None:
    """Between saying something and knowing that it was heard, more may be served."""
    one = Replica()
    one.put("a", *[100] * 10)
    one.serve(2)
    said = one.lane.news()
    one.serve(3)
    assert said is not None
    one.lane.told(said)
    left = one.lane.news()
    assert left is not None
    assert (said.tokens, left.tokens) == ({"a": 200.0}, {"a": 300.0})


async def test_claims_are_ranked_by_how_far_ahead_their_tenant_is() -> None:
    """Of two replicas the one whose next tenant got less goes first: the other's rank is the difference."""
    one, other = Replica(), Replica()
    one.put("a", *[100] * 100)
    other.put("c", *[100] * 100)
    exchange(one, other)
    one.serve(10)
    exchange(one, other)
    assert (one.lane.rank, other.lane.rank) == (1000.0, 0.0)
    other.serve(15)
    exchange(one, other)
    assert (one.lane.rank, other.lane.rank) == (0.0, 500.0)


async def test_nobody_is_ahead_of_replicas_where_nobody_waits() -> None:
    """Who has been served most but is alone in waiting has nobody to let pass."""
    one, other = Replica(), Replica()
    one.put("a", *[100] * 100)
    other.put("c", 100)
    exchange(one, other)
    one.serve(10)
    other.serve()
    exchange(one, other)
    assert one.lane.rank == 0.0


async def test_a_new_replica_begins_where_the_others_are() -> None:
    """It has no arrears to make up, nor has whoever asks it."""
    one, new = Replica(), Replica()
    one.put("a", *[100] * 1000)
    one.serve(500)
    new.put("c", *[100] * 1000)
    exchange(one, new)
    assert (one.lane.level, new.lane.level, new.lane.rank) == (50_000.0, 50_000.0, 0.0)
    exchange(one, new)
    assert one.lane.rank == 0.0
    one.put("c", *[100] * 100)
    assert Counter(one.serve(20)) == {"a": 10, "c": 10}


async def test_who_comes_back_begins_at_the_least_level_where_somebody_waits() -> None:
    """Also at a replica where nobody waits: there is nothing to make up for, and no credit for being away."""
    one, other, third = Replica(), Replica(), Replica()
    one.put("a", *[100] * 1000)
    other.put("c", *[100] * 1000)
    exchange(one, other, third)
    one.serve(300)
    other.serve(200)
    exchange(one, other, third)
    third.put("d", *[100] * 10)
    assert third.lane.level == 20_000.0
    exchange(one, other, third)
    assert (one.lane.rank, other.lane.rank, third.lane.rank) == (10_000.0, 0.0, 0.0)


def compete(replicas: list[Replica], turns: int, *, restarts: bool) -> float:
    """Grants quota as the limiter does, by rank, and tells how far apart the two tenants ever were.

    A waits at replica 0 and C at all; they talk after every twenty texts.
    """
    served: Counter[str] = Counter({"a": 0, "c": 0})
    apart = 0
    for turn in range(turns):
        if restarts and turn % 97 == 96:
            replicas[turn % 3] = Replica()
        for number, each in enumerate(replicas):
            if not each.lane:
                each.put("c", *[100] * 50)
                if number == 0:
                    each.put("a", *[100] * 50)
        goes = min(replicas, key=lambda each: (each.lane.rank, sum(each.served.values())))
        goes.put("c", 100)
        if goes is replicas[0]:
            goes.put("a", 100)
        served[goes.serve()] += 100
        if turn % 20 == 19:
            exchange(*replicas)
        apart = max(apart, abs(served["a"] - served["c"]))
    return apart


async def test_tenants_at_one_and_at_all_replicas_stay_together() -> None:
    """Never further apart than what is served between two exchanges, one way and the other."""
    assert compete([Replica() for _ in range(3)], 3000, restarts=False) <= 2 * 2000


async def test_replicas_that_restart_starve_nobody() -> None:
    """Each restart forgets what was not told; the tenants drift apart by no more than that each time."""
    apart = compete([Replica() for _ in range(3)], 3000, restarts=True)
    print(f"{3000 // 97} restarts: {apart} tokens of 300,000 apart")
    assert apart <= 31 * 1000


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_ten_thousand_idle_tenants_are_not_spoken_of() -> None:
    """Told is who was served since; of the others nothing is said or kept."""
    one, other = Replica(), Replica()
    other.put("busy", *[100] * 20_000)
    one.put("busy", *[100] * 20_000)
    for number in range(10_000):
        one.put(f"tenant {number}", 1)
        one.serve()
        if number % 100 == 99:
            exchange(one, other)
            other.put("passing", 1)
            other.serve()
    news = one.lane.news()
    assert news == Served({}, one.lane.level, waiting=True)
    assert len(msgspec.msgpack.encode(news)) < 60


async def test_an_idle_lane_says_nothing() -> None:
    """Where nobody was served and nobody waits there is no news."""
    one = Replica()
    assert one.lane.news() is None
    one.put("a", 100)
    one.serve()
    said = one.lane.news()
    assert said == Served({"a": 100.0}, 0.0, waiting=False)
    one.lane.told(said)
    assert one.lane.news() is None


# ── while it runs ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_bug_in_telling_stops_nobody() -> None:
    """Requests are answered, it is counted, and telling goes on."""
    board = Noticeboard()
    seat, calls = board.seat(), 0

    class Broken:
        replicas = 1

        async def exchange(self, own: dict[str, Served]) -> Sequence[dict[str, Served]] | None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise ValueError("a bug")
            return await seat.exchange(own)

    async with engine(ScriptedProvider(), shares=Broken()) as rig:
        await rig.ask("before")
        await asyncio.sleep(3.5 * SHARE_S)
        await rig.ask("after")
        await asyncio.sleep(SHARE_S)
        assert 'embedgate_loop_crashes_total{loop="shares"} 1.0' in rig.metrics()
    said = sum(sum(served.tokens.values()) for _, news in board.notices for served in news.values())
    assert (calls, said) == (4, 2.0)
