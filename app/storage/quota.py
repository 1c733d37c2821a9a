"""Hides how one account's quotas per minute are filled to the brim and never broken: pure decisions, given the time.

Times are whole microseconds and sums are integers over slots, so that `quota.lua` can run the same arithmetic where
several replicas share it; a test holds the two together. What a slot holds is forgotten only when even a call that
arrived late by the margin has left every window in which its vendor could still count it.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from app.domain import Limits, Priority
from app.ports import Claim, Grant, NotYet, Scarce, Stated

S_US = 1_000_000
_MINUTE_US = 60 * S_US

_SLOT_US = S_US // 4
_SLOTS_PER_SPAN = 40  # at least: with slots of a quarter second, a span of 1 s would be used to two thirds
_MARGINS_PER_SPAN = 120  # 0.5 s of jitter between grant and arrival for 60 s, but never less than a slot

_BOOK_AHEAD_US = {"free": S_US // 4, "paced": S_US // 40, "bulk": S_US // 40}  # who comes after starts after that
_CREDIT_US = S_US  # what the pacer saves at most
_WORTH_US = S_US // 4  # bulk that has more work waits for that much of the rate, rather than spend a call on less
_LEAD_US = 2 * S_US  # how far what is paced may run ahead of what was earned
_DEBT_US = 10 * S_US  # how long bulk has to wait, at most, for what the others overdrew
_KEPT_FROM = {"bulk": 50, "paced": 200}  # the part of a limit that they leave free: 2 %, 0.5 %

_PLACES = 64
_PLACE_US = 5 * S_US  # a refused claim that is not asked again for so long has lost its place
_PLACE_GRACE_US = S_US // 2
_ALIKE = 8  # needs that differ by less than one eighth are taken for the same
_CALL_US = S_US // 20  # nobody knows when a call in flight ends, so who waits for its slot is told to ask again

PAUSE_S = 1.0  # after a 429 that names no time
LONGEST_PAUSE_S = 120.0
_WHOLE = 10_000  # rates are ten-thousandths of the configured limits
_CUT = 8_500
_LEAST_RATE = 500
_REGAINED = 100
_REGAIN_US = 10 * S_US
_STATED_US = _MINUTE_US  # how long a provider's word about its limits counts

Manner = Literal["free", "paced", "bulk"]
"""How a claim spends: at once, at the pace once it has begun, or always at the pace and leaving most free."""


def pause_us(retry_after_s: float | None) -> int:
    """How long everybody rests after a 429: what the provider named, within reason."""
    return int((PAUSE_S if retry_after_s is None else min(LONGEST_PAUSE_S, max(0.0, retry_after_s))) * S_US)


class _Ask(NamedTuple):
    """What is wanted of one dimension: from `least` to `most`, beside `ahead` that was asked for before."""

    least: int
    most: int
    ahead: int
    rate: int
    manner: Manner


class _Window:
    """What was granted within one span of one dimension: a ring of slots and its running sum."""

    __slots__ = ("_counts", "_newest", "_slot_us", "level", "limit", "slots")

    def __init__(self, per_minute: int, span_s: float) -> None:
        span_us = round(span_s * S_US)
        self._slot_us = min(_SLOT_US, max(1, span_us // _SLOTS_PER_SPAN))
        margin_us = max(span_us // _MARGINS_PER_SPAN, self._slot_us)
        self.slots = math.ceil((span_us + margin_us) / self._slot_us) + 1
        self.limit = per_minute * span_us // _MINUTE_US
        self.level = 0
        self._counts = [0] * self.slots
        self._newest = 0

    @property
    def length_us(self) -> int:
        return self.slots * self._slot_us

    def advance(self, at_us: int) -> None:
        """Forgets what no vendor counts any more at `at_us`."""
        slot = at_us // self._slot_us
        for passed in range(self._newest + 1, min(slot, self._newest + self.slots) + 1):
            self.level -= self._counts[passed % self.slots]
            self._counts[passed % self.slots] = 0
        self._newest = max(slot, self._newest)

    def add(self, at_us: int, amount: int) -> None:
        """Counts `amount` (negative: a refund) at `at_us`, not later than the last `advance`; nothing if forgotten."""
        slot = at_us // self._slot_us
        if slot > self._newest - self.slots:
            self._counts[slot % self.slots] += amount
            self.level += amount

    def fill(self, at_us: int) -> None:
        """Takes all of it for granted, evenly until `at_us`: who knows nothing must expect the worst."""
        self.advance(at_us)
        newest = at_us // self._slot_us
        for back in range(self.slots):
            missing = self.limit * (back + 1) // self.slots - self.level
            self.add((newest - back) * self._slot_us, max(0, missing))

    def history(self, now_us: int) -> list[tuple[int, int]]:
        slots = range(self._newest - self.slots + 1, self._newest + 1)
        held = ((slot * self._slot_us, self._counts[slot % self.slots]) for slot in slots)
        return [(now_us - at_us, amount) for at_us, amount in held if amount]

    def room(self, ask: _Ask, most: int) -> int:
        cap = min(self.limit, most) * ask.rate // _WHOLE
        kept = _KEPT_FROM.get(ask.manner)
        return cap - (cap // kept if kept else 0) - self.level - ask.ahead

    def ready_us(self, ask: _Ask, most: int) -> int:
        """The earliest time at which the ask fits: at once is 0.

        What is too large for the whole limit waits for an empty window; behind others who come first it cannot know
        when that will be, so it is told one window later.
        """
        too_much = ask.least - self.room(ask, most)
        if too_much <= 0 or (self.level == 0 and not ask.ahead):
            return 0
        if too_much <= self.level:
            return self._falls_by_us(too_much)
        return self._falls_by_us(self.level) + (self.length_us if ask.ahead else 0)

    def _falls_by_us(self, amount: int) -> int:
        """When slots that hold `amount` together, the oldest first, will have been forgotten."""
        left = amount
        for slot in range(self._newest - self.slots + 1, self._newest + 1):
            left -= self._counts[slot % self.slots]
            if left <= 0:
                return (slot + self.slots) * self._slot_us
        return (self._newest + self.slots) * self._slot_us


class _Dimension:
    """Requests or tokens per minute: windows that hold for all, and a pacer that some have to keep.

    The pacer is one number, the time up to which the rate is spent: behind the clock it is credit, ahead of it debt.
    Bulk spends credit. What is paced may begin with whatever fits and then waits until that is earned. The others may
    run into debt, of which they leave bulk no more than `_DEBT_US`.
    """

    def __init__(self, per_minute: int, spans_s: Sequence[float]) -> None:
        self._per_minute = per_minute
        self._spent_until_us = -_CREDIT_US
        self._stated = 0
        self._stated_until_us = 0
        self.windows = [_Window(per_minute, span_s) for span_s in spans_s] if per_minute else []

    def advance(self, at_us: int) -> None:
        for window in self.windows:
            window.advance(at_us)

    def ready_us(self, ask: _Ask, now_us: int) -> int:
        """The earliest time at which all windows, and where it counts the pacer, let the ask pass."""
        if not self.windows:
            return 0
        ready_us = max(window.ready_us(ask, self._most(window, now_us)) for window in self.windows)
        if ask.manner == "free":
            return ready_us
        ahead_us = self._cost_us(ask.ahead, ask.rate)
        if ask.manner == "paced":
            return max(ready_us, self._spent_until_us + ahead_us - _LEAD_US)
        worth_us = max(self._cost_us(ask.least, ask.rate), min(self._cost_us(ask.most, ask.rate), _WORTH_US))
        return max(ready_us, self._spent_until_us + ahead_us + min(worth_us, _CREDIT_US))

    def take(self, ask: _Ask, at_us: int) -> int:
        """Counts as much of the ask as fits now that it is ready, at least `least`."""
        if not self.windows:
            return ask.most
        rooms = [window.room(ask, self._most(window, at_us)) for window in self.windows]
        idle_us = at_us - self._spent_until_us
        if ask.manner == "bulk":
            rooms.append(self._earned(min(idle_us, _CREDIT_US), ask.rate) - ask.ahead)
        elif ask.manner == "paced" and idle_us < _CREDIT_US:
            rooms.append(self._earned(idle_us + _LEAD_US, ask.rate) - ask.ahead)
        taken = max(ask.least, min(ask.most, *rooms))
        self.add(at_us, taken, ask.rate)
        if ask.manner == "free":
            self._spent_until_us = min(self._spent_until_us, at_us + _DEBT_US)
        return taken

    def add(self, at_us: int, amount: int, rate: int) -> None:
        """Counts `amount`, negative for a refund, at a time that is not in the future of the last `advance`."""
        if self.windows:
            for window in self.windows:
                window.add(at_us, amount)
            self._spent_until_us = max(self._spent_until_us, at_us - _CREDIT_US) + self._cost_us(amount, rate)

    def fill(self, at_us: int) -> None:
        for window in self.windows:
            window.fill(at_us)

    def recall(self, history: Sequence[tuple[int, int]], now_us: int) -> None:
        """Counts what another one's `history` has, beside the pacer."""
        for window in self.windows:
            for age_us, amount in history:
                window.add(now_us - age_us, amount)

    def history(self, now_us: int) -> list[tuple[int, int]]:
        return max((window.history(now_us) for window in self.windows), key=len, default=[])

    def stated(self, per_minute: int | None, left: int | None, now_us: int) -> None:
        """The provider says what its limit is and what is left of it: that may only lower what is granted."""
        if per_minute is None or not self.windows:
            return
        self._stated, self._stated_until_us = per_minute, now_us + _STATED_US
        if left is not None:
            for window in self.windows:
                if window.limit == self._per_minute:
                    window.add(now_us, max(0, min(per_minute, window.limit) - left - window.level))

    def _most(self, window: _Window, now_us: int) -> int:
        """What the provider last said that its limit is for a window, if that was lately."""
        if now_us >= self._stated_until_us:
            return window.limit
        return window.limit * self._stated // self._per_minute

    def _earned(self, of_us: int, rate: int) -> int:
        """How much the rate brings in so long."""
        return of_us * self._per_minute // _MINUTE_US * rate // _WHOLE

    def _cost_us(self, amount: int, rate: int) -> int:
        """How long it takes to earn `amount`."""
        return amount * _MINUTE_US // self._per_minute * _WHOLE // rate


