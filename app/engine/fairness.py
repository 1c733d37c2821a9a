"""Fairness inside one priority: between tenants by tokens served, between one tenant's requests by turns.

Bulk requests of one tenant go one after the other: whoever waits for them waits for the oldest, and lets go of it.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence

from app.domain import EmbeddingRequest, Priority
from app.engine.workitem import WorkItem
from app.ports import Served

_IDLE_TAGS = 1024
"""So many tenants that do not wait are remembered before it is looked who of them is still ahead."""


class _TenantFlow:
    """One tenant's waiting requests, which may take turns text by text: so a big one does not hold up a small one."""

    __slots__ = ("by_turns", "name", "requests", "tag", "tokens", "weight")

    def __init__(self, name: str, weight: float, tag: float, *, by_turns: bool) -> None:
        self.name = name
        self.by_turns = by_turns
        self.weight = weight
        self.tag = tag
        self.tokens = 0
        self.requests: deque[list[WorkItem]] = deque()  # each reversed: the next text is the last

    def head(self) -> WorkItem:
        return self.requests[0][-1]

    @property
    def due(self) -> float:
        """What it will have been served with its next text."""
        return self.tag + self.cost(self.head())

    def cost(self, item: WorkItem) -> float:
        """What a text counts for it."""
        return max(item.tokens, 1) / self.weight

    def advance(self) -> WorkItem:
        request = self.requests[0]
        item = request.pop()
        if not request:
            self.requests.popleft()
        elif self.by_turns:
            self.requests.rotate(-1)
        self.tokens -= item.tokens
        return item


