"""How a dataset goes through the engine: in order, through outages, within bounds, noted as it goes. Virtual time."""

import asyncio
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from app.corpus.rows import DataError, Matrix, Row, Shape
from app.corpus.stream import Earlier, GaveUp, Manner, Means, Stream, unbroken
from app.corpus.trail import Checkpoint, Failed, Known, Trail, hash_of
from app.domain import ANONYMOUS, EmbeddingRequest, Limits, Priority
from app.errors import InputRefused, Transient
from tests.identity import identifying_vectors
from tests.rig import MODEL, WIDTH, Rig, ScriptedProvider, engine

pytestmark = pytest.mark.looptime(start=1000.0)

LIMITS = Limits(max_in_flight=4, max_batch_items=10)
MANNER = Manner(batch_rows=10, rows_at_once=80)
OUTAGE = Transient("nobody there")


class Texts:
    """A Source of these texts; `most_read` is the row that was read last."""

    name, fingerprint = "texts", "f"
    columns: Sequence[str] = ("text",)
    reading: Mapping[str, str | int | None] = {}

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.rows = len(texts)
        self.most_read = -1

    def read(self, start: int = 0) -> Iterator[Row]:
        """See `Source`."""
        for number in range(start, self.rows):
            self.most_read = number
            text = self._texts[number]
            yield Row(number, f"id{number}", text, {"text": text})


class Memory:
    """A Sink that keeps rows, and refuses those from number `full` on; what is not synced is lost by `open`."""

    def __init__(self, full: float = float("inf")) -> None:
        self.rows: list[Row] = []
        self.vectors_of: list[Matrix] = []
        self.full = full

    def open(self, shape: Shape, state: Mapping[str, Any] | None) -> None:
        """See `Sink`."""
        del shape
        kept = state["rows"] if state else 0
        del self.rows[kept:], self.vectors_of[kept:]

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """See `Sink`."""
        assert vectors.shape == (len(rows), WIDTH)
        if rows[-1].number >= self.full:
            raise DataError("full")
        self.rows += rows
        self.vectors_of += list(vectors)

    def sync(self) -> Mapping[str, Any]:
        """See `Sink`."""
        return {"rows": len(self.rows)}

    def finish(self) -> None:
        """See `Sink`."""

    def close(self) -> None:
        """See `Sink`."""

    def vectors(self, start: int, count: int) -> Matrix | None:
        """See `Sink`."""
        return np.stack(self.vectors_of[start : start + count])


@dataclass
class Bench:
    """Runs of one dataset against an engine; `told` is when which checkpoint was."""

    rig: Rig
    trail: Trail
    texts: Sequence[str]
    sink: Memory = field(default_factory=Memory)
    told: list[tuple[float, Checkpoint]] = field(default_factory=list)
    complaint: str = ""

    async def run(self, manner: Manner = MANNER, earlier: Earlier | None = None) -> Checkpoint:
        """From where the last one stopped to the end."""
        clock = asyncio.get_running_loop().time
        checkpoint = self.trail.checkpoint() or Checkpoint({}, "")
        self.source = Texts(self.texts)
        self.sink.open(Shape(len(self.texts), WIDTH, ("text",)), checkpoint.sink)
        self.trail.open(checkpoint)
        means = Means(self.rig.gateway, ask, lambda: self.complaint)
        stream = Stream(
            self.source, self.sink, self.trail, means, manner, dimensions=WIDTH, checkpoint=checkpoint,
            told=lambda noted: self.told.append((clock(), noted)), earlier=earlier, rng=random.Random(7),
        )  # fmt: skip
        try:
            return await stream.run()
        finally:
            self.trail.close()

    def proves(self, *, without: Sequence[int] = (), left_out: Sequence[int] = ()) -> None:
        """Every row is there once, in order, with its own vector; NaN where it is `without`."""
        rows = [number for number in range(len(self.texts)) if number not in left_out]
        expected = identifying_vectors([self.texts[number] for number in rows], MODEL, WIDTH)
        expected[[rows.index(number) for number in without]] = np.nan
        assert [row.number for row in self.sink.rows] == rows
        np.testing.assert_array_equal(np.stack(self.sink.vectors_of), expected)


