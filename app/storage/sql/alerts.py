"""Hides how replicas agree which of them tells of a budget, and when a message that was not taken is sent again."""

from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.sql.database import Database
from app.storage.sql.tables import alerts, insert, now_ms, untold

AGAIN_S: Final = (0, 10, 60, 300, 1800, 7200, 21_600, 86_400)
"""When a message is sent, in seconds from the alert; after the last time it is given up."""

_WITHIN_S = 5.0
_AT_ONCE = 32
_DAY_MS = 86_400_000


class Alert(NamedTuple):
    """So many per cent of a budget were spent; `attempts` to tell were made with this one."""

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

    async def due(self) -> Sequence[Alert]:
        """Those that are to be told now, each by nobody else for a while."""
        open_ones = select(*_COLUMNS, now_ms.label("now_ms")).where(untold, alerts.c.attempts < len(AGAIN_S))
        rows = await self._database.fetch(open_ones.order_by(alerts.c.at_ms).limit(1000), {}, within_s=_WITHIN_S)
        ripe = [Alert(*[*row][:-1]) for row in rows if row.at_ms + 1000 * AGAIN_S[row.attempts] <= row.now_ms]
        if not ripe:
            return []
        return await self._database.write(partial(_claim, wanted=ripe[:_AT_ONCE]), within_s=_WITHIN_S)

    async def delivered(self, alert: Alert) -> None:
        """It need not be told again."""
        done = update(alerts).where(_is(alert)).values(delivered_at_ms=now_ms)
        await self._database.write(lambda connection: connection.execute(done), within_s=_WITHIN_S)

    async def trim(self, keep_days: int) -> None:
        """Forgets those that are older."""
        old = delete(alerts).where(alerts.c.at_ms < now_ms - keep_days * _DAY_MS)
        await self._database.write(lambda connection: connection.execute(old), within_s=_WITHIN_S)


_COLUMNS = tuple(alerts.c[name] for name in Alert._fields)


def _is(alert: Alert) -> ColumnElement[bool]:
    return (
        (alerts.c.account == alert.account)
        & (alerts.c.span == alert.span)
        & (alerts.c.percent == alert.percent)
        & (alerts.c.attempts == alert.attempts)
    )


async def _claim(connection: AsyncConnection, wanted: Sequence[Alert]) -> list[Alert]:
    """Those whose attempt nobody else has made meanwhile."""
    mine = []
    for alert in wanted:
        counted = alert._replace(attempts=alert.attempts + 1)
        taken = update(alerts).where(_is(alert) & untold).values(attempts=counted.attempts)
        if (await connection.execute(taken)).rowcount:
            mine.append(counted)
    return mine
