"""Hides how orders, jobs, tasks and pieces stand in rows."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Row

from app.job import Job, LineError, Order, Piece, Shard, Task, Work

_ORDER: Final = tuple(name for name in Order.__struct_fields__ if name != "metadata")
_JOB: Final = tuple(name for name in Job.__struct_fields__ if name not in {"order", "errors", "work"})
_SHARD: Final = Shard.__struct_fields__
_TASK: Final = tuple(name for name in Task.__struct_fields__ if name not in {"job", "shard"})
_PIECE: Final = tuple(name for name in Piece.__struct_fields__ if name != "work")
_WORK: Final = Work.__struct_fields__
SUMMED: Final = ("completed", "failed", "tokens", *_WORK)
"""What of a job is the sum of its pieces; what is NULL stays so."""


def new_job(order: Order, now: int) -> dict[str, Any]:
    """The columns of a job that has just been ordered."""
    ordered = {name: getattr(order, name) for name in _ORDER}
    counts = dict.fromkeys(("total", *SUMMED), 0)
    return ordered | counts | {
        "metadata": msgspec.json.encode(order.metadata).decode(), "errors": "[]", "status": "validating",
        "ending": "completed", "model": "", "pause": "", "output_file_id": "", "error_file_id": "",
        "created_at_ms": now, "expires_at_ms": now + 1000 * order.window_s,
    }  # fmt: skip


def new_task(job_id: str, number: int, kind: str, shard: Shard | None = None) -> dict[str, Any]:
    """The columns of a task that nobody has taken yet."""
    span = {name: None if shard is None else getattr(shard, name) for name in _SHARD}
    return span | {
        "job": job_id, "number": number, "kind": kind, "fence": 0, "owner": "", "held_until_ms": 0, "done_lines": 0,
        "next_piece": 0, "note": b"",
    }  # fmt: skip


def new_piece(task: Task, piece: Piece) -> dict[str, Any]:
    """The columns of a piece."""
    own = {name: getattr(piece, name) for name in _PIECE} | {name: getattr(piece.work, name) for name in _WORK}
    return own | {"job": task.job.id, "task": task.number, "fence": task.fence}


def errors_column(errors: Sequence[LineError]) -> str:
    """Errors in one column."""
    return msgspec.json.encode(errors).decode()


def job_of(row: Row[Any]) -> Job:
    """From a row of `jobs`."""
    columns = row._mapping  # noqa: SLF001 — SQLAlchemy's public name
    order = Order(metadata=msgspec.json.decode(row.metadata), **{name: columns[name] for name in _ORDER})
    errors = msgspec.json.decode(row.errors, type=tuple[LineError, ...])
    return Job(order=order, errors=errors, work=_work(row), **{name: columns[name] for name in _JOB})


def task_of(row: Row[Any], job: Job) -> Task:
    """From a row of `job_tasks`."""
    columns = row._mapping  # noqa: SLF001
    shard = None if row.first_line is None else Shard(*(columns[name] for name in _SHARD))
    return Task(job=job, shard=shard, **{name: columns[name] for name in _TASK})


def piece_of(row: Row[Any]) -> Piece:
    """From a row of `job_pieces`."""
    return Piece(work=_work(row), **{name: row._mapping[name] for name in _PIECE})  # noqa: SLF001


def _work(row: Row[Any]) -> Work:
    return Work(**{name: row._mapping[name] for name in _WORK})  # noqa: SLF001
