"""Hides who does bulk work: a runner beside a server, or a process that does nothing else."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from functools import partial

from app import __version__
from app.api import batch_wire
from app.api.bulk_lines import BulkLines
from app.api.errors import printable
from app.errors import ConfigurationError
from app.job import LineError, Order
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
        stores.jobs, stores.blobs, runtime.gateway, runtime.wholesale, BulkLines(runtime), runtime.telemetry, bounds,
        owner=stores.replica, wrong=partial(_wrong, runtime), rng=random.Random(),  # noqa: S311 — jitter
    )  # fmt: skip


def _wrong(runtime: Runtime, order: Order, model: str) -> LineError | None:
    """Why this order cannot have this model; one that only its tenant would rather have in batches can."""
    caller = runtime.directory.owner(order.tenant, order.key)
    if model not in runtime.gateway.routes or not (caller is None or caller.tenant.may_use(model)):
        text = f"The model `{printable(model)}` does not exist or you do not have access to it."
        return LineError("model_not_found", text, "body.model")
    if batch_wire.asks_for_vendor(order.metadata) and not runtime.wholesale.sells(model):
        text = (
            f"The model `{printable(model)}` has no deployment whose vendor takes batches: leave out 'embedgate_tier'."
        )
        return LineError("unsupported_value", text, "body.model")
    return None


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
