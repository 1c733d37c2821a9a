"""Hides how replicas share quotas through Redis, and how each goes on alone, within its part, when that is gone."""

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import msgspec

from app.domain import Limits
from app.ports import Claim, Grant, NotYet, Stated
from app.storage.quota import S_US, Quota, pause_us
from app.storage.redis_server import RedisServer, Script, StoreDown

TICK_S: Final = 1.0
"""How often leases are renewed and books compared."""

_LEASE_US = 5 * S_US  # a replica that is gone holds its slots for so long
_KEPT_UP_S = 60.0  # how long the books of an account are kept up after it was asked for
_REFRESHED = 100  # accounts without calls whose books are kept up at a tick, those that waited longest first
_FRESH_S = 5.0  # books that were not kept up for longer say nothing about the present
_RETURN_S = 1.5  # how long all replicas book what they grant by themselves, before they share again
_QUICK_S = 0.03  # what failed sooner was not a server too slow, so asking again is worth it
_QUOTA = Script("quota")
_MEMORY_AGE, _SINCE = Script("memory_age"), "eg:{memory}:since"


class _Answer(msgspec.Struct):
    """What `quota.lua` returns."""

    lost: bool = False
    born: int = 0
    before: int = 0
    serial: int = 0
    tokens: int = 0
    requests: int = 0
    granted: tuple[int, int] | None = None
    wait_us: float = 0
    scarce: Any = "tokens"


@dataclass(slots=True)
class _Account:
    """One account as this replica sees it.

    `books` follow what all replicas were granted; `alone` is what is granted from them while nobody can be asked, as if
    every replica did the same as this one; `unreported` is what the others do not know yet: when, tokens, requests.
    """

    name: str
    limits: Limits
    books: Quota
    seen: tuple[int, int, int, int] = (0, 0, 0, 0)
    alone: Quota | None = None
    alone_at: float = -math.inf
    unreported: list[tuple[int, int, int]] = field(default_factory=list)
    asked_at: float = -math.inf
    heard_at: float = -math.inf
    open: set[str] = field(default_factory=set)
    open_alone: set[str] = field(default_factory=set)
    settling: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def keys(self) -> list[str]:
        """All in one slot of a cluster."""
        tag = self.name.encode().hex()
        return [f"eg:{{{tag}}}:{part}" for part in ("state", "open", "held", "stale")]


