"""The work queue: who goes next, who must wait, and what never gets lost."""

import asyncio
import io
from collections import Counter

import pytest
from prometheus_client import generate_latest

from app.domain import EmbeddingRequest, Priority, Tenant, Text
from app.engine.workitem import Batch, Fit, Group, WorkItem
from app.engine.workqueue import DEFAULT_SHARE, QueueBound, WorkQueue
from app.errors import Overloaded
from app.telemetry import Telemetry

pytestmark = pytest.mark.looptime
EVERYTHING = Fit(10_000, 10_000_000, 1 << 30)
ONE = Fit(1, 10_000_000, 1 << 30)


class Bench:
    """A queue, and short words for what happens to it."""

    def __init__(self, **bound: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.bound = QueueBound(**bound)  # type: ignore[arg-type]
        self.telemetry = Telemetry(stream=io.BytesIO())
        self.queue = WorkQueue(self.bound, self.telemetry, clock=self.loop.time)

    def put(
        self,
        *texts: Text,
        tenant: str = "a",
        weight: float = 1.0,
        priority: Priority = Priority.DEFAULT,
        tokens: int = 10,
        within_s: float = 1000.0,
    ) -> tuple[EmbeddingRequest, list[WorkItem]]:
        """One request with one text each of so many tokens."""
        request = EmbeddingRequest(Tenant(tenant, weight), "m", texts, self.loop.time() + within_s, priority)
        items = [
            WorkItem(repr(text).encode(), text, tokens, tokens, self.loop.create_future(), [request], self.loop.time())
            for text in texts
        ]
        self.queue.put(request, items)
        return request, items

    def batch(self, fit: Fit = EVERYTHING, at: int = -1) -> Batch:
        """The next batch, of the demand at this place: the last is that of the lanes."""
        wishes = self.queue.demands()
        return self.queue.take(fit, wishes[at]) if wishes else Batch((), 0, "drained")

    def take(self, fit: Fit = EVERYTHING, at: int = -1) -> list[Text]:
        """The payloads of the next batch."""
        return [item.payload for item in self.batch(fit, at).items]

    def served(self, count: int) -> Counter[str]:
        """Who is served by the next `count` texts, by their first tenant."""
        return Counter(self.batch(ONE).items[0].waiters[0].tenant.name for _ in range(count))


def numbered(prefix: str, count: int) -> list[str]:
    """So many different texts."""
    return [f"{prefix}{number}" for number in range(count)]


async def test_one_request_keeps_the_order_of_its_texts() -> None:
    """Texts of one request leave in the order in which they were given."""
    bench = Bench()
    bench.put("x", "y", "z")
    assert bench.take() == ["x", "y", "z"]
    assert len(bench.queue) == 0


async def test_higher_priorities_go_first() -> None:
    """Interactive texts overtake default ones, and those overtake bulk."""
    bench = Bench()
    bench.put("bulk", priority=Priority.BULK)
    bench.put("default")
    bench.put("interactive", priority=Priority.INTERACTIVE)
    assert bench.take() == ["interactive", "default", "bulk"]


async def test_lower_priorities_keep_their_guaranteed_share() -> None:
    """However many interactive texts wait, bulk is served 5 % and default its share."""
    bench = Bench()
    for priority in Priority:
        bench.put(*numbered(priority.name, 4000), priority=priority)
    first = [item.waiters[0].priority for _ in range(40) for item in bench.batch(Fit(100, 10**9, 10**9)).items]
    shares = {priority: first.count(priority) / len(first) for priority in Priority}
    assert shares[Priority.BULK] == pytest.approx(0.05, abs=0.005)
    assert shares[Priority.DEFAULT] == pytest.approx(DEFAULT_SHARE, abs=0.005)


async def test_bulk_gets_everything_when_nobody_else_waits() -> None:
    """A guaranteed share is a floor, not a ceiling."""
    bench = Bench()
    bench.put(*numbered("b", 100), priority=Priority.BULK)
    assert len(bench.take()) == 100


async def test_tenants_are_served_equal_tokens_whatever_their_texts() -> None:
    """A tenant of long texts gets as many tokens as a tenant of short ones, within two texts."""
    bench = Bench()
    bench.put(*numbered("long", 500), tenant="long", tokens=200)
    bench.put(*numbered("short", 5000), tenant="short", tokens=10)
    tokens: Counter[str] = Counter()
    for _ in range(2000):
        item = bench.batch(ONE).items[0]
        tokens[item.waiters[0].tenant.name] += item.tokens
        assert abs(tokens["long"] - tokens["short"]) <= 2 * 200


async def test_without_tenants_the_long_texts_would_win() -> None:
    """The control: the same load, with nobody told apart, breaks the bound of the test above."""
    bench = Bench()
    bench.put(*numbered("long", 500), tokens=200)
    bench.put(*numbered("short", 5000), tokens=10)
    tokens: Counter[str] = Counter()
    for _ in range(400):
        item = bench.batch(ONE).items[0]
        tokens[str(item.payload).rstrip("0123456789")] += item.tokens
    assert tokens["long"] - tokens["short"] > 2 * 200


async def test_weights_divide_the_service() -> None:
    """Weights 1 : 2 : 4 are kept within 10 %."""
    bench = Bench()
    for weight in (1, 2, 4):
        bench.put(*numbered(f"w{weight}-", 2000), tenant=str(weight), weight=weight)
    served = bench.served(1400)
    assert served["1"] == pytest.approx(200, rel=0.1)
    assert served["2"] == pytest.approx(400, rel=0.1)
    assert served["4"] == pytest.approx(800, rel=0.1)


async def test_idle_time_is_not_saved_up() -> None:
    """A tenant that was away starts level with the others: it gets its half from now on, not what it missed."""
    bench = Bench()
    bench.put(*numbered("busy", 3000), tenant="busy")
    bench.served(1000)
    bench.put(*numbered("late", 1000), tenant="late")
    served = bench.served(400)
    assert served["late"] == pytest.approx(200, abs=2)


async def test_leaving_for_a_moment_brings_no_advantage() -> None:
    """A tenant that always shows one text at a time still gets no more than its share."""
    bench = Bench()
    bench.put(*numbered("steady", 1000), tenant="steady")
    served: Counter[str] = Counter()
    hops: list[WorkItem] = []
    for turn in range(200):
        if served["hopper"] == len(hops):
            hops += bench.put(f"hop{turn}", tenant="hopper")[1]
        served += bench.served(1)
    assert served["hopper"] <= served["steady"] + 2


async def test_a_small_request_does_not_wait_for_a_big_one_of_the_same_tenant() -> None:
    """Requests of one tenant take turns, so a lone text leaves second, not 2,049th."""
    bench = Bench()
    bench.put(*numbered("big", 2048))
    bench.put("lone")
    assert "lone" in bench.take(Fit(2, 10**9, 10**9))


async def test_a_stream_of_small_requests_does_not_starve_a_big_one() -> None:
    """While a new small request comes for each that leaves, the big one has its turn in every round."""
    bench = Bench()
    bench.put(*numbered("big", 100))
    taken: list[Text] = []
    for turn in range(100):
        bench.put(f"small{turn}")
        taken += bench.take(ONE)
    assert sum(str(text).startswith("big") for text in taken) >= 13  # rounds of 1, 2, 3, … requests: √(2·100) − 1


async def test_a_request_is_admitted_whole_or_not_at_all() -> None:
    """A request that does not fit changes nothing; one that does still gets in."""
    bench = Bench(max_items=10)
    bench.put(*numbered("a", 8))
    with pytest.raises(Overloaded) as refused:
        bench.put(*numbered("b", 3))
    assert refused.value.retry_after_s >= 1.0
    bench.put(*numbered("c", 2))
    assert sum(bench.bound.items) == 10
    assert sorted(map(str, bench.take())) == sorted(numbered("a", 8) + numbered("c", 2))


async def test_the_queue_is_bounded_by_tokens_too() -> None:
    """Few texts may be too many tokens."""
    bench = Bench(max_tokens=100)
    bench.put("a", tokens=60)
    with pytest.raises(Overloaded):
        bench.put("b", tokens=41)
    bench.put("c", tokens=40)


async def test_an_empty_queue_takes_any_legal_request() -> None:
    """A bound below the largest legal request must not make that request impossible for ever."""
    bench = Bench(max_items=10)
    bench.put(*numbered("a", 50))
    assert len(bench.take()) == 50


async def test_a_forgotten_text_makes_room_at_once_and_never_leaves() -> None:
    """What nobody wants any more is neither counted nor sent."""
    bench = Bench(max_items=2)
    _, (unwanted, wanted) = bench.put("unwanted", "wanted")
    bench.queue.forget(unwanted)
    bench.put("next")
    assert sorted(map(str, bench.take())) == ["next", "wanted"]
    assert 'dropped_texts_total{reason="left"} 1.0' in _metrics(bench.telemetry)
    assert wanted.place is None


async def test_forgotten_texts_do_not_pile_up() -> None:
    """A hundred thousand callers that come and go while nothing leaves do not fill the memory."""
    bench = Bench()
    bench.put("stays")
    for number in range(20_000):
        _, (item,) = bench.put(f"gone{number}", tenant=f"t{number % 7}")
        bench.queue.forget(item)
    held = sum(
        len(request) for lane in bench.queue._lanes for flow in lane._flows.values() for request in flow.requests
    )
    assert held <= 1002
    assert bench.take() == ["stays"]


async def test_a_text_past_its_deadline_is_dropped_at_the_door() -> None:
    """It costs nothing upstream, and its neighbours leave as if it had not been there."""
    bench = Bench()
    bench.put("late", within_s=1.0)
    bench.put("patient", within_s=100.0)
    await asyncio.sleep(2.0)
    assert bench.take() == ["patient"]
    assert sum(bench.bound.items) == 0
    assert 'dropped_texts_total{reason="expired"} 1.0' in _metrics(bench.telemetry)


async def test_a_text_wanted_by_a_higher_priority_moves_up() -> None:
    """A bulk text that an interactive caller wants too leaves as interactive, once."""
    bench = Bench()
    _, (shared,) = bench.put("shared", priority=Priority.BULK)
    bench.put("default")
    caller = EmbeddingRequest(Tenant("b"), "m", ("shared",), bench.loop.time() + 10, Priority.INTERACTIVE)
    shared.waiters.append(caller)
    bench.queue.promote(shared, caller)
    assert sum(bench.bound.items) == 2
    assert bench.take() == ["shared", "default"]
    assert bench.take() == []


async def test_what_cannot_make_its_deadline_is_refused_at_once() -> None:
    """Once the service rate is known, a hopeless request is told the real wait instead of being kept."""
    bench = Bench()
    bench.put(*numbered("a", 1000))
    for _ in range(20):
        bench.take(Fit(10, 10**9, 10**9))
        await asyncio.sleep(0.5)  # 10 texts of 10 tokens in 0.5 s: 200 tokens/s; 8,000 tokens wait: 40 s
    with pytest.raises(Overloaded) as refused:
        bench.put("hopeless", within_s=10.0, priority=Priority.BULK)
    assert refused.value.retry_after_s == pytest.approx(40, rel=0.2)
    bench.put("patient", within_s=60.0, priority=Priority.BULK)


async def test_a_light_tenant_is_not_refused_for_a_heavy_ones_backlog() -> None:
    """Its wait is its own share of the service, not the whole queue."""
    bench = Bench()
    bench.put(*numbered("a", 1000), tenant="heavy")
    for _ in range(20):
        bench.take(Fit(10, 10**9, 10**9))
        await asyncio.sleep(0.5)
    bench.put("quick", tenant="light", within_s=1.0)
    with pytest.raises(Overloaded):
        bench.put("slow", tenant="heavy", within_s=1.0, tokens=2000)


@pytest.mark.parametrize(
    ("fit", "reason", "count"),
    [(Fit(3, 1000, 1000), "items", 3), (Fit(99, 45, 1000), "tokens", 4), (Fit(99, 1000, 25), "bytes", 2)],
)
async def test_a_batch_is_closed_by_items_tokens_or_bytes(fit: Fit, reason: str, count: int) -> None:
    """Whichever limit comes first closes it, and the reason is told."""
    bench = Bench()
    bench.put(*numbered("t", 10))
    batch = bench.batch(fit)
    assert (len(batch.items), batch.reason) == (count, reason)
    assert bench.batch().reason == "drained"


async def test_an_empty_text_travels_alone() -> None:
    """A lone "" may be refused inside a list, so nobody shares its call."""
    bench = Bench()
    for text in ("a", "", "b"):
        bench.put(text)
    assert [bench.take(), bench.take(), bench.take()] == [["a"], [""], ["b"]]


async def test_text_and_token_ids_never_share_a_call() -> None:
    """A provider takes a list of the one or of the other."""
    bench = Bench()
    bench.put("a")
    bench.put((1, 2))
    assert [bench.take(), bench.take()] == [["a"], [(1, 2)]]


async def test_returned_texts_are_offered_first_and_apart() -> None:
    """Each group that came back is a demand of its own before that of the lanes, and names whom it avoids."""
    bench = Bench()
    groups = [bench.put(f"x{number}", f"y{number}", tokens=number + 1)[1] for number in range(2)]
    bench.take()
    bench.put("fresh", tokens=5, priority=Priority.BULK)
    for number, items in enumerate(groups):
        bench.queue.put_back(Group(tuple(items), frozenset({f"d{number}"}), rest_until=7.0))
    first, second, lanes = bench.queue.demands()
    assert [(wish.items, wish.tokens) for wish in (first, second, lanes)] == [(2, 2), (2, 4), (1, 5)]
    assert [wish.avoid for wish in (first, second, lanes)] == [{"d0"}, {"d1"}, set()]
    assert [wish.rest_until for wish in (first, second, lanes)] == [7.0, 7.0, 0.0]
    assert [wish.priority for wish in (first, second, lanes)] == [Priority.DEFAULT, Priority.DEFAULT, Priority.BULK]
    taken = bench.queue.take(EVERYTHING, second)
    assert [item.payload for item in taken.items] == ["x1", "y1"]
    assert taken.avoid == {"d1"}
    assert bench.take() == ["fresh"]
    assert bench.take() == ["x0", "y0"]


async def test_a_demand_is_renewed_until_nothing_of_it_waits() -> None:
    """What was offered changes with what comes and goes, and what is taken is what was offered, never another's."""
    bench = Bench()
    _, items = bench.put("x", "y")
    bench.take()
    bench.queue.put_back(Group(tuple(items)))
    wish = bench.queue.demands()[0]
    bench.queue.forget(items[0])
    renewed = bench.queue.renewed(wish)
    assert renewed is not None
    assert (renewed.head, renewed.items, renewed.tokens) == (items[1], 1, 10)
    assert [item.payload for item in bench.queue.take(EVERYTHING, wish).items] == ["y"]
    bench.put("another")
    assert bench.queue.renewed(wish) is None
    assert bench.queue.take(EVERYTHING, wish).items == ()
    assert bench.take() == ["another"]


async def test_texts_that_rest_are_no_company_and_no_backlog() -> None:
    """They neither end the wait for a fuller batch nor make the service look slow."""
    bench = Bench()
    _, items = bench.put(*numbered("t", 50))
    bench.take()
    bench.queue.put_back(Group(tuple(items), rest_until=1e9))
    for _ in range(20):
        bench.put("quick")
        assert not bench.queue.holds(2, 1000)
        assert bench.take() == ["quick"]
        await asyncio.sleep(1.0)
    bench.put(*numbered("many", 1000), within_s=5.0)


async def test_the_first_text_keeps_its_place_when_a_grant_is_too_small() -> None:
    """Nothing smaller overtakes a text for which the quota does not suffice yet."""
    bench = Bench()
    bench.put("big", tokens=100)
    bench.put("small", tokens=1)
    assert bench.take(Fit(10, 50, 1000)) == []
    assert bench.take(Fit(10, 101, 1000)) == ["big", "small"]


async def test_ten_thousand_idle_tenants_cost_nothing() -> None:
    """A tenant that waits for nothing leaves no trace that grows."""
    bench = Bench()
    for number in range(10_000):
        bench.put("t", tenant=f"tenant{number}")
        bench.take()
    lane = bench.queue._lanes[Priority.DEFAULT]
    assert len(lane._flows) == 0
    assert len(lane._idle_tags) <= 1025


def _metrics(telemetry: Telemetry) -> str:
    return generate_latest(telemetry.registry).decode()
