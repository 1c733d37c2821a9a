"""Hides how a provider counts: a strict sliding minute over requests and tokens, and its 429s word for word."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from tests.emulators.faults import error_body

Window: TypeAlias = deque[tuple[float, int]]


class RefusalError(Exception):
    """An answer in OpenAI's error envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = error_body(message, kind, code=code)


@dataclass(slots=True)
class Judge:
    """Refuses what would exceed a limit in any 60 s; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    clock: Callable[[], float] = time.monotonic
    refusals: int = 0
    _requests: Window = field(default_factory=deque)
    _tokens: Window = field(default_factory=deque)

    def admit(self, model: str, tokens: int) -> dict[str, str]:
        """The rate limit headers of an admitted call; raises RefusalError (429) for one that is too much."""
        asks = (
            ("requests", "requests per min (RPM)", self.requests_per_minute, self._requests, 1),
            ("tokens", "tokens per min (TPM)", self.tokens_per_minute, self._tokens, tokens),
        )
        now = self.clock()
        for kind, unit, limit, window, amount in asks:
            while window and window[0][0] <= now - 60:
                window.popleft()
            used = sum(spent for _, spent in window)
            if limit and used + amount > limit:
                self.refusals += 1
                whose = f"for {model} in organization org-emulator on {unit}: Limit {limit}"
                raise self._refusal(kind, whose, used, amount, _room_in_s(window, limit - amount, now))
        headers: dict[str, str] = {}
        for kind, _, limit, window, amount in asks:
            window.append((now, amount))
            if limit:
                headers |= self._headers(kind, limit, window, now)
        return headers

    def _refusal(self, kind: str, whose: str, used: int, amount: int, wait_s: float) -> RefusalError:
        if math.isinf(wait_s):
            text = f"Request too large {whose}, Requested {amount}. The input or output tokens must be reduced."
            return RefusalError(429, text, kind, code="rate_limit_exceeded")
        text = f"Rate limit reached {whose}, Used {used}, Requested {amount}. Please try again in {wait_s:.3f}s."
        headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
        return RefusalError(429, text, kind, code="rate_limit_exceeded", headers=headers)

    def _headers(self, kind: str, limit: int, window: Window, now: float) -> dict[str, str]:
        left = limit - sum(spent for _, spent in window)
        return {
            f"x-ratelimit-limit-{kind}": str(limit),
            f"x-ratelimit-remaining-{kind}": str(left),
            f"x-ratelimit-reset-{kind}": f"{_room_in_s(window, 0, now):.3f}s",
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
