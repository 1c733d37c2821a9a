"""Hides how a tree gets into its index: only what changed is bought, as much at once as fits, written as it comes."""

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from app.corpus.rows import DataError, Lost
from app.corpus.stream import GaveUp, Manner, embed_each, reason_of
from app.corpus.trail import Spent
from app.corpus.tree.changes import Changes, Cut, Failure, Lot
from app.corpus.tree.pieces import Chunk
from app.corpus.tree.stored import Made
from app.corpus.tree.tables import Tables
from app.corpus.tree.writing import Settled, Writer
from app.domain import EmbeddingRequest
from app.errors import EmbedgateError
from app.jobs.patience import Engine, Patient

COMMIT_S: Final = 1.0
"""How old a chunk that is done may be before it is written, so long as those before it are done, too."""

FAILED: Final = "failed.jsonl"
"""The file in the index's folder that lists what failed in the last run; there is none where nothing did."""

_COMMIT_CHUNKS = 4096
_SPECIAL = re.compile(r"([\\*?\[\]!# ])")  # in a pattern of .gitignore


@dataclass(frozen=True, slots=True)
class Wish:
    """A tree, and what its index is made with.

    A request has at most `request_tokens`. `anew`: what is there is forgotten.
    """

    cut: Cut
    made: Made
    manner: Manner
    request_tokens: int = 150_000
    anew: bool = False


@dataclass(slots=True)
class Tally:
    """What a run came to so far: `spent` is for the chunks of files that were not known as they are.

    `kept_tokens` are those of chunks of theirs that were not bought; `cut_s` is what reading and cutting took of a
    processor.
    """

    changes: Changes
    writer: Writer
    spent: Spent = field(default_factory=Spent)
    kept_tokens: int = 0
    cut_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    gone: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """How many files have failed."""
        return len({failure.path for failure in self.failures})

    @property
    def outside_ms(self) -> float:
        """What a new chunk took beside the model: to be cut out, and to be written."""
        return 1000 * (self.cut_s + self.writer.took_s) / max(1, self.spent.rows)


class _Done(NamedTuple):
    """A lot that is settled, why some of its chunks have no vector, and what it took."""

    settled: Settled
    failures: Sequence[Failure]
    spent: Spent
    kept_tokens: int


