"""Hides how replicas agree that one of them does something for all, by the database's clock."""

from sqlalchemy import or_
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.sql.tables import insert, leases, now_ms


async def take(connection: AsyncConnection, name: str, for_s: float) -> bool:
    """Whether `name` is the caller's now: it was last taken `for_s` ago or longer, or its time lies in the future."""
    taken = insert(connection, leases).values(name=name, taken_at_ms=now_ms)
    free = or_(leases.c.taken_at_ms <= now_ms - int(1000 * for_s), leases.c.taken_at_ms > now_ms)
    statement = taken.on_conflict_do_update(
        index_elements=[leases.c.name], set_={"taken_at_ms": taken.excluded.taken_at_ms}, where=free
    ).returning(leases.c.name)
    return (await connection.execute(statement)).first() is not None


async def release(connection: AsyncConnection, name: str) -> None:
    """Whoever comes next takes it."""
    await connection.execute(leases.delete().where(leases.c.name == name))
