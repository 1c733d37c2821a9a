"""Hides how all replicas learn that vectors were invalidated."""

from collections.abc import Mapping, Sequence

from sqlalchemy import case, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.level import Epoch
from app.storage.sql.database import Database
from app.storage.sql.tables import cache_epochs, insert

_WITHIN_S = 2.0


class SqlEpochs:
    """The `Epochs` of all that share a database, and how they are raised. Every method raises LevelDown."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self) -> Mapping[str, Epoch]:
        """See `Epochs`."""

        async def all_of(connection: AsyncConnection) -> dict[str, Epoch]:
            rows = await connection.execute(select(cache_epochs))
            return {row.space: Epoch(row.number, row.not_before_s) for row in rows}

        return await self._database.read(all_of, within_s=_WITHIN_S)

    async def raise_epoch(self, spaces: Sequence[str]) -> None:
        """Whatever was kept of these spaces, by id, is no longer wanted; `*` is all of them."""
        rows = [{"space": space, "number": 1, "not_before_s": 0} for space in sorted(set(spaces))]

        async def count_up(connection: AsyncConnection) -> None:
            more = {"number": cache_epochs.c.number + 1}
            statement = insert(connection, cache_epochs)
            await connection.execute(statement.on_conflict_do_update(index_elements=["space"], set_=more), rows)

        if rows:
            await self._database.write(count_up, within_s=_WITHIN_S)

    async def raise_not_before(self, space: str, at_s: int) -> None:
        """What was made of `space` before the Unix second `at_s` is no longer wanted. Never goes back."""

        async def move(connection: AsyncConnection) -> None:
            statement = insert(connection, cache_epochs).values(space=space, number=0, not_before_s=at_s)
            new, old = statement.excluded.not_before_s, cache_epochs.c.not_before_s
            latest = {"not_before_s": case((new > old, new), else_=old)}
            await connection.execute(statement.on_conflict_do_update(index_elements=["space"], set_=latest))

        await self._database.write(move, within_s=_WITHIN_S)