class Indexing:
    """One run: the tree of `wish` into `tables`; `ask` makes the request for some texts.

    `told` hears every second how far it is. `complaint` says why nobody will embed anything before somebody mends that.
    Who cancels `run` loses what was not written, a second's work.
    """

    def __init__(
        self, wish: Wish, tables: Tables, engine: Engine, ask: Callable[[Sequence[str]], EmbeddingRequest], *,
        told: Callable[[Tally], None], complaint: Callable[[], str], rng: random.Random,
    ) -> None:  # fmt: skip
        self._wish = replace(wish, cut=_without(wish.cut, tables.folder))
        self._tables = tables
        self._patient = Patient(engine.embed, attempts=2, rng=rng)
        self._ask = ask
        self._told = told
        self._complaint = complaint
        self._room = asyncio.Semaphore(wish.manner.requests)
        self._under_way: asyncio.Queue[asyncio.Task[_Done] | None] = asyncio.Queue()
        self._done: list[_Done] = []
        self._clock = asyncio.get_running_loop().time
        self._begun_at = self._noted_at = self._settled_at = self._clock()
        self.tally: Tally
        """From when it runs."""

    async def run(self) -> None:
        """All of the tree. Raises DataError, GaveUp, and what is wrong with every chunk alike."""
        self._writer = await asyncio.to_thread(_opened, self._tables, self._wish)
        self.tally = Tally(Changes(self._wish.cut, self._writer.known), self._writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(group))
                await self._settle()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self.tally.failures += self.tally.changes.failures
            _list(self._tables.folder / FAILED, self.tally.failures)
        await asyncio.to_thread(self._finish)
        self._tell()

    def _finish(self) -> None:
        changes = self.tally.changes
        if not changes.files:
            raise _nothing(self._wish.cut)
        gone = changes.gone(self._writer.paths)
        self.tally.gone = len(gone)
        self._writer.finish(gone)

    def _tell(self) -> None:
        self.tally.seconds = self._clock() - self._begun_at
        self._told(self.tally)

    # ── in order ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _read(self, group: asyncio.TaskGroup) -> None:
        """Starts what is to be embedded, as soon as there is room for it."""
        lots = self.tally.changes.lots(self._wish.manner.batch_rows, self._wish.request_tokens)
        while (lot := await asyncio.to_thread(self._next, lots)) is not None:
            await self._room.acquire()
            self._under_way.put_nowait(group.create_task(self._lot(lot)))
        self._under_way.put_nowait(None)

    def _next(self, lots: Iterator[Lot]) -> Lot | None:
        began_s = time.thread_time()
        lot = next(lots, None)
        self.tally.cut_s += time.thread_time() - began_s
        return lot

    async def _settle(self) -> None:
        """Takes what is done in the order in which it was read, and writes it."""
        head: asyncio.Task[_Done] | None = None
        more = True
        while more:
            try:
                async with asyncio.timeout(COMMIT_S):
                    if head is None and (head := await self._under_way.get()) is None:
                        more = False
                    else:
                        await asyncio.wait([head])
            except TimeoutError:
                pass
            if head is None or head.done():
                self._collect(head)
                head = None
            if reason := self._why_not_on():
                await self._commit()
                raise GaveUp(reason)
            chunks = sum(done.spent.rows for done in self._done)
            if not more or chunks >= _COMMIT_CHUNKS or self._clock() - self._noted_at >= COMMIT_S:
                await self._commit()

    def _collect(self, head: asyncio.Task[_Done] | None) -> None:
        if head is not None:
            if head.cancelled():
                return
            self._done.append(head.result())
            self._room.release()
        self._settled_at = self._clock()

    def _why_not_on(self) -> str:
        if self._patient.broke:
            return "the budget is spent"
        idle_s = self._clock() - self._settled_at
        if idle_s > self._wish.manner.give_up_after_s:
            return f"no chunk was done for {idle_s:.0f} s"
        return self._complaint() if idle_s > COMMIT_S else ""

    async def _commit(self) -> None:
        done, self._done = self._done, []
        self._noted_at = self._clock()
        if done:
            await asyncio.to_thread(self._writer.write, [each.settled for each in done])
        for each in done:
            self.tally.spent += each.spent
            self.tally.kept_tokens += each.kept_tokens
            self.tally.failures += each.failures
        self._tell()

    # ── chunks ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _lot(self, lot: Lot) -> _Done:
        """Every chunk with its vector, or why it has none."""
        chunks = [piece for piece in lot if isinstance(piece, Chunk)]
        vectors = await asyncio.to_thread(self._writer.kept, chunks)
        spent = Spent(rows=len(chunks), kept=len(vectors))
        kept_tokens = sum(chunk.tokens for chunk in chunks if chunk.id in vectors)
        failures: list[Failure] = []
        if wanted := [chunk for chunk in chunks if chunk.id not in vectors]:
            brought, took = await embed_each(self._patient, self._ask, [chunk.passage for chunk in wanted], {})
            spent += took
            for chunk, answer in zip(wanted, brought, strict=True):
                if isinstance(answer, EmbedgateError):
                    failures.append(Failure(chunk.path, chunk.start_line, chunk.end_line, reason_of(answer)))
                else:
                    vectors[chunk.id] = answer
            spent += Spent(failed=len(failures))
        return _Done(Settled(lot, vectors), failures, spent, kept_tokens)


def _opened(tables: Tables, wish: Wish) -> Writer:
    """The tables, which are made as is wished. Raises DataError where they are not, and must not be made anew."""
    try:
        made = tables.open()
    except Lost:
        if not wish.anew:
            raise
        made = None
    if made is None or wish.anew:
        changes = Changes(wish.cut, {})
        if next(changes.lots(1, wish.request_tokens), None) is None and not changes.files:
            raise _nothing(wish.cut)
        tables.begin(wish.made)
    elif differs := made.differs(wish.made):
        raise DataError(f"{tables.folder}: is an index of something else: {differs}. --force makes it anew")
    return Writer(tables)


def _nothing(cut: Cut) -> DataError:
    return DataError(f"{cut.root}: there is no file with words to index; the index is left as it is")


def _without(cut: Cut, folder: Path) -> Cut:
    """The tree without the index, where that lies in it, or is its root."""
    root, folder = cut.root.resolve(), folder.resolve()
    own = []
    if folder == root:
        own = ["/chunks.lance/", "/files.lance/", f"/{FAILED}"]
    elif folder.is_relative_to(root):
        name = _SPECIAL.sub(r"\\\1", folder.relative_to(root).as_posix())
        own = [f"/{name}/"]
    return replace(cut, exclude=[*cut.exclude, *own])


def _list(file: Path, failures: Sequence[Failure]) -> None:
    try:
        if failures:
            file.write_bytes(b"".join(msgspec.json.encode(failure) + b"\n" for failure in failures))
        else:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}") from error
