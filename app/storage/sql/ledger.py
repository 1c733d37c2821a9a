"""Hides how purchases become rows and sums: in one transaction, each of them once, whoever tells of it how often."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from sqlalchemy import Executable, Select, Table, Text, any_, bindparam, cast, column, func, select, true, tuple_
from sqlalchemy.dialects.postgresql import ARRAY, JSON
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.sql import leases
from app.storage.sql.database import Database
from app.storage.sql.entries import Calls, Entry, Line, SparedBy, entries_of, planned, spared_rows, unconfirmed
from app.storage.sql.tables import (
    insert,
    ledger,
    left_open,
    now_ms,
    replicas,
    spared,
    spent,
    usage_days,
    usage_hours,
    usage_totals,
)

MOST_CALLS: Final = 1000
"""In one transaction."""

_DAY_MS = 86_400_000
_WITHIN_S = 10.0
_GONE_MS = 60_000  # after so long without a sign of it a replica will not end what it began
_FORGOTTEN_MS = 7 * _DAY_MS
_SWEEP_S, _TRIM_S = 30.0, 60.0
_TRIMMED_ROWS = 1000  # deleted in one transaction
_ASKED = {
    "postgresql": ledger.c.call == any_(bindparam("calls", type_=ARRAY(Text))),
    "sqlite": ledger.c.call.in_(bindparam("calls", expanding=True)),
}


class Booked(NamedTuple):
    """How much the accounts that were told of spent now in all, and what a transaction made known to be spent.

    The latter by tenant, model and cause; what was known to be spent before and turned out not to be is below 0.
    `calls` are those of which it learnt something.
    """

    spent: Sequence[tuple[str, str, int]] = ()
    more: Mapping[tuple[str, str, str], int] = {}
    calls: int = 0


class SqlLedger:
    """Rows by part of a call, and sums by hour, by day and by account. Every method raises DatabaseDown.

    Then it may or may not have happened; told again it happens once. Whatever is told of a call, the first end counts;
    but one that was booked as unconfirmed gives way to what really became of it.
    """

    def __init__(self, database: Database, replica: str) -> None:
        self._database = database
        self._replica = replica
        self._statements: _Statements | None = None

    async def book(self, lines: Sequence[Line]) -> Booked:
        """Writes down at most `MOST_CALLS` purchases, one line for each."""
        wanted = await asyncio.to_thread(lambda: {line.purchase.id: entries_of(line) for line in lines})

        async def use(connection: AsyncConnection) -> Booked:
            if any(line.state == "begun" for line in lines):
                await _see(connection, self._replica)
            return await self._settle(connection, wanted, await self._known(connection, [*wanted]))

        return await self._database.write(use, within_s=_WITHIN_S)

    async def add_spared(self, amounts: SparedBy) -> None:
        """Adds to the sums of what was not bought. The one thing that is added twice if it is told twice."""
        texts = await asyncio.to_thread(spared_rows, amounts)

        async def use(connection: AsyncConnection) -> None:
            for table, rows in texts:
                await connection.execute(self._of(connection).adding[table.name], {"rows": rows})

        await self._database.write(use, within_s=_WITHIN_S)

    async def spent(self, accounts: Sequence[str], spans: Sequence[str]) -> Mapping[tuple[str, str], int]:
        """What these accounts spent in these spans, in nano-USD, as far as it was booked; 0 is left out."""
        asked = select(spent).where(spent.c.account.in_(accounts), spent.c.span.in_(spans))
        rows = await self._database.read(partial(_all, statement=asked), within_s=_WITHIN_S)
        return {(row.account, row.span): row.nano_usd for row in rows}

    # ── upkeep ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def seen(self) -> None:
        """A sign of this replica, as is wanted every few seconds of whoever began something."""
        await self._database.write(partial(_see, replica=self._replica), within_s=_WITHIN_S)

    async def sweep(self) -> Booked:
        """Books as unconfirmed what replicas began that gave no sign for a minute; one replica for all."""

        async def use(connection: AsyncConnection) -> Booked:
            if not await leases.take(connection, "ledger.sweep", _SWEEP_S):
                return Booked()
            await connection.execute(replicas.delete().where(replicas.c.seen_at_ms < now_ms - _FORGOTTEN_MS))
            calls = (await connection.execute(_LEFT_OPEN)).scalars().all()
            known = {
                call: of_call
                for call, of_call in (await self._known(connection, calls)).items()
                if of_call[0].state == "begun"
            }
            return await self._settle(connection, {call: unconfirmed(known[call]) for call in known}, known)

        return await self._database.write(use, within_s=_WITHIN_S)

    async def trim(self, keep_days: int) -> int:
        """Deletes rows that are older, for a minute at most, and keeps their sums by hour; how many. One for all."""
        until = time.monotonic() + _TRIM_S
        mine = partial(leases.take, name="ledger.trim", for_s=_TRIM_S)
        if not await self._database.write(mine, within_s=_WITHIN_S):
            return 0
        since_ms, dropped = now_ms - keep_days * _DAY_MS, 0
        for table, old in ((ledger, ledger.c.at_ms < since_ms), (spared, spared.c.minute < since_ms // 60_000)):
            key, gone = [*table.primary_key], _TRIMMED_ROWS
            statement = table.delete().where(tuple_(*key).in_(select(*key).where(old).limit(_TRIMMED_ROWS)))
            while gone == _TRIMMED_ROWS and time.monotonic() < until:
                gone = await self._database.write(partial(_count, statement=statement), within_s=_WITHIN_S)
                dropped += gone
        return dropped

    # ── one transaction ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _known(self, connection: AsyncConnection, calls: Sequence[str]) -> Calls:
        """What is there of them, kept for this transaction, in the order of parts."""
        known: dict[str, list[Entry]] = defaultdict(list)
        if calls:
            for row in await connection.execute(self._of(connection).known, {"calls": [*calls]}):
                known[row.call].append(Entry(*row))
        return known

    async def _settle(self, connection: AsyncConnection, wanted: Calls, known: Calls) -> Booked:
        statements = self._of(connection)
        plan = await asyncio.to_thread(planned, wanted, known)
        if plan.new:
            await connection.execute(statements.new, {"rows": plan.new})
        if plan.changed:
            await connection.execute(statements.changed, {"rows": plan.changed})
        for table, rows in plan.sums:
            await connection.execute(statements.adding[table.name], {"rows": rows})
        if not plan.spent:
            return Booked((), plan.more, plan.calls)
        totals = await connection.execute(statements.spending, {"rows": plan.spent})
        return Booked([tuple(row) for row in totals.all()], plan.more, plan.calls)

    def _of(self, connection: AsyncConnection) -> "_Statements":
        if self._statements is None:
            self._statements = _Statements(connection)
        return self._statements


# ── statements ──────────────────────────────────────────────────────────────────────────────────────────────────────

_alive = select(replicas.c.id).where(replicas.c.seen_at_ms >= now_ms - _GONE_MS)
_LEFT_OPEN = (
    select(ledger.c.call).where(left_open, ledger.c.part == 0, ledger.c.replica.not_in(_alive)).limit(MOST_CALLS)
)


class _Statements:
    """Made once. Many rows travel as one JSON text: a parameter each would keep the loop busy for longer."""

    def __init__(self, connection: AsyncConnection) -> None:
        asked = _ASKED[connection.dialect.name]
        self.known = select(ledger).where(asked).order_by(ledger.c.call, ledger.c.part).with_for_update()
        self.new = _inserted(connection, ledger)
        rows = _inserted(connection, ledger)
        replaced = {name: rows.excluded[name] for name in ("state", "tokens", "nano_usd")}
        self.changed = rows.on_conflict_do_update(index_elements=["call", "part"], set_=replaced)
        tables = (usage_hours, usage_days, usage_totals, spared)
        self.adding: dict[str, Executable] = {table.name: _added(connection, table) for table in tables}
        self.spending = _added(connection, spent).returning(*spent.c)


def _added(connection: AsyncConnection, table: Table) -> Any:
    rows = _inserted(connection, table)
    sums = {each.name: each + rows.excluded[each.name] for each in table.c if not each.primary_key}
    return rows.on_conflict_do_update(index_elements=[*table.primary_key], set_=sums)


def _inserted(connection: AsyncConnection, table: Table) -> Any:
    return insert(connection, table).from_select([*table.c.keys()], _given(connection.dialect.name, table))


def _given(dialect: str, table: Table) -> Select[Any]:
    """The rows in the parameter `rows`; a sum that is not named is 0."""
    text = bindparam("rows", type_=Text)
    if dialect == "sqlite":
        each = func.json_each(text).table_valued("value")
        found = [func.json_extract(each.c.value, f"$.{name}") for name in table.c.keys()]  # noqa: SIM118
    else:
        columns = [column(each.name, each.type) for each in table.c]
        found = [*func.json_to_recordset(cast(text, JSON)).table_valued(*columns).render_derived(with_types=True).c]
    values = [
        func.coalesce(value, 0) if not each.nullable and each.type.python_type is int else value
        for value, each in zip(found, table.c, strict=True)
    ]
    return select(*values).where(true())  # without a condition SQLite takes ON CONFLICT for one of a join


async def _see(connection: AsyncConnection, replica: str) -> None:
    statement = insert(connection, replicas).values(id=replica, seen_at_ms=now_ms)
    now = {"seen_at_ms": statement.excluded.seen_at_ms}
    await connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=now))


async def _all(connection: AsyncConnection, statement: Select[Any]) -> Sequence[Any]:
    return [*await connection.execute(statement)]


async def _count(connection: AsyncConnection, statement: Executable) -> int:
    return int((await connection.execute(statement)).rowcount)
