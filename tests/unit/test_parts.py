"""How a dataset falls into parts, and what has to be so that they may be joined."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from app.corpus.parts import Joint, Part, far, joined, part_of, parts_of
from app.corpus.rows import DataError, Matrix, Row, Sink, Source
from app.corpus.run import Outcome, Wish, made
from app.corpus.stream import Earlier, Manner
from app.corpus.trail import Checkpoint, Failed, Spent, Trail, hash_of
from tests.identity import identifying_vectors

MODEL, WIDTH = "tiny", 8
FORMS = ["npy", "jsonl", "parquet", "arrow"]


class Texts:
    """A Source of so many texts."""

    name = "texts"
    columns: Sequence[str] = ("text",)
    reading: Mapping[str, str | int | None] = {}

    def __init__(self, rows: int, fingerprint: str = "f") -> None:
        self.rows, self.fingerprint = rows, fingerprint

    def read(self, start: int = 0) -> Iterator[Row]:
        """See `Source`."""
        for number in range(start, self.rows):
            yield Row(number, f"id{number}", f"text {number}", {"text": f"text {number}"})


def vectors_of(rows: Sequence[Row]) -> Matrix:
    """Which they must have."""
    return identifying_vectors([row.text for row in rows], MODEL, WIDTH)


def make(
    source: Source, out: str, *, failing: Sequence[str] = (), omits: bool = False, model: str = MODEL, ends: bool = True
) -> None:
    """The output that a run makes, without vectors for the ids `failing`, which has cost a little.

    Unless it `ends` it dies with all of it done.
    """

    async def work(sink: Sink, trail: Trail, checkpoint: Checkpoint, _: Earlier | None) -> Checkpoint:
        rows = [*source.read()]
        failed = [Failed(row.number, row.id, "no") for row in rows if row.id in failing]
        vectors = vectors_of(rows)
        vectors[[each.row for each in failed]] = np.nan
        kept = [row.number for row in rows if not (omits and row.id in failing)]
        sink.write([rows[number] for number in kept], vectors[kept])
        trail.add([hash_of(rows[number]) for number in kept], failed)
        spent = Spent(len(rows), len(failed), tokens=10, calls=1.5, nano_usd=7)
        state = dict(sink.sync())
        after = Checkpoint(checkpoint.subject, "2026-01-01", len(rows), state, spent=spent, seconds=2.0)
        after = trail.note(after)
        if not ends:
            raise KeyboardInterrupt
        return after

    asyncio.run(made(Wish(source, out, model, "space", WIDTH, Manner(omits=omits), {}), work))


def join(
    source: Source, out: str, count: int, *, omits: bool = False, told: Callable[[Checkpoint], None] = lambda _: None
) -> Outcome:
    """All parts of an output, of whatever model, joined."""
    return asyncio.run(joined(Joint(source, out, out, count, "", 0, omits, {}), told))


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (10, 1), (10, 3), (10, 10), (7, 2), (1003, 64)])
def test_parts_are_all_rows_once_in_order(rows: int, count: int) -> None:
    """Of sizes that differ by one at most; each counts from 0, with the names of the whole."""
    whole = Texts(rows)
    slices = [part.of(whole) for part in parts_of(count)]
    assert [row.id for each in slices for row in each.read()] == [row.id for row in whole.read()]
    assert max(each.rows for each in slices) - min(each.rows for each in slices) <= 1
    for each in slices:
        assert [row.number for row in each.read()] == [*range(each.rows)]
        middle = each.rows // 2
        assert [*each.read(middle)] == [*each.read()][middle:]
    assert len({each.fingerprint for each in slices} | {whole.fingerprint}) == count + 1


@pytest.mark.parametrize("text", ["", "a", "0/4", "5/4", "1/0", "1", "-1/4", "1/4/2", "1/999999", "²/4"])
def test_a_part_that_is_none_is_told(text: str) -> None:
    """With how one is called."""
    with pytest.raises(DataError, match="2/4"):
        part_of(text)


@pytest.mark.parametrize("out", ["db.lance", "postgresql://host/db#t.npy", "out"])
def test_only_files_have_parts(out: str) -> None:
    """A table has none that could be joined."""
    with pytest.raises(DataError, match="joined from files"):
        Part(1, 2).out(out)


def test_no_part_is_empty() -> None:
    """More of them than rows are refused."""
    with pytest.raises(DataError, match="3 rows"):
        Part(1, 4).of(Texts(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("omits", [False, True])
def test_joined_parts_are_what_one_run_makes(tmp_path: Path, form: str, omits: bool) -> None:
    """To the byte, with its hashes and its failed rows, also where a part has no vector at all; the parts stay."""
    source, failing = Texts(2500), ["id3", "id625", "id1249", "id2499", *(f"id{each}" for each in range(700, 760))]
    failing += [f"id{number}" for number in range(1800, 1850)]
    one, out = str(tmp_path / f"one.{form}"), str(tmp_path / f"out.{form}")
    make(source, one, failing=failing, omits=omits)
    parts = parts_of(50)
    for part in parts:
        make(part.of(source), part.out(out), failing=failing, omits=omits)
    outcome = join(source, out, 50, omits=omits)
    assert (outcome.rows, outcome.spent.failed, outcome.was_there) == (2500, len(failing), False)
    for end in ("", ".hashes", ".failed.jsonl"):
        assert Path(out + end).read_bytes() == Path(one + end).read_bytes(), end
    meta, whole = Trail(out).meta(), Trail(one).meta()
    assert meta is not None
    assert whole is not None
    assert (meta["subject"], meta["rows"], meta["failed"]) == (whole["subject"], whole["rows"], whole["failed"])
    assert (meta["tokens"], meta["calls"], meta["cost_usd"], meta["seconds"]) == (500, 75.0, "0.00000035", 100.0)
    assert (meta["started_at"], meta["parts"]) == ("2026-01-01", 50)
    assert all(Path(part.out(out)).exists() for part in parts)
    assert join(source, out, 50, omits=omits).was_there


@pytest.mark.parametrize("omits", [False, True])
def test_a_join_begins_anew_over_what_is_half_done(tmp_path: Path, omits: bool) -> None:
    """By a join that died in the third part, or by a run of the whole; everything is counted once."""
    source, one, out, failing = Texts(100), str(tmp_path / "one.jsonl"), str(tmp_path / "out.jsonl"), ["id3", "id60"]
    make(source, one, failing=failing, omits=omits)
    for part in parts_of(4):
        make(part.of(source), part.out(out), failing=failing, omits=omits)

    def dying(checkpoint: Checkpoint) -> None:
        if checkpoint.rows == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        join(source, out, 4, omits=omits, told=dying)
    with pytest.raises(KeyboardInterrupt):
        make(source, out, failing=failing, omits=omits, ends=False)
    outcome = join(source, out, 4, omits=omits)
    assert outcome.spent == Spent(100, 2, tokens=40, calls=6.0, nano_usd=28)
    for end in ("", ".hashes", ".failed.jsonl"):
        assert Path(out + end).read_bytes() == Path(one + end).read_bytes(), end
    assert join(source, out, 4, omits=omits).was_there


def test_no_join_is_made_where_rows_are_ordered(tmp_path: Path) -> None:
    """The run that has ordered them in the vendor's batches goes on as if nobody had tried, also with --force."""
    source, out = Texts(10), str(tmp_path / "out.npy")
    [only] = parts_of(1)
    make(only.of(source), only.out(out))
    with pytest.raises(KeyboardInterrupt):
        make(source, out, ends=False)
    before = Path(f"{out}.progress").read_bytes()
    Path(f"{out}.orders").mkdir()
    joint = Joint(source, out, out, 1, "", 0, False, {}, anew=True)
    with pytest.raises(DataError, match="under way in the vendor's batches"):
        asyncio.run(joined(joint, lambda _: None))
    assert Path(f"{out}.progress").read_bytes() == before


