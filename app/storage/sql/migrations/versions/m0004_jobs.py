"""Files, jobs, their tasks and pieces."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
additive = True

_COUNTS = ("completed", "failed", "tokens", "texts", "cached")
_MOMENTS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def upgrade() -> None:
    """Makes the tables of bulk work."""
    _files()
    _jobs()
    _tasks()
    _pieces()


def _files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Text, primary_key=True),
        *_each(sa.Text, "tenant", "purpose", "filename"),
        *_each(sa.BigInteger, "size_bytes", "created_at_ms"),
        sa.Column("expires_at_s", sa.BigInteger),
    )
    op.create_index("files_by_tenant", "files", ["tenant", "created_at_ms", "id"])
    op.create_index("files_by_expiry", "files", ["expires_at_s"])


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text, primary_key=True),
        *_each(sa.Text, "tenant", "project", "key", "input_file_id", "metadata", "tier", "idempotency_key"),
        sa.Column("window_s", sa.BigInteger, nullable=False),
        sa.Column("output_expires_after_s", sa.BigInteger),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        *_each(sa.Text, "status", "ending", "model", "errors", "pause", "output_file_id", "error_file_id"),
        *_each(sa.BigInteger, "total", *_COUNTS),
        sa.Column("calls", sa.Float, nullable=False),
        sa.Column("nano_usd", sa.BigInteger),
        sa.Column("paused_until_ms", sa.BigInteger),
        *_each(sa.BigInteger, "created_at_ms", "expires_at_ms"),
        *(sa.Column(f"{each}_at_ms", sa.BigInteger) for each in _MOMENTS),
    )
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "created_at_ms", "id"])
    _partial("jobs_open", "jobs", ["tenant"], "status NOT IN ('failed', 'completed', 'expired', 'cancelled')")
    _partial("jobs_by_key", "jobs", ["tenant", "idempotency_key"], "idempotency_key <> ''", unique=True)


def _tasks() -> None:
    op.create_table(
        "job_tasks",
        sa.Column("job", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        *_each(sa.Text, "kind", "owner"),
        *_each(sa.BigInteger, "fence", "held_until_ms", "done_lines", "next_piece"),
        sa.Column("note", sa.LargeBinary, nullable=False),
        *(
            sa.Column(name, sa.BigInteger)
            for name in ("done_at_ms", "first_line", "lines", "offset_bytes", "size_bytes")
        ),
    )
    _partial("job_tasks_left", "job_tasks", ["job", "kind", "number"], "done_at_ms IS NULL")
    _partial("job_tasks_held", "job_tasks", ["job"], "owner <> ''")


def _pieces() -> None:
    op.create_table(
        "job_pieces",
        sa.Column("job", sa.Text, primary_key=True),
        sa.Column("task", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        *_each(sa.BigInteger, "fence", "lines", *_COUNTS, "output_bytes", "error_bytes"),
        sa.Column("calls", sa.Float, nullable=False),
        sa.Column("nano_usd", sa.BigInteger),
    )
    op.create_table("job_leavings", sa.Column("job", sa.Text, primary_key=True))


def _each(kind: type[sa.types.TypeEngine[Any]], *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=False) for name in names]


def _partial(name: str, table: str, columns: list[str], where: str, *, unique: bool = False) -> None:
    op.create_index(
        name, table, columns, unique=unique, postgresql_where=sa.text(where), sqlite_where=sa.text(where)
    )  # fmt: skip
