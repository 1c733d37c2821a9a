"""Hides how what replicas spend together is kept within allowances: set aside before a call, in the books after it."""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final, Self

from app.errors import BudgetExhausted, InternalError, TryAgainLater
from app.ports import Bounds
from app.storage.purses import Account, Claim, Purse, Span, refuse, span_of, spans_of_claims
from app.storage.redis_budget import Answer, decide, remembered_us
from app.storage.redis_server import RedisServer, StoreDown
from app.storage.sql.database import DatabaseDown
from app.storage.sql.entries import spans_of
from app.storage.sql.ledger import SqlLedger
from app.telemetry import Telemetry

TICK_S: Final = 1.0
"""How often what others can use is given back, and what they should know is told."""

_DAY_S = 86_400
_IDLE_S = 60.0  # after so long without a request a tenant's figures are forgotten here
_PATIENCE_S = 4.0  # the longest that a request waits for what others hold, or for what a server forgot
_AGAIN_S = 0.25
_RETURN_S = 1.5  # how long every replica goes on alone when the server is back, and tells it what it knows
_AT_ONCE, _TELL_S, _CLOSE_S = 32, 0.1, 1.0  # tenants told of at one moment, and for how long that is waited for
_MOST_SETTLED, _UNKNOWN = 64, -1
_NOBODY_KNOWS = "What is left of your budget is not known. Please try again later."


