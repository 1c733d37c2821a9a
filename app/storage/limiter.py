"""Hides how a deployment's quotas per minute are filled to the brim and never broken, in one process.

The decision is pure: `_Quota` is told the time, in whole microseconds, and does integer sums over slots, so that a
shared store can run the same arithmetic. What a slot holds is forgotten only when even a call that arrived late by the
margin has left every window in which its vendor could still count it.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.domain import Limits, Priority
from app.ports import Claim, Grant, NotYet

_S = 1_000_000  # microseconds
_MINUTE_US = 60 * _S

_SLOT_US = _S // 4
_SLOTS_PER_SPAN = 40  # at least: with slots of a quarter second, a span of 1 s would be used to two thirds
_MARGINS_PER_SPAN = 120  # 0.5 s of jitter between grant and arrival for 60 s, but never less than a slot

_BOOK_AHEAD_US = _S // 4
_CREDIT_US = _S  # what the pacer saves at most
_WORTH_US = _S // 4  # bulk that has more work waits for that much of the rate, rather than spend a call on less
_DEBT_US = 10 * _S  # how long bulk has to wait, at most, for what the others overdrew
_KEPT_FROM_BULK = 50  # the part of a limit that bulk leaves free: one fiftieth

_PLACES = 16
_PLACE_US = 5 * _S  # a refused claim that is not asked again for so long has lost its place
_PLACE_GRACE_US = _S // 2
_ALIKE = 8  # needs that differ by less than one eighth are taken for the same

_PAUSE_S = 1.0  # after a 429 that names no time
_LONGEST_PAUSE_S = 120.0
_WHOLE = 10_000  # rates are ten-thousandths of the configured limits
_CUT = 8_500
_LEAST_RATE = 500
_REGAINED = 100
_REGAIN_US = 10 * _S


class _Ask(NamedTuple):
    """What is wanted of one dimension: from `least` to `most`, beside `ahead` that was asked for before."""

    least: int
    most: int
    ahead: int
    rate: int
    bulk: bool


class _Window:
    """What was granted within one span of one dimension: a ring of slots and its running sum."""

    __slots__ = ("_counts", "_newest", "_slot_us", "level", "limit", "slots")

    def __init__(self, per_minute: int, span_s: float) -> None:
        span_us = round(span_s * _S)
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

    def cap(self, ask: _Ask) -> int:
        limit = self.limit * ask.rate // _WHOLE
        return limit - limit // _KEPT_FROM_BULK if ask.bulk else limit

    def room(self, ask: _Ask) -> int:
        return self.cap(ask) - self.level - ask.ahead

    def ready_us(self, ask: _Ask) -> int:
        """The earliest time at which the ask fits: at once is 0.

        What is too large for the whole limit waits for an empty window; behind others who come first it cannot know
        when that will be, so it is told one window later.
        """
        too_much = ask.least - self.room(ask)
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
    """Requests or tokens per minute: windows that hold for all, and a pacer that bulk has to keep.

    The pacer is one number, the time up to which the rate is spent: behind the clock it is credit, ahead of it debt.
    Bulk spends credit; the others may run into debt, of which they leave bulk no more than `_DEBT_US`.
    """

    def __init__(self, per_minute: int, spans_s: Sequence[float]) -> None:
        self._per_minute = per_minute
        self._spent_until_us = -_CREDIT_US
        self.windows = [_Window(per_minute, span_s) for span_s in spans_s] if per_minute else []

    def advance(self, at_us: int) -> None:
        for window in self.windows:
            window.advance(at_us)

    def ready_us(self, ask: _Ask) -> int:
        """The earliest time at which all windows, and for bulk the pacer, let the ask pass."""
        ready_us = max((window.ready_us(ask) for window in self.windows), default=0)
        if ask.bulk and self.windows:
            worth_us = max(self._cost_us(ask.least, ask.rate), min(self._cost_us(ask.most, ask.rate), _WORTH_US))
            credit_us = self._cost_us(ask.ahead, ask.rate) + min(worth_us, _CREDIT_US)
            ready_us = max(ready_us, self._spent_until_us + credit_us)
        return ready_us

    def take(self, ask: _Ask, at_us: int) -> int:
        """Counts as much of the ask as fits now that it is ready, at least `least`."""
        rooms = [window.room(ask) for window in self.windows]
        if ask.bulk and self.windows:
            credit_us = min(at_us - self._spent_until_us, _CREDIT_US)
            rooms.append(credit_us * self._per_minute * ask.rate // (_MINUTE_US * _WHOLE) - ask.ahead)
        taken = max(ask.least, min(ask.most, *rooms)) if rooms else ask.most
        self.add(at_us, taken, ask.rate)
        if not ask.bulk:
            self._spent_until_us = min(self._spent_until_us, at_us + _DEBT_US)
        return taken

    def add(self, at_us: int, amount: int, rate: int) -> None:
        """Counts `amount`, negative for a refund, at a time that is not in the future of the last `advance`."""
        if self.windows:
            for window in self.windows:
                window.add(at_us, amount)
            self._spent_until_us = max(self._spent_until_us, at_us - _CREDIT_US) + self._cost_us(amount, rate)

    def _cost_us(self, amount: int, rate: int) -> int:
        """How long it takes to earn `amount`."""
        return amount * _MINUTE_US * _WHOLE // (self._per_minute * rate)


@dataclass(slots=True)
class _Place:
    """A refused claim that others of its priority, or a lower one, may not overtake until `until_us`."""

    priority: Priority
    tokens: int
    requests: int
    until_us: int

    def is_of(self, claim: Claim) -> bool:
        """Whether it can pass for the claim's own: an estimate of the same text's tokens may have moved meanwhile."""
        alike = abs(self.tokens - claim.tokens_min) <= self.tokens // _ALIKE
        return alike and (self.priority, self.requests) == (claim.priority, claim.requests)


class _Quota:
    """The decisions for one deployment; times are microseconds of one clock."""

    def __init__(self, limits: Limits) -> None:
        self._requests = _Dimension(limits.requests_per_minute, limits.judged_spans_s)
        self._tokens = _Dimension(limits.tokens_per_minute, limits.judged_spans_s)
        windows = self._requests.windows + self._tokens.windows
        self._longest_us = max((window.length_us for window in windows), default=0)
        self._frontier_us = 0  # nobody starts before the last who was booked
        self._places: list[_Place] = []  # in order of asking
        self._open: dict[int, int] = {}  # grant id → its start, in order of starting
        self._paused_until_us = 0
        self._rate = _WHOLE
        self._regains_from_us = 0
        self._cut_again_us = 0

    def reserve(self, claim: Claim, grant_id: int, now_us: int) -> Grant | NotYet:
        at_us = max(now_us, self._frontier_us)
        self._forget(now_us)
        self._advance(at_us)
        place, tokens, requests = self._asks(claim, now_us)
        start_us = max(at_us, self._paused_until_us, self._tokens.ready_us(tokens), self._requests.ready_us(requests))
        wait_us = start_us - now_us
        if wait_us > _BOOK_AHEAD_US:
            self._keep_place(claim, place, now_us + min(wait_us, _PLACE_US) + _PLACE_GRACE_US)
            return NotYet(wait_us / _S)
        if place is not None:
            self._places.remove(place)
        self._advance(start_us)
        granted = self._tokens.take(tokens, start_us)
        requests_granted = self._requests.take(requests, start_us)
        self._frontier_us = start_us
        if self._longest_us:
            self._open[grant_id] = start_us
        return Grant(grant_id, claim.deployment, granted, requests_granted, wait_us / _S)

    def settle(self, grant: Grant, tokens_used: int | None, requests_used: int, now_us: int) -> None:
        start_us = self._open.pop(grant.id, None)
        if start_us is None or tokens_used is None:
            return
        rate = self._rate_at(now_us)
        self._advance(max(now_us, self._frontier_us))
        self._tokens.add(start_us, tokens_used - grant.tokens, rate)
        self._requests.add(start_us, requests_used - grant.requests, rate)

    def throttled(self, pause_us: int, now_us: int) -> None:
        """Pauses; the calls that fly when a quota is found to be smaller than thought cut the rate once, not each."""
        self._paused_until_us = max(self._paused_until_us, now_us + pause_us)
        if now_us >= self._cut_again_us:
            self._rate = max(_LEAST_RATE, self._rate_at(now_us) * _CUT // _WHOLE)
            self._regains_from_us = now_us + pause_us
            self._cut_again_us = now_us + max(pause_us, _S)

    def _asks(self, claim: Claim, now_us: int) -> tuple[_Place | None, _Ask, _Ask]:
        """The claim's own place if it has one, and its asks for tokens and requests behind those who come first."""
        mine = next((place for place in self._places if place.is_of(claim)), None)
        tokens_ahead = requests_ahead = 0
        overtaken = False
        for place in self._places:
            overtaken = overtaken or place is mine
            if place.priority < claim.priority or (place.priority == claim.priority and not overtaken):
                tokens_ahead += place.tokens
                requests_ahead += place.requests
        rate, bulk = self._rate_at(now_us), claim.priority is Priority.BULK
        tokens = _Ask(claim.tokens_min, claim.tokens_max, tokens_ahead, rate, bulk)
        most = max(claim.requests, claim.requests_max)
        return mine, tokens, _Ask(claim.requests, most, requests_ahead, rate, bulk)

    def _keep_place(self, claim: Claim, place: _Place | None, until_us: int) -> None:
        if place is not None:
            place.until_us = until_us
        elif len(self._places) < _PLACES:
            self._places.append(_Place(claim.priority, claim.tokens_min, claim.requests, until_us))

    def _rate_at(self, now_us: int) -> int:
        """The part of the configured limits that is used, in ten-thousandths."""
        return min(_WHOLE, self._rate + _REGAINED * max(0, (now_us - self._regains_from_us) // _REGAIN_US))

    def _advance(self, at_us: int) -> None:
        self._tokens.advance(at_us)
        self._requests.advance(at_us)

    def _forget(self, now_us: int) -> None:
        """Drops places that were given up and grants that left every window unsettled."""
        self._places = [place for place in self._places if place.until_us > now_us]
        while self._open:
            grant_id, start_us = next(iter(self._open.items()))
            if start_us + self._longest_us > now_us:
                break
            del self._open[grant_id]


class InProcessLimiter:
    """The `Limiter` of a lone process. `clock` is the running loop's unless one is given, in seconds."""

    def __init__(self, limits: Mapping[str, Limits], *, clock: Callable[[], float] | None = None) -> None:
        self._quotas = {name: _Quota(of_one) for name, of_one in limits.items()}
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._ids = itertools.count(1)

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """See `ports.Limiter`. A refused claim keeps its place for as long as it is asked again every 5 s or sooner."""
        grant_id = next(self._ids)
        quota = self._quotas.get(claim.deployment)
        if quota is None:
            return Grant(grant_id, claim.deployment, claim.tokens_max, max(claim.requests, claim.requests_max))
        return quota.reserve(claim, grant_id, self._now_us())

    async def settle(self, grant: Grant, tokens_used: int | None, *, requests_used: int = 1) -> None:
        """See `ports.Limiter`."""
        quota = self._quotas.get(grant.deployment)
        if quota is not None:
            quota.settle(grant, tokens_used, requests_used, self._now_us())

    async def throttled(self, deployment: str, retry_after_s: float | None) -> None:
        """See `ports.Limiter`; the pause is at most 120 s, and 1 s when the provider named none."""
        quota = self._quotas.get(deployment)
        if quota is not None:
            pause_s = _PAUSE_S if retry_after_s is None else min(_LONGEST_PAUSE_S, max(0.0, retry_after_s))
            quota.throttled(int(pause_s * _S), self._now_us())

    def _now_us(self) -> int:
        return int(self._clock() * _S)
