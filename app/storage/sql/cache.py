"""Hides how sealed vectors are kept in a database, and how it is kept from growing without end."""

import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, LargeBinary, Select, any_, bindparam, delete, func, select, true, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain import Space
from app.storage.level import LevelStats
from app.storage.sql import leases
from app.storage.sql.database import Database
from app.storage.sql.tables import cache, insert, now_s, today

_PIECE_ITEMS = 256
_BATCH_ROWS = 1000  # deleted in one transaction
_ROW_BYTES = 500  # of a row beside key and value, at least: its header, places in four indexes, what a page wastes
_MOST_TOUCHED = 50_000
_WRITE_S = 5.0
_COUNT_S = 30.0
_SWEEP_S = 60.0
_LEASE = "cache.sweep"

_ASKED = {
    "postgresql": cache.c.key == any_(bindparam("keys", type_=ARRAY(LargeBinary))),
    "sqlite": cache.c.key.in_(bindparam("keys", expanding=True)),
}
_FOUND = {
    dialect: select(cache.c.key, cache.c.value, (cache.c.used_on_day < today).label("touch")).where(asked)
    for dialect, asked in _ASKED.items()
}


class SqlLevel:
    """A `Level` in a database. The day of last use is written once a day, with what else is written or swept.

    `max_bytes` and `max_age_days` are kept to by `sweep`; 0 is no bound.
    """

    name = "sql"

    def __init__(
        self, database: Database, *, max_bytes: int = 0, max_age_days: int = 0, within_s: float = 0.05
    ) -> None:  # fmt: skip
        self._database = database
        self._max_bytes = max_bytes
        self._max_age_days = max_age_days
        self._within_s = within_s
        self._touched: set[bytes] = set()  # read today, and not written down yet

    # ── a level ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def read(
        self, space: Space, keys: Sequence[bytes], *, within_s: float | None = None
    ) -> dict[bytes, bytes]:  # fmt: skip
        """See `Level`."""
        del space  # is part of the keys
        within_s = within_s or self._within_s
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), _PIECE_ITEMS):
            piece = keys[start : start + _PIECE_ITEMS]
            statement = _FOUND[self._database.dialect]
            rows = await self._database.fetch(statement, {"keys": [*piece]}, within_s=within_s)
            found.update((row.key, row.value) for row in rows)
            if len(self._touched) < _MOST_TOUCHED:
                self._touched.update(row.key for row in rows if row.touch)
        return found

    async def write(self, space: Space, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """See `Level`."""
        ordered = sorted(dict(entries).items())  # two that write the same never wait for each other crosswise
        sizes = (len(key) + len(value) + _ROW_BYTES for key, value in ordered)
        rows = [
            {"key": key, "space": space.id, "value": value, "size_bytes": size}
            for (key, value), size in zip(ordered, sizes, strict=True)
        ]
        if rows:
            await self._database.write(partial(_keep, rows=rows), within_s=_WRITE_S)
        await self._write_uses(_BATCH_ROWS)

    async def delete(self, space: Space, keys: Sequence[bytes]) -> None:
        """See `Level`."""
        del space
        for start in range(0, len(keys), _BATCH_ROWS):
            piece = keys[start : start + _BATCH_ROWS]
            await self._database.write(partial(_delete, keys=piece), within_s=_WRITE_S)

    async def stats(self) -> LevelStats:
        """See `Level`; counts every row."""
        rows, size_bytes = await self._database.read(_count, within_s=_COUNT_S)
        return LevelStats(rows, size_bytes, self._max_bytes)

    # ── upkeep ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def sweep(self) -> int:
        """Drops what is too old, then the least recently used of what is too much; how many rows went.

        One replica at a time, a minute at most: what is left then is for the next time. Raises LevelDown.
        """
        until = time.monotonic() + _SWEEP_S
        await self._write_uses(_MOST_TOUCHED + _PIECE_ITEMS)
        if not await self._database.write(partial(leases.take, name=_LEASE, for_s=_SWEEP_S), within_s=_WRITE_S):
            return 0
        dropped = 0
        if self._max_age_days:
            dropped += await self._drop(cache.c.made_at_s < now_s - 86_400 * self._max_age_days, until)
        if self._max_bytes:
            dropped += await self._drop_least_used(until)
        await self._database.write(partial(leases.release, name=_LEASE), within_s=_WRITE_S)
        return dropped

    async def forget(self, space_ids: Sequence[str] | None = None, *, made_before_s: int | None = None) -> int:
        """Drops what was kept of these spaces (None: all), as far as it was made before that Unix second.

        How many rows went. Raises LevelDown; then some may be left.
        """
        wanted: ColumnElement[bool] = true()
        if space_ids is not None:
            wanted &= cache.c.space.in_(space_ids)
        if made_before_s is not None:
            wanted &= cache.c.made_at_s < made_before_s
        return await self._drop(wanted, math.inf)

    async def _drop(self, wanted: ColumnElement[bool], until: float) -> int:
        """In batches, so that nobody waits for them long."""
        dropped, gone = 0, _BATCH_ROWS
        while gone == _BATCH_ROWS and time.monotonic() < until:
            batch = select(cache.c.key).where(wanted).limit(_BATCH_ROWS)
            gone = len(await self._database.write(partial(_delete_sized, chosen=batch), within_s=_WRITE_S))
            dropped += gone
        return dropped

    async def _drop_least_used(self, until: float) -> int:
        stats = await self.stats()
        excess, dropped = stats.used_bytes - self._max_bytes, 0
        mean_bytes = stats.used_bytes / max(stats.entries, 1)
        while excess > 0 and time.monotonic() < until:
            most = min(_BATCH_ROWS, math.ceil(excess / mean_bytes))
            batch = select(cache.c.key).order_by(cache.c.used_on_day).limit(most)
            sizes = await self._database.write(partial(_delete_sized, chosen=batch), within_s=_WRITE_S)
            if not sizes:  # others hold what is left
                break
            excess -= sum(sizes)
            dropped += len(sizes)
        return dropped

    async def _write_uses(self, most: int) -> None:
        touched = sorted(islice(self._touched, most))
        self._touched.difference_update(touched)  # should it fail: the next read of one notes it again
        for start in range(0, len(touched), _BATCH_ROWS):
            piece = touched[start : start + _BATCH_ROWS]
            await self._database.write(partial(_touch, keys=piece), within_s=_WRITE_S)


async def _keep(connection: AsyncConnection, rows: list[dict[str, Any]]) -> None:
    statement = insert(connection, cache).values(made_at_s=now_s, used_on_day=today)
    statement = statement.on_conflict_do_update(
        index_elements=[cache.c.key],
        set_={name: statement.excluded[name] for name in ("space", "value", "size_bytes", "made_at_s", "used_on_day")},
    )
    await connection.execute(statement, rows)


async def _delete(connection: AsyncConnection, keys: Sequence[bytes]) -> None:
    await connection.execute(delete(cache).where(_among(connection)), {"keys": [*keys]})


async def _touch(connection: AsyncConnection, keys: Sequence[bytes]) -> None:
    await connection.execute(update(cache).values(used_on_day=today).where(_among(connection)), {"keys": [*keys]})


async def _delete_sized(connection: AsyncConnection, chosen: Select[Any]) -> Sequence[int]:
    """The sizes of what was `chosen` and is gone."""
    free = chosen.with_for_update(skip_locked=True)
    return (
        (await connection.execute(delete(cache).where(cache.c.key.in_(free)).returning(cache.c.size_bytes)))
        .scalars()
        .all()
    )


async def _count(connection: AsyncConnection) -> tuple[int, int]:
    total = func.coalesce(func.sum(cache.c.size_bytes), 0)
    rows, size_bytes = (await connection.execute(select(func.count(), total).select_from(cache))).one()
    return rows, int(size_bytes)


def _among(connection: AsyncConnection) -> ColumnElement[bool]:
    """Those asked for that nobody else is about to change: so nobody waits for each other crosswise."""
    asked = select(cache.c.key).where(_ASKED[connection.dialect.name])
    return cache.c.key.in_(asked.with_for_update(skip_locked=True))