def ask(texts: Sequence[str]) -> EmbeddingRequest:
    """At the lowest priority."""
    return EmbeddingRequest(ANONYMOUS, MODEL, tuple(texts), 0.0, Priority.BULK, cause="bulk")


def some(count: int, first: int = 0) -> list[str]:
    """So many texts, each another."""
    return [f"text {number}" for number in range(first, first + count)]


async def test_rows_are_in_order_whatever_the_order_of_answers(tmp_path: Path) -> None:
    """Also with calls of very different length; what they took adds up, and no more is under way than may be."""
    chance = random.Random(3)
    provider = ScriptedProvider()
    provider.script.extend(chance.uniform(0.01, 3.0) for _ in range(60))
    async with engine(provider, limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), some(500))
        done = await bench.run()
        bench.proves()
        assert sorted(map(str, provider.texts)) == sorted(bench.texts)
        spent = done.spent
        assert (spent.rows, spent.failed, spent.kept, spent.cached) == (500, 0, 0, 0)
        assert spent.tokens == provider.billed
        assert spent.calls == pytest.approx(len(provider.calls))
        assert rig.leftovers()["tasks"] == 0


async def test_what_is_done_is_noted_as_it_goes(tmp_path: Path) -> None:
    """No second goes by without a checkpoint in which rows are done; each counts on from the one before."""
    async with engine(ScriptedProvider(latency_s=0.2), limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), some(2000))
        done = await bench.run()
        times = [at for at, _ in bench.told]
        rows = [checkpoint.rows for _, checkpoint in bench.told]
        assert rows == sorted(set(rows))
        assert rows[-1] == 2000
        assert max(np.diff(times)) < 0.5
        assert done.seconds == pytest.approx(times[-1] - 1000.0, abs=0.5)


async def test_no_more_rows_are_read_than_can_be_kept(tmp_path: Path) -> None:
    """While nobody answers, the rows beyond those that may be under way stay where they are."""
    async with engine(ScriptedProvider(always=OUTAGE), limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), some(20_000))
        with pytest.raises(GaveUp):
            await bench.run(Manner(batch_rows=10, rows_at_once=80, give_up_after_s=60.0))
        assert bench.source.most_read < 2000
        assert len(set(map(str, rig.provider.texts)) & set(bench.texts)) <= 80


async def test_an_outage_fails_no_row(tmp_path: Path) -> None:
    """However long it is, if it ends before patience does; hardly anybody is asked meanwhile."""
    provider = ScriptedProvider()
    loop = asyncio.get_running_loop()
    async with engine(provider, limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), some(1000))
        loop.call_later(0.5, lambda: setattr(provider, "always", OUTAGE))
        loop.call_later(1800.0, lambda: setattr(provider, "always", None))
        done = await bench.run()
        bench.proves()
        assert done.spent.failed == 0
        assert done.seconds < 1800.0 + 400.0
        meanwhile = [at for at, _ in provider.calls if 1100.0 < at < 2800.0]
        assert len(meanwhile) < 1700 / 10


async def test_who_is_not_answered_gives_up_in_time_and_goes_on_later(tmp_path: Path) -> None:
    """What was done by then is safe, and is not bought again."""
    provider = ScriptedProvider(always=None)
    loop = asyncio.get_running_loop()
    async with engine(provider, limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), some(1000))
        loop.call_later(0.5, lambda: setattr(provider, "always", OUTAGE))
        with pytest.raises(GaveUp, match=r"no row was done for 360\d s \(.* provider .*\)"):
            await bench.run()
        assert 4500.0 < loop.time() < 4700.0
        checkpoint = bench.trail.checkpoint()
        assert checkpoint is not None
        assert 0 < checkpoint.rows < 1000
        provider.always = None
        provider.calls.clear()
        done = await bench.run()
        bench.proves()
        assert (done.spent.rows, done.spent.failed) == (1000, 0)
        assert not set(map(str, provider.texts)) & set(bench.texts[: checkpoint.rows])
        assert done.seconds < 5000.0


