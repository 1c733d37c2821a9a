"""Hides how replicas agree which of them tells of a budget, and when a message that was not taken is sent again."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, case, delete, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.sql.database import Database
from app.storage.sql.tables import alerts, insert, now_ms, spent, untold

AGAIN_S: Final = (0, 10, 60, 300, 1800, 7200, 21_600, 86_400)
"""When a message is sent, in seconds from the alert; after the last time it is given up."""

_WITHIN_S = 5.0
_MOST_DUE = 1000
_DAY_MS = 86_400_000


class Alert(NamedTuple):
    """So many per cent of a budget were spent; so many attempts to tell of it were begun."""

    account: str
    span: str
    percent: int
    budget_nano_usd: int
    at_ms: int
    attempts: int = 0


class SqlAlerts:
    """The alerts of all that share a database. Every method raises DatabaseDown."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, account: str, span: str, percent: int, budget_nano_usd: int, *, tells: bool) -> bool:
        """Whether the caller is the first to notice; of a budget that was raised there is a first time again.

        `tells`: somebody wants to be told.
        """

        async def use(connection: AsyncConnection) -> bool:
            new = insert(connection, alerts).values(
                account=account, span=span, percent=percent, at_ms=now_ms, attempts=0, budget_nano_usd=budget_nano_usd,
                delivered_at_ms=None if tells else now_ms,
            )  # fmt: skip
            names = ("at_ms", "delivered_at_ms", "attempts", "budget_nano_usd")
            again = new.on_conflict_do_update(
                index_elements=["account", "span", "percent"],
                set_={name: new.excluded[name] for name in names},
                where=alerts.c.budget_nano_usd < new.excluded.budget_nano_usd,
            )
            return (await connection.execute(again.returning(alerts.c.percent))).first() is not None

        return await self._database.write(use, within_s=_WITHIN_S)

    async def spent(self, spans: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
        """What was spent in spans of accounts, in nano-USD, as far as it was booked; 0 is left out."""
        asked = select(spent).where(tuple_(spent.c.account, spent.c.span).in_(spans))
        rows = await self._database.fetch(asked, {}, within_s=_WITHIN_S)
        return {(row.account, row.span): row.nano_usd for row in rows}

    async def due(self) -> Sequence[Alert]:
        """Those that are to be told now, those first that were tried least: who takes nothing is in nobody's way."""
        order = (alerts.c.attempts, alerts.c.at_ms, alerts.c.percent)
        ripe = select(*_COLUMNS).where(untold, now_ms >= _NEXT_MS).order_by(*order).limit(_MOST_DUE)
        return [Alert._make(row) for row in await self._database.fetch(ripe, {}, within_s=_WITHIN_S)]

    async def claim(self, wanted: Collection[Alert]) -> Sequence[Alert]:
        """Those of them that nobody else tells now, with one more attempt."""
        return await self._database.write(partial(_claim, wanted=sorted(wanted)), within_s=_WITHIN_S)

    async def delivered(self, alert: Alert) -> None:
        """It need not be told again."""
        done = update(alerts).where(_is(alert)).values(delivered_at_ms=now_ms)
        await self._database.write(lambda connection: connection.execute(done), within_s=_WITHIN_S)

    async def trim(self, keep_days: int) -> None:
        """Forgets those that are older."""
        old = delete(alerts).where(alerts.c.at_ms < now_ms - keep_days * _DAY_MS)
        await self._database.write(lambda connection: connection.execute(old), within_s=_WITHIN_S)


_COLUMNS = tuple(alerts.c[name] for name in Alert._fields)
_NEXT_MS = alerts.c.at_ms + case({made: 1000 * rest_s for made, rest_s in enumerate(AGAIN_S)}, value=alerts.c.attempts)
"""When the next attempt is due; NULL after the last one."""


def _is(alert: Alert) -> ColumnElement[bool]:
    """One of a budget that was raised meanwhile is another one."""
    return (
        (alerts.c.account == alert.account)
        & (alerts.c.span == alert.span)
        & (alerts.c.percent == alert.percent)
        & (alerts.c.budget_nano_usd == alert.budget_nano_usd)
    )


async def _claim(connection: AsyncConnection, wanted: Sequence[Alert]) -> list[Alert]:
    mine = []
    for alert in wanted:
        counted = alert._replace(attempts=alert.attempts + 1)
        still = untold & (alerts.c.attempts == alert.attempts)
        taken = update(alerts).where(_is(alert) & still).values(attempts=counted.attempts)
        if (await connection.execute(taken)).rowcount:
            mine.append(counted)
    return mine
