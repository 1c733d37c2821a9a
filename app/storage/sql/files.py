"""Hides where it is kept which files there are, and how what a tenant does comes one after the other."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, Table, delete, func, insert, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import BatchLimitExceeded, Conflict
from app.job import Purpose, StoredFile
from app.job_ports import FilePage
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.tables import files, jobs, now_ms, now_s, still_open

WITHIN_S = 5.0
_LOCK = 0x6A6F6273  # beside a tenant's hash: any number that every program of ours uses for this
_DELETED_S = 0


class SqlFiles:
    """A `FileStore` of all that share a database. `ready`: whether the database is ours to ask by now."""

    def __init__(self, database: Database, *, ready: Callable[[], bool] = lambda: True) -> None:
        self._opened = database
        self._ready = ready

    @property
    def database(self) -> Database:
        """The database; raises DatabaseDown until it is ours to ask."""
        if not self._ready():
            raise DatabaseDown("not prepared")
        return self._opened

    async def add_file(self, file: StoredFile, *, most_bytes: int) -> StoredFile:
        """See `FileStore`."""
        return await self.database.write(partial(_add, file=file, most_bytes=most_bytes), within_s=WITHIN_S)

    async def file(self, tenant: str, file_id: str) -> StoredFile | None:
        """See `FileStore`."""
        rows = await self.rows(select(files).where(in_force(tenant, file_id)), of=file_id)
        return _file(rows[0]) if rows else None

    async def files(
        self, tenant: str, *, purpose: Purpose | None, after: str, limit: int, ascending: bool
    ) -> FilePage | None:
        """See `FileStore`."""
        wanted = select(files).where(files.c.tenant == tenant, _IN_FORCE)
        if after:
            found = await self.rows(select(files.c.created_at_ms).where(in_force(tenant, after)), of=after)
            if not found:
                return None
            wanted = wanted.where(behind(files, (found[0].created_at_ms, after), ascending=ascending))
        if purpose is not None:
            wanted = wanted.where(files.c.purpose == purpose)
        rows = await self.rows(by_creation(wanted, files, ascending=ascending).limit(limit + 1))
        return FilePage([_file(row) for row in rows[:limit]], len(rows) > limit)

    async def delete_file(self, tenant: str, file_id: str) -> bool:
        """See `FileStore`."""
        return sayable(file_id) and await self.database.write(
            partial(_delete, tenant=tenant, file_id=file_id), within_s=WITHIN_S
        )

    async def gone_files(self, limit: int) -> Sequence[str]:
        """See `FileStore`."""
        gone = select(files.c.id).where(files.c.expires_at_s <= now_s, ~_read_by_a_job.exists())
        return [row.id for row in await self.rows(gone.order_by(files.c.expires_at_s).limit(limit))]

    async def forget_files(self, file_ids: Sequence[str]) -> None:
        """See `FileStore`."""
        statement = delete(files).where(files.c.id.in_(file_ids), files.c.expires_at_s <= now_s)
        await self.database.write(lambda connection: connection.execute(statement), within_s=WITHIN_S)

    async def rows(self, wanted: Select[Any], *, of: str = "") -> Sequence[Row[Any]]:
        """What one statement finds; nothing `of` an id that none of ours is."""
        return await self.database.fetch(wanted, {}, within_s=WITHIN_S) if sayable(of) else ()


_IN_FORCE: ColumnElement[bool] = files.c.expires_at_s.is_(None) | (files.c.expires_at_s > now_s)
_read_by_a_job = select(jobs.c.id).where(
    still_open, jobs.c.tenant == files.c.tenant, jobs.c.input_file_id == files.c.id
)  # fmt: skip


def sayable(name: str) -> bool:
    """Whether it could be an id of ours: a database may not even take what else callers think of."""
    return name.isascii() and (name.isprintable() or not name)


def in_force(tenant: str, file_id: str) -> ColumnElement[bool]:
    """Which file is meant, if the tenant has it."""
    return (files.c.id == file_id) & (files.c.tenant == tenant) & _IN_FORCE


def by_creation(wanted: Select[Any], table: Table, *, ascending: bool) -> Select[Any]:
    """The same rows in their order."""
    order = (table.c.created_at_ms, table.c.id)
    return wanted.order_by(*(order if ascending else (column.desc() for column in order)))


def behind(table: Table, place: tuple[int, str], *, ascending: bool) -> ColumnElement[bool]:
    """Rows that stand behind the one that was created then and has this id."""
    own, other = tuple_(table.c.created_at_ms, table.c.id), tuple_(*place)
    return own > other if ascending else own < other


async def clock(connection: AsyncConnection) -> int:
    """The database's time in Unix milliseconds."""
    return int((await connection.execute(select(now_ms))).scalar_one())


async def alone(connection: AsyncConnection, tenant: str) -> None:
    """Until the transaction ends nobody else is at it for this tenant; in SQLite whoever writes is alone."""
    if connection.dialect.name == "postgresql":
        statement = text(f"SELECT pg_advisory_xact_lock({_LOCK}, hashtext(:tenant))")
        await connection.execute(statement, {"tenant": tenant})


async def keep(connection: AsyncConnection, file: StoredFile, now: int) -> StoredFile:
    """Makes its row; it was created now, and lives as long as it was to."""
    lives_s = None if file.expires_at_s is None else file.expires_at_s - file.created_at_s
    values = {
        "id": file.id, "tenant": file.tenant, "purpose": file.purpose, "filename": file.filename,
        "size_bytes": file.size_bytes, "created_at_ms": now,
        "expires_at_s": None if lives_s is None else now // 1000 + lives_s,
    }  # fmt: skip
    return _file((await connection.execute(insert(files).values(values).returning(*files.c))).one())


async def erase_files(connection: AsyncConnection, tenant: str, nobody: str) -> None:
    """What a tenant has is gone, and is nobody's."""
    gone = {"expires_at_s": _DELETED_S, "tenant": nobody, "filename": ""}
    await connection.execute(update(files).where(files.c.tenant == tenant).values(gone))


async def _add(connection: AsyncConnection, file: StoredFile, most_bytes: int) -> StoredFile:
    await alone(connection, file.tenant)
    kept = select(func.coalesce(func.sum(files.c.size_bytes), 0)).where(files.c.tenant == file.tenant, _IN_FORCE)
    if most_bytes and (await connection.execute(kept)).scalar_one() + file.size_bytes > most_bytes:
        raise BatchLimitExceeded(f"Your files would take more than {most_bytes:,} bytes: delete some first.")
    return await keep(connection, file, await clock(connection))


async def _delete(connection: AsyncConnection, tenant: str, file_id: str) -> bool:
    await alone(connection, tenant)
    reading = _read_by_a_job.where(jobs.c.tenant == tenant, jobs.c.input_file_id == file_id)
    if (await connection.execute(select(files.c.id).where(in_force(tenant, file_id), reading.exists()))).first():
        raise Conflict(f"File {file_id} is read by a batch that has not ended.", code="file_in_use")
    deleted = update(files).where(in_force(tenant, file_id)).values(expires_at_s=_DELETED_S)
    return bool((await connection.execute(deleted)).rowcount)


def _file(row: Row[Any]) -> StoredFile:
    return StoredFile(
        row.id, row.tenant, row.purpose, row.filename, row.size_bytes, row.created_at_ms // 1000, row.expires_at_s
    )
