"""Hides what stands around a store of jobs in its tests: a database, a tenant's file, and who works there."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import update

from app.job import Job, Order, Piece, Shard, StoredFile, Task, Work
from app.job_ports import JobStore
from app.storage.sql.database import Database
from app.storage.sql.jobs import SqlJobs
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import job_tasks, jobs
from tests.contract.stored import change

FOR_S = 600.0
DAY_S = 86_400


class Shop:
    """A database with the file `in` of the tenant `a`, and who works there."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.store: JobStore = SqlJobs(database)
        self._made = 0

    async def upload(self, file_id: str = "in", tenant: str = "a", *, most_bytes: int = 0, **more: Any) -> StoredFile:
        """A file of ten bytes."""
        values: dict[str, Any] = {"purpose": "batch", "filename": "x.jsonl", "size_bytes": 10, "created_at_s": 0}
        return await self.store.add_file(StoredFile(file_id, tenant, **(values | more)), most_bytes=most_bytes)

    def order(self, tenant: str = "a", **more: Any) -> Order:
        """A new one, of the file `in`."""
        self._made += 1
        values: dict[str, Any] = {
            "id": f"batch_{self._made:03}", "project": "p", "key": "k", "input_file_id": "in",
            "window_s": DAY_S, "metadata": {},
        }  # fmt: skip
        return Order(tenant=tenant, **(values | more))

    async def create(self, tenant: str = "a", **more: Any) -> Job:
        """A job in `validating`, older than what is made after it."""
        job = await self.store.create(self.order(tenant, **more), most_open=0)
        await self.set_job(job, created_at_ms=self._made)
        return job

    async def take(self, owner: str = "one", most: int = 1) -> list[Task]:
        """What is there to be taken."""
        return [*await self.store.take(owner, most=most, for_s=FOR_S)]

    async def take_one(self, owner: str = "one") -> Task:
        """The one that comes next."""
        (task,) = await self.take(owner)
        return task

    async def begin(self, tenant: str = "a", lines: Sequence[int] = (10,), **more: Any) -> Job:
        """A job in `in_progress` with a shard of so many lines each."""
        job = await self.create(tenant, **more)
        await self.set_job(job, created_at_ms=0)  # it is read before anything else is done
        read = await self.take_one("reader")
        await self.set_job(job, created_at_ms=self._made)
        assert (read.kind, read.job.id) == ("read", job.id)
        shards = [Shard(10 * n, count, 1000 * n, 999) for n, count in enumerate(lines)]
        assert await self.store.accept(read, model="mini", total=sum(lines), shards=shards)
        return await self.look(job)

    async def finish(self) -> Task:
        """Does what there is to do of one job; its task `join`."""
        while (task := await self.take_one()).kind == "embed":
            assert await self.store.commit(task, piece(task)) is not None
        return task

    async def look(self, job: Job) -> Job:
        """As it is now."""
        found = await self.store.job(job.order.tenant, job.id)
        assert found is not None
        return found

    async def run_out(self, task: Task) -> None:
        """The task's lease ends, as it would after a time."""
        ours = (job_tasks.c.job == task.job.id) & (job_tasks.c.number == task.number)
        await change(self.database, update(job_tasks).where(ours).values(held_until_ms=1))

    async def set_job(self, job: Job, **columns: Any) -> None:
        """What only time would do."""
        await change(self.database, update(jobs).where(jobs.c.id == job.id).values(columns))


def piece(task: Task, lines: int | None = None, *, failed: int = 0, number: int | None = None) -> Piece:
    """What comes next of a task: so many lines, by default all that are left."""
    assert task.shard is not None
    count = task.shard.lines - task.done_lines if lines is None else lines
    work = Work(texts=count, cached=1, calls=0.5, nano_usd=7)
    at = task.next_piece if number is None else number
    return Piece(at, count, count - failed, failed, 3 * count, 100, 5 * failed, work)


def output(job: Job, what: str = "out", **more: Any) -> StoredFile:
    """A joined file."""
    return StoredFile(f"{what}-{job.id}", job.order.tenant, "batch_output", "o.jsonl", 20, 0, **more)


@asynccontextmanager
async def open_shop(url: str) -> AsyncIterator[Shop]:
    """With its file."""
    async with Database(url) as database:
        await migrate(database)
        made = Shop(database)
        await made.upload()
        yield made
