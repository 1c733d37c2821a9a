"""What bulk work needs from the world: Protocols whose docstrings are the contract; see `ports`."""

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from app.domain import Space, Text
from app.errors import ProviderError
from app.job import Job, LineError, Order, Piece, Purpose, Shard, StoredFile, Task


class Writer(Protocol):
    """A blob that is being written."""

    async def write(self, data: bytes) -> None:
        """Adds `data`."""


class Blobs(Protocol):
    """Bytes by name, shared by all replicas. Names are slashes between `[A-Za-z0-9._-]+`. Raises OSError only."""

    def writing(self, name: str) -> AbstractAsyncContextManager[Writer]:
        """What is written inside is there as a whole once the block is left, durably; after an exception not at all.

        What was there before is replaced.
        """

    def reading(self, name: str, *, offset_bytes: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """Its bytes in pieces of at most 1 MiB, from the offset on, at most so many. FileNotFoundError."""

    async def delete(self, names: Collection[str]) -> None:
        """Removes what there is of them."""

    async def delete_under(self, prefix: str) -> None:
        """Removes everything whose name begins with `prefix` and a slash."""


class FilePage(NamedTuple):
    """Rows in the order that was asked for, and whether more stand behind them."""

    rows: Sequence[StoredFile]
    has_more: bool


class JobPage(NamedTuple):
    """The same of jobs."""

    rows: Sequence[Job]
    has_more: bool


class FileStore(Protocol):
    """Which files there are. What is not the tenant's is not there. Every method raises LevelDown."""

    async def add_file(self, file: StoredFile, *, most_bytes: int) -> StoredFile:
        """Keeps it, its times moved to the store's.

        Raises BatchLimitExceeded where the tenant's were more than so many together, 0: no bound.
        """

    async def file(self, tenant: str, file_id: str) -> StoredFile | None:
        """One that is neither deleted nor expired."""

    async def files(
        self, tenant: str, *, purpose: Purpose | None, after: str, limit: int, ascending: bool
    ) -> FilePage | None:
        """By creation, from behind the file `after`; None where there is no such file."""

    async def delete_file(self, tenant: str, file_id: str) -> bool:
        """Whether there was one; raises Conflict while a job that has not ended reads it."""

    async def gone_files(self, limit: int) -> Sequence[str]:
        """Ids of deleted and expired files whose bytes may still be there, until `forget_files` names them.

        Not of those that an open job reads.
        """

    async def forget_files(self, file_ids: Sequence[str]) -> None:
        """Their bytes are gone."""


class JobStore(FileStore, Protocol):
    """Which jobs there are and who works on what: every change is one transaction. Every method raises LevelDown.

    A task is held by whoever took it last, until its lease ends; what an earlier holder says is not heard.
    """

    async def create(self, order: Order, *, most_open: int) -> Job:
        """A job in `validating` with its one task `read`; for an idempotency key that is known, the job of before.

        Raises NotFound for a file that is not there (`input_file_id`), BatchLimitExceeded where the tenant has so many
        open jobs, 0: no bound, IdempotencyMismatch for a known key with another digest.
        """

    async def job(self, tenant: str, job_id: str) -> Job | None:
        """One of the tenant's."""

    async def jobs(self, tenant: str, *, after: str, limit: int) -> JobPage | None:
        """The newest first, from behind the job `after`; None where there is no such job."""

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        """In `cancelling` from now on, `cancelled` when nobody works on it any more; raises Conflict if ended."""

    # ── for who works ───────────────────────────────────────────────────────────────────────────────────────────────

    async def take(self, owner: str, *, most: int, for_s: float) -> Sequence[Task]:
        """Leases up to so many tasks that nobody holds; of every tenant, then of every job, one before a second one.

        Of jobs in `validating` the task `read`; in `in_progress` and not paused the tasks `embed`; the task `join` once
        it is all that is left. Older jobs first; what is held counts. Also moves on what waits for a time: jobs past
        their window, pauses that are over.
        """

    async def renew(self, tasks: Sequence[Task], *, for_s: float) -> Sequence[Task]:
        """Those of them that are still held and wanted, with longer leases; the others should be dropped at once.

        They count as given back.
        """

    async def give_back(self, task: Task) -> None:
        """Somebody else may take it now."""

    async def rest(self, task: Task, *, for_s: float) -> None:
        """Gives the task back, and nobody takes it before then."""

    async def accept(self, task: Task, *, model: str, total: int, shards: Sequence[Shard]) -> bool:
        """The file is good: the job is in `in_progress` with a task `embed` for each shard. False: no longer held."""

    async def refuse(self, task: Task, errors: Sequence[LineError]) -> bool:
        """The file is not: the job has `failed`."""

    async def commit(self, task: Task, piece: Piece) -> Task | None:
        """The piece's blobs are there: they count from now on. The task as it is then; None: no longer held or wanted.

        Wanted is what a job in `in_progress` needs next. Who has not heard the answer may say the same again.
        When that was the shard's last line the task is done; when it was the job's last task the job is `finalizing`.
        """

    async def note(self, task: Task, note: bytes) -> Task | None:
        """Remembers something with the task; None: no longer held."""

    async def pause(self, task: Task, reason: str, *, for_s: float) -> None:
        """Gives the task back, and nobody takes one of its job before then."""

    async def pieces(self, job_id: str) -> Sequence[tuple[int, int, Piece]]:
        """Task, fence and piece of everything that was committed, in the order of lines."""

    async def tasks(self, job_id: str) -> Sequence[Task]:
        """Every task `embed` of the job in the order of lines, as it stands."""

    async def close(self, task: Task, *, output: StoredFile | None, errors: StoredFile | None) -> bool:
        """The joined files are there: the job becomes what its `ending` says. False: no longer held.

        Who has not heard the answer may say the same again. What was done for the job is forgotten, its pieces too.
        """

    async def gone_parts(self, limit: int) -> Sequence[str]:
        """Ids of jobs that are over whose pieces may still be there as blobs, until `forget_parts` names them."""

    async def forget_parts(self, job_ids: Sequence[str]) -> None:
        """Their pieces are gone."""


# ── vendors' own batches ────────────────────────────────────────────────────────────────────────────────────────────


class BatchLimits(NamedTuple):
    """The most that one batch of a vendor holds: texts, bytes of its file as it is sent, tokens (0: not known)."""

    texts: int
    bytes: int
    tokens: int


BatchStatus: TypeAlias = Literal["running", "done", "failed", "expired", "cancelled"]


class BatchState(NamedTuple):
    """How a vendor's batch stands: counts are texts, as the vendor says.

    `done`: every text has an answer, a vector or a refusal. `failed`: nothing was carried out, for the `reason` that
    the vendor's machine word names; `crowded`: only because too much was queued there, so another try may succeed.
    `expired` and `cancelled`: some texts may have an answer.
    """

    status: BatchStatus
    completed: int = 0
    failed: int = 0
    reason: str = ""
    crowded: bool = False


class BatchAnswer(NamedTuple):
    """What became of text `place`: its checked vector, float32, shape (d,), or why there is none.

    `tokens` are those that the vendor says it billed; None where it says nothing that may be true.
    """

    place: int
    answer: npt.NDArray[np.float32] | ProviderError
    tokens: int | None


class BatchProvider(Protocol):
    """One deployment's vendor's own batches: cheaper, within hours. Every method raises ProviderErrors only."""

    @property
    def limits(self) -> BatchLimits:
        """What a batch may hold; more than one may be under way."""

    async def submit(self, name: str, texts: Sequence[Text], space: Space) -> str:
        """Orders a vector for each of `texts`; returns the vendor's id.

        `name` (letters, digits, `-`, `_`, at most 64) is ours, and the vendor keeps it. After a Transient and after a
        crash only `find` knows whether there is a batch. Throttled: the vendor's queue is full. InputRefused: one of
        the texts must not go (`position`), or they are more than `limits` has room for.
        """

    async def find(self, name: str) -> str | None:
        """The id of the batch that was submitted under this name; None: none is among the vendor's newest 5,000."""

    async def poll(self, vendor_id: str) -> BatchState:
        """How it stands."""

    def results(self, vendor_id: str, texts: Sequence[Text], space: Space) -> AsyncGenerator[BatchAnswer, None]:
        """One answer for each of `texts`, in no order, streamed; the texts and Space of `submit`.

        Once the batch is over, as often as wanted; who leaves early closes it (`contextlib.aclosing`). What the vendor
        did not get to is Transient, what it forgot or spoiled is MalformedReply. Raises ProviderErrors for a broken
        stream, and MalformedReply for two answers to one text: then nothing that came before is to be believed.
        """

    async def cancel(self, vendor_id: str) -> None:
        """Asks for it to end; what is over stays as it is."""

    async def aclose(self) -> None:
        """Gives back connections."""
