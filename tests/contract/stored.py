"""Hides how tests reach what is in a database past whoever keeps it there."""

from typing import Any

from app.storage.sql.database import Database

SOON_S = 5.0
"""Long enough for a machine that is busy."""


async def change(database: Database, statement: Any) -> None:
    """What only time would do."""
    await database.write(lambda connection: connection.execute(statement), within_s=SOON_S)


async def scalars(database: Database, statement: Any) -> list[Any]:
    """One column of what is there."""
    rows = await database.read(lambda connection: connection.execute(statement), within_s=SOON_S)
    return [*rows.scalars()]
