"""Hides where all replicas keep the first accepted vectors of each Space, by which later ones are judged."""

from functools import partial
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.sql import leases
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.tables import insert, landmarks, now_s
from app.vectors import Matrix

_WITHIN_S = 2.0


class SqlLandmarks:
    """The `Landmarks` of all that share a database; never an error.

    While it is down this process goes by what it knows, and nobody probes.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, Matrix] = {}

    async def vectors(self, place: str) -> Matrix | None:
        """See `ports.Landmarks`; what does not read back counts as none."""
        try:
            found = await self._database.read(partial(_find, place=place), within_s=_WITHIN_S)
        except DatabaseDown:
            found = None
        if found is not None:
            self._known[place] = found
        return self._known.get(place)

    async def accept(self, place: str, vectors: Matrix) -> None:
        """See `ports.Landmarks`; what cannot be written lasts as long as the process."""
        self._known[place] = vectors
        row = {"place": place, "vectors": vectors.astype("<f4").tobytes(), "probes": len(vectors)}
        try:
            await self._database.write(partial(_keep, row=row), within_s=_WITHIN_S)
        except DatabaseDown:
            return

    async def claim(self, place: str, interval_s: float) -> bool:
        """See `ports.Landmarks`; by the database's clock."""
        try:
            taken = partial(leases.take, name=_lease(place), for_s=interval_s)
            return await self._database.write(taken, within_s=_WITHIN_S)
        except DatabaseDown:
            return False

    async def release(self, place: str) -> None:
        """See `ports.Landmarks`."""
        try:
            await self._database.write(partial(leases.release, name=_lease(place)), within_s=_WITHIN_S)
        except DatabaseDown:
            return


def _lease(place: str) -> str:
    return f"canary.{place}"


async def _find(connection: AsyncConnection, place: str) -> Matrix | None:
    row = (await connection.execute(select(landmarks).where(landmarks.c.place == place))).one_or_none()
    if row is None or not row.probes or len(row.vectors) % (4 * row.probes):
        return None
    return np.frombuffer(row.vectors, "<f4").reshape(row.probes, -1)


async def _keep(connection: AsyncConnection, row: dict[str, Any]) -> None:
    statement = insert(connection, landmarks).values(**row, accepted_at_s=now_s)
    replaced = {name: statement.excluded[name] for name in ("vectors", "probes", "accepted_at_s")}
    await connection.execute(statement.on_conflict_do_update(index_elements=["place"], set_=replaced))
