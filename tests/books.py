"""Hides how a ledger is held against the bills: every call that was paid for has its line, at its price, and once."""

import asyncio
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Row, func, select

from app.storage.journal import Journal
from app.storage.ledger import BookedLedger
from app.storage.sql.database import Database
from app.storage.sql.ledger import SqlLedger
from app.storage.sql.tables import ledger, spent, usage_days, usage_hours, usage_totals
from app.storage.sql.usage import SqlUsage
from app.telemetry import Telemetry
from tests.emulators.server import Emulator

_WITHIN_S = 10.0


class Vendor(NamedTuple):
    """Whose bill comes for one deployment, and what a million tokens cost there, in decimals.

    `exact`: embedgate counts as the vendor does, so that it knows what a call costs whose answer was lost.
    """

    emulator: Emulator
    usd_per_million_tokens: str
    exact: bool = True

    def cost(self, tokens: int) -> int:
        """What a call of so many tokens costs, in nano-USD."""
        return round(tokens * Fraction(self.usd_per_million_tokens) * 1000)

    def known(self, sizes: Counter[tuple[int, int]]) -> Counter[Any]:
        """What embedgate can know of the texts and tokens of so many calls that nobody told it of."""
        return sizes if self.exact else Counter(texts for texts, _ in sizes.elements())

    @property
    def owed(self) -> int:
        """The whole bill, in nano-USD."""
        return sum(self.cost(each.tokens) for each in self.emulator.receipts if each.paid)


class Call(NamedTuple):
    """What the ledger says of one call; `parts` are its rows."""

    deployment: str
    state: str
    texts: int
    tokens: int
    nano_usd: int
    parts: Sequence[Row[Any]]


class Balance(NamedTuple):
    """Books that are right. As a string it is a line for people."""

    calls: Sequence[Call]
    owed: int
    """What is on all bills together, in nano-USD."""

    def of(self, state: str) -> list[Call]:
        """The calls that ended so."""
        return [call for call in self.calls if call.state == state]

    def nano_usd(self, state: str) -> int:
        """What those cost, as far as the ledger knows."""
        return sum(call.nano_usd for call in self.of(state))

    def __str__(self) -> str:
        parts = (f"{self.nano_usd(s)} {s} ({len(self.of(s))})" for s in ("billed", "estimated", "unconfirmed"))
        return f"{len(self.calls)} calls, {self.owed} nano-USD on the bills: {', '.join(parts)}"


