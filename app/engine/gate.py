"""One deployment's door and who waits before it: slots, health, and how it counts tokens."""

import asyncio
import math

from app.domain import Deployment, Priority, Space
from app.engine.breaker import CircuitBreaker, RetryBudget
from app.engine.ceiling import BatchCeiling
from app.engine.workitem import Demand
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
    """One deployment's door, shared by all its spaces: slots, breaker, retry budget, batch sizes, how it counts tokens.

    `proven`: it has accepted a text since it last refused one. `cooling` counts its 429s since anything landed: until
    then its calls go one by one. `rests_until` is when the last of these said that it may be asked again.
    """

    def __init__(self, deployment: Deployment, provider: Provider, breaker: CircuitBreaker, ratio: LearnedRatio | None):
        self.deployment = deployment
        self.provider = provider
        self.breaker = breaker
        self.budget = RetryBudget()
        self.in_flight = 0
        self._strange: set[tuple[str, str]] = set()  # (model of the Space, name of the watch that says so)
        self.proven = False
        self.cooling = 0
        self._cooling_since = -math.inf
        self.rests_until = -math.inf
        limits = deployment.limits
        self._ceiling = (
            BatchCeiling(limits.min_batch_tokens, limits.max_batch_tokens, limits.target_latency_s)
            if limits.target_latency_s
            else None
        )
        self._bulk_in_flight = 0
        self._interactive_until = -math.inf
        self._ratio = ratio

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.deployment.name

    def __repr__(self) -> str:
        return f"<Gate {self.name} {self.breaker.state}, {self.in_flight} of {self.deployment.limits.max_in_flight}>"

    @property
    def has_room(self) -> bool:
        """Whether a slot is free for anybody."""
        return self.in_flight < (1 if self.cooling else self.deployment.limits.max_in_flight)

    def is_strange(self, space: Space) -> bool:
        """Whether somebody who watches it says that its vectors are no longer those of `space`."""
        return any(model == space.model for model, _ in self._strange)

    def judge(self, space: Space, watch: str, *, strange: bool) -> bool:
        """`watch` says what its vectors are to `space`, in all its variants; whether it said something else before."""
        judged = (space.model, watch)
        if strange == (judged in self._strange):
            return False
        self._strange ^= {judged}
        return True

    @property
    def most_items(self) -> int:
        """How many texts a call may carry now."""
        return min(self.deployment.limits.max_batch_items, self.provider.max_items)

    @property
    def most_tokens(self) -> int:
        """How many tokens, as we count them, a call may carry now."""
        return self.unweigh(self._ceiling.tokens if self._ceiling else self.deployment.limits.max_batch_tokens)

    def landed(self, tokens: int, billed: int | None, duration_s: float) -> None:
        """A call of `tokens`, as we count, brought vectors."""
        self.proven, self.cooling = True, 0
        if self._ceiling is not None:
            self._ceiling.landed(self.weigh(tokens), duration_s)
        if self._ratio is not None and billed:
            self._ratio.learn(tokens, billed)

    def throttled(self, named_s: float | None, started: float, now: float) -> float:
        """A call that began at `started` met a 429: how long the deployment rests, what it named or longer.

        Calls that were in flight together count once.
        """
        policy = self.deployment.attempts
        if started >= self._cooling_since or not self.cooling:
            self.cooling += 1
            self._cooling_since = now
        rest_s = min(policy.cooldown_s * 2.0 ** min(self.cooling - 1, 32), policy.cooldown_cap_s)
        rest_s = max(rest_s, named_s or 0.0)
        self.rests_until = max(self.rests_until, now + rest_s)
        return rest_s

    def enter(self, priority: Priority, now: float) -> bool:
        """Takes a slot if `priority` may have one now."""
        most = self.deployment.limits.max_in_flight
        if priority == Priority.INTERACTIVE:
            self._interactive_until = now + INTERACTIVE_MEMORY_S
        if not self.has_room:
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

    def worth_s(self, tokens: int, items: int) -> float:
        """How long the quota takes to bring so many tokens, as we count, in calls of as many texts as fit."""
        limits = self.deployment.limits
        calls = items if limits.counts_texts else math.ceil(items / self.most_items)
        by_tokens = 60.0 * self.weigh(tokens) / limits.tokens_per_minute if limits.tokens_per_minute else 0.0
        by_requests = 60.0 * calls / limits.requests_per_minute if limits.requests_per_minute else 0.0
        return max(by_tokens, by_requests)

    @property
    def counts_exactly(self) -> bool:
        """Whether our count of a text is the vendor's, so that nothing has to be learned from its bills."""
        return self._ratio is None

    def weigh(self, tokens: int) -> int:
        """Our count in the vendor's counting, on the safe side."""
        return tokens if self._ratio is None else math.ceil(tokens * self._ratio.value)

    def expect(self, tokens: int) -> int:
        """Our count as the vendor will probably bill it."""
        return tokens if self._ratio is None else round(tokens * self._ratio.mean)

    def cost_nano_usd(self, tokens: int) -> int:
        """What a text of so many tokens, as we count, will cost at most; 0 where its price is not known."""
        return -(-self.expect(tokens) * (self.deployment.price or 0) // 1000)

    def unweigh(self, tokens: int) -> int:
        """How many of our tokens fit so many of the vendor's."""
        return tokens if self._ratio is None else int(tokens / self._ratio.value)


class Slot:
    """A place at one deployment, taken for `wish`; must be released, once or more."""

    def __init__(self, gate: Gate, wish: Demand, bell: Bell) -> None:
        self.gate = gate
        self.wish = wish
        self._bell = bell
        self._held = True

    def release(self) -> None:
        """Gives the place back and wakes who waits for one."""
        if self._held:
            self._held = False
            self.gate.leave(self.wish.priority)
            self._bell.ring()
