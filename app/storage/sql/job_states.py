"""Hides how a job gets from one status to the next, under its lock.

Whoever locks both locks a job before its tasks; who has tasks locked already does not wait for a job.
"""

from typing import Any, Final

from sqlalchemy import ColumnElement, Row, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.job import ENDED, Kind, Status, Task
from app.storage.sql.files import clock
from app.storage.sql.tables import has_owner, insert, job_leavings, job_pieces, job_tasks, jobs, left_to_do, now_ms

WANTED: Final[dict[Kind, tuple[Status, ...]]] = {
    "read": ("validating",),
    "embed": ("in_progress",),
    "join": ("finalizing", "cancelling"),
}
"""In which status of its job somebody should work on a task."""

IS_HELD: Final = has_owner & (job_tasks.c.held_until_ms > now_ms)
IS_FREE: Final = job_tasks.c.held_until_ms <= now_ms
"""What rests has no owner, and is not free either."""
NO_PAUSE: Final = {"pause": "", "paused_until_ms": None}

HELD: Final = (
    select(func.count()).select_from(job_tasks).where(job_tasks.c.job == jobs.c.id, IS_HELD).scalar_subquery()
).label("held")
"""How many tasks of a job are held now."""


def mine(task: Task) -> ColumnElement[bool]:
    """The task, if nobody has taken it since."""
    return (
        (job_tasks.c.job == task.job.id)
        & (job_tasks.c.number == task.number)
        & (job_tasks.c.fence == task.fence)
        & (job_tasks.c.owner == task.owner)
        & has_owner
    )


async def lock(connection: AsyncConnection, job_id: str, *, waits: bool = True) -> Row[Any] | None:
    """The job as it is until the transaction ends, with how many of its tasks are `held`."""
    own = select(jobs.c.id).where(jobs.c.id == job_id).with_for_update(skip_locked=not waits)
    if (await connection.execute(own)).first() is None:
        return None
    return (await connection.execute(select(jobs, HELD).where(jobs.c.id == job_id))).one()


async def lock_mine(connection: AsyncConnection, task: Task) -> Row[Any] | None:
    """The task's job, with it locked; None: the task is no longer held."""
    job = await lock(connection, task.job.id)
    held = select(job_tasks.c.number).where(mine(task)).with_for_update()
    return None if (await connection.execute(held)).first() is None else job


async def release(connection: AsyncConnection, tasks: ColumnElement[bool], *, until_ms: int = 0) -> bool:
    """Whoever held them is not heard any more, and nobody takes them before then; whether there were any."""
    freed = {"owner": "", "held_until_ms": until_ms}
    return bool((await connection.execute(update(job_tasks).where(tasks).values(freed))).rowcount)


async def turn(connection: AsyncConnection, job_id: str, status: Status, **more: Any) -> Row[Any]:
    """Sets a locked job's status and the moment of it. Of one that ends with this nothing is left to do."""
    values = {"status": status, f"{status}_at_ms": await clock(connection)} | NO_PAUSE | more
    row = (await connection.execute(update(jobs).where(jobs.c.id == job_id).values(values).returning(*jobs.c))).one()
    if status in ENDED:
        await clear(connection, job_id)
    return row


async def clear(connection: AsyncConnection, job_id: str) -> None:
    """Forgets what was to do for a locked job, and remembers that its pieces are to be removed."""
    ours = job_tasks.c.job == job_id
    await connection.execute(select(job_tasks.c.job).where(ours).order_by(job_tasks.c.number).with_for_update())
    await connection.execute(delete(job_tasks).where(ours))
    await connection.execute(delete(job_pieces).where(job_pieces.c.job == job_id))
    await connection.execute(insert(connection, job_leavings).values(job=job_id).on_conflict_do_nothing())


async def move_on(connection: AsyncConnection, job_id: str) -> None:
    """Does what has become due; if the job is locked, somebody else will."""
    job = await lock(connection, job_id, waits=False)
    now = await clock(connection)
    if job is None or not is_due(job, now):
        return
    match job.status:
        case "validating":
            await turn(connection, job_id, "expired", ending="expired")
        case "cancelling":
            await turn(connection, job_id, "cancelled")
        case "in_progress" if job.expires_at_ms <= now:
            await turn(connection, job_id, "finalizing", ending="expired")
        case _:
            await connection.execute(update(jobs).where(jobs.c.id == job_id).values(NO_PAUSE))


def is_due(job: Row[Any], now: int) -> bool:
    """Whether its window is over, or its pause, or nobody reads the file of one that is to be cancelled."""
    match job.status:
        case "validating":
            return bool(job.expires_at_ms <= now)
        case "in_progress":
            return bool(min(job.expires_at_ms, job.paused_until_ms or job.expires_at_ms) <= now)
        case "cancelling":
            return job.in_progress_at_ms is None and not job.held
        case _:
            return False


async def is_left(connection: AsyncConnection, job_id: str, kind: Kind) -> bool:
    """Whether a task of this kind is left to do."""
    left = select(job_tasks.c.job).where(job_tasks.c.job == job_id, job_tasks.c.kind == kind, left_to_do)
    return (await connection.execute(left.limit(1))).first() is not None