def test_every_part_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """One that is not there, one that is not finished, one of another model or input, one that nothing is known of."""
    source, out = Texts(100), str(tmp_path / "out.npy")
    outs = [part.out(out) for part in parts_of(6)]
    for part in parts_of(6):
        input_ = Texts(100, "g") if part.number == 4 else source
        make(part.of(input_), part.out(out), model="other" if part.number == 3 else MODEL)
    for path in (*outs[1:2], outs[5]):
        Path(path).unlink()
    Path(f"{outs[1]}.progress").write_text("{}")
    Path(f"{outs[4]}.meta.json").unlink()
    with pytest.raises(DataError) as refused:
        join(source, out, 6)
    assert str(refused.value).splitlines() == [
        f"{outs[1]} is not finished",
        f"{outs[2]} is of something else: model was other, now it is tiny",
        f"{outs[3]} is of something else: the input has changed",
        f"{outs[4]} is there, and {outs[4]}.meta.json does not say of what",
        f"{outs[5]} is not there",
    ]
    assert not Path(out).exists()


@pytest.mark.parametrize("lost", ["rows", "width", "failed"])
def test_a_part_that_is_not_whole_is_told(tmp_path: Path, lost: str) -> None:
    """An array that is shorter or narrower than it was, or a list of failed rows that has gone: nothing is joined."""
    source, out = Texts(100), str(tmp_path / "out.npy")
    for part in parts_of(2):
        make(part.of(source), part.out(out), failing=["id70"])
    second = Part(2, 2).out(out)
    if lost == "rows":
        np.save(second, np.load(second)[:-1])
    elif lost == "width":
        np.save(second, np.load(second)[:, 1:])
    else:
        Path(f"{second}.failed.jsonl").unlink()
    with pytest.raises(DataError, match=r"out\.part-2-of-2\.npy"):
        join(source, out, 2)
    assert not Path(out).exists()


def test_how_far_all_parts_are_is_known(tmp_path: Path) -> None:
    """Those that are finished, and those that are not."""
    source, out = Texts(100), str(tmp_path / "out.npy")
    assert far(out, 4) == Spent()
    make(Part(1, 4).of(source), Part(1, 4).out(out), failing=["id1"], omits=True)
    trail = Trail(Part(3, 4).out(out))
    trail.open(Checkpoint({}, ""))
    trail.note(Checkpoint({}, "", 10, {}, spent=Spent(10, 2, tokens=4, nano_usd=3)))
    trail.close()
    assert far(out, 4) == Spent(35, 3, tokens=14, calls=1.5, nano_usd=10)
