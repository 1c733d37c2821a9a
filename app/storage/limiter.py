"""Hides how quotas are kept in one process that has them to itself."""

import asyncio
import itertools
from collections.abc import Callable, Mapping

from app.domain import Limits
from app.ports import Claim, Grant, NotYet, Stated
from app.storage.quota import S_US, Quota, pause_us


class InProcessLimiter:
    """The `Limiter` of a lone process. `clock` is the running loop's unless one is given, in seconds."""

    def __init__(self, limits: Mapping[str, Limits], *, clock: Callable[[], float] | None = None) -> None:
        self._quotas = {account: Quota(of_one) for account, of_one in limits.items()}
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._ids = itertools.count(1)

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """See `ports.Limiter`. A refused claim keeps its place for as long as it is asked again every 5 s or sooner."""
        grant_id = str(next(self._ids))
        quota = self._quotas.get(claim.account)
        if quota is None:
            return Grant(grant_id, claim.account, claim.tokens_max, max(claim.requests, claim.requests_max))
        return quota.reserve(claim, grant_id, self._now_us())

    async def settle(
        self, grant: Grant, tokens_used: int | None, *, requests_used: int = 1, stated: Stated | None = None
    ) -> None:
        """See `ports.Limiter`."""
        quota = self._quotas.get(grant.account)
        if quota is not None:
            quota.settle(grant.id, tokens_used, requests_used, self._now_us(), stated)

    def allow(self, account: str, limits: Limits | None) -> None:
        """See `ports.Limiter`."""
        known = self._quotas.pop(account, None)
        if limits is not None:
            self._quotas[account] = known.resized(limits, self._now_us()) if known is not None else Quota(limits)

    async def throttled(self, account: str, retry_after_s: float | None) -> None:
        """See `ports.Limiter`; the pause is at most 120 s, and 1 s when the provider named none."""
        quota = self._quotas.get(account)
        if quota is not None:
            quota.throttled(pause_us(retry_after_s), self._now_us())

    def _now_us(self) -> int:
        return int(self._clock() * S_US)
