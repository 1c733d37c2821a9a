"""Hides how what is spent is written down: into the journal at once, from there into SQL, whatever fails in between."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from operator import add
from typing import Final, Protocol, Self

import msgspec

from app.errors import TryAgainLater
from app.ports import End, Part, Purchase
from app.storage.journal import DiskFull, Journal, JournalFull, Place, Record
from app.storage.sql.database import DatabaseDown
from app.storage.sql.entries import Line, Spared, charges, spans_of
from app.storage.sql.ledger import MOST_CALLS, Booked, SqlLedger
from app.telemetry import Telemetry

_DRAIN_S, _BEAT_S, _CLOSE_S = 0.5, 5.0, 2.0
_SWEEP_BEATS, _TRIM_BEATS = 6, 60
_FULL_S = 5.0  # then it is worth asking again for room in the journal
_LONG_MS = 2000  # others shall know of a purchase that takes longer
_MOST_SPARED, _SPARED_AT_ONCE = 100_000, 1000
_MOST_TOKENS = 2**31 - 1  # of a call; whatever a vendor claims, its price must fit into 64 bits
_END_BYTES: Final = 48  # of an end beside the purchase's id, at most


class _Begun(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=1):
    """A `Purchase`, its parts as tuples."""

    id: str
    at_ms: int
    deployment: str
    model: str
    space: str
    price: int | None
    parts: tuple[tuple[str, str, str, str, str, int, int], ...]


class _Ended(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=2):
    """How the purchase `id` ended."""

    id: str
    tokens: int
    how: End


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Begun | _Ended).decode


class Backlog:
    """What a journal tells and SQL does not know; `gone`: of a process that will not end what it began.

    Its methods block; they are called one after the other, in whatever thread.
    """

    def __init__(self, record: Record, *, gone: bool) -> None:
        self.record = record
        self.lines: list[Line] = []
        """What is to be booked now."""
        self.charges: Counter[tuple[str, int]] = Counter()
        """What those of them that ended cost, by account and day."""
        self.behind = True
        """Whether there is more to read."""
        self._gone = gone
        self._at = Place()
        self._open: dict[str, tuple[Purchase, int]] = {}  # and the segment that it was begun in
        self._told: set[str] = set()

    @property
    def empty(self) -> bool:
        """Whether all that was read is known to SQL."""
        return not (self.lines or self._open)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, now or later, before more is written."""
        return self.empty and self._at == self.record.end

    def take(self, now_ms: int) -> None:
        """Finds out what is to be booked: what was not `done`, else at most `MOST_CALLS` purchases more."""
        if self.lines:
            return
        frames, self._at = self.record.read(self._at, MOST_CALLS)
        self.behind = len(frames) == MOST_CALLS
        for segment, payload in frames:
            self._hear(segment, payload)
        if not self.behind:
            self.lines += self._unfinished(now_ms)

    def done(self) -> None:
        """The lines have been booked."""
        for line in self.lines:
            (self._told.add if line.state == "begun" else self._told.discard)(line.purchase.id)
        self.lines, self.charges = [], Counter()
        self.record.forget(before=min([self._at.segment, *(segment for _, segment in self._open.values())]))

    def _hear(self, segment: int, payload: bytes) -> None:
        try:
            told = _decode(payload)
        except msgspec.DecodeError:  # whole, so a later version's that we know nothing of
            return
        if isinstance(told, _Begun):
            parts = tuple(Part(*part) for part in told.parts)  # type: ignore[arg-type]  # a cause may be a later version's
            self._open[told.id] = (
                Purchase(told.id, told.at_ms, told.deployment, told.model, told.space, told.price, parts), segment
            )  # fmt: skip
        elif told.id in self._open:  # else its beginning was torn
            self._end(told.id, told.tokens, told.how)

    def _end(self, call: str, tokens: int, how: End) -> None:
        purchase, _ = self._open.pop(call)
        self.lines.append(Line(purchase, how, tokens, self.record.owner))
        for account, day, nano_usd in charges(purchase, tokens):
            self.charges[account, day] += nano_usd

    def _unfinished(self, now_ms: int) -> list[Line]:
        """What nobody will end, or what takes long enough that others should know of it."""
        if self._gone:
            for purchase, _ in [*self._open.values()]:
                self._end(purchase.id, sum(part.tokens for part in purchase.parts), "unconfirmed")
            return []
        return [
            Line(purchase, "begun", 0, self.record.owner)
            for purchase, _ in self._open.values()
            if purchase.at_ms < now_ms - _LONG_MS and purchase.id not in self._told
        ]


