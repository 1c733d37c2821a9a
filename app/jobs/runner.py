"""Hides who works on jobs: leases what is to be done, does it, and lets go of what somebody else took over."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self, TypeVar, assert_never

from app.domain import Vector
from app.engine.wholesale import Wholesale
from app.errors import BudgetExhausted, TryAgainLater
from app.job import NO_WORK, Job, LineError, Order, Piece, Task, file_blob
from app.job_ports import Blobs, JobStore
from app.jobs.embedding import Paused, ShardWork, Window, Wire
from app.jobs.intake import Intake
from app.jobs.joining import join
from app.jobs.patience import Engine
from app.jobs.shard_errand import ShardErrand
from app.jobs.sweeping import sweep
from app.jobs.vendor import TakenOver, VendorPath, Wait
from app.storage.level import LevelDown
from app.telemetry import Telemetry

LEASE_S: Final = 30.0
"""After so long without a sign others take what a runner had."""

_RENEW_S, _LOOK_S = 8.0, 1.0
_AGAIN_S, _AGAIN_CAP_S = 0.2, 5.0
_PAUSE_S = 60.0
_CALLED_OFF_LOOK_S = 10.0
_TROUBLE_S = 10.0  # how long a task is left to others after what should not have happened

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is done at one moment, what a file may hold, and for how long what came of it is kept."""

    tasks: int
    window: Window
    attempts: int
    max_lines: int
    max_inputs: int
    shard_lines: int
    keep_s: int


