"""Hides which deployment of a Space is asked for what, who has to wait for which, and when that may change."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from app.domain import Priority, Space
from app.engine.gate import LEAST_WAIT_S, Gate
from app.engine.workitem import Demand, WorkItem

ASK_AGAIN_S = 1.0
"""A refused claim keeps its place only while it is asked again now and then."""


_BACKLOG_S = 1.0
"""What waits for longer than that is a backlog, and goes at the pace at which quota comes back."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A deployment had no quota for `head` at `since`; it may have some at `open_at`, and is asked at `again_at`."""

    head: WorkItem
    since: float
    again_at: float
    open_at: float


class Roster:
    """The deployments of one Space: in order, or all at once with `spread`.

    Whom a wait for quota would keep longer than `spill_s`, or than it can afford, goes to the next deployment; so does,
    at once, who would have to wait because the provider itself said 429.
    """

    def __init__(
        self,
        space: Space,
        gates: Sequence[Gate],
        *,
        clock: Callable[[], float],
        spread: bool,
        spill_s: float,
        several_tenants: Callable[[], bool] = lambda: False,
    ) -> None:
        self._space = space
        self._gates = gates
        self._clock = clock
        self._spread = spread
        self._spill_s = 0.0 if spread else spill_s
        self._several_tenants = several_tenants
        self._chosen: Counter[str] = Counter()
        self._refusals: dict[tuple[str, Priority, bool], _Refusal] = {}
        self._looked_at = -math.inf
        self._left_alone: set[str] = set()

    def outage_s(self) -> float | None:
        """Seconds until the earliest probe when every deployment is out; None while one can be asked."""
        gates = self._sound()
        wait_s = min(gate.breaker.retry_in_s() for gate in gates)
        trusted = any(gate.breaker.state in ("closed", "half_open") for gate in gates)
        return None if trusted or wait_s == 0.0 else wait_s

    def can_avoid(self, names: frozenset[str]) -> bool:
        """Whether somebody else than `names` may be called."""
        return any(gate.name not in names for gate in self._callable())

    def enter(self, wishes: Sequence[Demand]) -> tuple[Gate, Demand] | None:
        """Takes a slot for the first of `wishes` that somebody can serve now; None: see `next_change_s`."""
        self._looked_at = self._clock()
        for gate in self._gates:
            gate.breaker.check_stall()
        self._left_alone = {gate.name for gate in self._gates if gate.breaker.retry_in_s()}
        for wish in wishes:
            chosen = self._choose(wish)
            if chosen is not None and chosen.enter(wish.priority, self._clock()):
                self._chosen[chosen.name] += 1
                return chosen, wish
        return None

    def next_change_s(self, wishes: Sequence[Demand]) -> float | None:
        """When waiting for a bell would be too long: a probe, a stall, quota or the end of a rest falls due.

        What has fallen due since `enter` looked does so now: there may be no bell any more that would tell.
        """
        now = self._clock()
        probes = [gate.breaker.retry_in_s() for gate in self._gates if gate.name in self._left_alone]
        stalls = [stall_s for gate in self._gates if (stall_s := gate.breaker.stall_in_s()) is not None]
        times = [wish.rest_until for wish in wishes]
        times += [at for refusal in self._refusals.values() for at in (refusal.again_at, refusal.open_at)]
        return min(probes + stalls + [at - now for at in times if self._looked_at < at < math.inf], default=None)

    # ── pace ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, gate: Gate, wish: Demand) -> tuple[Demand, bool]:
        """What of `wish` is asked of `gate`, and whether at the pace, so that others find something left.

        Where tenants share a quota that cannot keep up, those that want more of it than their share are paced. Whoever
        wants less gets it at once, but nothing of the others' comes along. Nor does a backlog of bulk, which would
        take what it has to leave to those who come next.
        """
        if wish.priority != Priority.BULK and gate.worth_s(wish.bulk_tokens, wish.bulk_items) > _BACKLOG_S:
            items, tokens = max(1, wish.items - wish.bulk_items), max(wish.head.tokens, wish.tokens - wish.bulk_tokens)
            wish = replace(wish, items=items, tokens=tokens, bulk_items=0, bulk_tokens=0)
        if not self._several_tenants() or wish.back is not None or wish.priority != Priority.DEFAULT:
            return wish, False
        if gate.worth_s(wish.tokens, wish.items) <= _BACKLOG_S:
            return wish, False
        own_items = max(1, wish.items * wish.own_tokens // max(1, wish.tokens))
        if gate.worth_s(wish.own_tokens, own_items) > _BACKLOG_S * wish.share:
            return wish, True
        return replace(wish, tokens=wish.own_tokens, items=own_items), False

    # ── quota ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def refused(self, gate: Gate, wish: Demand, wait_s: float) -> None:
        """`gate` will have no quota for `wish`, nor for what is no smaller and no more urgent, within `wait_s`."""
        now, wait_s = self._clock(), max(wait_s, LEAST_WAIT_S)
        key = (gate.name, wish.priority, self.ask(gate, wish)[1])
        last = self._refusals.get(key)
        since = last.since if last is not None and last.head is wish.head else now
        refusal = _Refusal(wish.head, since, now + min(wait_s, ASK_AGAIN_S), now + wait_s)
        self._refusals[key] = refusal

    def granted(self, gate: Gate, wish: Demand) -> float | None:
        """`gate` had quota for `wish`: since when it had waited for it, if it had to."""
        for paced in (False, True):
            last = self._refusals.get((gate.name, wish.priority, paced))
            if last is not None and last.head is wish.head:
                del self._refusals[gate.name, wish.priority, paced]
                return last.since
        return None

    def refunded(self, gate: Gate) -> None:
        """`gate` got quota back, so that whoever was refused may ask again."""
        now = self._clock()
        for key, refusal in self._refusals.items():
            if key[0] == gate.name:
                self._refusals[key] = replace(refusal, again_at=now, open_at=now)

    def _refusal(self, gate: Gate, wish: Demand) -> _Refusal | None:
        """The last refusal at `gate` of a wish like this one, or of one that was easier to grant."""
        now = self._clock()
        paced = self.ask(gate, wish)[1]
        asked = [
            self._refusals.get((gate.name, priority, at_pace))
            for priority in Priority
            for at_pace in (False, True)
            if (priority, at_pace) <= (wish.priority, paced)
        ]
        like_it = [each for each in asked if each is not None and each.open_at > now]
        like_it = [each for each in like_it if each.head.tokens <= wish.head.tokens]
        return max(like_it, key=lambda each: each.again_at, default=None)

    # ── choosing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sound(self) -> Sequence[Gate]:
        """Those whose vectors are this Space's; when that is said of none, there is nobody else to ask."""
        return [gate for gate in self._gates if not gate.is_strange(self._space)] or self._gates

    def _callable(self) -> list[Gate]:
        """Those that may be called now."""
        return [gate for gate in self._sound() if gate.breaker.retry_in_s() == 0.0]

    def _choose(self, wish: Demand) -> Gate | None:
        """Who serves `wish` now: whom it avoids only after its rest, if nobody else may be asked or would soon do."""
        able = self._callable()
        asked = [gate for gate in able if gate.name not in wish.avoid]
        willing = self._willing(asked, wish)
        if not willing and wish.avoid and wish.rest_until <= self._clock():
            asked, willing = able, self._willing(able, wish)
        if not asked:
            return None
        if not willing:
            chosen = min(asked, key=lambda gate: self._open_at(gate, wish))
        elif self._spread:
            chosen = min(willing, key=self._load)
        else:
            chosen = willing[0]
        refusal = self._refusal(chosen, wish)
        return chosen if refusal is None or refusal.again_at <= self._clock() else None

    def _willing(self, gates: Sequence[Gate], wish: Demand) -> list[Gate]:
        return [gate for gate in gates if not self._is_passed_over(gate, wish)]

    def _is_passed_over(self, gate: Gate, wish: Demand) -> bool:
        """Whether somebody else is asked rather than wait so long for a slot or for quota here."""
        if not gate.has_room and (gate.cooling or self._spill_s == 0.0):
            return True
        now, open_at = self._clock(), self._open_at(gate, wish)
        if open_at <= now:
            return False
        return gate.cooling > 0 or open_at - now > min(self._spill_s, (wish.head.deadline - now) / 2)

    def _open_at(self, gate: Gate, wish: Demand) -> float:
        refusal = self._refusal(gate, wish)
        return -math.inf if refusal is None else refusal.open_at

    def _load(self, gate: Gate) -> tuple[float, int]:
        """How busy it is; of equally busy ones, how often it was chosen."""
        return gate.in_flight / gate.deployment.limits.max_in_flight, self._chosen[gate.name]
