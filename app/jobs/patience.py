"""Hides how whoever has time asks for texts: through limits and outages, until surely nobody will embed them."""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from app.domain import Basket, EmbeddingRequest, EmbeddingResult
from app.errors import (
    BudgetExhausted,
    DeadlineExceeded,
    EmbedgateError,
    InternalError,
    RateLimited,
    TryAgainLater,
    UpstreamFailed,
)

_TRY_S = 600.0  # the deadline of a try
_COOL_BASE_S, _COOL_CAP_S = 1.0, 300.0
_PROBE_S = 60.0


class Engine(Protocol):
    """The one door, see `Gateway`."""

    async def embed(self, request: EmbeddingRequest, basket: Basket | None = ...) -> EmbeddingResult:
        """One vector per text, in order."""


class Cooldown:
    """For how long the providers are left alone: longer each time, until somebody is answered."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._times = 0
        self._until = 0.0

    def left_s(self, now: float) -> float:
        """How long it still lasts."""
        return max(0.0, self._until - now)

    def answered(self) -> None:
        """Somebody was."""
        self._times = 0

    def refused(self, now: float, named_s: float) -> None:
        """Somebody was told to come again, after `named_s` at the soonest; those that were told at once count once."""
        if now < self._until:
            return
        longest_s = min(_COOL_CAP_S, _COOL_BASE_S * 2.0**self._times)
        self._times = min(self._times + 1, 16)
        self._until = now + max(named_s, longest_s * self._rng.uniform(0.5, 1.0))


class Patient:
    """Asks `embed` for all who wait together: whoever is told to come again tells the others.

    What fails is tried `attempts` times, after `base_s`, then after twice as long, at most `cap_s`. `embed` takes what
    `ask` is called with: with a basket nothing that a try has bought is bought by the next one.
    """

    def __init__(
        self, embed: Callable[..., Awaitable[EmbeddingResult]], *, attempts: int, rng: random.Random,
        base_s: float = 0.5, cap_s: float = 60.0,
    ) -> None:  # fmt: skip
        self.broke = False
        """Whether there is no money left: then nobody is asked any more."""
        self.heard: EmbedgateError | None = None
        """Why whoever was told to come again was, the last one of all, if nobody was answered since."""
        self._embed = embed
        self._attempts = attempts
        self._rng = rng
        self._base_s = base_s
        self._cap_s = cap_s
        self._cooldown = Cooldown(rng)
        self._clock = asyncio.get_running_loop().time

    async def ask(self, request: EmbeddingRequest, *basket: Basket) -> EmbeddingResult | EmbedgateError:
        """Its answer, however long that takes; or the error that no other try would mend.

        What only has to wait is no try, nor is one while nobody is there for others, either: somebody is, before the
        last one and after it. Raises CancelledError once there is no money left.
        """
        tries = 0
        while not self.broke:
            now = self._clock()
            if wait_s := self._cooldown.left_s(now):
                await asyncio.sleep(wait_s)
                continue
            try:
                result = await self._embed(msgspec.structs.replace(request, deadline=now + _TRY_S), *basket)
            except BudgetExhausted:
                self.broke = True
            except (RateLimited, TryAgainLater) as error:
                self.heard = error
                if error.retry_after_s is None:
                    return error
                self._cooldown.refused(self._clock(), error.retry_after_s)
            except (UpstreamFailed, DeadlineExceeded, InternalError) as error:
                self.heard = error
                tries += 1
                if tries < self._attempts - 1:
                    await asyncio.sleep(min(self._cap_s, self._base_s * 2.0**tries) * self._rng.uniform(0.5, 1.0))
                elif not await self._is_served(request):
                    tries -= 1
                    self._cooldown.refused(self._clock(), 0.0)
                elif tries >= self._attempts:
                    return error
            except EmbedgateError as error:
                return error
            else:
                self._cooldown.answered()
                self.heard = None
                return result
        raise asyncio.CancelledError

    async def _is_served(self, request: EmbeddingRequest) -> bool:
        """Whether a text that nobody could mind is embedded now: then it was not for an outage that others failed."""
        harmless = msgspec.structs.replace(
            request, texts=(f"hello {secrets.token_hex(4)}",), deadline=self._clock() + _PROBE_S
        )
        try:
            await self._embed(harmless)
        except EmbedgateError:
            return False
        return True
