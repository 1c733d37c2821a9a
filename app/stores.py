"""Hides where state lives: opens the stores that the settings name, in order, and closes them in reverse."""

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final, Self

from pydantic import SecretStr

from app.domain import Limits
from app.errors import ConfigurationError
from app.job_ports import Blobs
from app.ports import Limiter
from app.settings import Settings
from app.storage.blobs import open_blobs
from app.storage.budgets import SharedBudgets
from app.storage.journal import Journal
from app.storage.ledger import BookedLedger
from app.storage.level import Epoch, Level, LevelDown
from app.storage.limiter import InProcessLimiter
from app.storage.memory import MemoryCache
from app.storage.redis_level import RedisLevel
from app.storage.redis_limiter import RedisLimiter
from app.storage.redis_server import RedisServer
from app.storage.redis_shares import RedisShares
from app.storage.sealing import Sealer
from app.storage.secret import MasterSecret, confirm, own_secret
from app.storage.sql.alerts import SqlAlerts
from app.storage.sql.cache import SqlLevel
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.directory import SqlDirectory
from app.storage.sql.epochs import SqlEpochs
from app.storage.sql.jobs import SqlJobs
from app.storage.sql.landmarks import SqlLandmarks
from app.storage.sql.ledger import SqlLedger
from app.storage.sql.migrations import migrate
from app.storage.sql.usage import SqlUsage
from app.storage.tiers import TieredCache
from app.telemetry import Telemetry

DATABASE_FILE: Final = "embedgate.db"
"""In `data_dir`, where no database is named."""

_LEVEL_S = 0.05  # how long a request waits for a level of the cache
_SWEEP_S, _LOOK_S = 300.0, 5.0
_START_S, _AGAIN_S = 10.0, 5.0


