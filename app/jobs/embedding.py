"""Hides how a shard is embedded: many lines at once, kept in their order, committed again and again, never twice."""

import asyncio
import random
from collections import ChainMap, deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from app.domain import Basket, EmbeddingRequest, EmbeddingResult, Vector
from app.errors import (
    EmbedgateError,
    TryAgainLater,
)
from app.job import NO_WORK, Job, Order, Piece, Task, Work, piece_blobs
from app.job_ports import Blobs
from app.jobs.patience import Patient
from app.jobs.reading import Line, lines_of

COMMIT_S: Final = 1.0
"""How old a finished line may be before it is committed, so long as the one before it is finished, too."""

_COMMIT_BYTES = 2**23


class Wire(Protocol):
    """What lines say and get, in the words of the API."""

    def read(self, body: bytes, order: Order) -> tuple[EmbeddingRequest, Any]:
        """The request that a line's body is, and how its answer is to be written. Raises EmbedgateErrors."""

    def good(self, job: Job, custom_id: str, asked: Any, result: EmbeddingResult) -> bytes:
        """The output line."""

    def bad(self, job: Job, custom_id: str, error: EmbedgateError) -> bytes:
        """The line of the error file."""

    def undone(self, job: Job, custom_id: str, code: str) -> bytes:
        """The same for a line that was not tried; `code` is `batch_expired` or `batch_cancelled`."""


class Paused(Exception):
    """The job has to wait for something that no retry brings; as a string it says for what: `budget`."""


class Done(NamedTuple):
    """What became of a line; `answer` is how it asked to be written and its vectors, or why there are none.

    `tried` is what tries took that failed.
    """

    custom_id: str
    texts: int
    answer: tuple[Any, EmbeddingResult] | EmbedgateError
    tried: Work = NO_WORK

    @property
    def size_bytes(self) -> int:
        """What it takes until it is written."""
        return 0 if isinstance(self.answer, EmbedgateError) else sum(map(len, self.answer[1].vectors))


class Window(NamedTuple):
    """How much of a shard is under way or waits to be committed at one moment, at most."""

    lines: int
    texts: int


