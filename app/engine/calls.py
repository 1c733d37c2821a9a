"""Hides what every call to a deployment needs, whoever makes it: quota, time, a line in the ledger, who hears of it."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Sequence

from app import vectors
from app.domain import Space, Text
from app.engine.breaker import Pass
from app.engine.gate import Bell, Gate
from app.errors import BadCredential, CallTimeout, InputRefused, Misconfigured, ProviderError, QuotaExhausted, Throttled
from app.ports import Claim, End, Grant, Ledger, Limiter, NotYet, Part, Purchase, Reply

OWN = ""
"""Who pays for what embedgate asks by itself: no tenant."""


class Calls:
    """Calls to deployments, one method before and one during; who made a call settles its grant with `limiter`."""

    def __init__(self, limiter: Limiter, ledger: Ledger, bell: Bell, *, clock: Callable[[], float]) -> None:
        self.limiter = limiter
        self._ledger = ledger
        self._bell = bell
        self._clock = clock
        self._prefix, self._numbers = secrets.token_hex(8), itertools.count(1)

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
        self, gate: Gate, passed: Pass, texts: Sequence[Text], space: Space, parts: Sequence[Part], *, timeout_s: float
    ) -> Reply:
        """One checked reply within `timeout_s`, paid by `parts`; ends `passed` with what it says about the deployment.

        Raises only `errors.ProviderError`s, after breaker, limiter and whoever waits have been told; and TryAgainLater
        for a call that did not leave, since it could not be written down.
        """
        try:
            reply = await self._buy(gate, texts, space, parts, timeout_s)
            gate.breaker.succeeded(passed)
            return reply
        except ProviderError as error:
            await self._note(gate, passed, error, timeout_s)
            self._bell.ring()
            raise
        finally:
            gate.breaker.neutral(passed)  # counts only if nothing else ended the pass

    async def _buy(
        self, gate: Gate, texts: Sequence[Text], space: Space, parts: Sequence[Part], timeout_s: float
    ) -> Reply:  # fmt: skip
        """Whatever becomes of the call, it has a line before it leaves and is ended after it."""
        price = gate.deployment.price
        call = f"{self._prefix}-{next(self._numbers)}"
        purchase = Purchase(call, int(time.time() * 1000), gate.name, space.model, space.id, price, tuple(parts))
        self._ledger.begin(purchase)
        tokens = gate.expect(sum(part.tokens for part in parts))
        how: End = "unconfirmed"
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await gate.provider.embed(texts, space, timeout_s=timeout_s)
            except TimeoutError:
                raise CallTimeout(f"no answer within {timeout_s:.1f} s") from None
            how = "estimated"
            if reply.tokens_billed is not None:
                tokens, how = reply.tokens_billed, "billed"
            vectors.check(reply.vectors, len(texts), space.dimensions, gate.deployment.unit_norm)
            return reply
        except ProviderError as error:
            if how == "unconfirmed" and not error.may_cost:
                tokens, how = 0, "failed"
            raise
        finally:
            self._ledger.end(purchase, tokens, how)

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