async def balance(
    url: str, vendors: Mapping[str, Vendor], *, journals: Path | None = None, in_flight: int = 0
) -> Balance:  # fmt: skip
    """Reads the ledger at `url` of a service that has stopped, and asserts that it and the vendors' bills are the same.

    What it left in its folder of `journals`, since it had no time to book it, is booked first.
    A call is billed, or `estimated` if its vendor names no tokens, unless its answer was lost; those are unconfirmed,
    and so may be calls that got no answer, and `in_flight` others of each vendor that were cut by nobody's fault.
    """
    async with asyncio.timeout(_WITHIN_S):
        while any(vendor.emulator.busy for vendor in vendors.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    if journals is not None and await asyncio.to_thread(_holds_any, journals):
        await _catch_up(url, journals)
    calls = await calls_in(url)
    assert {call.deployment for call in calls} <= vendors.keys()
    for name, vendor in vendors.items():
        _check(vendor, [call for call in calls if call.deployment == name], in_flight)
    return Balance(calls, sum(vendor.owed for vendor in vendors.values()))


async def _catch_up(url: str, journals: Path) -> None:
    """What the next process would do first."""
    async with asyncio.timeout(_WITHIN_S), Database(url) as database:
        journal, sql = Journal(journals, "auditor", max_bytes=2**30), SqlLedger(database, "auditor")
        telemetry = Telemetry(stream=io.BytesIO())
        async with BookedLedger(journal, sql, telemetry, ready=lambda: True):
            while await asyncio.to_thread(_holds_any, journals):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        telemetry.close()


def _holds_any(journals: Path) -> bool:
    return any(journals.iterdir())


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────


async def calls_in(url: str) -> list[Call]:
    """The whole ledger at `url`, which is one with its sums and with what it lists as uncertain."""
    asked = select(ledger).order_by(ledger.c.call, ledger.c.part)
    async with Database(url) as database:
        rows = await database.read(lambda connection: connection.execute(asked), within_s=_WITHIN_S)
        calls = [_call([*parts]) for _, parts in groupby(rows, lambda row: row.call)]
        await _check_sums(database, calls)
        await _check_listed(database, calls)
    return calls


def _call(parts: Sequence[Row[Any]]) -> Call:
    (state,), (deployment,) = {part.state for part in parts}, {part.deployment for part in parts}
    assert [part.part for part in parts] == [*range(len(parts))]
    texts, tokens, nano_usd = (sum(part._mapping[name] for part in parts) for name in ("texts", "tokens", "nano_usd"))
    return Call(deployment, state, texts, tokens, nano_usd, parts)


async def _check_listed(database: Database, calls: Iterable[Call]) -> None:
    """What no vendor stated is what an operator is told to look up."""
    uncertain = [part for call in calls if call.state in {"estimated", "unconfirmed"} for part in call.parts]
    told = await SqlUsage(database).uncertain(0, 2**62, within=None, most=len(uncertain) + 1)
    assert {(each.call, each.part) for each in told} == {(each.call, each.part) for each in uncertain}


async def _check_sums(database: Database, calls: Iterable[Call]) -> None:
    """Whoever asks for sums hears the same as whoever adds up the rows."""
    nano_usd = sum(call.nano_usd for call in calls)
    of_tenants = sum(part.nano_usd for call in calls for part in call.parts if part.tenant)
    in_months = spent.c.account.startswith("tenant ") & (func.length(spent.c.span) == len("2026-11"))
    asked = [select(func.sum(table.c.nano_usd)) for table in (usage_hours, usage_days, usage_totals)]
    asked.append(select(func.sum(spent.c.nano_usd)).where(in_months))
    found = [
        await database.read(lambda connection, each=each: connection.scalar(each), within_s=_WITHIN_S)  # type: ignore[misc]
        for each in asked
    ]
    assert [each or 0 for each in found] == [nano_usd, nano_usd, nano_usd, of_tenants]


# ── against the bill ────────────────────────────────────────────────────────────────────────────────────────────────


def _check(vendor: Vendor, calls: Sequence[Call], in_flight: int) -> None:
    emulator, receipts = vendor.emulator, vendor.emulator.receipts
    billed, estimated, unconfirmed, failed = (
        Counter((call.texts, call.tokens) for call in calls if call.state == state)
        for state in ("billed", "estimated", "unconfirmed", "failed")
    )
    ended = sum(map(Counter.total, (billed, estimated, unconfirmed, failed)))
    assert ended == len(calls) >= len(emulator.arrivals), (ended, len(calls), len(emulator.arrivals))
    assert all(call.nano_usd == vendor.cost(call.tokens) for call in calls)
    assert not any(tokens for _, tokens in failed)
    paid = Counter((each.items, each.tokens) for each in receipts if each.paid)
    assert paid.total() == emulator.bill.requests
    assert billed <= paid, f"booked but not on the bill: {billed - paid}"
    lost, guessed, maybe = map(vendor.known, (paid - billed, estimated, unconfirmed))
    assert guessed <= lost, f"estimated but not on the bill: {guessed - lost}"
    assert lost - guessed <= maybe, f"on the bill but not booked: {lost - guessed - maybe}"
    unheard = sum(not each.heard for each in receipts)
    assert maybe.total() <= unheard + in_flight, f"{maybe.total()} unconfirmed, of {unheard} unheard"
