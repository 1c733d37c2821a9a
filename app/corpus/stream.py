"""Hides how rows go through the engine: many at once, kept in their order, written and noted again and again."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple, ParamSpec, Protocol, TypeVar

import msgspec
import numpy as np

from app.corpus.rows import Matrix, Row, Sink, Source
from app.corpus.trail import Checkpoint, Failed, Known, Spent, Trail, hash_of
from app.domain import Basket, EmbeddingRequest, EmbeddingResult, Vector
from app.errors import EmbedgateError
from app.job import Work
from app.jobs.patience import Engine, Patient

P = ParamSpec("P")
T = TypeVar("T")

_LOOK_S: Final = 1.0
_READ_ROWS = 1000


class GaveUp(Exception):
    """It does not go on, as a string: why; what was done is safe."""


class Supply(Protocol):
    """What is bought of rows before their turn, see `Preorders`."""

    async def run(self, start: int) -> None:
        """Buys for the rows from `start` on."""

    async def bought(self, rows: Sequence[Row]) -> tuple[MutableMapping[bytes, Vector], Work]:
        """Vectors by key, and what these took that were not told of before."""


class Means(NamedTuple):
    """How texts become vectors: `ask` makes the request for some texts, `engine` answers it.

    `complaint` says why nobody will be answered before somebody mends that, "" while somebody may. What `supply` buys
    is not bought again.
    """

    engine: Engine
    ask: Callable[[Sequence[str]], EmbeddingRequest]
    complaint: Callable[[], str]
    supply: Supply | None = None


@dataclass(frozen=True, slots=True)
class Manner:
    """How rows are asked for.

    `batch_rows` in a request, at most `rows_at_once` in all; in the vendor's batches so many `span_rows` are ordered
    together, with 0 none is. A row without a vector is left out if `omits`, else it is one of NaN.
    """

    batch_rows: int = 100
    rows_at_once: int = 4096
    span_rows: int = 0
    give_up_after_s: float = 3600.0
    omits: bool = False

    @property
    def requests(self) -> int:
        """How many are under way or wait to be written."""
        return max(2, self.rows_at_once // self.batch_rows)


class _Done(NamedTuple):
    """Rows that are settled: what each brought, and what all took."""

    rows: Sequence[Row]
    answers: Sequence[bytes | Failed]
    spent: Spent


class Earlier(NamedTuple):
    """An output of before in the same space: the rows that it knows, and how their vectors are read."""

    known: Known
    sink: Sink


class Stream:
    """One run of `source` into `sink`, from a `checkpoint` on.

    What is done is noted at once, while the next rows are under way; `told` hears of every checkpoint. A caller that
    cancels `run` loses what was not noted.
    """

    def __init__(
        self, source: Source, sink: Sink, trail: Trail, means: Means, manner: Manner, *, dimensions: int,
        checkpoint: Checkpoint, told: Callable[[Checkpoint], None], earlier: Earlier | None = None, rng: random.Random,
    ) -> None:  # fmt: skip
        self._source = source
        self._sink = sink
        self._trail = trail
        self._patient = Patient(means.engine.embed, attempts=2, rng=rng)
        self._manner = manner
        self._means = means
        self._dimensions = dimensions
        self._checkpoint = checkpoint
        self._told = told
        self._earlier = earlier
        self._under_way: deque[asyncio.Task[_Done]] = deque()
        self._settled: list[_Done] = []
        self._clock = asyncio.get_running_loop().time
        self._begun_at = self._settled_at = self._clock()
        self._before_s = checkpoint.seconds

    async def run(self) -> Checkpoint:
        """All rows, done and noted. Raises DataError, GaveUp, and what is wrong with every row alike."""
        try:
            async with asyncio.TaskGroup() as group:
                await self._run(group)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return self._checkpoint

    async def _run(self, group: asyncio.TaskGroup) -> None:
        supply = self._means.supply
        supplying = group.create_task(supply.run(self._checkpoint.rows)) if supply else None
        rows = self._source.read(self._checkpoint.rows)
        ready: deque[Sequence[Row]] = deque()
        noting: asyncio.Task[None] | None = None
        more = True
        while more or ready or self._under_way or self._settled or noting:
            if more and len(ready) < self._manner.requests:
                read = await asyncio.to_thread(_chunks, rows, self._manner.batch_rows)
                more = bool(read)
                ready += read
            while ready and len(self._under_way) + len(self._settled) < self._manner.requests:
                self._under_way.append(group.create_task(self._chunk(ready.popleft())))
            await self._wait(noting)
            self._collect()
            noting = None if noting is None or noting.done() else noting
            if noting is None and (reason := self._why_not_on()):
                await self._note()
                raise GaveUp(reason)
            if noting is None and self._settled:
                noting = group.create_task(self._note())
        if supplying is not None:
            supplying.cancel()

    async def _wait(self, noting: asyncio.Task[None] | None) -> None:
        """Until the first chunk is done, or what was done is noted, or it is time to look how it goes."""
        awaited: list[asyncio.Task[Any]] = [*islice(self._under_way, 1), *([noting] if noting else [])]
        if awaited and not any(work.done() for work in awaited):
            await asyncio.wait(awaited, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)

    def _why_not_on(self) -> str:
        if self._patient.broke:
            return "the budget is spent"
        idle_s = self._clock() - self._settled_at
        if idle_s > self._manner.give_up_after_s:
            why = f" ({self._patient.heard})" if self._patient.heard else ""
            return f"no row was done for {idle_s:.0f} s{why}"
        return self._means.complaint() if idle_s > _LOOK_S else ""

    def _collect(self) -> None:
        while self._under_way and self._under_way[0].done():
            if self._under_way[0].cancelled():
                return
            self._settled.append(self._under_way.popleft().result())
            self._settled_at = self._clock()

    # ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _chunk(self, rows: Sequence[Row]) -> _Done:
        """Every row with its vector, or why it has none."""
        bought: MutableMapping[bytes, Vector] = {}
        spent = Spent(len(rows))
        if self._means.supply is not None:  # which is asked for rows in their order
            bought, work = await self._means.supply.bought(rows)
            spent += Spent(cached=work.cached, calls=work.calls, nano_usd=work.nano_usd)
        answers: dict[int, bytes | Failed] = {
            row.number: Failed(row.number, row.id, "the text is empty") for row in rows if not row.text
        }
        kept = await self._kept([row for row in rows if row.text])
        answers |= kept
        wanted = [row for row in rows if row.number not in answers]
        spent += Spent(kept=len(kept))
        if wanted:
            brought, took = await embed_each(self._patient, self._means.ask, [row.text for row in wanted], bought)
            spent += took
            answers |= {
                row.number: Failed(row.number, row.id, reason_of(it)) if isinstance(it, EmbedgateError) else it
                for row, it in zip(wanted, brought, strict=True)
            }
        failed = sum(isinstance(answer, Failed) for answer in answers.values())
        spent = msgspec.structs.replace(spent, failed=failed)
        return _Done(rows, [answers[row.number] for row in rows], spent)

    async def _kept(self, rows: Sequence[Row]) -> dict[int, bytes | Failed]:
        """What the earlier output has of them."""
        if self._earlier is None or not rows:
            return {}
        return await asyncio.to_thread(_reused, self._earlier, rows, self._dimensions)

    # ── what is done ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _note(self) -> None:
        """Writes what is settled: data, then what belongs to it, then how far that is."""
        settled, self._settled = self._settled, []
        if not settled:
            return
        spent = self._checkpoint.spent
        for done in settled:
            spent += done.spent
        rows = self._checkpoint.rows + sum(len(done.rows) for done in settled)
        seconds = self._before_s + self._clock() - self._begun_at
        after = msgspec.structs.replace(self._checkpoint, rows=rows, spent=spent, seconds=seconds)
        self._checkpoint = await unbroken(self._written, settled, after)
        self._told(self._checkpoint)

    def _written(self, settled: Sequence[_Done], after: Checkpoint) -> Checkpoint:
        for done in settled:
            failed = [answer for answer in done.answers if isinstance(answer, Failed)]
            pairs = [*zip(done.rows, done.answers, strict=True)]
            if self._manner.omits:
                pairs = [pair for pair in pairs if not isinstance(pair[1], Failed)]
            rows = [row for row, _ in pairs]
            if rows:
                self._sink.write(rows, self._matrix([answer for _, answer in pairs]))
            self._trail.add([hash_of(row) for row in rows], failed)
        return self._trail.note(msgspec.structs.replace(after, sink=dict(self._sink.sync())))

    def _matrix(self, answers: Sequence[bytes | Failed]) -> Matrix:
        none = np.full(self._dimensions, np.nan, "<f4").tobytes()
        data = b"".join(answer if isinstance(answer, bytes) else none for answer in answers)
        return np.frombuffer(data, "<f4").reshape(len(answers), self._dimensions)


async def embed_each(
    patient: Patient, ask: Callable[[Sequence[str]], EmbeddingRequest], texts: Sequence[str],
    bought: MutableMapping[bytes, Vector],
) -> tuple[list[bytes | EmbedgateError], Spent]:  # fmt: skip
    """The vector of each text, or why it has none; what cannot be had together is asked for one by one.

    What fails buys into `bought`, by key: nothing in there is bought again.
    """
    basket = Basket(bought, each=True)
    result = await patient.ask(ask(texts), basket)
    spent = Spent(cached=-basket.texts, calls=basket.calls, nano_usd=basket.nano_usd)
    if isinstance(result, EmbeddingResult):
        cached = result.cache_hits + result.joined
        spent += Spent(cached=cached, tokens=result.tokens, calls=result.calls, nano_usd=result.cost_nano_usd)
        return [*result.vectors], spent
    if len(texts) == 1:
        return [result], spent
    answers: list[bytes | EmbedgateError] = []
    for alone in await asyncio.gather(*(embed_each(patient, ask, [text], bought) for text in texts)):
        answers += alone[0]
        spent += alone[1]
    return answers, spent


async def unbroken(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work` in a thread; who is cancelled meanwhile goes once it has ended, and then may close what it used."""
    running = asyncio.create_task(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    finally:
        await asyncio.wait([running])


def _chunks(rows: Iterator[Row], size: int) -> list[Sequence[Row]]:
    """The next rows, some thousand at once; none at the end."""
    read = [*islice(rows, max(size, _READ_ROWS // size * size))]
    return [read[at : at + size] for at in range(0, len(read), size)]


def _reused(earlier: Earlier, rows: Sequence[Row], dimensions: int) -> dict[int, bytes | Failed]:
    """Vectors of texts that an earlier output has, if they are so wide; neighbours are read together."""
    places = [(row.number, place) for row in rows if (place := earlier.known.row(hash_of(row))) is not None]
    found: dict[int, bytes | Failed] = {}
    at = 0
    while at < len(places):
        end = at + 1
        while end < len(places) and places[end][1] == places[end - 1][1] + 1:
            end += 1
        vectors = earlier.sink.vectors(places[at][1], end - at)
        for (number, _), vector in zip(places[at:end], () if vectors is None else vectors, strict=False):
            if len(vector) == dimensions and np.isfinite(vector).all():
                found[number] = vector.astype("<f4").tobytes()
        at = end
    return found


def reason_of(error: EmbedgateError) -> str:
    """In words."""
    return str(error) or type(error).__name__
