"""Hides what a tenant's limits let in: taken for all that a request may buy, settled with what it did."""

from collections.abc import Collection

from app.domain import Limits, Priority, Tenant
from app.engine.workitem import WorkItem
from app.errors import RateLimited
from app.ports import Claim, Grant, Limiter, NotYet


class Door:
    """Where requests that have to buy something pass; what comes from the cache does not come by."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    async def enter(self, tenant: Tenant, tokens: int) -> Grant | None:
        """Leave for a request that may buy so many tokens; None where there are no limits. Raises RateLimited."""
        limits = tenant.limits
        if limits is None:
            return None
        if 0 < limits.tokens_per_minute < tokens:
            text = f"Request too large. Limit {limits.tokens_per_minute} tokens/min, requested {tokens}."
            raise RateLimited(text, kind="tokens", retry_after_s=None)
        # Whoever is let in is let in at once, so nobody waits at the door and there are no priorities.
        claim = Claim(tenant.account, tokens, tokens, Priority.INTERACTIVE, waits=False)
        answer = await self._limiter.reserve(claim)
        if isinstance(answer, NotYet):
            raise _limited(limits, tokens, answer)
        return answer

    async def leave(self, grant: Grant | None, bought: Collection[WorkItem] | None) -> None:
        """Ends a request's stay: counted is what was sent for it, nothing where it was not even queued (None)."""
        if grant is None:
            return
        if bought is None:
            await self._limiter.settle(grant, 0, requests_used=0)
            return
        sent = sum(item.tokens for item in bought if item.flying or item.left_at)
        await self._limiter.settle(grant, sent)


def _limited(limits: Limits, tokens: int, answer: NotYet) -> RateLimited:
    if answer.scarce == "slots":
        text = f"Too many concurrent requests. Limit {limits.max_in_flight}."
        return RateLimited(
            text, kind="requests", retry_after_s=max(1.0, answer.wait_s), code="concurrency_limit_exceeded"
        )
    scarce, limit, wanted = "tokens", limits.tokens_per_minute, tokens
    if answer.scarce == "requests":
        scarce, limit, wanted = "requests", limits.requests_per_minute, 1
    text = f"Rate limit reached for {scarce}. Limit {limit}/min, requested {wanted}. "
    text += f"Please try again in {answer.wait_s:.1f}s."
    return RateLimited(text, kind=scarce, retry_after_s=answer.wait_s)
