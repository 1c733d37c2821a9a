"""One deployment's door and who waits before it: slots, health, and how it counts tokens."""

import asyncio
import math

from app.domain import Deployment, Priority
from app.engine.breaker import CircuitBreaker, RetryBudget
from app.ports import Provider
from app.tokens import LearnedRatio

LEAST_WAIT_S = 0.0001
"""Waiting shorter than this may be no time at all for a coarse clock."""

INTERACTIVE_MEMORY_S = 10.0
"""How long after an interactive text bulk leaves a quarter of the slots free."""


class Bell:
    """Wakes everybody who waits for something to change."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Something changed: a slot, a breaker, a priority."""
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout_s: float | None) -> None:
        """Returns at the next ring, or after `timeout_s`; never at once, since a clock may be too coarse to tell."""
        timeout_s = None if timeout_s is None else max(timeout_s, LEAST_WAIT_S)
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait((future,), timeout=timeout_s)
        finally:
            self._waiting.discard(future)


class Gate:
    """One deployment's door, shared by all its spaces: slots, breaker, retry budget, and how it counts tokens."""

    def __init__(self, deployment: Deployment, provider: Provider, breaker: CircuitBreaker, ratio: LearnedRatio | None):
        self.deployment = deployment
        self.provider = provider
        self.breaker = breaker
        self.budget = RetryBudget()
        self.in_flight = 0
        self._bulk_in_flight = 0
        self._interactive_until = -math.inf
        self._ratio = ratio

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.deployment.name

    def __repr__(self) -> str:
        return f"<Gate {self.name} {self.breaker.state}, {self.in_flight} of {self.deployment.limits.max_in_flight}>"

    def enter(self, priority: Priority, now: float) -> bool:
        """Takes a slot if `priority` may have one now."""
        most = self.deployment.limits.max_in_flight
        if priority == Priority.INTERACTIVE:
            self._interactive_until = now + INTERACTIVE_MEMORY_S
        if self.in_flight >= most:
            return False
        if priority == Priority.BULK:
            reserved = max(1, most // 4) if now < self._interactive_until else 0
            if self._bulk_in_flight >= max(1, most - reserved):
                return False
            self._bulk_in_flight += 1
        self.in_flight += 1
        return True

    def leave(self, priority: Priority) -> None:
        """Gives a slot back."""
        self.in_flight -= 1
        self._bulk_in_flight -= priority == Priority.BULK

    @property
    def counts_exactly(self) -> bool:
        """Whether our count of a text is the vendor's, so that nothing has to be learned from its bills."""
        return self._ratio is None

    def weigh(self, tokens: int) -> int:
        """Our count in the vendor's counting, on the safe side."""
        return tokens if self._ratio is None else math.ceil(tokens * self._ratio.value)

    def unweigh(self, tokens: int) -> int:
        """How many of our tokens fit so many of the vendor's."""
        return tokens if self._ratio is None else int(tokens / self._ratio.value)

    def learn(self, tokens: int, billed: int | None) -> None:
        """Compares our count of a whole call with the vendor's."""
        if self._ratio is not None and billed:
            self._ratio.learn(tokens, billed)


class Slot:
    """A place at one deployment; must be released, once or more."""

    def __init__(self, gate: Gate, priority: Priority, bell: Bell) -> None:
        self.gate = gate
        self._priority = priority
        self._bell = bell
        self._held = True

    def release(self) -> None:
        """Gives the place back and wakes who waits for one."""
        if self._held:
            self._held = False
            self.gate.leave(self._priority)
            self._bell.ring()
