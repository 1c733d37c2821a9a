"""Hides what every call to a deployment needs, whoever makes it: its quota, its time, and who hears how it ended."""

import asyncio
from collections.abc import Callable, Sequence

from app import vectors
from app.domain import Space, Text
from app.engine.breaker import Pass
from app.engine.gate import Bell, Gate
from app.errors import BadCredential, CallTimeout, InputRefused, Misconfigured, ProviderError, QuotaExhausted, Throttled
from app.ports import Claim, Grant, Limiter, NotYet, Reply


class Calls:
    """Calls to deployments, one method before and one during; who made a call settles its grant with `limiter`."""

    def __init__(self, limiter: Limiter, bell: Bell, *, clock: Callable[[], float]) -> None:
        self.limiter = limiter
        self._bell = bell
        self._clock = clock

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """Asks once; a grant may be used at once, and one that was not returned is given back."""
        answer = await self.limiter.reserve(claim)
        if isinstance(answer, Grant) and answer.start_in_s:
            try:
                await asyncio.sleep(answer.start_in_s)
            except BaseException:
                await self.limiter.settle(answer, 0, requests_used=0)
                raise
        return answer

    async def embed(
        self, gate: Gate, passed: Pass, texts: Sequence[Text], space: Space, *, timeout_s: float
    ) -> Reply:  # fmt: skip
        """One checked reply within `timeout_s`; ends `passed` with what the call says about the deployment.

        Raises only `errors.ProviderError`s, after breaker, limiter and whoever waits have been told.
        """
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await gate.provider.embed(texts, space, timeout_s=timeout_s)
            except TimeoutError:
                raise CallTimeout(f"no answer within {timeout_s:.1f} s") from None
            vectors.check(reply.vectors, len(texts), space.dimensions, gate.deployment.unit_norm)
            gate.breaker.succeeded(passed)
            return reply
        except ProviderError as error:
            await self._note(gate, passed, error, timeout_s)
            self._bell.ring()
            raise
        finally:
            gate.breaker.neutral(passed)  # counts only if nothing else ended the pass

    async def _note(self, gate: Gate, passed: Pass, error: ProviderError, timeout_s: float) -> None:
        match error:
            case InputRefused() | Misconfigured():
                gate.breaker.neutral(passed)
            case Throttled():
                gate.breaker.neutral(passed)
                rest_s = gate.throttled(error.retry_after_s, passed.started_s, self._clock())
                await self.limiter.throttled(gate.name, rest_s)
            case BadCredential():
                gate.breaker.condemn("credential")
            case QuotaExhausted():
                gate.breaker.condemn("quota")
            case CallTimeout() if timeout_s < min(gate.deployment.timeout_s, gate.breaker.patience_s()):
                gate.breaker.cut(passed, gate.deployment.timeout_s)
            case _:
                gate.breaker.failed(passed)
