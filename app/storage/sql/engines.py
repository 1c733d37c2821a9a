"""Hides what each kind of database wants: its URL, its driver, its settings, and how many may write at once."""

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

import asyncpg
from sqlalchemy import URL, Executable, Row, create_engine, event, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

CONNECT_S = 2.0
"""A connection that takes longer to be made is none."""

_POSTGRES_CONNECTIONS = 10
_SQLITE_READERS = 4
_RECYCLE_S = 1800
_CLOSE_S = 1.0
_POSTGRES_SETTINGS = {  # a backend whose client is gone, or was given up, must not hold locks for long
    "application_name": "embedgate",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "30s",
    "tcp_keepalives_idle": "30",
    "jit": "off",  # pays for long analyses only
}
_SQLITE_PRAGMAS = ("busy_timeout = 5000", "journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON")


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """An engine, and a slot for each connection that it may have: nobody waits inside its pool."""

    engine: AsyncEngine
    slots: asyncio.Semaphore


class FileReader:
    """Reads a SQLite file in a thread of its own, a statement at a time.

    The asynchronous driver goes to its thread and back for each step of a statement, which takes a lone reader three
    times as long.
    """

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite reader")
        self._engine = create_engine(
            URL.create("sqlite+pysqlite", database=str(path)), isolation_level="AUTOCOMMIT", hide_parameters=True
        )
        event.listen(self._engine, "connect", _set_pragmas)
        self._connection: Connection | None = None

    async def rows(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """All of them; whoever is cancelled only stops waiting."""
        asked = asyncio.get_running_loop().run_in_executor(self._thread, self._fetch, statement, parameters)
        asked.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # also if nobody waits any more
        return await asyncio.shield(asked)

    async def close(self) -> None:
        """Once what was asked has been read."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown(wait=False)

    def _fetch(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection.execute(statement, parameters).all()

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()


class Engines:
    """The lanes for single statements and for transactions: one and the same server, or a file with one writer.

    `url` is `postgresql://…` as libpq reads it, or `sqlite:///path`; else ValueError, without what may be secret.
    """

    def __init__(self, url: str) -> None:
        scheme = url.partition("://")[0]
        self._drivers: WeakSet[Any] = WeakSet()
        self.path: Path | None = None
        """The file, if it is SQLite."""
        self.reader: FileReader | None = None
        if scheme in {"postgresql", "postgres"}:
            engine = self._postgres(url)
            slots = asyncio.Semaphore(_POSTGRES_CONNECTIONS)
            self.single = Lane(engine.execution_options(isolation_level="AUTOCOMMIT"), slots)
            self.transactions = Lane(engine, slots)
        elif scheme == "sqlite":
            self.path = _file_of(url)
            self.reader = FileReader(self.path)
            self.single = Lane(_sqlite(self.path, _SQLITE_READERS), asyncio.Semaphore(_SQLITE_READERS))
            self.transactions = Lane(_sqlite(self.path, 1), asyncio.Semaphore(1))
            event.listen(self.transactions.engine.sync_engine, "begin", _begin_writing)
        else:
            raise ValueError("the database's URL must begin with postgresql:// or sqlite:///")

    def _postgres(self, url: str) -> AsyncEngine:
        _check_server(url)

        async def connect() -> Any:
            driver = await asyncpg.connect(
                url, timeout=CONNECT_S, command_timeout=None, server_settings=_POSTGRES_SETTINGS
            )
            self._drivers.add(driver)
            return driver

        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=connect,
            pool_size=_POSTGRES_CONNECTIONS,
            max_overflow=0,
            pool_recycle=_RECYCLE_S,
            hide_parameters=True,
        )
        event.listen(engine.sync_engine, "checkout", _refuse_closed)
        return engine

    def sever(self, driver: Any) -> None:
        """Nothing more is heard from a server through `driver`; a file needs no such thing."""
        if self.path is None:
            driver.terminate()

    def sever_idle(self, used: set[Any]) -> None:
        """Gives up all connections to a server but those `used`: they may be as dead as the ones before."""
        if self.path is None:
            for driver in set(self._drivers) - used:
                driver.terminate()

    async def close(self) -> None:
        """Ends all connections, in peace if that is quick."""
        if self.reader is not None:
            await self.reader.close()
        await asyncio.gather(*(_part(driver) for driver in [*self._drivers]))
        for engine in {self.single.engine, self.transactions.engine}:
            await engine.dispose()


@contextmanager
def held(path: Path, *, alone: bool) -> Iterator[None]:
    """Makes the file at `path` for this user only; `alone`: while this lasts no other such block has it, anywhere.

    Raises ConfigurationError when the file cannot be written, or another one has it.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            if alone and fcntl is not None:
                lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"stores.data_dir: another server already uses {path}; several need stores.database_url (Postgres)"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"stores: {path} cannot be written: {error.strerror}") from error
        yield


def _check_server(url: str) -> None:
    """Refuses what could never be connected to."""
    try:
        parts = urlsplit(url)
        if "," not in parts.netloc:
            _ = parts.port
    except ValueError:
        raise ValueError("the database's URL has an impossible host or port") from None
    if not parts.path.strip("/"):
        raise ValueError("the database's URL names no database: postgresql://user@host:5432/NAME")


def _file_of(url: str) -> Path:
    try:
        parts = make_url(url)
    except ArgumentError:
        raise ValueError("the database's URL cannot be read: sqlite:///path") from None
    if not parts.database or parts.database == ":memory:" or parts.host or parts.query:
        raise ValueError("the database's URL must name a file, and nothing else: sqlite:///path")
    return Path(parts.database).expanduser()


def _sqlite(path: Path, connections: int) -> AsyncEngine:
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        pool_size=connections,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",  # the driver begins nothing by itself
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    for pragma in _SQLITE_PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_writing(connection: Connection) -> None:
    """At once for writing: a reader that turns writer fails when another one has written since."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


async def _part(driver: Any) -> None:
    """Says farewell to a server; the pool waits for its answer without end."""
    with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        await driver.close(timeout=_CLOSE_S)


def _refuse_closed(connection: Any, _: object, __: object) -> None:
    """The pool makes a new connection in the place of one that is known to be dead."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError
