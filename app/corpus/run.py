"""Hides what a run over a dataset finds and leaves: an output that fits or does not, half of one, and the facts."""

import asyncio
import platform
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np

from app import __version__, money
from app.corpus.address import shown
from app.corpus.alone import alone
from app.corpus.preorders import Preorders, call_off
from app.corpus.rows import DataError, Lost, Shape, Sink, Source
from app.corpus.sinks import Output, open_sink
from app.corpus.stream import Earlier, Manner, Means, Stream, unbroken
from app.corpus.trail import Checkpoint, Spent, Trail
from app.domain import EmbeddingRequest
from app.engine.wholesale import Wholesale
from app.jobs.patience import Engine


class Subject(msgspec.Struct, frozen=True):
    """What decides what an output holds: the fingerprint of its `source`, and how that was read; and so on.

    `failed` is what becomes of rows without a vector: `nan` or `omit`.
    """

    source: str
    reading: Mapping[str, str | int | None]
    rows: int
    model: str
    space: str
    dimensions: int
    failed: str

    def differs(self, other: Mapping[str, Any]) -> str:
        """What is not the same in `other`, for people; "" where all is."""
        facts, reading = msgspec.structs.asdict(self), other.get("reading")
        told = _differences(facts.pop("reading"), reading if isinstance(reading, Mapping) else {})
        if facts.pop("source") != other.get("source") and not told:
            told = ["the input has changed"]
        return "; ".join(told + _differences(facts, other))


@dataclass(frozen=True, slots=True)
class Wish:
    """A dataset and what is to become of it: vectors of a model in the space of this id, `dimensions` wide, at `out`.

    `facts` stand in the sidecar as they are. `anew`: an output that is of something else is done again; `failed_only`:
    rows of a finished output that have no vector are tried once more.
    """

    source: Source
    out: str
    model: str
    space: str
    dimensions: int
    manner: Manner
    facts: Mapping[str, Any]
    anew: bool = False
    failed_only: bool = False

    @property
    def subject(self) -> Subject:
        """What its output is recognised by."""
        failed = "omit" if self.manner.omits else "nan"
        source = self.source
        return Subject(source.fingerprint, source.reading, source.rows, self.model, self.space, self.dimensions, failed)


class Outcome(NamedTuple):
    """What came of it; `was_there`: nothing had to be done."""

    rows: int
    spent: Spent
    seconds: float
    was_there: bool
    trail: Trail


Work: TypeAlias = Callable[[Sink, Trail, Checkpoint, Earlier | None], Awaitable[Checkpoint]]
"""Writes rows from a checkpoint on; the last one that it has noted."""


class Watch(Protocol):
    """Who wants to know how it goes."""

    def told(self, checkpoint: Checkpoint) -> None:
        """So much is done and safe."""

    def ordered(self, batches: int, over: int) -> None:
        """So many parts of the rows are ordered in the vendor's batches, and so many of these are over."""

    def calling_off(self) -> None:
        """What was ordered before is called off, which may take the vendor some minutes."""


async def run(
    wish: Wish, engine: Engine, ask: Callable[[Sequence[str]], EmbeddingRequest], watch: Watch, *,
    complaint: Callable[[], str], wholesale: Wholesale,
) -> Outcome:  # fmt: skip
    """Does what has to be done, from where an earlier run stopped; by the vendor's batches if rows are to be in spans.

    Of `complaint` see `Means`. Raises DataError for what is there and does not fit, GaveUp once it does not go on.
    """

    async def streamed(sink: Sink, trail: Trail, checkpoint: Checkpoint, earlier: Earlier | None) -> Checkpoint:
        preorders, span_rows = None, wish.manner.span_rows
        if trail.orders_folder.exists() and not (span_rows and checkpoint.sink):
            if checkpoint.sink and not wish.anew:
                text = "go on with --tier vendor_batch, or with --force: that calls them off"
                raise DataError(f"{shown(wish.out)} was begun in the vendor's batches: {text}")
            watch.calling_off()
            await call_off(trail.orders_folder, wholesale, ask, complaint)
        if span_rows:
            checkpoint = await unbroken(_note, sink, trail, checkpoint)  # else nobody knew what is ordered
            preorders = Preorders(
                wish.source, trail.orders_folder, wholesale, ask, span_rows=span_rows,
                known=earlier.known if earlier else None, told=watch.ordered,
            )  # fmt: skip
        stream = Stream(
            wish.source, sink, trail, Means(engine, ask, complaint, preorders), wish.manner,
            dimensions=wish.dimensions, checkpoint=checkpoint, told=watch.told, earlier=earlier,
            rng=random.Random(),  # noqa: S311 — jitter
        )  # fmt: skip
        return await stream.run()

    return await made(wish, streamed)


async def made(wish: Wish, work: Work, *, goes_on: bool = True) -> Outcome:
    """The output as `work` writes it, unless it is there and fits; see `run`.

    Unless it `goes_on` where an earlier run stopped it begins anew, and must not where rows are ordered.
    """
    sink = await asyncio.to_thread(open_sink, wish.out)
    with alone(sink.companions), closing(sink):
        return await _made(wish, sink, work, goes_on=goes_on)


async def _made(wish: Wish, sink: Output, work: Work, *, goes_on: bool) -> Outcome:
    trail = Trail(sink.companions)
    found = await unbroken(_found, wish, sink, trail)
    if isinstance(found, Outcome):
        return found
    checkpoint, earlier = found
    if wish.failed_only and earlier is None:
        text = "there are no rows that could be tried again; leave out --retry-failed"
        raise DataError(f"{sink.name} is not there with what belongs to it: {text}")
    if not goes_on:
        if trail.orders_folder.exists():
            text = "end that run first, or remove this folder: then they go on at your expense"
            raise DataError(f"{trail.orders_folder}: rows are under way in the vendor's batches; {text}")
        checkpoint = _beginning(wish.subject)
    if checkpoint.sink is None:
        trail.forget()
    try:
        checkpoint = await unbroken(_open, wish, sink, trail, checkpoint)
        done = await work(sink, trail, checkpoint, earlier)
        await unbroken(_finish, wish, sink, trail, done)
    finally:
        trail.close()
        if earlier is not None:
            earlier.sink.close()
    return Outcome(done.rows, done.spent, done.seconds, was_there=False, trail=trail)


def there(wish: Wish) -> Outcome | None:
    """The output, if it is there and fits. Raises DataError for what is there and does not fit."""
    with closing(open_sink(wish.out)) as output:
        found = _found(wish, output, Trail(output.companions))
    return found if isinstance(found, Outcome) else None


def _found(wish: Wish, output: Output, trail: Trail) -> Outcome | tuple[Checkpoint, Earlier | None]:
    """What there is: an output that fits, or where to begin and what may be taken from before."""
    subject, is_there = wish.subject, output.there()
    checkpoint = _begun(wish, trail, subject)
    meta = trail.meta() if is_there else None
    kept = output.kept(meta["sink"], meta["dimensions"]) if meta is not None else None
    if checkpoint is None and is_there:
        differs = _differs(trail, subject, meta, kept)
        if meta is not None and not differs and not (wish.failed_only and meta.get("failed")):
            return _there(meta, trail)
        if differs and not wish.anew:
            text = f"{differs}. --force does it again, and buys only texts that are new"
            raise DataError(f"{output.name} is there, and is of something else: {text}")
    return checkpoint or _beginning(subject), _earlier(wish, trail, meta if kept is not None else None)


def _begun(wish: Wish, trail: Trail, subject: Subject) -> Checkpoint | None:
    """Where an earlier run stopped; None: nowhere, or that shall be forgotten."""
    try:
        checkpoint = trail.checkpoint()
        if checkpoint is not None and (differs := subject.differs(checkpoint.subject)):
            text = f"{differs}. Give what was given then, or begin again with --force"
            raise Lost(f"{shown(wish.out)} was begun and not ended, of something else: {text}")
    except Lost:
        if not wish.anew:
            raise
        return None
    return checkpoint


def _differs(trail: Trail, subject: Subject, meta: Mapping[str, Any] | None, kept: int | None) -> str:
    """Why the output that is there is not what is wished, for people; "" where it is."""
    if meta is None:
        return f"{trail.meta_file} does not say of what"
    if differs := subject.differs(meta.get("subject", {})):
        return differs
    rows = meta.get("rows", 0)
    return "" if kept == rows else f"it does not hold the {rows} rows that {trail.meta_file} tells of"


def _differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Of these facts, for people; None is not given."""
    told = [(name, before.get(name), value) for name, value in now.items() if before.get(name) != value]
    return [f"{name} was {'not given' if was is None else was}, now it is {'not given' if it is None else it}"
            for name, was, it in told]  # fmt: skip


def _beginning(subject: Subject) -> Checkpoint:
    return Checkpoint(msgspec.structs.asdict(subject), datetime.now(UTC).isoformat(timespec="seconds"))


def _open(wish: Wish, sink: Sink, trail: Trail, checkpoint: Checkpoint) -> Checkpoint:
    """Both are where the checkpoint says; if that cannot be and may be forgotten, at the beginning, as is told."""
    try:
        sink.open(Shape(wish.source.rows, wish.dimensions, wish.source.columns), checkpoint.sink)
        trail.open(checkpoint)
    except Lost:
        if not wish.anew:
            raise
        trail.forget()
        return _open(wish, sink, trail, _beginning(wish.subject))
    return checkpoint


def _note(sink: Sink, trail: Trail, checkpoint: Checkpoint) -> Checkpoint:
    return trail.note(msgspec.structs.replace(checkpoint, sink=dict(sink.sync())))


def _there(meta: Mapping[str, Any], trail: Trail) -> Outcome:
    spent = Spent(meta.get("rows", 0), meta.get("failed", 0), kept=meta.get("rows", 0))
    return Outcome(meta.get("rows", 0), spent, 0.0, was_there=True, trail=trail)


def _earlier(wish: Wish, trail: Trail, meta: Mapping[str, Any] | None) -> Earlier | None:
    """The output that is there, if its vectors are what this one wants."""
    if meta is None or (meta.get("space"), meta.get("dimensions")) != (wish.space, wish.dimensions):
        return None
    known = trail.known(omitted=meta.get("subject", {}).get("failed") == "omit")
    return None if known is None else Earlier(known, open_sink(wish.out))


def _finish(wish: Wish, sink: Sink, trail: Trail, done: Checkpoint) -> None:
    trail.retract()
    state = dict(sink.sync())
    sink.finish()
    spent = done.spent
    trail.finish(
        {
            "model": wish.model,
            "space": wish.space,
            "dimensions": wish.dimensions,
            "rows": done.rows - (spent.failed if wish.manner.omits else 0),
            "failed": spent.failed,
            "dtype": "float32",
            **wish.facts,
            "tokens": spent.tokens,
            "calls": round(spent.calls, 3),
            "cost_usd": None if spent.nano_usd is None else money.usd(spent.nano_usd),
            "started_at": done.started_at,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(done.seconds, 3),
            "subject": msgspec.structs.asdict(wish.subject),
            "sink": state,
            "versions": {"embedgate": __version__, "numpy": np.__version__, "python": platform.python_version()},
        },
        failed=spent.failed,
    )
