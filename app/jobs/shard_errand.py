"""Hides how a task `embed` of a job is an errand to the vendor: its lines ask, its row in the store remembers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol

from app.domain import EmbeddingRequest
from app.errors import EmbedgateError, TryAgainLater
from app.job import Order, Task, task_folder
from app.job_ports import Blobs
from app.jobs.reading import lines_of
from app.jobs.vendor import TakenOver

PATIENCE: Final = 0.75
"""Which part of a job's window the vendor has; then the rest goes the ordinary way, while there is time."""


class Asks(Protocol):
    """What a line says, see `embedding.Wire`."""

    def read(self, body: bytes, order: Order) -> tuple[EmbeddingRequest, Any]:
        """The request that a line's body is. Raises EmbedgateErrors."""


class ShardErrand:
    """See `Errand`; `task` is the task as it was noted last. `note` says whether it is still held."""

    def __init__(
        self, task: Task, blobs: Blobs, asks: Asks, note: Callable[[Task, bytes], Awaitable[Task | None]]
    ) -> None:  # fmt: skip
        job = task.job
        self.task = task
        self.name = f"{job.id}-{task.number}"
        self.folder = task_folder(job.id, task.number)
        self.fence = task.fence
        self.until_s = (job.created_at_ms + PATIENCE * (job.expires_at_ms - job.created_at_ms)) / 1000
        self._blobs = blobs
        self._asks = asks
        self._note = note

    @property
    def note(self) -> bytes:
        """See `Errand`."""
        return self.task.note

    async def requests(self) -> AsyncIterator[EmbeddingRequest]:
        """Those of the lines that are not done. Raises TryAgainLater while nobody can know who asks."""
        task = self.task
        assert task.shard is not None  # noqa: S101 — a task of its kind has one
        async for line in lines_of(self._blobs, task.job.order.input_file_id, task.shard, skip=task.done_lines):
            try:
                request, _ = self._asks.read(bytes(line.body), task.job.order)
            except TryAgainLater:
                raise
            except EmbedgateError:
                continue
            yield request

    async def buyer(self) -> EmbeddingRequest | None:
        """See `Errand`."""
        return await anext(self.requests(), None)

    async def noted(self, words: bytes) -> None:
        """See `Errand`."""
        after = await self._note(self.task, words)
        if after is None:
            raise TakenOver
        self.task = after