class Stores:
    """What outlives a request, opened as `settings` say; an async context manager.

    `serves`: for a server, of which a SQLite file takes only one; tools may work beside it. A database that cannot be
    reached is waited for in the background, since requests can be answered without it; one that is not ours is not.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry, *, serves: bool) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._serves = serves
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()
        self._background: list[asyncio.Task[None]] = []
        self._complaint: str | None = None
        self.shares: RedisShares | None = None
        """How replicas tell each other whom they served; None for a lone one."""
        self._prepared = False
        self._crowded = False
        self._redis: RedisServer | None = None
        self._watched: dict[str, Database | RedisServer] = {}
        self.replica = secrets.token_hex(8)
        self.secret: MasterSecret
        self.database: Database
        self.sql: SqlLevel
        self.epochs: SqlEpochs
        self.cache: TieredCache
        self.budgets: SharedBudgets
        self.ledger: BookedLedger
        self.blobs: Blobs

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.secret = await asyncio.to_thread(master_secret, self._settings)
            self.blobs = await asyncio.to_thread(open_blobs, self._settings.bulk.blobs, _data_dir(self._settings))
            self.database = await stack.enter_async_context(
                open_database(self._settings, serves=self._serves, on_change=partial(self._changed, "database"))
            )
            self._watched["database"] = self.database
            await self._tasks.__aenter__()
            stack.push_async_callback(self._tasks.__aexit__, None, None, None)  # what goes wrong here is told as it is
            stack.callback(self._stop)
            preparing = self._tasks.create_task(self._prepare(), name="stores")
            self._background = [preparing]
            await asyncio.wait({preparing}, timeout=_START_S)
            if self._complaint is not None:
                raise ConfigurationError(self._complaint)
            self._redis = await self._server(stack, "redis", self._settings.stores.redis_url)
            self.shares = RedisShares(self._redis, self.replica) if self._redis else None
            self.cache = await stack.enter_async_context(await self._cache(stack))
            self.budgets = await stack.enter_async_context(self._budgets())
            self.ledger = await stack.enter_async_context(self._ledger())
            self.budgets.unbooked = self.ledger.unbooked
            self.budgets.ready = lambda: self._prepared and self.ledger.caught_up
            self.ledger.watchers.append(self.budgets)
            self._watch()
            self._background.append(self._tasks.create_task(self._tend(preparing), name="stores"))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def limiter(self, limits: Mapping[str, Limits], stack: AsyncExitStack) -> Limiter:
        """Who keeps the quotas of these accounts; entered into `stack`."""
        if self._redis is None:
            return InProcessLimiter(limits)
        most = self._settings.stores.max_replicas
        limiter = RedisLimiter(self._redis, limits, replica=self.replica, max_replicas=most)
        self._telemetry.watch(
            "embedgate_limiter_mode", "1 for how quotas are kept: shared by all replicas, or each its part", ("mode",),
            lambda: [(("shared",), float(limiter.shared)), (("alone",), float(not limiter.shared))],
        )  # fmt: skip
        return await stack.enter_async_context(limiter)

    @property
    def landmarks(self) -> SqlLandmarks:
        """The accepted vectors of each Space."""
        return SqlLandmarks(self.database)

    @property
    def alerts(self) -> SqlAlerts:
        """What was told of budgets."""
        return SqlAlerts(self.database)

    @property
    def jobs(self) -> SqlJobs:
        """Files and jobs, and who works on them."""
        return SqlJobs(self.database, ready=lambda: self._prepared)

    @property
    def usage(self) -> SqlUsage:
        """What was spent, as it has been summed up."""
        return SqlUsage(self.database)

    @property
    def directory(self) -> SqlDirectory:
        """Tenants, projects and keys made at run time."""
        return SqlDirectory(self.database, ready=lambda: self._prepared)

    @property
    def prepared(self) -> bool:
        """Whether the database is known to be ours, and has our tables."""
        return self._prepared

    def complaint(self) -> str | None:
        """Why this process should get no requests, if so."""
        return self._complaint

    # ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _prepare(self) -> None:
        """Makes sure that the tables are there and ours; never raises, since it may take longer than a start may."""
        try:
            await migrate(self.database, only_additive=True)
            await confirm(self.database, self.secret)
            self._prepared = True
        except DatabaseDown:
            return
        except ConfigurationError as error:
            self._complaint = str(error)
            self.database.up = False  # for good: what is not ours is not asked, let alone written to

    async def _server(self, stack: AsyncExitStack, name: str, url: SecretStr | None) -> RedisServer | None:
        if url is None:
            return None
        try:
            server = RedisServer(url.get_secret_value(), on_change=partial(self._changed, name))
        except ValueError as error:
            raise ConfigurationError(f"stores.{name}_url: is not understood") from error
        self._watched[name] = server
        return await stack.enter_async_context(server)

    async def _cache(self, stack: AsyncExitStack) -> TieredCache:
        stores, kept = self._settings.stores, self._settings.cache
        levels: list[tuple[Level, float]] = []
        server = await self._server(stack, "cache_redis", stores.cache_redis_url) or self._redis
        if server is not None:
            redis = RedisLevel(server, ttl_s=kept.redis_ttl_s)
            with suppress(LevelDown):
                if warning := await redis.maxmemory_warning(holds_limiter=server is self._redis):
                    self._telemetry.store_warned(store="cache", warning=warning)
            levels.append((redis, _LEVEL_S))
        self.sql = SqlLevel(self.database, max_bytes=kept.sql_max_bytes, max_age_days=kept.sql_max_age_days)
        self.epochs = SqlEpochs(self.database)
        levels.append((self.sql, _LEVEL_S))
        sealer = Sealer(
            self.secret.derive("cache values"),
            older=self.secret.derive_older("cache values"),
            float16=kept.float16,
            compression=kept.compression,
        )
        memory = MemoryCache(kept.memory_bytes)
        self._telemetry.watch(
            "embedgate_cache_bytes", "Memory of the vectors kept", (), lambda: [((), memory.stats().used_bytes)]
        )
        return TieredCache(memory, levels, sealer, self._telemetry, epochs=_Ours(self))

    def _budgets(self) -> SharedBudgets:
        """To be entered before the ledger, whose last bookings it tells the others."""
        return SharedBudgets(
            SqlLedger(self.database, self.replica),
            self._telemetry,
            server=self._redis,
            replica=self.replica,
            max_replicas=self._settings.stores.max_replicas,
        )

    def _ledger(self) -> BookedLedger:
        folder, kept = _data_dir(self._settings) / "journal", self._settings.ledger
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"stores.data_dir: {folder} cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigurationError(f"stores.data_dir: {folder} cannot be written, and nothing is bought unwritten")
        return BookedLedger(
            Journal(folder, self.replica, max_bytes=kept.journal_max_bytes),
            SqlLedger(self.database, self.replica),
            self._telemetry,
            ready=lambda: self._prepared,
            keep_days=kept.keep_days,
        )

    # ── afterwards ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _tend(self, preparing: asyncio.Task[None]) -> None:
        """Goes on preparing what could not be reached, then drops what need not be kept."""
        await preparing
        while not self._prepared and self._complaint is None:
            await asyncio.sleep(_AGAIN_S)
            await self._prepare()
        if self._complaint is not None:
            self._telemetry.store_warned(store="database", warning=self._complaint)
            return
        while True:
            for _ in range(round(_SWEEP_S / _LOOK_S)):
                await asyncio.sleep(_LOOK_S)
                self._count_replicas()
            with suppress(LevelDown):
                await self.sql.sweep()

    def _count_replicas(self) -> None:
        """Warns, once, of more replicas than there are parts for when Redis is gone."""
        most, there = self._settings.stores.max_replicas, self.shares.replicas if self.shares else 1
        if there > most and not self._crowded:
            text = f"{there} replicas, but stores.max_replicas is {most}: without Redis they would break the quotas"
            self._telemetry.store_warned(store="redis", warning=text)
        self._crowded = there > most

    def _watch(self) -> None:
        self._telemetry.watch(
            "embedgate_store_up", "1 while a store can be asked", ("store",),
            lambda: [((name,), float(store.up)) for name, store in self._watched.items()],
        )  # fmt: skip
        self._telemetry.watch(
            "embedgate_replicas", "Replicas that were there lately", (),
            lambda: [((), self.shares.replicas if self.shares else 1)],
        )  # fmt: skip
        self._telemetry.watch(
            "embedgate_ledger_unbooked", "Purchases that the database does not know of yet", (),
            lambda: [((), self.ledger.waiting)],
        )  # fmt: skip
        self._telemetry.watch(
            "embedgate_journal_bytes", "Disk that the journal takes", (), lambda: [((), self.ledger.journal_bytes)]
        )

    def _stop(self) -> None:
        for task in self._background:
            task.cancel()

    def _changed(self, store: str, up: bool, reason: str) -> None:
        self._telemetry.store_changed(store=store, up=up, reason=reason)

    async def read_epochs(self) -> Mapping[str, Epoch]:
        """What was invalidated, from a database that is ours. Raises LevelDown."""
        if not self._prepared:
            raise LevelDown("not prepared")
        return await self.epochs.read()


def master_secret(settings: Settings) -> MasterSecret:
    """What every key of ours is made from; without a configured one that of this machine. ConfigurationError."""
    configured = [each.get_secret_value().encode() for each in settings.server.secret]
    return MasterSecret(configured[0], configured[1:]) if configured else own_secret(_data_dir(settings))


def open_database(
    settings: Settings, *, serves: bool, on_change: Callable[[bool, str], None] | None = None
) -> Database:
    """The database that the settings name, to be entered; without one a file in `data_dir`. ConfigurationError."""
    url, file = settings.stores.database_url, f"sqlite:///{_data_dir(settings) / DATABASE_FILE}"
    try:
        return Database(url.get_secret_value() if url else file, serves=serves, on_change=on_change)
    except ValueError as error:
        raise ConfigurationError(f"stores.database_url: {error}") from error


def _data_dir(settings: Settings) -> Path:
    return Path(settings.stores.data_dir).expanduser()


class _Ours:
    """The epochs of stores that have been prepared."""

    def __init__(self, stores: Stores) -> None:
        self.read = stores.read_epochs
