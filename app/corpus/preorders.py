"""Hides how rows are bought in the vendor's own batches: ordered ahead of the stream, and there when it needs them."""

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from app.corpus.rows import DataError, Row, Source
from app.corpus.stream import GaveUp
from app.corpus.trail import Known, hash_of
from app.domain import EmbeddingRequest, Vector
from app.engine.wholesale import Wholesale
from app.errors import TryAgainLater
from app.job import NO_WORK, Work
from app.jobs.vendor import CALLED_OFF_S, Brought, VendorPath, Wait, ordered_since_s
from app.storage.blobs import LocalBlobs

WINDOW_S: Final = 18 * 3600.0
"""So long the vendor has, who promises a day; then what is not there goes the ordinary way."""

_AHEAD_SPANS = 64  # that are ordered while the first of them has not come
_LOOKS_AT_ONCE = 4  # each holds the texts of a span
_REQUEST_ROWS = 500  # that are looked up in the cache at once
_LOOK_S = 2.0  # between two looks at what was called off
_RUN, _SPANS = "run", "spans"


class _Run(msgspec.Struct, frozen=True):
    """What holds for all spans: `name` is like no other's."""

    name: str
    span_rows: int


class Preorders:
    """Rows of `source` in spans of about `span_rows`, each ordered as a whole; what is noted of them lies in `folder`.

    `ask` makes the request for some texts; those that are `known` need not be bought. `told` hears how many spans are
    ordered, and how many of these are over.
    """

    def __init__(
        self, source: Source, folder: Path, wholesale: Wholesale, ask: Callable[[Sequence[str]], EmbeddingRequest], *,
        span_rows: int, known: Known | None, told: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self._source = source
        self._folder = folder
        self._wholesale = wholesale
        self._ask = ask
        self._known = known
        self._told = told
        self._plan = _Run(f"embed_{secrets.token_hex(12)}", span_rows)
        self._reader = _SpanReader(source)
        self._reading = asyncio.Lock()
        self._room = asyncio.Semaphore(_AHEAD_SPANS)
        self._looks = asyncio.Semaphore(_LOOKS_AT_ONCE)
        self._over: dict[int, asyncio.Future[_Span]] = {}
        self._brought: dict[int, asyncio.Task[Brought]] = {}
        self._ready = asyncio.Event()
        self._counts = [0, 0]

    async def run(self, start: int) -> None:
        """Orders what the rows from `start` on need, and sees to it, until it is cancelled. Raises DataError."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._run(start)
        except BaseExceptionGroup as failures:
            first = failures.exceptions[0]
            if isinstance(first, OSError):
                raise DataError(f"{self._folder}: cannot be used: {first.strerror}") from first
            raise first from None

    async def _run(self, start: int) -> None:
        self._blobs = await asyncio.to_thread(LocalBlobs, self._folder)
        self._path = VendorPath(self._blobs, self._wholesale)
        await self._resume()
        self._ready.set()
        for number in range(start // self._plan.span_rows, -(-self._source.rows // self._plan.span_rows)):
            await self._room.acquire()
            span = _Span(number, self._plan, self._blobs, self._ask, self._texts)
            await span.remember()
            wait = await self._look(span)  # then it is written down, and ordered if the vendor takes it now
            self._count(1, 0)
            self._tasks.create_task(self._follow(span, wait))
        await asyncio.Future()  # what is over is brought when it is needed

    async def bought(self, rows: Sequence[Row]) -> tuple[MutableMapping[bytes, Vector], Work]:
        """What the batches brought for neighbouring rows, by key, beside others; and what spans took that begin here.

        Waits until they are over. Later calls are for later rows.
        """
        await self._ready.wait()
        vectors: MutableMapping[bytes, Vector] = {}
        work = NO_WORK
        first, last = (row.number // self._plan.span_rows for row in (rows[0], rows[-1]))
        for number in range(first, last + 1):
            brought = await self._bring(number)
            vectors = {**vectors, **brought.vectors} if vectors else brought.vectors
            work += brought.work if rows[0].number <= number * self._plan.span_rows else NO_WORK
        self._let_go(first)
        return vectors, work

    # ── spans ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _resume(self) -> None:
        """What an earlier run has decided stays so."""
        try:
            self._plan = await _plan(self._blobs)
        except FileNotFoundError:
            async with self._blobs.writing(_RUN) as writer:
                await writer.write(msgspec.msgpack.encode(self._plan))

    async def _follow(self, span: "_Span", wait: Wait | None) -> None:
        while wait is not None:
            await asyncio.sleep(wait.for_s)
            wait = await self._look(span)
        self._count(0, 1)
        self._future(span.number).set_result(span)

    async def _look(self, span: "_Span") -> Wait | None:
        try:
            async with self._looks:
                return await self._path.look(span)
        except TryAgainLater as later:
            return Wait(later.retry_after_s)

    def _count(self, ordered: int, over: int) -> None:
        self._counts = [self._counts[0] + ordered, self._counts[1] + over]
        self._told(*self._counts)

    def _future(self, number: int) -> "asyncio.Future[_Span]":
        return self._over.setdefault(number, asyncio.get_running_loop().create_future())

    async def _bring(self, number: int) -> Brought:
        """Downloaded once for all who need it."""
        if number not in self._brought:
            self._brought[number] = self._tasks.create_task(self._download(number))
        return await asyncio.shield(self._brought[number])

    async def _download(self, number: int) -> Brought:
        span = await self._future(number)
        while True:
            try:
                found = await self._path.bring(span)
            except TryAgainLater as later:
                found = Wait(later.retry_after_s)
            if not isinstance(found, Wait):
                return found
            await asyncio.sleep(found.for_s)

    def _let_go(self, first: int) -> None:
        """Of spans before this one; who waits for one of them has it."""
        for number in [number for number in self._brought if number < first]:
            del self._brought[number]
            self._room.release()

    async def _texts(self, number: int) -> list[str]:
        """What has to be bought of a span."""
        async with self._reading:
            rows = await asyncio.to_thread(self._reader.read, number, self._plan.span_rows)
        known = self._known
        return [row.text for row in rows if row.text and (known is None or known.row(hash_of(row)) is None)]


async def call_off(
    folder: Path, wholesale: Wholesale, ask: Callable[[Sequence[str]], EmbeddingRequest], complaint: Callable[[], str]
) -> None:
    """Ends what an earlier run has ordered and noted in `folder`, which goes once nothing of it is under way.

    What came of it is kept in the cache, and booked. Raises DataError where that cannot be, and GaveUp where it cannot
    be now: with the `complaint` that there is, or after the time that a vendor may take.
    """
    try:
        blobs = await asyncio.to_thread(LocalBlobs, folder)
        spans = await _noted(folder, blobs, ask)
        path = VendorPath(blobs, wholesale)
        if unknown := await path.out_of_reach(spans):
            names = ", ".join(f"deployments.{name}" for name in sorted(unknown))
            text = f"batches may be under way at {names}, which is not configured here"
            raise DataError(f"{folder}: {text}; call them off where it is, or remove this folder")
        await _called_off(path, spans, complaint)
        await asyncio.to_thread(shutil.rmtree, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be used: {error.strerror}") from error


async def _called_off(path: VendorPath, spans: "Sequence[_Span]", complaint: Callable[[], str]) -> None:
    """Nothing of these is under way any more. Raises GaveUp."""
    since_s = time.monotonic()
    while True:
        with suppress(TryAgainLater):
            if await path.call_off(spans, time.time()):
                return
        if reason := complaint():
            raise GaveUp(reason)
        if time.monotonic() - since_s > CALLED_OFF_S:
            raise GaveUp(f"the vendor has not ended what was called off {CALLED_OFF_S:.0f} s ago")
        await asyncio.sleep(_LOOK_S)


async def _noted(folder: Path, blobs: LocalBlobs, ask: Callable[[Sequence[str]], EmbeddingRequest]) -> "list[_Span]":
    """All that an earlier run has noted."""
    spans = []
    with suppress(FileNotFoundError):
        plan = await _plan(blobs)
        for each in (folder / _SPANS).iterdir():
            spans.append(_Span(int(each.name), plan, blobs, ask, _nothing))
            await spans[-1].remember()
    return spans


async def _plan(blobs: LocalBlobs) -> _Run:
    return msgspec.msgpack.decode(b"".join([data async for data in blobs.reading(_RUN)]), type=_Run)


async def _nothing(_: int) -> list[str]:
    return []


class _SpanReader:
    """Reads spans one after the other in one go through the source, and any other one from its beginning. Blocks."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rows: Iterator[Row] = iter(())
        self._at = -1

    def read(self, number: int, span_rows: int) -> list[Row]:
        if number != self._at:
            self._rows = self._source.read(number * span_rows)
        self._at = number + 1
        return [*islice(self._rows, span_rows)]


class _Span:
    """See `Errand`: some neighbouring rows, of which `texts` tells what has to be bought."""

    fence = 0  # nobody else works on them

    def __init__(
        self, number: int, plan: _Run, blobs: LocalBlobs, ask: Callable[[Sequence[str]], EmbeddingRequest],
        texts: Callable[[int], Awaitable[list[str]]],
    ) -> None:  # fmt: skip
        self.number = number
        self.name = f"{plan.name}-{number}"
        self.folder = f"{_SPANS}/{number:06}"
        self.note = b""
        self._blobs = blobs
        self._ask = ask
        self._texts = texts

    @property
    def until_s(self) -> float:
        """See `Errand`."""
        return (ordered_since_s(self.note) or time.time()) + WINDOW_S

    async def remember(self) -> None:
        """Goes on from what was noted."""
        try:
            self.note = b"".join([data async for data in self._blobs.reading(f"{self.folder}/note")])
        except FileNotFoundError:
            self.note = b""

    async def requests(self) -> AsyncIterator[EmbeddingRequest]:
        """See `Errand`."""
        texts = await self._texts(self.number)
        for at in range(0, len(texts), _REQUEST_ROWS):
            yield self._ask(texts[at : at + _REQUEST_ROWS])

    async def buyer(self) -> EmbeddingRequest:
        """See `Errand`; it is always the same."""
        return self._ask([])

    async def noted(self, words: bytes) -> None:
        """See `Errand`."""
        async with self._blobs.writing(f"{self.folder}/note") as writer:
            await writer.write(words)
        self.note = words
