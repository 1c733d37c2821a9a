"""Hides whose turn it is, who works on what, and whose word counts: leases with fences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace
from sqlalchemy import Row, case, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.job import Job, LineError, Piece, Shard, StoredFile, Task
from app.storage.sql.files import clock, keep
from app.storage.sql.job_rows import SUMMED, errors_column, job_of, new_piece, new_task, task_of
from app.storage.sql.job_states import (
    HELD,
    IS_FREE,
    WANTED,
    is_due,
    is_left,
    lock,
    lock_mine,
    mine,
    move_on,
    release,
    turn,
)
from app.storage.sql.tables import job_pieces, job_tasks, jobs, left_to_do, still_open

# ── whose turn it is ────────────────────────────────────────────────────────────────────────────────────────────────

_wanted_kind = case({one: kind for kind, statuses in WANTED.items() for one in statuses}, value=jobs.c.status)
_free = (
    select(job_tasks.c.job)
    .where(job_tasks.c.job == jobs.c.id, left_to_do, job_tasks.c.kind == _wanted_kind, IS_FREE)
    .exists()
)
_OPEN: Final = select(jobs, HELD, _free.label("free")).where(still_open)
"""Jobs that have not ended, with how many of their tasks are held, and whether there is one to take."""


async def take(connection: AsyncConnection, owner: str, most: int, for_s: float) -> list[Task]:
    """See `JobStore`."""
    now = await clock(connection)
    found = (await connection.execute(_OPEN)).all()
    due = sorted(row.id for row in found if is_due(row, now))
    if due:
        for job_id in due:
            await move_on(connection, job_id)
        found = (await connection.execute(_OPEN)).all()
    turns, taken = _Turns(found), list[Task]()
    while len(taken) < most and (job := turns.next()) is not None:
        row = await _take_one(connection, job, owner, now + int(1000 * for_s))
        turns.done(job, found=row is not None)
        if row is not None:
            taken.append(task_of(row, job_of(job)))
    return taken


class _Turns:
    """Of every tenant one before a second one, then of every job, the older first; what is held counts."""

    def __init__(self, found: Sequence[Row[Any]]) -> None:
        self._waiting = {row.id: row for row in found if _may_be_taken(row)}
        self._of_job, self._of_tenant = Counter[str](), Counter[str]()
        for row in found:
            self._of_job[row.id] += row.held
            self._of_tenant[row.tenant] += row.held

    def next(self) -> Row[Any] | None:
        """Whose turn it is."""
        return min(self._waiting.values(), key=self._place, default=None)

    def done(self, job: Row[Any], *, found: bool) -> None:
        """It had its turn; who had nothing to take has no other one."""
        if found:
            self._of_job[job.id] += 1
            self._of_tenant[job.tenant] += 1
        else:
            del self._waiting[job.id]

    def _place(self, row: Row[Any]) -> tuple[int, int, int, str]:
        return self._of_tenant[row.tenant], self._of_job[row.id], row.created_at_ms, row.id


def _may_be_taken(job: Row[Any]) -> bool:
    joins = job.status in WANTED["join"]
    return bool(job.free) and job.paused_until_ms is None and not (joins and job.held)


async def _take_one(connection: AsyncConnection, job: Row[Any], owner: str, until_ms: int) -> Row[Any] | None:
    kind = next(kind for kind, statuses in WANTED.items() if job.status in statuses)
    free = (job_tasks.c.job == job.id) & (job_tasks.c.kind == kind) & left_to_do & IS_FREE
    first = select(job_tasks.c.number).where(free).order_by(job_tasks.c.number).limit(1)
    number = first.with_for_update(skip_locked=True).scalar_subquery()
    leased = {"fence": job_tasks.c.fence + 1, "owner": owner, "held_until_ms": until_ms}
    taken = update(job_tasks).where(job_tasks.c.job == job.id, job_tasks.c.number == number).values(leased)
    return (await connection.execute(taken.returning(*job_tasks.c))).one_or_none()


# ── leases ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def renew(connection: AsyncConnection, tasks: Sequence[Task], for_s: float) -> list[Task]:
    """See `JobStore`."""
    until_ms = await clock(connection) + int(1000 * for_s)
    renewed = []
    for task in sorted(tasks, key=lambda task: (task.job.id, task.number)):
        lasts = update(job_tasks).where(mine(task)).values(held_until_ms=until_ms).returning(*job_tasks.c)
        row = (await connection.execute(lasts)).one_or_none()
        job = (await connection.execute(select(jobs).where(jobs.c.id == task.job.id))).one_or_none()
        if row is None or job is None:
            continue
        if job.status in WANTED[task.kind]:
            renewed.append(task_of(row, job_of(job)))
        else:
            await give_back(connection, task)
    return renewed


async def give_back(connection: AsyncConnection, task: Task) -> None:
    """See `JobStore`."""
    if await release(connection, mine(task)):
        await move_on(connection, task.job.id)


async def rest(connection: AsyncConnection, task: Task, for_s: float) -> None:
    """See `JobStore`."""
    until_ms = await clock(connection) + int(1000 * for_s)
    if await release(connection, mine(task), until_ms=until_ms):
        await move_on(connection, task.job.id)


async def note(connection: AsyncConnection, task: Task, words: bytes) -> Task | None:
    """See `JobStore`."""
    noted = update(job_tasks).where(mine(task)).values(note=words).returning(*job_tasks.c)
    row = (await connection.execute(noted)).one_or_none()
    return None if row is None else task_of(row, await _job(connection, task.job.id))


async def pause(connection: AsyncConnection, task: Task, reason: str, for_s: float) -> None:
    """See `JobStore`."""
    job = await lock_mine(connection, task)
    if job is None:
        return
    if job.status == "in_progress":
        until_ms = max(await clock(connection) + int(1000 * for_s), job.paused_until_ms or 0)
        paused = update(jobs).where(jobs.c.id == job.id).values(pause=reason, paused_until_ms=until_ms)
        await connection.execute(paused)
    await give_back(connection, task)


# ── what became of them ─────────────────────────────────────────────────────────────────────────────────────────────


async def accept(connection: AsyncConnection, task: Task, model: str, total: int, shards: Sequence[Shard]) -> bool:
    """See `JobStore`."""
    job = await lock_mine(connection, task)
    if job is None:
        return False
    if job.status != "validating":
        await give_back(connection, task)
        return False
    read = {"done_at_ms": await clock(connection), "owner": "", "held_until_ms": 0}
    await connection.execute(update(job_tasks).where(mine(task)).values(read))
    embeds = [new_task(job.id, number, "embed", shard) for number, shard in enumerate(shards, 1)]
    await connection.execute(insert(job_tasks), [*embeds, new_task(job.id, len(embeds) + 1, "join")])
    await turn(connection, job.id, "in_progress", model=model, total=total)
    return True


async def refuse(connection: AsyncConnection, task: Task, errors: Sequence[LineError]) -> bool:
    """See `JobStore`."""
    job = await lock_mine(connection, task)
    if job is None:
        return False
    if job.status != "validating":
        await give_back(connection, task)
        return False
    await turn(connection, job.id, "failed", errors=errors_column(errors))
    return True


async def commit(connection: AsyncConnection, task: Task, piece: Piece) -> Task | None:
    """See `JobStore`."""
    job = await lock(connection, task.job.id)
    if job is None:
        return None
    row = await _advance(connection, task, piece) if job.status == "in_progress" else None
    if row is None:
        return await _said_before(connection, task, piece)
    columns = new_piece(task, piece)
    await connection.execute(insert(job_pieces).values(columns))
    return task_of(row, await _count(connection, job.id, columns, ends=row.done_at_ms is not None))


async def close(connection: AsyncConnection, task: Task, output: StoredFile | None, errors: StoredFile | None) -> bool:
    """See `JobStore`."""
    ids = ("" if output is None else output.id, "" if errors is None else errors.id)
    job = await lock_mine(connection, task)
    if job is None:
        closed = select(jobs.c.id).where(jobs.c.id == task.job.id, jobs.c.status == jobs.c.ending)
        same = closed.where(jobs.c.output_file_id == ids[0], jobs.c.error_file_id == ids[1])
        return (await connection.execute(same)).first() is not None
    now = await clock(connection)
    for file in (output, errors):
        if file is not None:
            await keep(connection, file, now)
    await turn(connection, job.id, job.ending, output_file_id=ids[0], error_file_id=ids[1])
    return True


async def _advance(connection: AsyncConnection, task: Task, piece: Piece) -> Row[Any] | None:
    """The task with the piece behind it; None: it is no longer held, or what comes next is another one."""
    done = job_tasks.c.done_lines + piece.lines
    ends = done == job_tasks.c.lines
    changes = {
        "done_lines": done,
        "next_piece": piece.number + 1,
        "done_at_ms": case((ends, await clock(connection))),
        "owner": case((ends, ""), else_=job_tasks.c.owner),
    }
    follows = (job_tasks.c.next_piece == piece.number) & (done <= job_tasks.c.lines) & left_to_do
    statement = update(job_tasks).where(mine(task), follows).values(changes)
    return (await connection.execute(statement.returning(*job_tasks.c))).one_or_none()


async def _said_before(connection: AsyncConnection, task: Task, piece: Piece) -> Task | None:
    """The task with it, if this very piece was committed by this very holder, who did not hear of it.

    Also if somebody else has the task by now: the piece counts, its blobs must stay.
    """
    committed = [job_pieces.c[name] == value for name, value in new_piece(task, piece).items()]
    if (await connection.execute(select(job_pieces.c.task).where(*committed))).first() is None:
        return None
    job = await _job(connection, task.job.id)
    return replace(task, job=job, done_lines=task.done_lines + piece.lines, next_piece=piece.number + 1)


async def _count(connection: AsyncConnection, job_id: str, piece: Mapping[str, Any], *, ends: bool) -> Job:
    """The job with the columns of a piece added, which may have been its last one."""
    more = {name: jobs.c[name] + piece[name] for name in SUMMED}
    if ends and not await is_left(connection, job_id, "embed"):
        return job_of(await turn(connection, job_id, "finalizing", **more))
    counted = update(jobs).where(jobs.c.id == job_id).values(more).returning(*jobs.c)
    return job_of((await connection.execute(counted)).one())


async def _job(connection: AsyncConnection, job_id: str) -> Job:
    return job_of((await connection.execute(select(jobs).where(jobs.c.id == job_id))).one())