class SharedBudgets:
    """The `Budgets` over `books`, shared through `server`; without one this process has them to itself.

    An async context manager that owns its tasks; to be entered before the ledger, so that it is closed after it.

    A replica asks for what a request may cost, and under load for what the next second may, so that most requests ask
    nobody; what it did not need it gives back every second. While the server cannot be asked each replica may spend
    what was left when it last heard, divided by `max_replicas`. A server that lost its memory is told by every replica
    what it holds, and by SQL what was spent, before it grants anything.

    `unbooked` says what of an account ended here and is perhaps not in SQL; `on_exhausted` hears of accounts and spans
    that refused. `ready`: whether `books` know by now what was spent before this process came; so long, those wait who
    ask. `clock` is Unix seconds.
    """

    def __init__(
        self, books: SqlLedger, telemetry: Telemetry, *, server: RedisServer | None = None, replica: str = "",
        max_replicas: int = 1, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.unbooked: Callable[[str], Mapping[str, int]] = lambda _: {}
        self.ready: Callable[[], bool] = lambda: True
        self.on_exhausted: Callable[[str, str], None] | None = None
        self._books = books
        self._telemetry = telemetry
        self._server = server
        self._replica = replica
        self._parts = max_replicas if server is not None else 1
        self._clock = clock
        self._serials = itertools.count(1)
        self._settled: deque[str] = deque(maxlen=_MOST_SETTLED)
        self._purses: dict[str, Purse] = {}
        self._accounts: dict[str, Account] = {}
        self._tasks = asyncio.TaskGroup()
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._ticking = self._tasks.create_task(self._tick(), name="budgets")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        for account in self._accounts.values():
            account.pace = account.lately = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._tell()
        await self._tasks.__aexit__(None, None, None)

    # ── the port ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def reserve(self, bounds: Bounds, nano_usd: int, *, within_s: float) -> None:
        """See `ports.Budgets`."""
        purse = self._purse(bounds.tenant)
        spans = self._spans(purse, bounds, within_s)
        if purse.asking is None and all(self._covers(span, nano_usd) for span in spans):
            self._set_aside(bounds, nano_usd)
            return
        now = self._now()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        claim = Claim(bounds, spans, nano_usd, now + min(within_s, _PATIENCE_S), answer)
        purse.waiting.append(claim)
        if purse.asking is None:
            purse.asking = self._tasks.create_task(self._serve(purse, tells=False))
        try:
            await asyncio.shield(claim.answer)
        except asyncio.CancelledError:
            claim.left = True
            if claim.answer.done() and claim.answer.exception() is None:
                self.release(bounds, nano_usd)
            raise

    def release(self, bounds: Bounds, nano_usd: int) -> None:
        """See `ports.Budgets`."""
        for name, _ in bounds.allowances:
            self._accounts[name].aside -= nano_usd

    def _set_aside(self, bounds: Bounds, nano_usd: int) -> None:
        for name, _ in bounds.allowances:
            account = self._accounts[name]
            account.aside += nano_usd
            account.lately += nano_usd

    # ── what the ledger tells ───────────────────────────────────────────────────────────────────────────────────────

    def ended(self, account: str, day: int, nano_usd: int) -> None:
        """See `ledger.Watcher`."""
        known = self._accounts.get(account)
        for name in spans_of(day) if known is not None else ():
            if known is not None and (span := known.spans.get(name)) is not None:
                span.ended += nano_usd

    def booked(self, account: str, span: str, nano_usd: int) -> None:
        """See `ledger.Watcher`."""
        known = self._accounts.get(account)
        found = known.spans.get(span) if known is not None else None
        if found is not None:
            found.booked = max(found.booked or 0, nano_usd)
            if self._server is None and found.most is not None:
                self._have(found)

    def settled(self, replica: str) -> None:
        """See `ledger.Watcher`."""
        self._settled.append(replica)

    # ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _purse(self, tenant: str) -> Purse:
        purse = self._purses.get(tenant)
        if purse is None:
            purse = self._purses[tenant] = Purse(tenant)
        purse.used_at = self._now()
        return purse

    def _spans(self, purse: Purse, bounds: Bounds, within_s: float) -> list[Span]:
        """The days and months that a call may fall into which leaves within `within_s`."""
        now_s = self._clock()
        first, last = int(now_s // _DAY_S), int((now_s + within_s) // _DAY_S)
        found = []
        for name, allowance in bounds.allowances:
            account = self._accounts.get(name)
            if account is None:
                account = self._accounts[name] = purse.accounts[name] = Account(name)
            for day in (first,) if first == last else (first, last):
                for span_name, most in zip(spans_of(day), (allowance.per_day, allowance.per_month), strict=True):
                    if most is not None:
                        found.append(span_of(account, span_name, most))
        return found if first == last else list(dict.fromkeys(found))

    def _unbooked(self, span: Span) -> int:
        return self.unbooked(span.account.name).get(span.name, 0)

    def _covers(self, span: Span, nano_usd: int) -> bool:
        """What was had while alone is nobody's own any more when all share again."""
        return nano_usd <= span.room and not (span.alone and self._is_shared)

    def _own(self, span: Span) -> int:
        """What the others have to leave to this process: while it goes on alone all that it may then spend."""
        alone = span.room if span.alone and not self._is_shared else 0
        return self._unbooked(span) + span.account.aside + alone

    def _have(self, span: Span) -> None:
        """All that is left of the span is this process' own: who has nobody to share with."""
        span.most = span.ended + span.allowance - (span.booked or 0) - self._unbooked(span)

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _serve(self, purse: Purse, *, tells: bool) -> None:
        """Answers all who wait, those who come meanwhile too; before that it `tells` what this replica holds."""
        try:
            if tells:
                with suppress(StoreDown):
                    await self._tell_of(purse)
            while purse.waiting:
                if wait_s := await self._decide(purse):
                    await asyncio.sleep(wait_s)
        except Exception as bug:  # supervision is for the errors that nobody thought of
            self._telemetry.loop_crashed(loop="budgets", error=bug)
            for claim in purse.waiting:
                refuse(claim, InternalError())
            purse.waiting.clear()
        finally:
            purse.asking = None

    async def _decide(self, purse: Purse) -> float:
        """One answer to those who wait now; for how long the rest must."""
        claims = [claim for claim in purse.waiting if not claim.left]
        wait_s = 0.0
        if claims:
            began = time.monotonic()
            await self._read([span for claim in claims for span in claim.spans], self._since)
            answer = await self._shared(purse, claims, began) if self._is_shared else None
            wait_s = self._decide_alone(claims) if answer is None else self._follow(purse, claims, answer)
        purse.waiting = [claim for claim in purse.waiting if not (claim.left or claim.answer.done())]
        return wait_s

    def _grant(self, claim: Claim) -> None:
        if not claim.left:
            self._set_aside(claim.bounds, claim.nano_usd)
            claim.answer.set_result(None)

    def _exhausted(self, claim: Claim, span: Span) -> None:
        self._telemetry.budget_refused(tenant=claim.bounds.tenant)
        if self.on_exhausted is not None:
            self.on_exhausted(span.account.name, span.name)
        refuse(claim, BudgetExhausted(span.account.name, span.name))

    @property
    def _since(self) -> float:
        """What SQL said before then may be less than others booked while they told nobody."""
        return self._server.up_since if self._server is not None else -math.inf

    async def _read(self, spans: Sequence[Span], since: float) -> bool:
        """Asks SQL for what it has of the spans about which it was not asked since; whether all is known now."""
        unread = [span for span in spans if span.read_at is None or span.read_at < since]
        if not unread:
            return True
        if not self.ready():
            return False
        accounts, names = {span.account.name for span in unread}, {span.name for span in unread}
        read_at = time.monotonic()
        try:
            found = await self._books.spent(sorted(accounts), sorted(names))
        except DatabaseDown:
            return False
        for span in unread:
            span.booked = max(span.booked or 0, found.get((span.account.name, span.name), 0))
            span.read_at = read_at
        return True

    # ── together ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _is_shared(self) -> bool:
        server = self._server
        return server is not None and server.up and time.monotonic() - server.up_since >= _RETURN_S

    async def _shared(self, purse: Purse, claims: Sequence[Claim], began: float) -> Answer | None:
        """What the server says; None when it cannot be asked, or says nothing since nobody knows what was spent."""
        with suppress(StoreDown):
            return await self._ask(purse, spans_of_claims(claims), claims, began)
        return None

    async def _ask(
        self, purse: Purse, spans: Sequence[Span], claims: Sequence[Claim], began: float
    ) -> Answer:  # fmt: skip
        """One step of `budget.lua`, after which `most` of these spans is as the server has it. Raises StoreDown.

        A server that knows nothing is told what SQL says now: later than `began`.
        """
        server = self._server
        assert server is not None  # noqa: S101 — who asks has looked
        places = {span: number for number, span in enumerate(spans, 1)}
        taken = [span.taken for span in spans]
        own = [self._own(span) for span in spans]

        def wishes() -> list[tuple[int, int, int, int]]:
            booked = (_UNKNOWN if span.booked is None else span.booked for span in spans)
            told = zip(spans, booked, own, strict=True)
            return [(span.allowance, in_sql, mine, span.account.wish) for span, in_sql, mine in told]

        ask = {
            "replica": self._replica,
            "serial": next(self._serials),
            "parts": self._parts,
            "settled": [*self._settled],
            "age_us": _UNKNOWN,
            "spans": wishes(),
            "claims": [(claim.nano_usd, [places[span] for span in claim.spans]) for claim in claims],
        }  # fmt: skip
        keys = [purse.key(span) for span in spans]
        answer = await decide(server, keys, ask)
        if answer.absent and await self._read(spans, began):
            ask["age_us"] = await remembered_us(server)
            ask["spans"] = wishes()
            answer = await decide(server, keys, ask)
        if answer.absent or answer.late:
            raise StoreDown("it does not know what was spent")
        for span, before, mine, (held, left, booked) in zip(spans, taken, own, answer.spans, strict=True):
            span.left, span.booked, span.held = left, max(span.booked or 0, booked), held
            if self._is_shared or not span.alone:  # else the others go on alone, too
                span.most, span.alone = before + held - mine, False
        return answer

    def _follow(self, purse: Purse, claims: Sequence[Claim], answer: Answer) -> float:
        """Tells those who wait what the server said; for how long the others should wait."""
        now, wait_s = self._now(), answer.wait_us / 1e6
        again_s = 0.0
        spans = spans_of_claims(claims)
        for claim, granted, short, soon in zip(claims, answer.granted, answer.short, answer.soon, strict=True):
            if granted:
                self._grant(claim)
            elif wait_s:
                again_s = wait_s
                if now + wait_s > claim.until:
                    refuse(claim, TryAgainLater(_NOBODY_KNOWS, wait_s))
            elif soon and now + _AGAIN_S <= claim.until:
                again_s = max(again_s, _AGAIN_S)
            else:
                self._exhausted(claim, spans[short - 1])
        return min(again_s, TICK_S)

    # ── alone ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decide_alone(self, claims: Sequence[Claim]) -> float:
        """Within this replica's part of what was left when that was last known; for how long the rest should wait."""
        wait_s = 0.0
        for claim in claims:
            for span in claim.spans:
                self._go_alone(span)
            unknown = any(span.most is None for span in claim.spans)
            if unknown and not self.ready() and self._now() + _AGAIN_S <= claim.until:
                wait_s = _AGAIN_S
            elif unknown:
                refuse(claim, TryAgainLater(_NOBODY_KNOWS, 1.0))
            elif short := [span for span in claim.spans if claim.nano_usd > span.room]:
                self._exhausted(claim, short[0])
            else:
                self._grant(claim)
        return wait_s

    def _go_alone(self, span: Span) -> None:
        if self._server is None:
            if span.most is None and span.booked is not None:
                self._have(span)
        elif span.most is not None and span.left is not None and not span.alone:
            span.most += max(0, span.left) // self._parts
            span.alone = True
        elif span.most is None and span.booked is not None:
            left = span.allowance - span.booked - self._unbooked(span) - span.account.aside
            span.most, span.alone = span.taken + max(0, left) // self._parts, True

    # ── every second ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                for account in self._accounts.values():
                    account.pace, account.lately = max(account.lately, account.pace // 2), 0
                self._forget()
                await self._tell()
            except Exception as bug:
                self._telemetry.loop_crashed(loop="budgets", error=bug)

    async def _tell(self) -> None:
        """Tells of every tenant what this replica holds, and gives back what it does not need; of a few at once."""
        server = self._server
        told = [purse for purse in self._purses.values() if self._holds(purse)]
        for at in range(0, len(told), _AT_ONCE):
            idle = [purse for purse in told[at : at + _AT_ONCE] if purse.asking is None]
            if server is None or not server.up or not idle:
                continue
            for purse in idle:
                purse.asking = self._tasks.create_task(self._serve(purse, tells=True))
            await asyncio.wait([purse.asking for purse in idle if purse.asking is not None], timeout=_TELL_S)

    async def _tell_of(self, purse: Purse) -> None:
        spans = [span for span in purse.spans() if span.most is not None]
        began = time.monotonic()
        await self._read(spans, self._since)
        await self._ask(purse, spans, (), began)

    def _forget(self) -> None:
        """Days that are over, and tenants who ask for nothing any more."""
        today = int(self._clock() // _DAY_S)
        current = {*spans_of(today), *spans_of(today + 1)}
        for name, purse in [*self._purses.items()]:
            for account in purse.accounts.values():
                for over in account.spans.keys() - current:
                    del account.spans[over]
            idle = purse.asking is None and self._now() - purse.used_at >= _IDLE_S
            if idle and not self._holds(purse):
                del self._purses[name]
                for account_name in purse.accounts:
                    del self._accounts[account_name]

    def _holds(self, purse: Purse) -> bool:
        """Whether the others have to leave something to this process, or think so."""
        busy = any(account.aside or self.unbooked(account.name) for account in purse.accounts.values())
        return busy or any(span.held or span.alone for span in purse.spans())
