"""Hides where it is kept which jobs there are, what became of them, and what they leave behind."""

from collections.abc import Sequence
from functools import partial

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import BatchLimitExceeded, Conflict, IdempotencyMismatch, NotFound
from app.job import ENDED, Job, LineError, Order, Piece, Shard, StoredFile, Task
from app.job_ports import JobPage
from app.storage.sql import work
from app.storage.sql.files import (
    WITHIN_S,
    SqlFiles,
    alone,
    behind,
    by_creation,
    clock,
    erase_files,
    in_force,
    sayable,
)
from app.storage.sql.job_rows import job_of, new_job, new_task, piece_of, task_of
from app.storage.sql.job_states import clear, lock, release, turn
from app.storage.sql.tables import files, job_leavings, job_pieces, job_tasks, jobs, still_open

_WHOLE_JOB_S = 30.0


class SqlJobs(SqlFiles):
    """A `JobStore` of all that share a database."""

    async def create(self, order: Order, *, most_open: int) -> Job:
        """See `JobStore`."""
        return await self.database.write(partial(_create, order=order, most_open=most_open), within_s=WITHIN_S)

    async def job(self, tenant: str, job_id: str) -> Job | None:
        """See `JobStore`."""
        found = await self.rows(select(jobs).where(jobs.c.id == job_id, jobs.c.tenant == tenant), of=job_id)
        return job_of(found[0]) if found else None

    async def jobs(self, tenant: str, *, after: str, limit: int) -> JobPage | None:
        """See `JobStore`."""
        wanted = select(jobs).where(jobs.c.tenant == tenant)
        if after:
            found = await self.rows(wanted.where(jobs.c.id == after), of=after)
            if not found:
                return None
            wanted = wanted.where(behind(jobs, (found[0].created_at_ms, after), ascending=False))
        rows = await self.rows(by_creation(wanted, jobs, ascending=False).limit(limit + 1))
        return JobPage([job_of(row) for row in rows[:limit]], len(rows) > limit)

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        """See `JobStore`."""
        if not sayable(job_id):
            return None
        return await self.database.write(partial(_cancel, tenant=tenant, job_id=job_id), within_s=WITHIN_S)

    # ── for who works ───────────────────────────────────────────────────────────────────────────────────────────────

    async def take(self, owner: str, *, most: int, for_s: float) -> Sequence[Task]:
        """See `JobStore`."""
        return await self.database.write(partial(work.take, owner=owner, most=most, for_s=for_s), within_s=WITHIN_S)

    async def renew(self, tasks: Sequence[Task], *, for_s: float) -> Sequence[Task]:
        """See `JobStore`."""
        return await self.database.write(partial(work.renew, tasks=tasks, for_s=for_s), within_s=WITHIN_S)

    async def give_back(self, task: Task) -> None:
        """See `JobStore`."""
        await self.database.write(partial(work.give_back, task=task), within_s=WITHIN_S)

    async def rest(self, task: Task, *, for_s: float) -> None:
        """See `JobStore`."""
        await self.database.write(partial(work.rest, task=task, for_s=for_s), within_s=WITHIN_S)

    async def accept(self, task: Task, *, model: str, total: int, shards: Sequence[Shard]) -> bool:
        """See `JobStore`."""
        use = partial(work.accept, task=task, model=model, total=total, shards=shards)
        return await self.database.write(use, within_s=_WHOLE_JOB_S)

    async def refuse(self, task: Task, errors: Sequence[LineError]) -> bool:
        """See `JobStore`."""
        return await self.database.write(partial(work.refuse, task=task, errors=errors), within_s=WITHIN_S)

    async def commit(self, task: Task, piece: Piece) -> Task | None:
        """See `JobStore`."""
        return await self.database.write(partial(work.commit, task=task, piece=piece), within_s=WITHIN_S)

    async def note(self, task: Task, note: bytes) -> Task | None:
        """See `JobStore`."""
        return await self.database.write(partial(work.note, task=task, words=note), within_s=WITHIN_S)

    async def pause(self, task: Task, reason: str, *, for_s: float) -> None:
        """See `JobStore`."""
        await self.database.write(partial(work.pause, task=task, reason=reason, for_s=for_s), within_s=WITHIN_S)

    async def pieces(self, job_id: str) -> Sequence[tuple[int, int, Piece]]:
        """See `JobStore`."""
        wanted = select(job_pieces).where(job_pieces.c.job == job_id)
        rows = await self.rows(wanted.order_by(job_pieces.c.task, job_pieces.c.number))
        return [(row.task, row.fence, piece_of(row)) for row in rows]

    async def tasks(self, job_id: str) -> Sequence[Task]:
        """See `JobStore`."""
        found = await self.rows(select(jobs).where(jobs.c.id == job_id))
        embeds = select(job_tasks).where(job_tasks.c.job == job_id, job_tasks.c.kind == "embed")
        rows = await self.rows(embeds.order_by(job_tasks.c.number)) if found else ()
        return [task_of(row, job_of(found[0])) for row in rows]

    async def close(self, task: Task, *, output: StoredFile | None, errors: StoredFile | None) -> bool:
        """See `JobStore`."""
        use = partial(work.close, task=task, output=output, errors=errors)
        return await self.database.write(use, within_s=_WHOLE_JOB_S)

    async def gone_parts(self, limit: int) -> Sequence[str]:
        """See `JobStore`."""
        return [row.job for row in await self.rows(select(job_leavings).limit(limit))]

    async def forget_parts(self, job_ids: Sequence[str]) -> None:
        """See `JobStore`."""
        statement = delete(job_leavings).where(job_leavings.c.job.in_(job_ids))
        await self.database.write(lambda connection: connection.execute(statement), within_s=WITHIN_S)