class ShardWork:
    """The lines of one leased task.

    `commit` says whether the task is still held. A caller that cancels `run` gives up what was not committed. What was
    `bought` elsewhere, by key, is not bought again; what was done for the lines `before` counts with the first of them.
    """

    def __init__(
        self, task: Task, blobs: Blobs, wire: Wire, embed: Callable[..., Awaitable[EmbeddingResult]],
        commit: Callable[[Task, Piece], Awaitable[Task | None]], *, window: Window, attempts: int, rng: random.Random,
        bought: MutableMapping[bytes, Vector] | None = None, before: Work = NO_WORK,
    ) -> None:  # fmt: skip
        self._task = task
        self._bought = {} if bought is None else bought
        self._before = before
        self._blobs = blobs
        self._wire = wire
        self._patient = Patient(embed, attempts=attempts, rng=rng)
        self._commit = commit
        self._window = window
        self._clock = asyncio.get_running_loop().time
        self._under_way: deque[asyncio.Task[Done]] = deque()
        self._texts = 0
        self._done: list[Done] = []  # what can be committed
        self._committed_at = self._clock()

    async def run(self) -> bool:
        """Commits all lines; False: somebody else holds the task. Raises Paused once what was done is committed."""
        try:
            async with asyncio.TaskGroup() as group:
                return await self._run(group)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _run(self, group: asyncio.TaskGroup) -> bool:
        task = self._task
        assert task.shard is not None  # noqa: S101 — a task of its kind has one
        lines = lines_of(self._blobs, task.job.order.input_file_id, task.shard, skip=task.done_lines)
        keeping: asyncio.Task[bool] | None = None
        more = True
        while more or self._under_way or self._done or keeping:
            more = more and not self._patient.broke and await self._fill(group, lines)
            await self._wait(keeping)
            self._collect()
            if keeping is not None and keeping.done():
                held, keeping = keeping.result(), None
                if not held:
                    self._give_up()
                    return False
            if keeping is None and self._is_due(last=not self._under_way):
                done, self._done = self._done, []
                keeping = group.create_task(self._keep(done))
        if self._patient.broke:
            raise Paused("budget")
        return True

    def _give_up(self) -> None:
        for work in self._under_way:
            work.cancel()

    # ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _fill(self, group: asyncio.TaskGroup, lines: AsyncIterator[Line]) -> bool:
        """Starts as many lines as the window has room for; whether there may be more."""
        while len(self._under_way) + len(self._done) < self._window.lines and self._texts < self._window.texts:
            line = await anext(lines, None)
            if line is None:
                return False
            try:
                request, asked = await self._read(line)
            except EmbedgateError as error:
                work, texts = group.create_task(_told(Done(line.custom_id, 1, error))), 1
            else:
                work, texts = group.create_task(self._line(line.custom_id, request, asked)), len(request.texts)
            self._under_way.append(work)
            self._texts += texts
        return True

    async def _read(self, line: Line) -> tuple[EmbeddingRequest, Any]:
        """What it asks for; waits while nobody can know who asks."""
        while True:
            try:
                return self._wire.read(bytes(line.body), self._task.job.order)
            except TryAgainLater as error:
                await asyncio.sleep(error.retry_after_s)

    async def _line(self, custom_id: str, request: EmbeddingRequest, asked: Any) -> Done:
        """Until it is embedded or surely will not be."""
        basket = Basket(ChainMap({}, self._bought))
        answer = await self._patient.ask(request, basket)
        told = answer if isinstance(answer, EmbedgateError) else (asked, answer)
        tried = Work(0, -basket.texts, basket.calls, basket.nano_usd)
        return Done(custom_id, len(request.texts), told, tried)

    async def _wait(self, keeping: asyncio.Task[bool] | None) -> None:
        """Until the next line in order is done, or what is kept is kept, or it is time to keep what there is."""
        head = [self._under_way[0]] if self._under_way else []
        awaited: list[asyncio.Task[Any]] = [*head, *([keeping] if keeping else [])]
        if awaited and not any(work.done() for work in awaited):
            await asyncio.wait(awaited, timeout=COMMIT_S, return_when=asyncio.FIRST_COMPLETED)

    def _collect(self) -> None:
        """Takes what is done, as far as all before it is. Behind a line that pauses nothing is taken."""
        while self._under_way and self._under_way[0].done():
            work = self._under_way[0]
            if work.cancelled():
                self._give_up()
                self._under_way.clear()
                return
            self._under_way.popleft()
            self._done.append(work.result())

    # ── pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _is_due(self, *, last: bool) -> bool:
        if not self._done:
            return False
        full = len(self._done) >= self._window.lines // 2 or sum(d.size_bytes for d in self._done) >= _COMMIT_BYTES
        return last or full or self._clock() - self._committed_at >= COMMIT_S

    async def _keep(self, done: Sequence[Done]) -> bool:
        """Writes a piece, then says so; whether the task is still held."""
        task = self._task
        good, bad = piece_blobs(task.job.id, task.number, task.fence, task.next_piece)
        answered = [each for each in done if not isinstance(each.answer, EmbedgateError)]
        refused = [each for each in done if isinstance(each.answer, EmbedgateError)]
        output_bytes = await self._write(good, answered)
        error_bytes = await self._write(bad, refused)
        tokens = sum(each.answer[1].tokens for each in answered if not isinstance(each.answer, EmbedgateError))
        work = sum((each.tried for each in done), self._before + _work(answered))
        piece = Piece(task.next_piece, len(done), len(answered), len(refused), tokens, output_bytes, error_bytes, work)
        after = await self._commit(task, piece)
        self._before = NO_WORK
        self._committed_at = self._clock()
        self._texts -= sum(each.texts for each in done)
        if after is None:
            return False
        self._task = after
        return True

    async def _write(self, name: str, done: Sequence[Done]) -> int:
        """How many bytes the lines take, as a blob; none where there is no line. Others have their turn in between."""
        if not done:
            return 0
        size_bytes = 0
        async with self._blobs.writing(name) as writer:
            for each in done:
                data = self._written(each)
                size_bytes += len(data)
                await writer.write(data)
        return size_bytes

    def _written(self, done: Done) -> bytes:
        if isinstance(done.answer, EmbedgateError):
            return self._wire.bad(self._task.job, done.custom_id, done.answer)
        return self._wire.good(self._task.job, done.custom_id, *done.answer)


def _work(answered: Sequence[Done]) -> Work:
    results = [each.answer[1] for each in answered if not isinstance(each.answer, EmbedgateError)]
    costs = [result.cost_nano_usd for result in results]
    return Work(
        sum(len(result.vectors) for result in results),
        sum(result.cache_hits + result.joined for result in results),
        sum(result.calls for result in results),
        None if None in costs else sum(cost or 0 for cost in costs),
    )


async def _told(done: Done) -> Done:
    return done
