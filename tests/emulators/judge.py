"""Hides how a provider counts: a strict sliding minute over requests and tokens."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

Window: TypeAlias = deque[tuple[float, int]]
Kind: TypeAlias = Literal["requests", "tokens"]


class OverLimit(Exception):
    """A call that is too much; `wait_s` until it would not be, infinite if it never can be."""

    def __init__(self, kind: Kind, limit: int, used: int, asked: int, wait_s: float) -> None:
        super().__init__(kind)
        self.kind = kind
        self.limit = limit
        self.used = used
        self.asked = asked
        self.wait_s = wait_s


class Level(NamedTuple):
    """How one limit stands: what it allows, what is left of it, when all of it is back."""

    limit: int
    left: int
    reset_s: float


@dataclass(slots=True)
class Judge:
    """Refuses what would exceed a limit in any 60 s; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    clock: Callable[[], float] = time.monotonic
    refusals: int = 0
    _requests: Window = field(default_factory=deque)
    _tokens: Window = field(default_factory=deque)

    def admit(self, requests: int, tokens: int) -> None:
        """Counts a call, or raises OverLimit for one that is too much."""
        now = self.clock()
        asks: list[tuple[Kind, int, Window, int]] = [
            ("requests", self.requests_per_minute, self._requests, requests),
            ("tokens", self.tokens_per_minute, self._tokens, tokens),
        ]
        for kind, limit, window, amount in asks:
            while window and window[0][0] <= now - 60:
                window.popleft()
            used = sum(spent for _, spent in window)
            if limit and used + amount > limit:
                self.refusals += 1
                raise OverLimit(kind, limit, used, amount, _room_in_s(window, limit - amount, now))
        for _, _, window, amount in asks:
            window.append((now, amount))

    def levels(self) -> dict[Kind, Level]:
        """How the limits stand; those that there are."""
        now = self.clock()
        limits: list[tuple[Kind, int, Window]] = [
            ("requests", self.requests_per_minute, self._requests),
            ("tokens", self.tokens_per_minute, self._tokens),
        ]
        return {
            kind: Level(limit, limit - sum(spent for _, spent in window), _room_in_s(window, 0, now))
            for kind, limit, window in limits
            if limit
        }


def _room_in_s(window: Window, most: int, now: float) -> float:
    """Seconds until the window holds at most `most`; infinite if it never can."""
    held = sum(spent for _, spent in window)
    wait_s = 0.0
    for at_s, spent in window:
        if held <= most:
            break
        held -= spent
        wait_s = at_s + 60 - now
    return wait_s if held <= most else math.inf