async def erase_jobs(connection: AsyncConnection, tenant: str, nobody: str) -> None:
    """Ends what a tenant has open, and removes its jobs and files; whoever works for it is not heard any more."""
    await alone(connection, tenant)
    ours = select(jobs.c.id).where(jobs.c.tenant == tenant, still_open).order_by(jobs.c.id).with_for_update()
    for job_id in (await connection.execute(ours)).scalars().all():
        await clear(connection, job_id)
    await connection.execute(delete(jobs).where(jobs.c.tenant == tenant))
    await erase_files(connection, tenant, nobody)


async def _create(connection: AsyncConnection, order: Order, most_open: int) -> Job:
    await alone(connection, order.tenant)
    if order.idempotency_key and (known := await _known(connection, order)) is not None:
        return known
    await _check_file(connection, order)
    opened = select(func.count()).select_from(jobs).where(jobs.c.tenant == order.tenant, still_open)
    if most_open and (await connection.execute(opened)).scalar_one() >= most_open:
        raise BatchLimitExceeded(f"You have {most_open} batches that have not ended: wait for one, or cancel one.")
    values = new_job(order, await clock(connection))
    row = (await connection.execute(insert(jobs).values(values).returning(*jobs.c))).one()
    await connection.execute(insert(job_tasks).values(new_task(order.id, 0, "read")))
    return job_of(row)


async def _known(connection: AsyncConnection, order: Order) -> Job | None:
    """The job that was made when the idempotency key was used before."""
    same = (jobs.c.tenant == order.tenant) & (jobs.c.idempotency_key == order.idempotency_key)
    row = (await connection.execute(select(jobs).where(same))).one_or_none()
    if row is not None and row.digest != order.digest:
        raise IdempotencyMismatch
    return None if row is None else job_of(row)


async def _check_file(connection: AsyncConnection, order: Order) -> None:
    wanted = order.input_file_id
    there = select(files.c.id).where(in_force(order.tenant, wanted))
    if not sayable(wanted) or (await connection.execute(there)).first() is None:
        raise NotFound(f"No such File object: {wanted}", param="input_file_id", code=None)


async def _cancel(connection: AsyncConnection, tenant: str, job_id: str) -> Job | None:
    job = await lock(connection, job_id)
    if job is None or job.tenant != tenant:
        return None
    if job.status in ENDED:
        raise Conflict(f"Cannot cancel a batch with status '{job.status}'.", code="batch_ended")
    if job.status == "cancelling":
        return job_of(job)
    row = await turn(connection, job_id, "cancelling", ending="cancelled")
    if job.status == "validating" and not job.held:
        row = await turn(connection, job_id, "cancelled")
    # who joins the parts already does so for another ending
    await release(connection, (job_tasks.c.job == job_id) & (job_tasks.c.kind == "join"))
    return job_of(row)
