"""Hides how Postgres keeps vectors: its types, its columns and keys, who made a table, and how one takes its place."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
import numpy as np
import pgvector.asyncpg
import pyarrow as pa
from pgvector import Vector

from app.corpus.address import Address
from app.corpus.rows import DataError, Matrix
from app.corpus.table_sink import NUMBER
from app.corpus.typed_rows import ID, matrix

T = TypeVar("T")
_Connection: TypeAlias = Any  # of asyncpg, which tells no types

_CONNECT_S = 10.0
_LOCK_S = 30
_MADE_BY: Final = "Made by embedgate, which may replace it; run "
_TYPES: Final = {pa.bool_(): "boolean", pa.int64(): "bigint", pa.float64(): "double precision", pa.string(): "text"}
_FIND: Final = """
SELECT obj_description(c.oid, 'pg_class') AS comment, atttypmod AS width, relrowsecurity AS guarded
FROM pg_class c LEFT JOIN pg_attribute ON attrelid = c.oid AND attname = 'embedding' WHERE c.oid = to_regclass($1)
"""
_LEGACY: Final = """
WITH old AS (SELECT * FROM pg_class WHERE oid = to_regclass($1)),
     new AS (SELECT * FROM pg_class WHERE oid = to_regclass($2)),
     kept AS (
         SELECT attribute.* FROM pg_attribute attribute JOIN old ON attrelid = old.oid AND attnum > 0
         WHERE attname IN (SELECT attname FROM pg_attribute JOIN new ON attrelid = new.oid)
     ),
     rights (step, act, whom, role, granting) AS (
         SELECT 2, 'REVOKE ALL', 'FROM', grantee, FALSE
         FROM old, new, aclexplode(new.relacl || acldefault('r', old.relowner))
         WHERE old.relacl IS DISTINCT FROM new.relacl
         UNION SELECT 3, 'GRANT ' || privilege_type, 'TO', grantee, is_grantable
         FROM old, new, aclexplode(coalesce(old.relacl, acldefault('r', old.relowner)))
         WHERE old.relacl IS DISTINCT FROM new.relacl
         UNION SELECT 3, format('GRANT %s (%I)', privilege_type, attname), 'TO', grantee, is_grantable
         FROM kept, aclexplode(attacl)
     )
