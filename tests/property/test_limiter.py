"""The limiter of one process against a naive account of the same promises, in any order of events."""

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.domain import Limits, Priority
from app.ports import Claim, Grant, NotYet
from app.storage.limiter import InProcessLimiter

SLOT_S, HELD_SLOTS = 0.25, 243  # a minute, half a second of margin, and the slot itself
TOKENS, REQUESTS = 1000, 6
LIMITS = Limits(max_in_flight=0, tokens_per_minute=TOKENS, requests_per_minute=REQUESTS)


T = TypeVar("T")


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that must not wait."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        result: T = finished.value
        return result
    raise AssertionError("the limiter waited")


@dataclass
class Entry:
    """One grant as the naive account keeps it: when it starts, and what counts of it."""

    grant: Grant
    start_s: float
    tokens: int
    requests: int
    settled: bool = False


class LimiterMachine(RuleBasedStateMachine):
    """One patient caller: what was refused is asked again before anything else. Times are quarters of a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.limiter = InProcessLimiter({"d": LIMITS}, clock=lambda: self.now_s)
        self.entries: list[Entry] = []
        self.waiting: Claim | None = None
        self.ready_s = 0.0

    def naive_level(self, at_s: float) -> tuple[int, int]:
        """Tokens and requests that may still be counted at a time, summed anew."""
        held = [e for e in self.entries if at_s // SLOT_S - e.start_s // SLOT_S < HELD_SLOTS]
        return sum(e.tokens for e in held), sum(e.requests for e in held)

    def naive_start_s(self, claim: Claim) -> float:
        """The first time at which the claim fits, not before the last start."""
        start_s = max([self.now_s, *(e.start_s for e in self.entries)])
        while True:
            tokens, requests = self.naive_level(start_s)
            alone = not tokens or tokens + claim.tokens_min <= TOKENS
            if alone and (not requests or requests + claim.requests <= REQUESTS):
                return start_s
            start_s = (start_s // SLOT_S + 1) * SLOT_S

    @rule(
        least=st.one_of(st.integers(1, 400), st.integers(900, 1500)),
        more=st.integers(0, 600),
        requests=st.sampled_from([1, 1, 1, 2, 7]),
        priority=st.sampled_from([Priority.INTERACTIVE, Priority.DEFAULT]),
    )
    def reserve(self, least: int, more: int, requests: int, priority: Priority) -> None:
        """The answer is the naive one: yes or no, how much, and when."""
        claim = self.waiting or Claim("d", least, least + more, priority, requests)
        start_s = self.naive_start_s(claim)
        answer = at_once(self.limiter.reserve(claim))
        if start_s - self.now_s > 0.25:
            assert isinstance(answer, NotYet)
            assert answer.wait_s == start_s - self.now_s
            self.waiting, self.ready_s = claim, start_s
            return
        assert isinstance(answer, Grant)
        room = TOKENS - self.naive_level(start_s)[0]
        assert answer.start_in_s == start_s - self.now_s
        assert answer.tokens == max(claim.tokens_min, min(claim.tokens_max, room))
        self.entries.append(Entry(answer, start_s, answer.tokens, claim.requests))
        self.waiting = None

    @rule(
        which=st.integers(0, 10),
        tokens=st.one_of(st.none(), st.integers(0, 2500)),
        requests=st.integers(0, 1),
        times=st.integers(1, 3),
    )
    def settle(self, which: int, tokens: int | None, requests: int, times: int) -> None:
        """Some grant is settled, perhaps again, perhaps with more than was granted, perhaps too late."""
        if not self.entries:
            return
        entry = self.entries[-1 - which % len(self.entries)]
        for _ in range(times):
            at_once(self.limiter.settle(entry.grant, tokens, requests_used=requests))
        if tokens is not None and not entry.settled:
            entry.tokens, entry.requests = tokens, requests
        entry.settled = True

    @rule(quarters=st.one_of(st.integers(0, 20), st.integers(200, 1200)))
    def time_passes(self, quarters: int) -> None:
        """A little, or up to more than a window."""
        self.now_s += quarters * SLOT_S / 4

    @rule()
    def wait_as_told(self) -> None:
        """The caller sleeps for as long as it was told."""
        self.now_s = max(self.now_s, self.ready_s)

    @invariant()
    def never_above_the_limit(self) -> None:
        """In any minute that ends with a start, what was granted and not charged beyond it is within the limit."""
        for last in self.entries:
            minute = [e for e in self.entries if last.start_s - 60.0 <= e.start_s <= last.start_s]
            tokens = sum(min(e.tokens, e.grant.tokens) for e in minute)
            requests = sum(min(e.requests, e.grant.requests) for e in minute)
            assert tokens <= TOKENS or any(e.grant.tokens > TOKENS for e in minute)
            assert requests <= REQUESTS or any(e.grant.requests > REQUESTS for e in minute)


LimiterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
test_the_limiter_decides_as_a_naive_account_would = LimiterMachine.TestCase


def test_places_that_nobody_claims_are_forgotten() -> None:
    """They take no memory once their time is over."""
    now_s = 0.0
    limiter = InProcessLimiter({"d": Limits(max_in_flight=0, tokens_per_minute=10_000)}, clock=lambda: now_s)
    for size in range(1, 300):
        at_once(limiter.reserve(Claim("d", size, size, Priority.DEFAULT)))
    quota = limiter._quotas["d"]
    assert 0 < len(quota._places) <= 64
    now_s = 70.0
    at_once(limiter.reserve(Claim("d", 1, 1, Priority.DEFAULT)))
    assert not quota._places