class RedisLimiter:
    """The `Limiter` of many replicas; an async context manager that owns its tasks.

    While Redis cannot be asked every replica grants what is left of its part, limit / `max_replicas`, of what it knows
    that all were granted, and reports it later. A Redis that lost its memory is told what is known here; where nothing
    is known the quota counts as used up and comes back as it is earned.
    """

    def __init__(
        self,
        server: RedisServer,
        limits: Mapping[str, Limits],
        *,
        replica: str,
        max_replicas: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._replica = replica
        self._max_replicas = max_replicas
        self._clock = clock
        self._accounts = {name: self._account(name, of_one) for name, of_one in limits.items()}
        self._ids = itertools.count(1)
        self._tasks = asyncio.TaskGroup()
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._ticking = self._tasks.create_task(self._tick(), name="limiter")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        await self._tasks.__aexit__(None, None, None)

    @property
    def shared(self) -> bool:
        """Whether quotas are shared now."""
        return self._server.up and time.monotonic() - self._server.up_since >= _RETURN_S

    # ── the port ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """See `ports.Limiter`. A refused claim keeps its place for as long as it is asked again every 5 s or sooner."""
        grant_id = f"{self._replica}-{next(self._ids)}"
        account = self._accounts.get(claim.account)
        if account is None:
            return Grant(grant_id, claim.account, claim.tokens_max, max(claim.requests, claim.requests_max))
        account.asked_at = self._clock()
        task = self._tasks.create_task(self._reserve(account, claim, grant_id))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._tasks.create_task(self._give_back(task))
            raise

    async def _reserve(self, account: _Account, claim: Claim, grant_id: str) -> Grant | NotYet:
        """Goes on when its caller is gone, else nobody would know of the grant."""
        if account.settling:
            await asyncio.wait(account.settling)
        if self.shared and not self._server.doubted:
            started = time.monotonic()
            for _ in range(2):  # the id makes it the same wish
                with suppress(StoreDown):
                    return await self._reserve_shared(account, claim, grant_id)
                if time.monotonic() - started > _QUICK_S:
                    break
        answer = self._reserve_alone(account, claim, grant_id)
        if account.unreported and self._server.up and not self._server.doubted:
            with suppress(StoreDown):
                await self._run(account, "charge", {})
        return answer

    async def _give_back(self, reserving: asyncio.Task[Grant | NotYet]) -> None:
        """Nobody waits for this grant any more."""
        if isinstance(grant := await reserving, Grant):
            self._settle(grant, 0, 0, None)

    async def settle(
        self, grant: Grant, tokens_used: int | None, *, requests_used: int = 1, stated: Stated | None = None
    ) -> None:
        """See `ports.Limiter`. Returns at once: whoever asks next for the same account waits until it is settled."""
        self._settle(grant, tokens_used, requests_used, stated)

    def _settle(self, grant: Grant, tokens_used: int | None, requests_used: int, stated: Stated | None) -> None:
        account = self._accounts.get(grant.account)
        if account is None:
            return
        if grant.id in account.open_alone:
            self._settle_alone(account, grant, tokens_used, requests_used)
        if grant.id not in account.open:
            return
        account.open.discard(grant.id)
        task = self._tasks.create_task(self._settle_shared(account, grant, tokens_used, requests_used, stated))
        account.settling.add(task)
        task.add_done_callback(account.settling.discard)

    def allow(self, account: str, limits: Limits | None) -> None:
        """See `ports.Limiter`."""
        known = self._accounts.get(account)
        if limits is None:
            self._accounts.pop(account, None)
        elif known is None:
            self._accounts[account] = self._account(account, limits)
        else:
            known.limits, known.alone = limits, None
            known.books = known.books.resized(replace(limits, max_in_flight=0), self._now_us())

    async def throttled(self, account: str, retry_after_s: float | None) -> None:
        """See `ports.Limiter`; the pause is at most 120 s, and 1 s when the provider named none."""
        known = self._accounts.get(account)
        if known is None:
            return
        rest_us = pause_us(retry_after_s)
        for quota in (known.books, known.alone):
            if quota is not None:
                quota.throttled(rest_us, self._now_us())
        with suppress(StoreDown):
            await self._run(known, "throttled", {"rest_us": rest_us})

    # ── together ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _reserve_shared(self, account: _Account, claim: Claim, grant_id: str) -> Grant | NotYet:
        wish = {
            "id": grant_id, "asker": self._replica, "class": 2 * claim.priority + claim.paced, "rank": claim.rank,
            "waits": claim.waits, "tokens_min": claim.tokens_min, "tokens_max": claim.tokens_max,
            "requests": claim.requests, "requests_max": claim.requests_max, "lease_us": _LEASE_US,
        }  # fmt: skip
        answer = await self._run(account, "reserve", {"claim": wish})
        account.alone = None
        if answer.granted is None:
            return NotYet(answer.wait_us / S_US, answer.scarce)
        account.open.add(grant_id)
        return Grant(grant_id, account.name, *answer.granted, answer.wait_us / S_US)

    async def _settle_shared(
        self, account: _Account, grant: Grant, tokens_used: int | None, requests_used: int, stated: Stated | None
    ) -> None:
        said = stated or Stated()
        limits = (said.requests_per_minute, said.tokens_per_minute, said.requests_left, said.tokens_left)
        fields = {
            "id": grant.id,
            "tokens_used": -1 if tokens_used is None else tokens_used,
            "requests_used": requests_used,
            "stated": [-1 if value is None else value for value in limits],
        }
        try:
            await self._run(account, "settle", fields)
        except StoreDown:
            more = max(0, (tokens_used or 0) - grant.tokens), max(0, requests_used - grant.requests)
            if any(more):
                account.unreported.append((self._now_us(), *more))

    async def _run(self, account: _Account, operation: str, fields: Mapping[str, Any]) -> _Answer:
        """One atomic step of `quota.lua`, which also learns what was not reported yet. Raises StoreDown."""
        limits, now_us = account.limits, self._now_us()
        reported, account.unreported = account.unreported, []
        ask = {
            "limits": [limits.requests_per_minute, limits.tokens_per_minute, limits.max_in_flight],
            "spans": [round(span_s * S_US) for span_s in limits.judged_spans_s],
            "seen": account.seen,
            "charges": [(now_us - at_us, tokens, requests) for at_us, tokens, requests in reported],
            **fields,
        }
        try:
            answer = await self._ask(account, operation, ask)
            if answer.lost:
                tokens, requests = (await self._known(account)).history(self._now_us())
                seed = {"tokens": tokens, "requests": requests}
                answer = await self._ask(account, operation, ask | {"seed": seed})
        except BaseException:
            account.unreported += reported
            raise
        self._hear(account, answer)
        return answer

    async def _ask(self, account: _Account, operation: str, ask: Mapping[str, Any]) -> _Answer:
        try:
            packed = await self._server.run(_QUOTA, account.keys, [operation, msgspec.msgpack.encode(ask)])
            return msgspec.msgpack.decode(packed, type=_Answer)
        except StoreDown:
            raise
        except Exception as bug:  # going on alone is better than ending every task beside this one
            raise StoreDown(type(bug).__name__) from bug

    def _hear(self, account: _Account, answer: _Answer) -> None:
        """Books what the others were granted since; answers may arrive out of order."""
        born, serial, tokens, requests = account.seen
        if (answer.born, answer.serial) <= (born, serial):
            return
        if answer.serial == 1 or (born and born in (answer.born, answer.before)):
            account.books.charge(answer.tokens - tokens, answer.requests - requests, self._now_us())
        elif not born:
            account.books.fill(self._now_us())
        account.heard_at = self._clock()
        account.seen = (answer.born, answer.serial, answer.tokens, answer.requests)

    async def _known(self, account: _Account) -> Quota:
        """What is known of an account that the server does not know, be it new or forgotten. Raises StoreDown."""
        if self._fresh(account):
            return account.books
        age_us = int(await self._server.run(_MEMORY_AGE, [_SINCE], []))
        known = account.books if account.seen[0] else Quota(account.limits)
        return known.stand_in(0, unknown_until_us=self._now_us() - age_us)

    def _fresh(self, account: _Account) -> bool:
        """Whether the books told what all had been granted while there was somebody to ask."""
        alone = account.alone is not None and account.alone_at > account.heard_at
        return (account.alone_at if alone else self._clock()) - account.heard_at <= _FRESH_S

    # ── alone ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reserve_alone(self, account: _Account, claim: Claim, grant_id: str) -> Grant | NotYet:
        """Decides as if every replica asked for the same at this moment."""
        scale = self._max_replicas
        if account.alone is None:
            slots = account.limits.max_in_flight
            unknown_until_us = None if self._fresh(account) else self._now_us()
            account.alone = account.books.stand_in(
                max(1, slots // scale) if slots else 0, unknown_until_us=unknown_until_us
            )
            account.alone_at = self._clock()
        wish = replace(
            claim,
            tokens_min=claim.tokens_min * scale,
            tokens_max=claim.tokens_max * scale,
            requests=claim.requests * scale,
            requests_max=max(claim.requests, claim.requests_max) * scale,
        )
        if _never_fits(wish, account.limits):
            return NotYet(TICK_S)
        answer = account.alone.reserve(wish, grant_id, self._now_us())
        if isinstance(answer, NotYet):
            return answer
        mine = replace(answer, tokens=answer.tokens // scale, requests=answer.requests // scale)
        account.unreported.append((self._now_us(), mine.tokens, mine.requests))
        account.open_alone.add(grant_id)
        return mine

    def _settle_alone(self, account: _Account, grant: Grant, tokens_used: int | None, requests_used: int) -> None:
        account.open_alone.discard(grant.id)
        scale, now_us = self._max_replicas, self._now_us()
        if account.alone is not None:
            used = None if tokens_used is None else tokens_used * scale
            account.alone.settle(grant.id, used, requests_used * scale, now_us)
        if tokens_used is not None and (tokens_used, requests_used) != (grant.tokens, grant.requests):
            account.unreported.append((now_us, tokens_used - grant.tokens, requests_used - grant.requests))

    # ── every second ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _tick(self) -> None:
        """Renews the leases of what is under way, reports what is not known, and reads what the others were granted.

        A server that was emptied begins to count from then how long it remembers.
        """
        while True:
            if self._server.up:
                with suppress(StoreDown):
                    await self._server.run(_MEMORY_AGE, [_SINCE], [])
            await asyncio.sleep(TICK_S)
            used_since = self._clock() - _KEPT_UP_S
            due = [each for each in self._accounts.values() if each.open or each.unreported]
            used = (each for each in self._accounts.values() if each.asked_at > used_since)
            idle = (each for each in used if not each.open and not each.unreported)
            due += heapq.nsmallest(_REFRESHED, idle, key=lambda each: each.heard_at)
            for account in due:
                if self._server.up:
                    with suppress(StoreDown):
                        await self._run(account, "renew", {"ids": [*account.open], "lease_us": _LEASE_US})

    def _account(self, name: str, limits: Limits) -> _Account:
        return _Account(name, limits, Quota(replace(limits, max_in_flight=0), unknown_until_us=self._now_us()))

    def _now_us(self) -> int:
        return int(self._clock() * S_US)


def _never_fits(wish: Claim, limits: Limits) -> bool:
    """Whether it is more than a whole limit. Alone that waits for the others: each would grant one such."""
    too_large = 0 < limits.tokens_per_minute < wish.tokens_min
    return too_large or 0 < limits.requests_per_minute < wish.requests
