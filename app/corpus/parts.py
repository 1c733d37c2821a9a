"""Hides how a dataset is done in parts, by machines that know nothing of each other, and how these become one."""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import orjson

from app import money
from app.corpus.rows import DataError, Matrix, Row, Sink, Source
from app.corpus.run import Outcome, Subject, Wish, made
from app.corpus.sinks import open_sink
from app.corpus.stream import Earlier, Manner, unbroken
from app.corpus.trail import Checkpoint, Failed, Spent, Trail, hash_of

_FILES: Final = (".npy", ".parquet", ".arrow", ".jsonl")
_MOST = 100_000
_COPY_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` neighbouring pieces of a dataset, about the same in size, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def out(self, out: str) -> str:
        """Where it goes, if the whole goes to the file `out`. Raises DataError where that is no file."""
        path = Path(out)
        if "://" in out or path.suffix.lower() not in _FILES:
            raise DataError(f"{out}: parts are joined from files: use .npy, .parquet, .arrow or .jsonl")
        return str(path.with_name(f"{path.stem}.part-{self.number}-of-{self.count}{path.suffix}"))

    def of(self, source: Source) -> Source:
        """Its rows, counted from 0 and named as in the whole. Raises DataError where some part would be empty."""
        if self.count > source.rows:
            raise DataError(f"{source.name} has {source.rows} rows: they cannot be done in {self.count} parts")
        return _Slice(source, self)


def part_of(text: str) -> Part:
    """The one that is called 2/4, say. Raises DataError."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    if not 1 <= part.number <= part.count <= _MOST:
        raise DataError(f"--part {text}: say which of how many, as in 2/4")
    return part


def parts_of(count: int) -> list[Part]:
    """All of so many, in order."""
    return [Part(number, count) for number in range(1, count + 1)]


class _Slice:
    """A part of a Source, as a Source."""

    def __init__(self, source: Source, part: Part) -> None:
        size, longer = divmod(source.rows, part.count)
        self._source = source
        self._first = (part.number - 1) * size + min(part.number - 1, longer)
        self.rows = size + (part.number <= longer)
        self.name = f"{source.name}, part {part}"
        self.fingerprint = blake2b(
            orjson.dumps([source.fingerprint, part.number, part.count]), digest_size=16
        ).hexdigest()
        self.reading = source.reading
        self.columns: Sequence[str] = source.columns

    def read(self, start: int = 0) -> Iterator[Row]:
        """See Source."""
        for row in islice(self._source.read(self._first + start), self.rows - start):
            yield row._replace(number=row.number - self._first)


# ── from parts to the whole ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Joint:
    """What joins so many parts of a source, those that belong to the output `parts`, into `out`.

    `model` and `dimensions` are what they have to be of; "" and 0: all of the same. The others are as in a Wish, but
    with `failed_only` a whole with rows without a vector is joined again: its parts may have them by now.
    """

    source: Source
    out: str
    parts: str
    count: int
    model: str
    dimensions: int
    omits: bool
    facts: Mapping[str, Any]
    anew: bool = False
    failed_only: bool = False


async def joined(joint: Joint, told: Callable[[Checkpoint], None]) -> Outcome:
    """The whole of all parts, as one run would have made it; these stay. Nobody is asked for vectors.

    Raises DataError, with a line for each part that is not there, not finished, or of something else.
    """
    pieces = await asyncio.to_thread(_pieces, joint)

    async def copied(sink: Sink, trail: Trail, checkpoint: Checkpoint, _: Earlier | None) -> Checkpoint:
        for piece in pieces:
            checkpoint = await unbroken(_copied, piece, sink, trail, checkpoint)
            told(checkpoint)
        return checkpoint

    subject = pieces[0].subject
    return await made(
        Wish(
            joint.source, joint.out, subject.model, subject.space, subject.dimensions, Manner(omits=joint.omits),
            {**joint.facts, "parts": joint.count}, joint.anew, joint.failed_only,
        ),
        copied,
        goes_on=False,
    )  # fmt: skip


class _Piece(NamedTuple):
    """A finished part."""

    source: Source
    out: str
    subject: Subject
    meta: Mapping[str, Any]
    trail: Trail


def _pieces(joint: Joint) -> list[_Piece]:
    """All of them, of one subject."""
    outs = [part.out(joint.parts) for part in parts_of(joint.count)]
    slices = [part.of(joint.source) for part in parts_of(joint.count)]
    metas = [(Trail(out).meta() if Path(out).exists() else None) or {} for out in outs]
    first = next((meta for meta in metas if meta), {})
    model, dimensions = joint.model or first.get("model", ""), joint.dimensions or first.get("dimensions", 0)
    failed, space = "omit" if joint.omits else "nan", first.get("space", "")
    subjects = [Subject(each.fingerprint, each.reading, each.rows, model, space, dimensions, failed) for each in slices]
    pieces = [_Piece(*each, Trail(each[1])) for each in zip(slices, outs, subjects, metas, strict=True)]
    wrong = [said for piece in pieces if (said := _wrong(piece))]
    if wrong:
        raise DataError("\n".join(wrong))
    return pieces


def _wrong(piece: _Piece) -> str:
    """Why it cannot be joined, for people; "" where it can."""
    if not Path(piece.out).exists():
        return f"{piece.out} is not {'finished' if piece.trail.progress_file.exists() else 'there'}"
    if not piece.meta:
        return f"{piece.out} is there, and {piece.trail.meta_file} does not say of what"
    if differs := piece.subject.differs(piece.meta.get("subject", {})):
        return f"{piece.out} is of something else: {differs}"
    with closing(open_sink(piece.out)) as output:
        whole = output.kept(piece.meta["sink"], piece.subject.dimensions) == piece.meta["rows"]
    return "" if whole else f"{piece.out} does not hold the rows that {piece.trail.meta_file} tells of"


def _copied(piece: _Piece, sink: Sink, trail: Trail, checkpoint: Checkpoint) -> Checkpoint:
    """Its rows from the checkpoint on; the checkpoint behind them."""
    first, failed = checkpoint.rows, piece.trail.failed()
    if failed is None or len(failed) != piece.meta["failed"]:
        raise DataError(f"{piece.trail.failed_file} does not list the rows of {piece.out} that have no vector")
    without = {each.row for each in failed}
    for rows, vectors in _rows_of(piece, without):
        sink.write([row._replace(number=first + row.number) for row in rows], vectors)
        trail.add([hash_of(row) for row in rows], [])
    trail.add([], [Failed(first + each.row, each.id, each.reason) for each in failed])
    return trail.note(
        msgspec.structs.replace(
            checkpoint,
            rows=first + piece.source.rows,
            started_at=min(checkpoint.started_at, piece.meta["started_at"]),
            spent=checkpoint.spent + _spent_on(piece.meta),
            seconds=checkpoint.seconds + piece.meta["seconds"],
            sink=dict(sink.sync()),
        )
    )


def _rows_of(piece: _Piece, without: set[int]) -> Iterator[tuple[Sequence[Row], Matrix]]:
    """What a finished part holds, some rows at a time."""
    omits, output, place = piece.subject.failed == "omit", open_sink(piece.out), 0
    read = piece.source.read()
    while chunk := [*islice(read, _COPY_ROWS)]:
        rows = [row for row in chunk if row.number not in without] if omits else chunk
        if without.issuperset(row.number for row in rows):
            vectors: Matrix | None = np.full((len(rows), piece.subject.dimensions), np.nan, np.float32)
        else:
            vectors = output.vectors(place, len(rows))
        if vectors is None:
            raise DataError(f"{piece.out} has changed meanwhile")
        if rows:
            yield rows, vectors
        place += len(rows)


def _spent_on(meta: Mapping[str, Any]) -> Spent:
    """What a finished output has taken, as its sidecar tells."""
    cost, failed = meta["cost_usd"], meta["failed"]
    rows = meta["rows"] + (failed if meta["subject"]["failed"] == "omit" else 0)
    nano_usd = None if cost is None else money.nano_usd_of(Decimal(cost))
    return Spent(rows, failed, tokens=meta["tokens"], calls=meta["calls"], nano_usd=nano_usd)


# ── how far they are ────────────────────────────────────────────────────────────────────────────────────────────────


def far(out: str, count: int) -> Spent:
    """What all parts have taken so far, those that others are at work on, too."""
    spent = Spent()
    for trail in (Trail(part.out(out)) for part in parts_of(count)):
        if checkpoint := trail.checkpoint():
            spent += checkpoint.spent
        elif meta := trail.meta():
            spent += _spent_on(meta)
    return spent