@pytest.mark.parametrize("omits", [False, True])
async def test_a_row_that_nobody_takes_does_not_hurt_its_neighbours(tmp_path: Path, omits: bool) -> None:
    """A refused one, one that is too long, and empty ones, that are not even asked for."""
    texts = some(200)
    texts[17], texts[50], texts[51] = "poison", "", "word " * 101
    provider = ScriptedProvider(poison=frozenset({"poison"}), refusal=InputRefused("no"))
    async with engine(provider, limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), texts)
        done = await bench.run(Manner(batch_rows=10, rows_at_once=80, omits=omits))
        bench.proves(**{"left_out" if omits else "without": [17, 50, 51]})
        assert (done.rows, done.spent.failed) == (200, 3)
        assert "" not in provider.texts
        bench.trail.open(done)
        bench.trail.finish({}, failed=3)
    lines = (tmp_path / "out.failed.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=Failed).row for line in lines] == [17, 50, 51]
    known = bench.trail.known(omitted=omits)
    assert known is not None
    assert known.row(hash_of(Row(0, "", "poison", {}))) is None
    assert known.row(hash_of(Row(0, "", "text 60", {}))) == (57 if omits else 60)


async def test_texts_of_before_are_not_bought(tmp_path: Path) -> None:
    """Wherever they stood; where the earlier output has no number after all, they are."""
    before = some(300)
    texts = [*some(50, 1000), *before[::-1], *before[:10]]
    sink = Memory()
    sink.vectors_of = list(identifying_vectors(before, MODEL, WIDTH))
    sink.vectors_of[7] = np.full(WIDTH, np.nan, np.float32)
    known = Known(b"".join(hash_of(Row(0, "", text, {})) for text in before), [8])
    async with engine(ScriptedProvider(), limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), texts)
        done = await bench.run(earlier=Earlier(known, sink))
        bench.proves()
        assert set(rig.provider.texts) == {*some(50, 1000), "text 7", "text 8"}
        assert (done.spent.rows, done.spent.kept) == (360, 306)


async def test_an_output_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    """With its own words; what was noted before stays, and the next run goes on from there."""
    async with engine(ScriptedProvider(latency_s=0.5), limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), some(500), Memory(full=300))
        with pytest.raises(DataError, match="full"):
            await bench.run()
        checkpoint = bench.trail.checkpoint()
        assert checkpoint is not None
        assert 0 < checkpoint.rows <= 300
        bench.sink.full = float("inf")
        await bench.run()
        bench.proves()


async def test_a_failure_tells_of_itself(tmp_path: Path) -> None:
    """By its row, its id and a reason."""
    async with engine(ScriptedProvider(), limits=LIMITS) as rig:
        bench = Bench(rig, Trail(str(tmp_path / "out")), ["a", "word " * 101])
        await bench.run()
    found = msgspec.json.decode((tmp_path / "out.failed.jsonl.partial").read_bytes(), type=Failed)
    assert (found.row, found.id) == (1, "id1")
    assert "100 tokens" in found.reason


async def test_who_is_cancelled_goes_once_the_thread_has_ended() -> None:
    """So nobody closes a file that it still writes."""
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def write() -> None:
        begun.set()
        may_end.wait(10.0)
        ended.append(True)

    writing = asyncio.create_task(unbroken(write))
    await asyncio.to_thread(begun.wait, 10.0)
    writing.cancel()
    await asyncio.sleep(0)
    assert not writing.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert ended