@dataclass(slots=True)
class _Place:
    """A refused claim that others who come after it may not overtake until `until_us`."""

    standing: tuple[int, float]
    asker: str
    tokens: int
    requests: int
    until_us: int

    def is_of(self, claim: Claim, asker: str) -> bool:
        """Whether it can pass for the claim's own: an estimate of the same text's tokens may have moved meanwhile."""
        alike = abs(self.tokens - claim.tokens_min) <= self.tokens // _ALIKE
        same = (self.standing[0], self.requests, self.asker) == (_standing(claim)[0], claim.requests, asker)
        return alike and same


def _standing(claim: Claim) -> tuple[int, float]:
    """Who comes first; the lower one. What is paced comes after the rest of its priority."""
    return 2 * claim.priority + claim.paced, claim.rank


@dataclass(slots=True)
class _Open:
    """A grant that is not settled: when it starts, what it may use, and until when it holds a slot."""

    start_us: int
    tokens: int
    requests: int


class Quota:
    """The decisions for one account; times are microseconds of one clock.

    `known_since_us`: what was granted before then is not known, so it counts as all that could have been.
    """

    def __init__(self, limits: Limits, *, unknown_until_us: int | None = None) -> None:
        self._requests = _Dimension(limits.requests_per_minute, limits.judged_spans_s)
        self._tokens = _Dimension(limits.tokens_per_minute, limits.judged_spans_s)
        self.most_slots = limits.max_in_flight
        self._frontier_us = 0  # nobody starts before the last who was booked
        self._places: list[_Place] = []  # in order of asking
        self._open: dict[str, _Open] = {}
        self._paused_until_us = 0
        self._rate = _WHOLE
        self._regains_from_us = 0
        self._cut_again_us = 0
        self.fill(unknown_until_us)

    def reserve(self, claim: Claim, grant_id: str, now_us: int, asker: str = "") -> Grant | NotYet:
        """See `ports.Limiter`. A refused claim keeps its place while `asker` asks for it again every 5 s or sooner."""
        at_us = max(now_us, self._frontier_us)
        self._places = [place for place in self._places if place.until_us > now_us]
        self._advance(at_us)
        place, places_ahead, tokens, requests = self._asks(claim, now_us, asker)
        tokens_us = self._tokens.ready_us(tokens, now_us)
        requests_us = self._requests.ready_us(requests, now_us)
        start_us = max(at_us, self._paused_until_us, tokens_us, requests_us)
        wait_us = start_us - now_us
        scarce: Scarce = "tokens" if tokens_us >= requests_us else "requests"
        crowded = self.most_slots > 0 and len(self._open) + places_ahead >= self.most_slots
        if crowded and wait_us < _CALL_US:
            wait_us, scarce = _CALL_US, "slots"
        if crowded or wait_us > (_BOOK_AHEAD_US[tokens.manner] if claim.waits else 0):
            if claim.waits:
                self._keep_place(claim, place, asker, now_us + min(wait_us, _PLACE_US) + _PLACE_GRACE_US)
            return NotYet(wait_us / S_US, scarce)
        if place is not None:
            self._places.remove(place)
        self._advance(start_us)
        granted = self._tokens.take(tokens, start_us)
        requests_granted = self._requests.take(requests, start_us)
        self._frontier_us = start_us
        self._open[grant_id] = _Open(start_us, granted, requests_granted)
        return Grant(grant_id, claim.account, granted, requests_granted, wait_us / S_US)

    def settle(
        self, grant_id: str, tokens_used: int | None, requests_used: int, now_us: int, stated: Stated | None = None
    ) -> None:
        """See `ports.Limiter`."""
        held = self._open.pop(grant_id, None)
        if held is None:
            return
        self._advance(max(now_us, self._frontier_us))
        if tokens_used is not None:
            rate = self._rate_at(now_us)
            self._tokens.add(held.start_us, tokens_used - held.tokens, rate)
            self._requests.add(held.start_us, requests_used - held.requests, rate)
        if stated is not None:
            self._tokens.stated(stated.tokens_per_minute, stated.tokens_left, now_us)
            self._requests.stated(stated.requests_per_minute, stated.requests_left, now_us)

    def throttled(self, rest_us: int, now_us: int) -> None:
        """Pauses; the calls that fly when a quota is found to be smaller than thought cut the rate once, not each."""
        self._paused_until_us = max(self._paused_until_us, now_us + rest_us)
        if now_us >= self._cut_again_us:
            self._rate = max(_LEAST_RATE, self._rate_at(now_us) * _CUT // _WHOLE)
            self._regains_from_us = now_us + rest_us
            self._cut_again_us = now_us + max(rest_us, S_US)

    def charge(self, tokens: int, requests: int, at_us: int) -> None:
        """Counts what was granted elsewhere."""
        self._advance(at_us)
        rate = self._rate_at(at_us)
        self._tokens.add(at_us, tokens, rate)
        self._requests.add(at_us, requests, rate)

    def history(self, now_us: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """What still counts of tokens and of requests: how long ago, in microseconds, and how much."""
        self._advance(max(now_us, self._frontier_us))
        return self._tokens.history(now_us), self._requests.history(now_us)

    def resized(self, limits: Limits, now_us: int) -> "Quota":
        """One with other limits that goes on from here."""
        tokens, requests = self.history(now_us)
        other = Quota(limits)
        other._advance(max(now_us, self._frontier_us))
        other._tokens.recall(tokens, now_us)
        other._requests.recall(requests, now_us)
        other._frontier_us, other._paused_until_us, other._open = self._frontier_us, self._paused_until_us, self._open
        return other

    def stand_in(self, slots: int, *, unknown_until_us: int | None = None) -> "Quota":
        """One that goes on from what is known here, by itself, with so many slots; see the constructor."""
        other = copy.deepcopy(self)
        other.most_slots = slots
        other.fill(unknown_until_us)
        return other

    def fill(self, unknown_until_us: int | None) -> None:
        """Takes for granted all that could have been, up to then."""
        if unknown_until_us is not None:
            self._requests.fill(unknown_until_us)
            self._tokens.fill(unknown_until_us)

    def _asks(self, claim: Claim, now_us: int, asker: str) -> tuple[_Place | None, int, _Ask, _Ask]:
        """The claim's own place if it has one, who comes first, and its asks for tokens and requests behind those."""
        mine = next((place for place in self._places if place.is_of(claim, asker)), None)
        standing = _standing(claim)
        before = self._places if mine is None else self._places[: self._places.index(mine)]
        ahead = [place for place in self._places if place is not mine and place.standing < standing]
        ahead += [place for place in before if place.standing == standing]
        rate = self._rate_at(now_us)
        manner: Manner = "bulk" if claim.priority is Priority.BULK else "paced" if claim.paced else "free"
        tokens = _Ask(claim.tokens_min, claim.tokens_max, sum(place.tokens for place in ahead), rate, manner)
        most = max(claim.requests, claim.requests_max)
        return (
            mine,
            len(ahead),
            tokens,
            _Ask(claim.requests, most, sum(place.requests for place in ahead), rate, manner),
        )

    def _keep_place(self, claim: Claim, place: _Place | None, asker: str, until_us: int) -> None:
        if place is not None:
            place.until_us = until_us
            place.standing = _standing(claim)
        elif len(self._places) < _PLACES:
            self._places.append(_Place(_standing(claim), asker, claim.tokens_min, claim.requests, until_us))

    def _rate_at(self, now_us: int) -> int:
        """The part of the configured limits that is used, in ten-thousandths."""
        return min(_WHOLE, self._rate + _REGAINED * max(0, (now_us - self._regains_from_us) // _REGAIN_US))

    def _advance(self, at_us: int) -> None:
        self._tokens.advance(at_us)
        self._requests.advance(at_us)
