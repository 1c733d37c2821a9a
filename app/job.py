"""The nouns of bulk work: stored files, jobs, and what of a job somebody works on; no I/O."""

from typing import Final, Literal, TypeAlias

import msgspec

from app.domain import Tier

Status: TypeAlias = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
"""As callers see it."""

ENDED: Final[frozenset[Status]] = frozenset({"failed", "completed", "expired", "cancelled"})

Ending: TypeAlias = Literal["completed", "expired", "cancelled"]
"""What a job becomes once its parts are joined."""

Purpose: TypeAlias = Literal["batch", "batch_output"]

Kind: TypeAlias = Literal["read", "embed", "join"]
"""What a task does: check the input file, embed a span of its lines, put the parts together."""


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a tenant; its bytes are under `id` where blobs are kept. Times are Unix seconds."""

    id: str
    tenant: str
    purpose: Purpose
    filename: str
    size_bytes: int
    created_at_s: int
    expires_at_s: int | None = None


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with an input file; `line` counts from 1, None: with the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Order(msgspec.Struct, frozen=True):
    """What a caller wants done: on whose account, with which file, within which time.

    `idempotency_key` "" is none; `digest` is then compared, of the body that came with it.
    """

    id: str
    tenant: str
    project: str
    key: str
    input_file_id: str
    window_s: int
    metadata: dict[str, str]
    tier: Tier = "online"
    output_expires_after_s: int | None = None
    idempotency_key: str = ""
    digest: bytes = b""


class Work(msgspec.Struct, frozen=True):
    """What lines took: texts, how many of these were bought already, calls, about what they cost; None: not known."""

    texts: int = 0
    cached: int = 0
    calls: float = 0.0
    nano_usd: int | None = 0

    def __add__(self, other: "Work") -> "Work":
        """Both together."""
        cost = None if self.nano_usd is None or other.nano_usd is None else self.nano_usd + other.nano_usd
        return Work(self.texts + other.texts, self.cached + other.cached, self.calls + other.calls, cost)


NO_WORK: Final = Work()


class Job(msgspec.Struct, frozen=True):
    """An `Order` and what became of it. Times are Unix milliseconds; counts are lines, `tokens` those of good ones.

    `ending` is what it will become once all its parts are joined. `pause` says for what it waits, "" for nothing.
    """

    order: Order
    status: Status
    created_at_ms: int
    expires_at_ms: int
    model: str = ""
    ending: Ending = "completed"
    errors: tuple[LineError, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    tokens: int = 0
    work: Work = NO_WORK
    pause: str = ""
    output_file_id: str = ""
    error_file_id: str = ""
    in_progress_at_ms: int | None = None
    finalizing_at_ms: int | None = None
    completed_at_ms: int | None = None
    failed_at_ms: int | None = None
    expired_at_ms: int | None = None
    cancelling_at_ms: int | None = None
    cancelled_at_ms: int | None = None

    @property
    def id(self) -> str:
        """The order's."""
        return self.order.id


class Shard(msgspec.Struct, frozen=True):
    """A span of the lines of an input file, and where in the file it is; lines count from 0, blank ones too."""

    first_line: int
    lines: int
    offset_bytes: int
    size_bytes: int


class Task(msgspec.Struct, frozen=True):
    """A part of a job, leased: only who holds the newest `fence` may say what became of it.

    For `embed`: the first `done_lines` of the shard are in the pieces before `next_piece`. `note` is what the vendor's
    batch is known by, or nothing.
    """

    job: Job
    number: int
    kind: Kind
    fence: int
    owner: str
    shard: Shard | None = None
    done_lines: int = 0
    next_piece: int = 0
    note: bytes = b""


class Piece(msgspec.Struct, frozen=True):
    """Lines of a task that have been done, in order: how many, of these good and failed ones, and their tokens.

    Sizes are those of its blobs, 0 for none.
    """

    number: int
    lines: int
    completed: int
    failed: int
    tokens: int
    output_bytes: int
    error_bytes: int
    work: Work = NO_WORK


def file_blob(file_id: str) -> str:
    """Where the bytes of a stored file are."""
    return f"files/{file_id}"


def parts_prefix(job_id: str) -> str:
    """Where all pieces of a job are until they are joined."""
    return f"parts/{job_id}"


def task_folder(job_id: str, task: int) -> str:
    """Where what belongs to a task of it is until then."""
    return f"{parts_prefix(job_id)}/{task:06}"


def piece_blobs(job_id: str, task: int, fence: int, piece: int) -> tuple[str, str]:
    """Where a piece's good lines and its failed ones are; an earlier holder of the task writes elsewhere."""
    stem = f"{task_folder(job_id, task)}/{piece:06}-{fence}"
    return f"{stem}.out", f"{stem}.err"