class Watcher(Protocol):
    """Who follows what is spent here, and what of it SQL knows."""

    def ended(self, account: str, day: int, nano_usd: int) -> None:
        """So much was spent here, on that day since 1970; it is in `unbooked` from now on."""

    def booked(self, account: str, span: str, nano_usd: int) -> None:
        """So much was spent in a span as far as SQL knows; what of it was ours is no longer in `unbooked`."""

    def settled(self, replica: str) -> None:
        """All that a replica which is gone ever wrote down is in SQL."""


class BookedLedger:
    """The `Ledger` over a journal and a database; an async context manager that owns its tasks.

    Nothing waits for the database: while it is away, or not `ready`, the journal grows. What was spared is no money
    and is not in the journal: a process that dies loses half a second of it.

    `keep_days`: how long rows are kept, 0 for ever. `clock` is Unix seconds.
    """

    def __init__(
        self,
        journal: Journal,
        sql: SqlLedger,
        telemetry: Telemetry,
        *,
        ready: Callable[[], bool],
        keep_days: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.sql = sql
        self.watchers: list[Watcher] = []
        self.caught_up = False
        """Whether SQL knows what processes on this machine left that were gone when this one came."""
        self.disk_full = ""
        """Why nothing can be spent before somebody makes room on the disk; "" while there is some."""
        self._looked = False
        self._journal = journal
        self._telemetry = telemetry
        self._ready = ready
        self._keep_days = keep_days
        self._clock = clock
        self._own = Backlog(journal, gone=False)
        self._inherited: list[Backlog] = []
        self._unbooked: dict[str, dict[int, int]] = {}
        self._spared: dict[tuple[int, str, str], list[int]] = {}
        self._waiting = 0
        self._takes = True
        self._closing = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        loops = (self._drain(), self._tend())
        self._running = [self._tasks.create_task(loop, name="ledger") for loop in loops]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing.set()
        await asyncio.wait(self._running[:1], timeout=_CLOSE_S)
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)
        await asyncio.to_thread(self._own.take, int(self._clock() * 1000))
        if self._own.empty:
            self._journal.remove()
        self._journal.close()

    # ── the port ────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, purchase: Purchase) -> None:
        """See `ports.Ledger`."""
        parts = tuple([msgspec.structs.astuple(part) for part in purchase.parts])
        begun = _Begun(
            purchase.id, purchase.at_ms, purchase.deployment, purchase.model, purchase.space, purchase.price, parts
        )
        try:
            self._journal.append(_encode(begun), promise_bytes=_END_BYTES + len(purchase.id))
        except JournalFull as full:
            self.disk_full = str(full) if isinstance(full, DiskFull) else ""
            self._tell(takes=False, reason=str(full))
            raise TryAgainLater(
                "What would be spent cannot be written down. Please try again later.", _FULL_S
            ) from None
        if not self._takes:
            self.disk_full = ""
            self._tell(takes=True, reason="there is room")

    def end(self, purchase: Purchase, tokens: int, how: End) -> None:
        """See `ports.Ledger`."""
        tokens = min(tokens, _MOST_TOKENS)
        ended = _Ended(purchase.id, tokens, how)
        self._journal.redeem(_encode(ended), _END_BYTES + len(purchase.id))
        self._waiting += 1
        for account, day, nano_usd in charges(purchase, tokens):
            of_account = self._unbooked.setdefault(account, {})
            of_account[day] = of_account.get(day, 0) + nano_usd
            for watcher in self.watchers:
                watcher.ended(account, day, nano_usd)

    def spared(self, tenant: str, model: str, *, hits: int, joined: int, tokens: int, nano_usd: int | None) -> None:
        """See `ports.Ledger`; of more tenants than can wait for the database it is not known whose it was."""
        sums = self._sums(int(self._clock()) // 60, tenant, model)
        sums[0] += hits
        sums[1] += joined
        sums[2] += tokens
        if nano_usd is None:
            sums[4] += tokens
        else:
            sums[3] += nano_usd

    def _sums(self, minute: int, tenant: str, model: str) -> list[int]:
        """Where the fields of a `Spared` are summed up."""
        key = (minute, tenant, model)
        sums = self._spared.get(key)
        if sums is None:
            if len(self._spared) >= _MOST_SPARED:
                key = (minute - minute % 1440, "", model)
            sums = self._spared.setdefault(key, [0] * len(Spared._fields))
        return sums

    # ── what is not in SQL yet ──────────────────────────────────────────────────────────────────────────────────────

    def unbooked(self, account: str) -> Mapping[str, int]:
        """What this process knows that `account` spent, by span in nano-USD, and SQL perhaps does not know."""
        sums: dict[str, int] = {}
        for day, nano_usd in self._unbooked.get(account, {}).items():
            for span in spans_of(day):
                sums[span] = sums.get(span, 0) + nano_usd
        return sums

    @property
    def waiting(self) -> int:
        """How many purchases ended here that SQL does not know of."""
        return self._waiting

    @property
    def journal_bytes(self) -> int:
        """What the journal takes of the disk."""
        return self._journal.size_bytes

    # ── the way into SQL ────────────────────────────────────────────────────────────────────────────────────────────

    async def _drain(self) -> None:
        """Books what there is, twice a second; a last time when it is closed."""
        last = False
        while not last:
            last = self._closing.is_set()
            self._journal.catch_up()
            if self._ready():
                await self._guarded(self._book_all)
                self.caught_up |= self._looked and not self._inherited
            with suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    await self._closing.wait()

    async def _tend(self) -> None:
        """Gives signs, and looks after those who give none any more."""
        for beat in itertools.count():
            if beat % _SWEEP_BEATS == 0:
                await self._guarded(self._inherit)
            if self._ready():
                await self._guarded(self.sql.seen)
                if beat % _SWEEP_BEATS == 0:
                    await self._guarded(self._sweep)
                if beat % _TRIM_BEATS == 0 and self._keep_days:
                    await self._guarded(partial(self.sql.trim, self._keep_days))
            await asyncio.sleep(_BEAT_S)

    async def _guarded(self, use: Callable[[], Awaitable[object]]) -> None:
        """What the database cannot do now is done the next time."""
        try:
            await use()
        except DatabaseDown:
            return
        except Exception as bug:  # supervision is for the errors that nobody thought of
            self._telemetry.loop_crashed(loop="ledger", error=bug)

    async def _book_all(self) -> None:
        if not self._own.idle:
            await self._book(self._own)
        for backlog in [*self._inherited]:
            await self._book(backlog)
            self._inherited.remove(backlog)
            await asyncio.to_thread(self._journal.disown, backlog.record)
            for watcher in self.watchers:
                watcher.settled(backlog.record.owner)
        await self._book_spared()

    async def _book(self, backlog: Backlog) -> None:
        """All that it tells; some of it at a time."""
        more = True
        while more:
            await asyncio.to_thread(backlog.take, int(self._clock() * 1000))
            if backlog.lines:
                booked = await self.sql.book(backlog.lines)
                self._note(booked, backlog)
            more = backlog.behind
            await asyncio.to_thread(backlog.done)

    def _note(self, booked: Booked, backlog: Backlog) -> None:
        if backlog is self._own:
            self._waiting -= sum(line.state != "begun" for line in backlog.lines)
            for (account, day), nano_usd in backlog.charges.items():
                of_account = self._unbooked[account]
                of_account[day] -= nano_usd
                if not of_account[day]:
                    del of_account[day]
                if not of_account:
                    del self._unbooked[account]
        else:
            unconfirmed = sum(line.state == "unconfirmed" for line in backlog.lines)
            self._telemetry.purchases_inherited(purchases=len(backlog.lines), unconfirmed=unconfirmed)
        self._tell_booked(booked)

    def _tell_booked(self, booked: Booked) -> None:
        for (tenant, model, cause), nano_usd in booked.more.items():
            self._telemetry.money_spent(tenant=tenant, model=model, cause=cause, nano_usd=nano_usd)
        for watcher in self.watchers:
            for total in booked.spent:
                watcher.booked(*total)

    async def _book_spared(self) -> None:
        more = True
        while more:
            taken = {key: self._spared.pop(key) for key in [*islice(self._spared, _SPARED_AT_ONCE)]}
            more = len(taken) == _SPARED_AT_ONCE
            try:
                if taken:
                    await self.sql.add_spared({key: Spared(*sums) for key, sums in taken.items()})
            except DatabaseDown:
                for key, amounts in taken.items():
                    sums = self._sums(*key)
                    sums[:] = map(add, sums, amounts)
                raise

    # ── upkeep ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _inherit(self) -> None:
        """Takes over the journals of processes on this machine that are gone."""
        records = await asyncio.to_thread(self._journal.inherit)
        self._inherited += [Backlog(record, gone=True) for record in records]
        self._looked = True

    async def _sweep(self) -> None:
        booked = await self.sql.sweep()
        if booked.calls:
            self._telemetry.purchases_inherited(purchases=booked.calls, unconfirmed=booked.calls)
        self._tell_booked(booked)

    def _tell(self, *, takes: bool, reason: str) -> None:
        if takes is not self._takes:
            self._takes = takes
            self._telemetry.journal_changed(takes=takes, reason=reason)
