"""Hides who does bulk work: a runner beside a server, or a process that does nothing else."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress

from app import __version__
from app.api.bulk_lines import BulkLines
from app.errors import ConfigurationError
from app.job import Order
from app.jobs.embedding import Window
from app.jobs.runner import Bounds, Runner
from app.runtime import Runtime
from app.settings import Settings


def working(runtime: Runtime) -> AbstractAsyncContextManager[Runner | None]:
    """Somebody who works on jobs while it is entered; nobody where `bulk.tasks` is 0."""
    return runner(runtime) if runtime.settings.bulk.tasks else nullcontext()


def runner(runtime: Runtime) -> Runner:
    """One with the bounds of `[bulk]`, to be entered."""
    bulk, stores = runtime.settings.bulk, runtime.stores

    def serves(order: Order, model: str) -> bool:
        caller = runtime.directory.owner(order.tenant, order.key)
        return model in runtime.gateway.routes and (caller is None or caller.tenant.may_use(model))

    bounds = Bounds(
        tasks=max(1, bulk.tasks),
        window=Window(bulk.lines_at_once, bulk.texts_at_once),
        attempts=bulk.attempts,
        max_lines=bulk.max_lines,
        max_inputs=bulk.max_inputs,
        shard_lines=bulk.shard_lines,
        keep_s=bulk.keep_days * 86_400,
    )
    return Runner(
        stores.jobs, stores.blobs, runtime.gateway, BulkLines(runtime), runtime.telemetry, bounds,
        owner=stores.replica, serves=serves, rng=random.Random(),  # noqa: S311 — jitter
    )  # fmt: skip


async def work(settings: Settings, on_ready: Callable[[], None]) -> None:
    """Works on jobs until SIGINT or SIGTERM, then leaves what is not committed to others.

    Raises ConfigurationError for settings with which nobody else could hand it a job.
    """
    if settings.stores.database_url is None:
        raise ConfigurationError("stores.database_url: a worker shares its jobs through a database; name a Postgres")
    async with Runtime(settings) as runtime, runner(runtime), _until_told() as told:
        runtime.telemetry.service_changed("started", version=__version__, base_url="")
        on_ready()
        await told.wait()
        runtime.telemetry.service_changed("draining")


@asynccontextmanager
async def _until_told() -> AsyncIterator[asyncio.Event]:
    """Set by the first signal that asks to leave."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, told.set)
    try:
        yield told
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):
                loop.remove_signal_handler(each)