class Lane:
    """One priority: tenants in order of the tokens that each will have got with its next text, divided by weight.

    A tenant that comes back starts at the counter of the one that goes next, so that nobody saves up idle time.
    """

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        self._heap: list[tuple[float, int, _TenantFlow]] = []
        self._flows: dict[str, _TenantFlow] = {}
        self._idle_tags: dict[str, float] = {}
        self._most_idle_tags = _IDLE_TAGS
        self._floor = 0.0
        self._ties = itertools.count()
        self._served: dict[str, float] = {}
        self._elsewhere: float | None = None
        self._joined = False
        self.weight = 0.0
        self.debt_tokens = 0.0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, request: EmbeddingRequest, items: Sequence[WorkItem]) -> None:
        """Lets `items` wait as one turn-taker of the request's tenant."""
        flow = self._flows.get(request.tenant.name)
        if flow is None:
            tag = max(self.level, self._idle_tags.pop(request.tenant.name, 0.0))
            name, weight = request.tenant.name, request.tenant.weight
            flow = self._flows[name] = _TenantFlow(name, weight, tag, by_turns=self.priority is not Priority.BULK)
            heapq.heappush(self._heap, (tag + flow.cost(items[0]), next(self._ties), flow))
            self.weight += flow.weight
        flow.requests.append(list(reversed(items)))
        flow.tokens += sum(item.tokens for item in items)

    def head(self) -> WorkItem:
        """The text that goes next; the lane must not be empty."""
        return self._heap[0][2].head()

    def backlog(self) -> tuple[int, float]:
        """The waiting tokens of the tenant that goes next, and its part of the weight of all that wait."""
        flow = self._heap[0][2]
        return flow.tokens, flow.weight / self.weight

    @property
    def level(self) -> float:
        """How much the tenant has been served that goes next, or that would if it came now."""
        return self._heap[0][2].tag if self._heap else self._floor

    @property
    def rank(self) -> float:
        """How much more that tenant has been served than the one that goes next at another replica."""
        return 0.0 if self._elsewhere is None else max(0.0, self.level - self._elsewhere)

    def news(self) -> Served | None:
        """What other replicas should know; None where nothing happens."""
        return Served(dict(self._served), self.level, bool(self._heap)) if self._served or self._heap else None

    def told(self, news: Served) -> None:
        """The others know that much."""
        for name, amount in news.tokens.items():
            left = self._served[name] - amount
            if left > 0.0:
                self._served[name] = left
            else:
                del self._served[name]

    def hear(self, news: Sequence[Served]) -> None:
        """What other replicas served lately counts here too; who comes newly begins where the least served one is."""
        elsewhere = [each.level for each in news if each.waiting]
        levels = elsewhere or [each.level for each in news]
        self._elsewhere = min(elsewhere, default=None)
        moved = self._join(min(levels)) if levels else False
        for each in news:
            for name, amount in each.tokens.items():
                moved |= self._count(name, amount)
        if moved:
            self._heap = [(flow.due, tie, flow) for _, tie, flow in self._heap]
            heapq.heapify(self._heap)
        if levels and not self._heap:
            self._floor = max(self._floor, min(levels))

    def _count(self, name: str, amount: float) -> bool:
        """Counts what a tenant was served elsewhere; whether it waits here."""
        flow = self._flows.get(name)
        if flow is not None:
            flow.tag += amount
        elif self._heap:
            self._idle_tags[name] = max(self._idle_tags.get(name, 0.0), self.level) + amount
        return flow is not None

    def _join(self, level: float) -> bool:
        """Begins to count where the others are, when it first hears of them; whether that moves who waits."""
        by = 0.0 if self._joined else level - self.level
        self._joined = True
        if by <= 0.0:
            return False
        self._floor += by
        for flow in self._flows.values():
            flow.tag += by
        self._idle_tags = {name: tag + by for name, tag in self._idle_tags.items()}
        return True

    def holds(self, item: WorkItem) -> bool:
        """Whether an entry for `item` here is live: not taken, not forgotten, not moved up since."""
        return item.place == self.priority and not item.returned

    def advance(self, *, charge: bool) -> WorkItem:
        """Removes the head; `charge` its tokens to its tenant (not for texts that nobody wants any more)."""
        _, tie, flow = self._heap[0]
        item = flow.advance()
        self._floor = flow.tag
        if charge:
            amount = flow.cost(item)
            flow.tag += amount
            self._served[flow.name] = self._served.get(flow.name, 0.0) + amount
        if flow.requests:
            heapq.heapreplace(self._heap, (flow.due, tie, flow))
        else:
            heapq.heappop(self._heap)
            self._retire(flow)
        return item

    def _retire(self, flow: _TenantFlow) -> None:
        del self._flows[flow.name]
        self.weight -= flow.weight
        if not self._heap:
            self._idle_tags.clear()  # nobody waits, so nobody can be ahead
            return
        self._idle_tags[flow.name] = flow.tag
        if len(self._idle_tags) > self._most_idle_tags:
            level = self.level
            self._idle_tags = {name: tag for name, tag in self._idle_tags.items() if tag > level}
            self._most_idle_tags = max(_IDLE_TAGS, 2 * len(self._idle_tags))

    def tokens_before(self, request: EmbeddingRequest, tokens: int) -> float:
        """At most so many tokens of this lane are served before `request`'s last text, `tokens` of its own included."""
        flow = self._flows.get(request.tenant.name)
        own_weight = flow.weight if flow else request.tenant.weight
        weight = self.weight if flow else self.weight + own_weight
        own = (flow.tokens if flow else 0) + tokens
        if flow and flow.by_turns:
            own = min(own, tokens * (len(flow.requests) + 1))
        return own * weight / own_weight

    def purge(self) -> None:
        """Rebuilds the lane without the texts that nobody wants any more."""
        for flow in self._flows.values():
            kept = ([item for item in request if self.holds(item)] for request in flow.requests)
            flow.requests = deque(request for request in kept if request)
            flow.tokens = sum(item.tokens for request in flow.requests for item in request)
        self._heap = [(flow.due, tie, flow) for _, tie, flow in self._heap if flow.requests]
        heapq.heapify(self._heap)
        for flow in [flow for flow in self._flows.values() if not flow.requests]:
            self._retire(flow)
