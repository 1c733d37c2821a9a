"""Hides how a tenant's name leaves the books: what it spent stays in the sums, but nobody's any more."""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from sqlalchemy import ColumnElement, Table, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.sql.database import Database
from app.storage.sql.jobs import erase_jobs
from app.storage.sql.tables import alerts, api_keys, insert, ledger, spared, spent, usage_days, usage_hours

ERASED: Final = "deleted tenant"
"""Whose it is then; no tenant's name has a blank."""

_WITHIN_S = 30.0
_DAY_MS = 86_400_000
_MOMENTS = 1440  # of a table of sums in one transaction


async def erase(database: Database, tenant: str) -> None:
    """Makes everything that `tenant` spent the deleted tenants'; its jobs and files are gone. May be done again.

    In steps that hold nobody up; raises DatabaseDown, after some of them.
    """
    await database.write(partial(erase_jobs, tenant=tenant, nobody=ERASED), within_s=_WITHIN_S)
    await _erase_rows(database, tenant)
    for table in (usage_hours, usage_days, spared):
        await _erase_sums(database, table, tenant)
    await database.write(partial(_forget_accounts, tenant=tenant), within_s=_WITHIN_S)


async def _erase_rows(database: Database, tenant: str) -> None:
    """A day after the other, since the ledger is ordered by time only."""
    nobody = {"tenant": ERASED, "project": "", "key": "", "user": ""}
    first, last = await _span(database, ledger.c.at_ms, ledger.c.at_ms >= 0)
    for start in range(first, last + 1, _DAY_MS):
        day = (ledger.c.at_ms >= start) & (ledger.c.at_ms < start + _DAY_MS)
        statement = update(ledger).where(day & (ledger.c.tenant == tenant)).values(nobody)
        await database.write(lambda c, s=statement: c.execute(s), within_s=_WITHIN_S)  # type: ignore[misc]


async def _erase_sums(database: Database, table: Table, tenant: str) -> None:
    moment, *_ = table.primary_key
    first, last = await _span(database, moment, table.c.tenant == tenant)
    for start in range(first, last + 1, _MOMENTS):
        span = (moment >= start) & (moment < start + _MOMENTS)
        await database.write(partial(_move, table=table, where=span & (table.c.tenant == tenant)), within_s=_WITHIN_S)


async def _span(database: Database, moment: ColumnElement[Any], where: ColumnElement[bool]) -> tuple[int, int]:
    """The first and the last moment; where there is none, the last is before the first."""
    least, most = func.coalesce(func.min(moment), 0).label("first"), func.coalesce(func.max(moment), -1).label("last")
    row = (await database.fetch(select(least, most).where(where), {}, within_s=_WITHIN_S))[0]
    return row.first, row.last


async def _move(connection: AsyncConnection, table: Table, where: ColumnElement[bool]) -> None:
    """Adds sums to the deleted tenants' and removes them, both or neither."""
    names = [column.name for column in table.primary_key]
    counted = [column.name for column in table.c if column.name not in names]
    rows = await connection.execute(delete(table).where(where).returning(*table.c))
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * len(counted))
    for row in rows.mappings():
        key = tuple((dict(row) | {"tenant": ERASED, "project": ""})[name] for name in names)
        sums[key] = [total + row[name] for total, name in zip(sums[key], counted, strict=True)]
    if sums:
        new = insert(connection, table)
        more = {name: table.c[name] + new.excluded[name] for name in counted}
        added = [dict(zip((*names, *counted), (*key, *sums[key]), strict=True)) for key in sorted(sums)]
        await connection.execute(new.on_conflict_do_update(index_elements=names, set_=more), added)


async def _forget_accounts(connection: AsyncConnection, tenant: str) -> None:
    """What budgets asked for, of the tenant itself, its keys and its projects."""
    keys = (await connection.execute(select(api_keys.c.id).where(api_keys.c.tenant == tenant))).scalars()
    named = [f"tenant {tenant}", *(f"key {key}" for key in keys)]
    for table in (spent, alerts):
        await connection.execute(delete(table).where(_of_any(table.c.account, named, f"project {tenant}/")))


def _of_any(account: ColumnElement[str], named: Iterable[str], prefix: str) -> ColumnElement[bool]:
    """Accounts by name, or of a project; a tenant whose name has a slash is another one."""
    slashes = func.length(account) - func.length(func.replace(account, "/", ""))
    return or_(account.in_([*named]), account.startswith(prefix, autoescape=True) & (slashes == 1))
