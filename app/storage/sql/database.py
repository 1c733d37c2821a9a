"""Hides how a database is asked so that it can never hold anybody up: within a time, once, or not at all."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Generic, Literal, Self, TypeVar

import asyncpg
from sqlalchemy import Executable, Row, literal, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.level import LevelDown
from app.storage.sql.engines import CONNECT_S, Engines, Lane, held

_T = TypeVar("_T")

_FAILURES = 3  # in a row, then nobody is kept waiting any more
_REST_S, _REST_CAP_S = 1.0, 2.0
_PATIENCE_S = 1.0
_MOST_WAITING = 1000
_FOREIGN = (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)  # TimeoutError is an OSError


class DatabaseDown(LevelDown):
    """The database cannot be asked now, refused, or did not answer in time; without address, statement or values."""


class _Errand(Generic[_T]):
    """One use of a connection, and the future of whoever waits for what comes of it."""

    def __init__(self, lane: Lane, work: Callable[[AsyncConnection], Awaitable[_T]]) -> None:
        self.lane = lane
        self.work = work
        self.answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self.stage: Literal["waiting", "connecting", "using", "leaving"] = "waiting"
        self.driver: Any = None
        self.task: asyncio.Task[None]

    def succeed(self, result: _T) -> None:
        if not self.answer.done():
            self.answer.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Database:
    """One database; an async context manager that owns its connections and whatever is under way on them.

    What is asked is never asked twice, for nobody can tell whether it was done. After three times in a row that no
    connection was to be had, or no answer within a second, it counts as down: whoever comes fails at once, until a
    probe is answered. Callers that are cancelled, or in a greater hurry, stop waiting; what was begun for them goes
    on for as long as that. A connection that was given up is never used again.

    `serves`: as a server, of which a SQLite file takes only one. `on_change` hears `up` and why.
    """

    def __init__(
        self, url: str, *, serves: bool = False, on_change: Callable[[bool, str], None] | None = None
    ) -> None:  # fmt: skip
        self._engines = Engines(url)
        self._serves = serves
        self._on_change = on_change
        self._failures = 0
        self._tasks = asyncio.TaskGroup()
        self._errands: set[_Errand[Any]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._held = ExitStack()
        self.dialect: Literal["postgresql", "sqlite"] = "postgresql" if self._engines.path is None else "sqlite"
        self.up = True
        """Whether it is worth asking."""

    async def __aenter__(self) -> Self:
        if self._engines.path is not None:
            self._held.enter_context(held(self._engines.path, alone=self._serves))
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.up = False
        if self._watching is not None:
            self._watching.cancel()
        for errand in [*self._errands]:
            self._give_up(errand, "closed")
        await self._tasks.__aexit__(None, None, None)
        await self._engines.close()
        self._held.close()

    async def read(self, use: Callable[[AsyncConnection], Awaitable[_T]], *, within_s: float) -> _T:
        """What `use` gets from a connection on which each statement stands for itself. Raises DatabaseDown."""
        return await self._ask(self._engines.single, use, within_s)

    async def fetch(
        self, statement: Executable, parameters: Mapping[str, Any], *, within_s: float
    ) -> Sequence[Row[Any]]:  # fmt: skip
        """The rows of one statement, the quickest way there is. Raises DatabaseDown."""
        reader = self._engines.reader
        if reader is None:
            return await self.read(partial(_rows, statement=statement, parameters=parameters), within_s=within_s)
        if not self.up:
            raise DatabaseDown("down")
        try:
            async with asyncio.timeout(within_s):
                return await reader.rows(statement, parameters)
        except _FOREIGN as error:
            raise DatabaseDown(_reason(error)) from None

    async def write(self, use: Callable[[AsyncConnection], Awaitable[_T]], *, within_s: float) -> _T:
        """What `use` gets from a connection in one transaction, committed. Raises DatabaseDown.

        After that it may nevertheless have been committed.
        """

        async def transact(connection: AsyncConnection) -> _T:
            async with connection.begin():
                return await use(connection)

        return await self._ask(self._engines.transactions, transact, within_s)

    # ── one errand ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, lane: Lane, work: Callable[[AsyncConnection], Awaitable[_T]], within_s: float) -> _T:
        if not self.up:
            raise DatabaseDown("down")
        if len(self._errands) >= _MOST_WAITING:
            raise DatabaseDown("busy")
        return await self._send(_Errand(lane, work), within_s)

    def _send(self, errand: _Errand[_T], within_s: float) -> asyncio.Future[_T]:
        errand.task = self._tasks.create_task(self._run(errand))
        self._errands.add(errand)
        loop = asyncio.get_running_loop()
        timers = (
            loop.call_later(within_s, self._expire, errand),
            loop.call_later(max(within_s, _PATIENCE_S), self._abandon, errand),
        )

        def ended(_: object) -> None:
            for timer in timers:
                timer.cancel()
            self._errands.discard(errand)

        errand.task.add_done_callback(ended)
        return errand.answer

    async def _run(self, errand: _Errand[_T]) -> None:
        """Never raises: what it is in belongs to everybody."""
        try:
            async with errand.lane.slots:
                if not errand.answer.done():
                    await self._carry_out(errand)
        except _FOREIGN as error:
            if errand.stage == "connecting" or (isinstance(error, DBAPIError) and error.connection_invalidated):
                self._failed(type(error).__name__)
            errand.fail(DatabaseDown(_reason(error)))
        except Exception as bug:
            errand.fail(bug)

    async def _carry_out(self, errand: _Errand[_T]) -> None:
        connection = errand.lane.engine.connect()
        errand.stage = "connecting"
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.start()
            if not errand.answer.done():  # else the connection is for the next one
                errand.driver = (await connection.get_raw_connection()).driver_connection
                errand.stage = "using"
                errand.succeed(await errand.work(connection))
                self._failures = 0
        except asyncio.CancelledError:
            if connection.sync_connection is not None:
                await connection.invalidate()
            raise
        finally:
            if errand.stage == "using":
                errand.stage = "leaving"
            if connection.sync_connection is not None:
                await connection.close()

    def _expire(self, errand: _Errand[Any]) -> None:
        """Nobody waits for it any longer; what has begun may still end well, and then has warmed a connection."""
        errand.fail(DatabaseDown("slow"))
        if errand.stage == "waiting":
            errand.task.cancel()

    def _abandon(self, errand: _Errand[Any]) -> None:
        """It should have ended by now; only a connection has a time of its own to be made in."""
        if errand.stage == "using":
            self._failed("slow")
            self._give_up(errand, "slow")

    def _give_up(self, errand: _Errand[Any], reason: str) -> None:
        errand.fail(DatabaseDown(reason))
        if errand.stage == "leaving":
            return
        if errand.stage == "using":
            errand.stage = "leaving"
            self._engines.sever(errand.driver)  # first: else the driver waits for the server to let go
        errand.task.cancel()

    # ── health ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _failed(self, reason: str) -> None:
        self._failures += 1
        if self.up and self._failures >= _FAILURES:
            self._turn(up=False, reason=reason)
            self._engines.sever_idle({errand.driver for errand in self._errands})
            self._watching = self._tasks.create_task(self._watch())

    async def _watch(self) -> None:
        """Asks a database that is down now and then."""
        rest_s = _REST_S
        while not self.up:
            await asyncio.sleep(rest_s)
            rest_s = min(2 * rest_s, _REST_CAP_S)
            with suppress(DatabaseDown):
                await self._send(_Errand(self._engines.single, _ping), CONNECT_S)
                self._failures = 0
                self._turn(up=True, reason="answered")

    def _turn(self, *, up: bool, reason: str) -> None:
        self.up = up
        if self._on_change is not None:
            self._on_change(up, reason)


async def _rows(
    connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any]
) -> Sequence[Row[Any]]:  # fmt: skip
    return (await connection.execute(statement, parameters)).all()


async def _ping(connection: AsyncConnection) -> None:
    await connection.execute(select(literal(1)))


def _reason(error: Exception) -> str:
    """What is known of an error, without its words: they may hold values."""
    origin = getattr(error, "orig", None) or error
    code = getattr(origin, "sqlstate", None) or getattr(origin, "sqlite_errorname", None)
    return " ".join(filter(None, (type(error).__name__, code)))