class Runner:
    """Works on jobs of `store` until it is left; an async context manager that owns its tasks.

    What it was doing then is left to others at once; what was not committed is done again. `wrong` says why an order
    cannot have a model.
    """

    def __init__(
        self, store: JobStore, blobs: Blobs, engine: Engine, wholesale: Wholesale, wire: Wire, telemetry: Telemetry,
        bounds: Bounds, *, owner: str, wrong: Callable[[Order, str], LineError | None], rng: random.Random,
    ) -> None:  # fmt: skip
        self._store = store
        self._blobs = blobs
        self._engine = engine
        self._wholesale = wholesale
        self._vendor = VendorPath(blobs, wholesale)
        self._wire = wire
        self._telemetry = telemetry
        self._bounds = bounds
        self._owner = owner
        self._wrong = wrong
        self._rng = rng
        self._held: dict[asyncio.Task[None], Task] = {}
        self._wake = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        loops = (
            self._for_ever(self._take), self._for_ever(self._renew), sweep(self._store, self._blobs, self._telemetry)
        )  # fmt: skip
        self._loops = [self._tasks.create_task(loop, name="jobs") for loop in loops]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for loop in self._loops:
            loop.cancel()
        for work in self._held:
            work.cancel()
        await self._tasks.__aexit__(None, None, None)

    @property
    def at_work(self) -> int:
        """How many tasks it holds."""
        return len(self._held)

    def wake(self) -> None:
        """There is something to do now."""
        self._wake.set()

    # ── leases ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _for_ever(self, step: Callable[[], Awaitable[None]]) -> None:
        """What the database cannot do now is done the next time."""
        while True:
            try:
                await step()
            except LevelDown:
                await asyncio.sleep(_LOOK_S)
            except Exception as bug:  # supervision is for the errors that nobody thought of
                self._telemetry.loop_crashed(loop="jobs", error=bug)
                await asyncio.sleep(_LOOK_S)

    async def _take(self) -> None:
        free = self._bounds.tasks - len(self._held)
        if free > 0 and self._start(await self._store.take(self._owner, most=free, for_s=LEASE_S)):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S * self._rng.uniform(0.8, 1.2)):
                await self._wake.wait()
        self._wake.clear()

    def _start(self, tasks: Sequence[Task]) -> int:
        """Who was gone for so long that it gets again what it had stops what it was doing then."""
        for task in tasks:
            for work, before in self._held.items():
                if (before.job.id, before.number) == (task.job.id, task.number):
                    work.cancel()
            work = self._tasks.create_task(self._work(task), name=f"{task.kind} {task.job.id} {task.number}")
            self._held[work] = task
            work.add_done_callback(self._ended)
        return len(tasks)

    def _ended(self, work: asyncio.Task[None]) -> None:
        del self._held[work]
        self._wake.set()

    async def _renew(self) -> None:
        """What could not be renewed in time others may have by now: they are the ones whose word counts."""
        await asyncio.sleep(_RENEW_S)
        held = dict(self._held)
        kept = await self._store.renew([*held.values()], for_s=LEASE_S) if held else ()
        still = {(task.job.id, task.number, task.fence) for task in kept}
        for work, task in held.items():
            if (task.job.id, task.number, task.fence) not in still:
                work.cancel()

    # ── work ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self, task: Task) -> None:
        """Never raises: what it is in belongs to everybody."""
        started = time.monotonic()
        outcome = "dropped"
        try:
            outcome = await self._do(task)
            if outcome == "taken over":  # or called off: then nobody has to wait until the lease ends
                await self._store.give_back(task)
        except LevelDown:
            pass
        except (Paused, BudgetExhausted) as paused:
            reason = str(paused) if isinstance(paused, Paused) else "budget"
            outcome = f"paused: {reason}"
            await self._surely(lambda: self._store.pause(task, reason, for_s=_PAUSE_S))
        except TryAgainLater as later:
            outcome, again_s = "put off", later.retry_after_s
            await self._surely(lambda: self._store.rest(task, for_s=again_s))
        except asyncio.CancelledError:
            with suppress(LevelDown):
                await asyncio.shield(self._store.give_back(task))
            raise
        except OSError as error:
            outcome = f"files: {type(error).__name__}"
            await self._later(task)
        except Exception as bug:  # supervision is for the errors that nobody thought of
            outcome = "a bug"
            self._telemetry.loop_crashed(loop="jobs", error=bug)
            await self._later(task)
        finally:
            self._telemetry.task_finished(
                job=task.job.id, kind=task.kind, number=task.number, outcome=outcome,
                duration_s=time.monotonic() - started,
            )  # fmt: skip

    async def _later(self, task: Task) -> None:
        """Somebody else may have more luck, or this one a little later."""
        await asyncio.sleep(_TROUBLE_S)
        with suppress(LevelDown):
            await self._store.give_back(task)

    async def _do(self, task: Task) -> str:
        match task.kind:
            case "read":
                return await self._read(task)
            case "embed":
                return await self._embed(task)
            case "join":
                return await self._join(task)
            case _:
                assert_never(task.kind)

    async def _read(self, task: Task) -> str:
        """Checks the input file, and says what is wrong with it or how it is cut."""
        order, bounds = task.job.order, self._bounds
        intake = Intake(
            wrong=lambda model: self._wrong(order, model), max_lines=bounds.max_lines, max_inputs=bounds.max_inputs,
            shard_lines=bounds.shard_lines,
        )  # fmt: skip
        with intake:
            async for data in self._blobs.reading(file_blob(order.input_file_id)):
                if not await asyncio.to_thread(intake.feed, data):
                    break
            await asyncio.to_thread(intake.finish)
        if intake.errors:
            held = await self._surely(lambda: self._store.refuse(task, intake.errors))
            return "refused" if held else "taken over"
        model, total = intake.model, intake.total
        held = await self._surely(lambda: self._store.accept(task, model=model, total=total, shards=intake.shards))
        return "done" if held else "taken over"

    async def _embed(self, task: Task) -> str:
        """The lines of a shard; before that what of them the vendor's batches bring, if that is wanted."""
        bought: MutableMapping[bytes, Vector] = {}
        before = NO_WORK
        if task.job.order.tier == "vendor_batch" and (task.note or self._wholesale.sells(task.job.model)):
            errand = self._errand(task)
            try:
                found = await self._vendor.look(errand) or await self._vendor.bring(errand)
            except TakenOver:
                return "taken over"
            task = errand.task
            if isinstance(found, Wait):
                await self._surely(lambda: self._store.rest(task, for_s=found.for_s))
                return "waits for the vendor"
            bought, before = found.vectors, NO_WORK if task.done_lines else found.work
        work = ShardWork(
            task, self._blobs, self._wire, self._engine.embed, self._commit,
            window=self._bounds.window, attempts=self._bounds.attempts, rng=self._rng, bought=bought, before=before,
        )  # fmt: skip
        return "done" if await work.run() else "taken over"

    async def _join(self, task: Task) -> str:
        """Puts the parts together; before that ends what a job that is over early has ordered."""
        job = task.job
        if job.ending != "completed" and job.order.tier == "vendor_batch":
            tasks = await self._surely(lambda: self._store.tasks(job.id))
            errands = [self._errand(each) for each in tasks if each.shard and each.done_lines < each.shard.lines]
            if not await self._vendor.call_off(errands, _over_since_s(job)):
                await self._surely(lambda: self._store.rest(task, for_s=_CALLED_OFF_LOOK_S))
                return "waits for the vendor"
        keep_s = self._bounds.keep_s
        joined = await self._surely(lambda: join(task, self._store, self._blobs, self._wire, keep_s=keep_s))
        return "done" if joined else "taken over"

    def _errand(self, task: Task) -> ShardErrand:
        return ShardErrand(task, self._blobs, self._wire, self._note)

    async def _note(self, task: Task, words: bytes) -> Task | None:
        return await self._surely(lambda: self._store.note(task, words))

    async def _commit(self, task: Task, piece: Piece) -> Task | None:
        after = await self._surely(lambda: self._store.commit(task, piece))
        if after is not None:
            self._telemetry.lines_committed(
                model=task.job.model, completed=piece.completed, failed=piece.failed, tokens=piece.tokens
            )
        return after

    async def _surely(self, use: Callable[[], Awaitable[_T]]) -> _T:
        """What it returns, however long the database is away: what was done is not thrown away for that."""
        again_s = _AGAIN_S
        while True:
            try:
                return await use()
            except LevelDown:
                await asyncio.sleep(again_s)
                again_s = min(_AGAIN_CAP_S, 2 * again_s)


def _over_since_s(job: Job) -> float:
    """Since when nothing more is wanted of a job that ends early (Unix seconds)."""
    return (job.cancelling_at_ms or job.finalizing_at_ms or job.expires_at_ms) / 1000