SELECT statement FROM (
    SELECT 1, format('ALTER TABLE %s OWNER TO %s', $1::text, old.relowner::regrole)
    FROM old, new WHERE old.relowner <> new.relowner
    UNION SELECT step, format(
        '%s ON %s %s %s%s', act, $1::text, whom, CASE role WHEN 0 THEN 'PUBLIC' ELSE role::regrole::text END,
        CASE WHEN granting THEN ' WITH GRANT OPTION' ELSE '' END
    ) FROM rights
    UNION SELECT 4, format('COMMENT ON COLUMN %s.%I IS %L', $1::text, attname, col_description(attrelid, attnum))
    FROM kept WHERE col_description(attrelid, attnum) IS NOT NULL
) AS told (step, statement) ORDER BY step
"""
"""What gives the table of the name $2, once it is called $1, the owner, rights and comments of the one before."""
_EXTENSION: Final = (
    "SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector'"
)


class PgvectorStore:
    """See `Store`. `id` is the primary key, unless two rows share one or it is too long for a key.

    Postgres keeps no NUL in a text: there stands U+FFFD in its place. A comment on the table is its mark.
    """

    vector = "embedding"

    def __init__(self, address: Address) -> None:
        self.name = address.name
        self._address = address
        self._session = _Session(address)

    def there(self) -> bool:
        """See `Store`."""
        return self._session.ask(self._find) is not None

    def mark(self) -> str | None:
        """See `Store`."""
        found = self._session.ask(self._find)
        comment = found["comment"] if found is not None else None
        return comment.removeprefix(_MADE_BY) if comment and comment.startswith(_MADE_BY) else None

    def rehearse(self, schema: pa.Schema) -> None:
        """See `Store`. Makes the extension, where it may."""

        async def done(connection: _Connection) -> None:
            await _extend(connection, self.name)
            transaction = connection.transaction()
            await transaction.start()
            try:
                await self._replace(connection, schema, iter(()), "rehearsal")
            finally:
                await transaction.rollback()

        self._session.ask(done)

    def replace(self, schema: pa.Schema, tables: Iterator[pa.Table], mark: str) -> None:
        """See `Store`. The table is locked only once all rows are in its successor."""

        async def done(connection: _Connection) -> None:
            async with connection.transaction():
                await self._replace(connection, schema, tables, mark)

        self._session.ask(done)

    def rows(self) -> int:
        """See `Store`."""

        async def done(connection: _Connection) -> int:
            count = f"SELECT count({NUMBER}) FROM {await self._table(connection)}"  # noqa: S608 — quoted
            try:
                found: int = await connection.fetchval(count)
            except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
                return 0
            return found

        return self._session.ask(done)

    def read(self, start: int, count: int) -> Matrix | None:
        """See `Store`."""

        async def done(connection: _Connection) -> Matrix | None:
            some = f"WHERE {NUMBER} >= $1 AND {NUMBER} < $2 ORDER BY {NUMBER}"
            wanted = f"SELECT embedding FROM {await self._table(connection)} {some}"  # noqa: S608 — quoted
            try:
                found = await connection.fetch(wanted, start, start + count)
            except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
                return None
            width = (await self._find(connection))["width"]
            return _matrix([row["embedding"] for row in found], width)

        return self._session.ask(done)

    def close(self) -> None:
        """See `Store`."""
        self._session.close()

    # ── in a connection ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _schema(self, connection: _Connection) -> str:
        found = self._address.schema or await connection.fetchval("SELECT current_schema()")
        if not found:
            raise DataError(f"{self.name}: there is no schema for it; name one: #schema.table")
        return str(found)

    async def _table(self, connection: _Connection) -> str:
        """Its name in SQL."""
        return f"{_quoted(await self._schema(connection))}.{_quoted(self._address.table)}"

    async def _find(self, connection: _Connection) -> Any:
        """What is known of it; None where it is not there."""
        return await connection.fetchrow(_FIND, await self._table(connection))

    async def _replace(self, connection: _Connection, schema: pa.Schema, tables: Iterator[pa.Table], mark: str) -> None:
        home, table = await self._schema(connection), await self._table(connection)
        found = await self._find(connection)
        if found is not None and found["guarded"]:
            text = "has row security, which a table in its place would lack: disable it, or name another"
            raise DataError(f"{self.name} {text}")
        name = f"embedgate_{mark}"
        successor = f"{_quoted(home)}.{_quoted(name)}"
        vectors = f"{_quoted(await connection.fetchval(_EXTENSION) or 'public')}.vector"
        await connection.execute(f"SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '{_LOCK_S}s'")
        columns = ", ".join(f"{_quoted(field.name)} {_type(field.type, vectors)}" for field in schema)
        await connection.execute(f"CREATE TABLE {successor} ({columns})")
        await connection.copy_records_to_table(
            name, schema_name=home, columns=schema.names, records=(row for each in tables for row in _records(each))
        )
        await self._take_place(connection, successor)
        await connection.execute(
            f"ALTER TABLE {table} ADD UNIQUE ({NUMBER}); COMMENT ON TABLE {table} IS '{_MADE_BY}{mark}'"
        )
        try:
            async with connection.transaction():
                await connection.execute(f"ALTER TABLE {table} ADD PRIMARY KEY ({ID})")
        except (asyncpg.UniqueViolationError, asyncpg.ProgramLimitExceededError):
            pass  # rows are not left out because of their names

    async def _take_place(self, connection: _Connection, successor: str) -> None:
        """Whose the table was, his is the new one, and who might read it may do so."""
        table = await self._table(connection)
        legacy = await connection.fetch(_LEGACY, table, successor)
        try:
            await connection.execute(f"DROP TABLE IF EXISTS {table}")
        except asyncpg.DependentObjectsStillExistError as error:
            others = "; ".join(str(error.detail).splitlines())
            what_to_do = "drop that first, and make it again once the table is there"
            raise DataError(f"{self.name}: {_line(error)}: {others}; {what_to_do}") from error
        await connection.execute(f"ALTER TABLE {successor} RENAME TO {_quoted(self._address.table)}")
        for each in legacy:
            await connection.execute(each["statement"])


class _Session:
    """A connection from when something is asked until it is closed, in a thread of its own: whoever asks, waits."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._thread: ThreadPoolExecutor | None = None
        self._runner = asyncio.Runner()
        self._connection: _Connection | None = None

    def ask(self, work: Callable[[_Connection], Awaitable[T]]) -> T:
        """What `work` comes to; its own errors become DataErrors."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="pgvector")
            self._runner = asyncio.Runner()
        return self._thread.submit(lambda: self._runner.run(self._done(work))).result()

    def close(self) -> None:
        """Waits for what is being done."""
        if self._thread is not None:
            self._thread.submit(self._end).result()
            self._thread.shutdown()
            self._thread = None

    async def _done(self, work: Callable[[_Connection], Awaitable[T]]) -> T:
        name = self._address.name
        try:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._connected()
            return await work(self._connection)
        except TimeoutError as error:
            raise DataError(f"{name}: cannot be reached: no answer within {_CONNECT_S:.0f} s") from error
        except OSError as error:
            raise DataError(f"{name}: cannot be reached: {error}") from error
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            raise DataError(f"{name}: {_line(error)}") from error

    async def _connected(self) -> _Connection:
        try:
            connection = await asyncpg.connect(
                self._address.url, timeout=_CONNECT_S, server_settings={"application_name": "embedgate"}
            )
        except ValueError:  # says parts of the URL
            raise DataError(f"{self._address.name}: its URL is not one that can be understood") from None
        await _register(connection)
        return connection

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
        self._runner.close()


async def _extend(connection: _Connection, name: str) -> None:
    if await connection.fetchval(_EXTENSION) is not None:
        return
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except asyncpg.PostgresError as error:
        need = "it needs the extension vector (pgvector) in that database, made by who may"
        raise DataError(f"{name}: {_line(error)}; {need}") from error
    await _register(connection)


async def _register(connection: _Connection) -> None:
    schema = await connection.fetchval(_EXTENSION)
    if schema is not None:
        await pgvector.asyncpg.register_vector(connection, schema=schema)


def _line(error: Exception) -> str:
    """Its first one."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _type(kind: pa.DataType, vectors: str) -> str:
    return f"{vectors}({kind.list_size})" if isinstance(kind, pa.FixedSizeListType) else _TYPES[kind]


def _records(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Its rows, as the driver takes them."""
    *columns, lists = table.columns
    values = [_texts(each.to_pylist()) if each.type == pa.string() else each.to_pylist() for each in columns]
    vectors = matrix(lists.combine_chunks())
    missing: list[bool] = np.asarray(np.isnan(vectors).any(axis=1)).tolist()
    return zip(
        *values, (None if none else Vector(row) for row, none in zip(vectors, missing, strict=True)), strict=True
    )


def _texts(values: Sequence[Any]) -> list[Any]:
    return [each.replace("\0", "\ufffd") if each else each for each in values]


def _matrix(vectors: Sequence[Vector | None], width: int) -> Matrix:
    none = np.full(width, np.nan, np.float32)
    return np.array([none if each is None else each.to_numpy() for each in vectors], np.float32).reshape(-1, width)
