"""Hides nothing: every table that embedgate has, as its newest migration leaves them."""

from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, Table, Text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.expression import FunctionElement

metadata = MetaData()

cache = Table(
    "cache",
    metadata,
    Column("key", LargeBinary(32), primary_key=True),
    Column("space", Text, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("made_at_s", BigInteger, nullable=False),
    Column("used_on_day", Integer, nullable=False),
    Index("cache_by_use", "used_on_day", "size_bytes"),
    Index("cache_by_space", "space"),
    Index("cache_by_age", "made_at_s"),
)
"""Sealed vectors by key, with the space's id, bytes with overhead, Unix second and the day since 1970 of last use."""

cache_epochs = Table(
    "cache_epochs",
    metadata,
    Column("space", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("not_before_s", BigInteger, nullable=False),
)
"""What was invalidated, by space id; `*` is all of them."""

landmarks = Table(
    "landmarks",
    metadata,
    Column("place", Text, primary_key=True),
    Column("vectors", LargeBinary, nullable=False),
    Column("probes", Integer, nullable=False),
    Column("accepted_at_s", BigInteger, nullable=False),
)
"""The accepted vectors of each Space's probes: float32 little-endian, one after the other."""

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("taken_at_ms", BigInteger, nullable=False),
)
"""When something that one replica does for all was last begun."""

facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
"""What is true of the whole database: the fingerprint of its secret, the programs that it suits."""


class NowMs(FunctionElement[int]):
    """The database's clock in Unix milliseconds, an integer."""

    type = BigInteger()
    inherit_cache = True


@compiles(NowMs, "postgresql")
def _postgres_now(_: NowMs, __: SQLCompiler, **___: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS bigint)"


@compiles(NowMs, "sqlite")
def _sqlite_now(_: NowMs, __: SQLCompiler, **___: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


now_ms: ColumnElement[int] = NowMs()
now_s: ColumnElement[int] = now_ms // 1000
today: ColumnElement[int] = now_ms // 86_400_000


def insert(connection: AsyncConnection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that can say what to do about rows that are there already."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)
