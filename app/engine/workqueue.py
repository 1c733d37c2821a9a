"""Who goes next: priorities with guaranteed shares, fairness between tenants, turns between requests, and a bound.

Every method is synchronous and leaves the queue consistent. Putting, taking and forgetting a text cost O(log tenants);
looking at what could go next costs as much, and a little for each group that came back.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from app.domain import EmbeddingRequest, Priority, Text
from app.engine.fairness import Lane
from app.engine.workitem import Batch, Demand, Fit, Group, Remainder, WorkItem
from app.errors import Overloaded
from app.ports import Served
from app.telemetry import Telemetry

DEFAULT_SHARE = 0.2
"""What the default priority is served at least while interactive texts keep coming."""


@dataclass(slots=True)
class QueueBound:
    """How much may wait over all spaces together, and how much does, by priority."""

    max_items: int = 100_000
    max_tokens: int = 20_000_000
    items: list[int] = field(default_factory=lambda: [0] * len(Priority))
    tokens: list[int] = field(default_factory=lambda: [0] * len(Priority))

    def refuses(self, items: int, tokens: int) -> bool:
        """Whether so much more would be too much. An empty queue takes any legal request."""
        waiting = sum(self.items)
        return waiting > 0 and (waiting + items > self.max_items or sum(self.tokens) + tokens > self.max_tokens)


_DOUBT = 1.25
"""By how much the measured rate may be wrong before a request is refused for it."""


class _ServiceRate:
    """Tokens per second that left while others were waiting, over about the last ten seconds of such time."""

    _MEMORY_S = 10.0
    _LEAST_S, _LEAST_TAKES = 2.0, 3.0

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._takes = 0.0
        self._last: float | None = None

    def left(self, tokens: int, now: float, *, backlogged: bool) -> None:
        if self._last is not None:
            passed = now - self._last
            keep = max(0.0, 1.0 - passed / self._MEMORY_S)
            self._tokens = self._tokens * keep + tokens
            self._seconds = self._seconds * keep + passed
            self._takes = self._takes * keep + 1
        self._last = now if backlogged else None

    def wait_s(self, tokens: float, now: float) -> float:
        """How long `tokens` will take; 0 while too little is known: refusing in error is worse than waiting in vain."""
        seconds = self._seconds + (now - self._last if self._last is not None else 0.0)
        known = self._tokens and self._takes >= self._LEAST_TAKES and seconds >= self._LEAST_S
        return tokens * seconds / self._tokens if known else 0.0


class WorkQueue:
    """The waiting texts of one Space. `repr` tells its state.

    `ring` is called when enough wait (see `holds`) and when a higher priority begins to wait.
    """

    def __init__(
        self,
        bound: QueueBound,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float],
        bulk_share: float = 0.05,
        ring: Callable[[], None] = lambda: None,
    ) -> None:
        self._bound = bound
        self._telemetry = telemetry
        self._clock = clock
        self._ring = ring
        self._shares = {Priority.DEFAULT: DEFAULT_SHARE, Priority.BULK: bulk_share}
        self._lanes = [Lane(priority) for priority in Priority]
        self._lanes_upwards = self._lanes[::-1]
        self._owed_lanes = [lane for lane in self._lanes if lane.priority in self._shares]
        self._picked: Lane | None = None
        self._returned: list[Remainder] = []
        self._rate = _ServiceRate()
        self._items = 0
        self._lane_items = 0
        self._lane_tokens = 0
        self._lane_items_by_priority = [0] * len(Priority)
        self._lane_bulk_tokens = 0
        self._tokens_by_priority = [0] * len(Priority)
        self._gone = 0
        self._wanted_items = 1
        self._wanted_tokens = 1

    def __len__(self) -> int:
        return self._items

    def __repr__(self) -> str:
        tokens = sum(self._tokens_by_priority)
        return f"<WorkQueue {self._items} texts, {tokens} tokens, {len(self._returned)} returned>"

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, request: EmbeddingRequest, items: Sequence[WorkItem]) -> None:
        """Takes all of `items` or none.

        Raises Overloaded when they do not fit, or when they could not leave before the deadline at the rate measured.
        """
        tokens = sum(item.tokens for item in items)
        now = self._clock()
        wait_s = self._rate.wait_s(self._tokens_before(request, tokens), now)
        if self._bound.refuses(len(items), tokens):
            raise Overloaded(max(1.0, self._rate.wait_s(sum(self._tokens_by_priority), now)))
        if wait_s and now + wait_s / _DOUBT > request.deadline:
            raise Overloaded(wait_s)
        rises = request.priority < self._highest()
        self._lanes[request.priority].add(request, items)
        for item in items:
            self._count_in(item, request.priority)
        if rises or self._is_enough():
            self._ring()

    def promote(self, item: WorkItem, request: EmbeddingRequest) -> None:
        """A waiting text is wanted by a request of higher priority too: it moves up (its old entry is skipped)."""
        if item.place is None or item.place <= request.priority:
            return
        self._count_out(item)
        self._gone += 1
        self._lanes[request.priority].add(request, [item])
        self._count_in(item, request.priority)

    def put_back(self, group: Group) -> None:
        """Texts whose call failed go to the head and travel by themselves."""
        tokens = sum(item.tokens for item in group.items)
        priority = min(item.priority for item in group.items)
        self._returned.append(Remainder(group, deque(group.items), tokens, priority))
        for item in group.items:
            item.returned = True
            self._count_in(item, item.priority)
        self._ring()

    def forget(self, item: WorkItem) -> None:
        """Nobody wants this waiting text any more: it makes room at once and costs nothing later."""
        if item.place is None:
            return
        self._count_out(item)
        item.payload = ""
        self._telemetry.texts_dropped(items=1, reason="left")
        self._gone += 1
        if self._gone > 1000 + self._items:
            self._gone = 0
            for lane in self._lanes:
                lane.purge()

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def holds(self, items: int, tokens: int) -> bool:
        """Whether so many texts or so many tokens wait to travel together; if not, `ring` is called when they do."""
        self._wanted_items, self._wanted_tokens = items, tokens
        return self._is_enough()

    def has_little(self, tokens: int) -> bool:
        """Whether nothing but bulk texts of fewer tokens waits."""
        return self._highest() is Priority.BULK and sum(self._tokens_by_priority) < tokens

    def demands(self) -> list[Demand]:
        """What could go next, first come first: each group that came back, then what the lanes begin with."""
        self._returned = [back for back in self._returned if self._head(back) is not None]
        wishes = [self._demand(back) for back in (*self._returned, None)]
        return [wish for wish in wishes if wish is not None]

    def renewed(self, wish: Demand) -> Demand | None:
        """What has become of a demand; None when nothing of it waits any more."""
        return self._demand(wish.back)

    def take(self, fit: Fit, wish: Demand) -> Batch:
        """The next batch of `wish` within `fit`; empty when nothing of it waits, or the first text is too long now."""
        back = wish.back
        total = _Total(fit)
        taken: list[WorkItem] = []
        reason = "drained"
        while (item := self._head(back)) is not None:
            if reason := total.refuses(item):
                break
            self._remove(item, back)
            total.add(item)
            taken.append(item)
        self._rate.left(total.tokens, self._clock(), backlogged=self._lane_items > 0)
        known = back.group if back is not None else Group(())
        return Batch(
            tuple(taken), total.tokens, reason or "drained", known.avoid, known.splits, known.doubt
        )  # fmt: skip

    def _demand(self, back: Remainder | None) -> Demand | None:
        head = self._head(back)
        if head is None:
            return None
        if back is not None:
            return Demand(head, back.tokens, len(back.items), back.priority, back)
        assert self._picked is not None  # noqa: S101 — _head picked it
        own_tokens, share = self._picked.backlog()
        return Demand(
            head, self._lane_tokens, self._lane_items, self._highest(),
            own_tokens=own_tokens, share=share, rank=self._picked.rank,
            bulk_tokens=self._lane_bulk_tokens, bulk_items=self._lane_items_by_priority[Priority.BULK],
        )  # fmt: skip

    def _highest(self) -> Priority:
        return next((priority for priority in Priority if self._lane_items_by_priority[priority]), Priority.BULK)

    def _head(self, back: Remainder | None) -> WorkItem | None:
        """The text that goes next, of those that came back together or of the lanes; the stale are dropped here."""
        if back is None:
            self._picked = self._next_lane()
            return self._picked.head() if self._picked is not None else None
        while back.items and self._is_gone(back.items[0]):
            back.tokens -= back.items.popleft().tokens
        return back.items[0] if back.items else None

    def _remove(self, item: WorkItem, back: Remainder | None) -> None:
        self._count_out(item)
        if back is not None:
            back.tokens -= back.items.popleft().tokens
            return
        assert self._picked is not None  # noqa: S101 — _head picked it
        self._picked.advance(charge=True)
        for lane in self._owed_lanes:
            share = self._shares[lane.priority]
            if lane is self._picked:
                lane.debt_tokens = max(0.0, lane.debt_tokens - item.tokens * (1.0 - share))
            else:
                lane.debt_tokens = lane.debt_tokens + item.tokens * share if lane else 0.0

    def _next_lane(self) -> Lane | None:
        """The lowest lane that is owed its head, else the highest in which something waits."""
        best = None
        for lane in self._lanes_upwards:
            while lane and self._is_gone(lane.head(), lane):
                lane.advance(charge=False)
            if not lane:
                continue
            if lane.debt_tokens and lane.debt_tokens >= lane.head().tokens:
                return lane
            best = lane
        return best

    # ── other replicas ──────────────────────────────────────────────────────────────────────────────────────────────

    def news(self) -> dict[str, Served]:
        """What other replicas should know of whom was served here, by priority."""
        told = ((lane.priority.name, lane.news()) for lane in self._lanes)
        return {priority: news for priority, news in told if news is not None}

    def told(self, news: Mapping[str, Served]) -> None:
        """The others know that much."""
        for priority, served in news.items():
            self._lanes[Priority[priority]].told(served)

    def hear(self, news: Sequence[Mapping[str, Served]]) -> None:
        """What each of the other replicas served since it last told."""
        for lane in self._lanes:
            lane.hear([each[lane.priority.name] for each in news if lane.priority.name in each])

    # ── texts that nobody wants any more ────────────────────────────────────────────────────────────────────────────

    def _is_gone(self, item: WorkItem, lane: Lane | None = None) -> bool:
        """Whether an entry is stale; a text past its deadline becomes so here."""
        if item.place is None or (lane is not None and not lane.holds(item)):
            return True
        if item.deadline > self._clock():
            return False
        self._count_out(item)
        self._telemetry.texts_dropped(items=1, reason="expired")
        return True

    # ── counting ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokens_before(self, request: EmbeddingRequest, tokens: int) -> float:
        lane = self._lanes[request.priority]
        higher = sum(self._tokens_by_priority[: request.priority])
        return higher + min(lane.tokens_before(request, tokens), self._tokens_by_priority[request.priority] + tokens)

    def _is_enough(self) -> bool:
        waiting = self._lane_items
        return waiting > 0 and (waiting >= self._wanted_items or self._lane_tokens >= self._wanted_tokens)

    def _count_in(self, item: WorkItem, priority: Priority) -> None:
        item.place = priority
        self._count(item, priority, 1, item.tokens)

    def _count_out(self, item: WorkItem) -> None:
        assert item.place is not None, "counted out twice: this is a bug"  # noqa: S101
        self._count(item, item.place, -1, -item.tokens)
        item.place = None
        item.returned = False

    def _count(self, item: WorkItem, priority: Priority, items: int, tokens: int) -> None:
        self._items += items
        self._tokens_by_priority[priority] += tokens
        self._bound.items[priority] += items
        self._bound.tokens[priority] += tokens
        if not item.returned:
            self._lane_items += items
            self._lane_tokens += tokens
            self._lane_items_by_priority[priority] += items
            self._lane_bulk_tokens += tokens if priority is Priority.BULK else 0


class _Total:
    """What a batch holds so far, and why the next text cannot come along."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._items = 0
        self._bytes = 0
        self._kind: type[Text] | None = None
        self._alone = False
        self.tokens = 0

    def refuses(self, item: WorkItem) -> str:
        """Empty when `item` may come along: a lone "" travels alone, text and token ids never together."""
        if self.tokens + item.tokens > self._fit.tokens:
            return "tokens"
        if not self._items:
            return ""
        if self._alone or not item.payload or type(item.payload) is not self._kind:
            return "kind"
        if self._items >= self._fit.items:
            return "items"
        return "bytes" if self._bytes + item.size_bytes > self._fit.size_bytes else ""

    def add(self, item: WorkItem) -> None:
        self._items += 1
        self._bytes += item.size_bytes
        self.tokens += item.tokens
        self._kind = type(item.payload)
        self._alone = not item.payload
