"""Every sink is held to the same promises: whole or not there, and the same after any crash."""

import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.corpus.rows import DataError, Lost, Matrix, Row, Shape, Sink
from app.corpus.sinks import open_sink
from tests.identity import identifying_vectors

FORMS = [".npy", ".parquet", ".arrow", ".jsonl"]
TABLES = {".parquet": pq.read_table, ".arrow": lambda path: pa.ipc.open_file(path.read_bytes()).read_all()}
WIDE = 6
COLUMNS = ("title", "label", "score", "mixed")
NPY_HEADER_BYTES = 128


def some_rows(count: int) -> list[Row]:
    """Rows whose columns tell which row it is; the last one of 60 changes the type of `mixed`."""
    return [
        Row(
            number, f"id-{number}", f"text {number}",
            {"title": f"Ünïcode\n{number}", "label": number % 4 or None, "score": number / 8,
             "mixed": number if number < 59 else "n/a"},
        )
        for number in range(count)
    ]  # fmt: skip


def some_vectors(rows: Sequence[Row]) -> Matrix:
    """Each row's own; every seventh row has none."""
    vectors = identifying_vectors([row.text for row in rows], "m", WIDE) if rows else np.empty((0, WIDE), np.float32)
    vectors[[index for index, row in enumerate(rows) if row.number % 7 == 3]] = np.nan
    return vectors


ROWS = some_rows(60)
VECTORS = some_vectors(ROWS)
SHAPE = Shape(len(ROWS), WIDE, COLUMNS)


def put(sink: Sink, start: int, end: int) -> None:
    """Writes these of the 60 rows."""
    sink.write(ROWS[start:end], VECTORS[start:end])


def make(out: Path, *, pieces: int = 7) -> None:
    """The output of all 60 rows, never interrupted, synced after every second piece."""
    sink = open_sink(str(out))
    sink.open(SHAPE, None)
    for index, start in enumerate(range(0, len(ROWS), pieces)):
        put(sink, start, start + pieces)
        if index % 2:
            sink.sync()
    sink.finish()
    sink.close()


def said(out: Path) -> Any:
    """What a reader sees; of files that have to be the same to the byte, the bytes."""
    read = TABLES.get(out.suffix)
    return read(out) if read else out.read_bytes()


@pytest.fixture(params=FORMS)
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where an output goes, once in each form."""
    return tmp_path / f"out{request.param}"


# ── what is there in the end ────────────────────────────────────────────────────────────────────────────────────────


def test_every_row_has_its_own_vector(out: Path) -> None:
    """All vectors come back bit by bit in their order, from any row on, and NaN where there was none."""
    make(out)
    sink = open_sink(str(out))
    for start, count in [(0, 60), (0, 1), (59, 1), (17, 30), (5, 1), (4, 2)]:
        found = sink.vectors(start, count)
        assert found is not None
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, VECTORS[start : start + count])


def test_nothing_is_seen_before_the_end(out: Path) -> None:
    """Until the end there is the partial, and an older output stays what it was; then there is only the new one."""
    sink = open_sink(str(out))
    sink.open(Shape(5, WIDE, COLUMNS), None)
    put(sink, 0, 5)
    sink.finish()
    sink.open(SHAPE, None)
    put(sink, 0, 60)
    sink.sync()
    assert {path.name for path in out.parent.iterdir()} == {out.name, f"{out.name}.partial"}
    assert sink.vectors(4, 1) is not None
    assert sink.vectors(5, 1) is None
    sink.finish()
    sink.close()
    found = sink.vectors(58, 2)
    assert found is not None
    np.testing.assert_array_equal(found, VECTORS[58:])
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_an_output_of_no_rows_is_one(out: Path) -> None:
    """No rows make a file that readers of its form can open."""
    sink = open_sink(str(out))
    sink.open(Shape(0, WIDE, COLUMNS), None)
    assert sink.sync()["rows"] == 0
    sink.finish()
    again = open_sink(str(out))
    assert again.vectors(0, 1) is None
    assert len(said(out)) == (NPY_HEADER_BYTES if out.suffix == ".npy" else 0)


@pytest.mark.parametrize("content", [None, b"", b"no such thing\n", b"[1]\n"])
def test_what_is_no_output_has_no_vectors(out: Path, content: bytes | None) -> None:
    """Of a file that is not there, or is of another form, there are no vectors, and no traceback."""
    if content is not None:
        out.write_bytes(content)
    assert open_sink(str(out)).vectors(0, 1) is None


def test_rows_beyond_the_end_have_no_vectors(out: Path) -> None:
    """Whoever asks for more rows than there are gets none, not some."""
    make(out)
    assert open_sink(str(out)).vectors(58, 3) is None
    assert open_sink(str(out)).vectors(70, 1) is None


# ── crashes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def damage(partial: Path, safe: set[str], state: Mapping[str, Any], chance: random.Random) -> None:
    """What a power cut may do: anything behind what was synced, `safe` being the files of a folder at that time."""
    if partial.is_dir():
        for path in partial.iterdir():
            if path.name not in safe:
                path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size + 1)])
        for name in ("draft", "whole", f"{state['parts']:08d}.arrow"):
            if chance.random() < 0.5:
                (partial / name).write_bytes(chance.randbytes(100))
        return
    kept_bytes = state.get("bytes", NPY_HEADER_BYTES + state["rows"] * WIDE * 4)
    behind = bytearray(partial.read_bytes()[kept_bytes:])
    for _ in range(min(len(behind), 40)):
        behind[chance.randrange(len(behind))] = chance.randrange(256)
    end = chance.choice([len(behind), chance.randrange(len(behind) + 1)])
    beyond = chance.randbytes(chance.choice([0, 30, 20_000]))
    partial.write_bytes(partial.read_bytes()[:kept_bytes] + behind[:end] + beyond)


def crash(out: Path, state: Mapping[str, Any] | None, chance: random.Random) -> Mapping[str, Any] | None:
    """Writes on from `state`, is cut off at any moment, and leaves what a power cut may leave; the last state."""
    partial = out.with_name(f"{out.name}.partial")
    sink = open_sink(str(out))
    sink.open(SHAPE, state)
    safe = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    at = state["rows"] if state else 0
    for _ in range(chance.randrange(6)):
        end = min(60, at + chance.randrange(12))
        put(sink, at, end)
        at = end
        if chance.random() < 0.4:
            state = orjson.loads(orjson.dumps(sink.sync()))
            safe = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    copy = out.with_name("copy")
    shutil.copytree(partial, copy) if partial.is_dir() else shutil.copyfile(partial, copy)
    sink.close()
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    copy.rename(partial)
    if state is not None:
        damage(partial, safe, state, chance)
    return state


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), crashes=st.integers(1, 4))
def test_no_crash_leaves_a_trace(form: str, seed: int, crashes: int) -> None:
    """Cut off anywhere, again and again, with garbage behind the last sync, the output is what it would have been."""
    with tempfile.TemporaryDirectory() as folder:
        out, straight, chance = Path(folder, f"out{form}"), Path(folder, f"straight{form}"), random.Random(seed)
        make(straight)
        state = None
        for _ in range(crashes):
            state = crash(out, state, chance)
        sink = open_sink(str(out))
        sink.open(SHAPE, state)
        put(sink, state["rows"] if state else 0, 60)
        sink.sync()
        sink.finish()
        assert said(out) == said(straight)
        assert {path.name for path in Path(folder).iterdir()} == {out.name, straight.name}


def test_who_dies_after_the_last_step_is_done(out: Path) -> None:
    """An output that was finished, and whose writer died before it could say so, is neither lost nor made again."""
    sink = open_sink(str(out))
    sink.open(SHAPE, None)
    put(sink, 0, 60)
    state = sink.sync()
    sink.finish()
    before = said(out)
    partial = out.with_name(f"{out.name}.partial")
    if out.suffix in TABLES:  # not all of the folder was removed yet
        partial.mkdir()
        (partial / "whole").write_bytes(b"")
    again = open_sink(str(out))
    again.open(SHAPE, state)
    assert again.sync() == state
    again.finish()
    again.close()
    assert said(out) == before
    assert not partial.exists()


def test_a_state_without_its_rows_is_told(out: Path) -> None:
    """Where what an earlier run has written is gone, a line says so, though another output lies there."""
    sink = open_sink(str(out))
    sink.open(SHAPE, None)
    put(sink, 0, 20)
    state = sink.sync()
    sink.close()
    partial = out.with_name(f"{out.name}.partial")
    if partial.is_dir():
        (partial / "00000000.arrow").unlink()
    else:
        partial.write_bytes(partial.read_bytes()[:150])
    for other in (False, True):
        if other:
            make(out)
        with pytest.raises(DataError, match=r"partial: does not hold what an earlier run has written; begin anew"):
            open_sink(str(out)).open(SHAPE, state)


def test_an_output_of_other_rows_is_not_gone_on_with(out: Path) -> None:
    """An older output that happens to have as many rows as were written is not taken for the one that is lost."""
    sink = open_sink(str(out))
    sink.open(Shape(20, WIDE, COLUMNS), None)
    put(sink, 0, 20)
    state = sink.sync()
    sink.finish()
    sink.open(SHAPE, state)
    with pytest.raises(DataError, match="does not hold"):
        put(sink, 20, 40)


def test_beginning_anew_forgets_everything(out: Path) -> None:
    """What an earlier run has left, longer or broken, is not in the new output."""
    sink = open_sink(str(out))
    sink.open(SHAPE, None)
    put(sink, 0, 60)
    sink.sync()
    sink.close()
    sink.open(Shape(5, WIDE, COLUMNS), None)
    assert not [*out.parent.glob("*.partial/*")]
    put(sink, 0, 5)
    sink.finish()
    found = open_sink(str(out)).vectors(0, 5)
    assert found is not None
    np.testing.assert_array_equal(found, VECTORS[:5])
    assert open_sink(str(out)).vectors(5, 1) is None


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """A disk that is full once a file gets so large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", [".parquet", ".arrow", ".jsonl"])
@pytest.mark.parametrize("synced", [20, 60])
def test_a_full_disk_is_a_line_and_loses_nothing(tmp_path: Path, form: str, synced: int) -> None:
    """With no room for a row or for the table of all, a line says so; what was synced stays, and goes on with room."""
    out = tmp_path / f"out{form}"
    sink = open_sink(str(out))
    sink.open(SHAPE, None)
    put(sink, 0, synced)
    state = sink.sync()

    def write_the_rest() -> None:
        put(sink, synced, 60)
        sink.finish()

    if form != ".jsonl" or synced < 60:
        with no_file_above(1000), pytest.raises(DataError, match=rf"out\{form}: cannot be written: File too large$"):
            write_the_rest()
        sink.close()
        sink.open(SHAPE, state)
    write_the_rest()
    make(tmp_path / f"straight{form}")
    assert said(out) == said(tmp_path / f"straight{form}")


def test_a_disk_that_is_too_small_is_told_before_the_first_row(tmp_path: Path) -> None:
    """A .npy file that cannot fit is refused with both numbers, or by the disk itself, and leaves nothing behind."""
    sink = open_sink(str(tmp_path / "out.npy"))
    with pytest.raises(DataError, match=r"out\.npy\.partial: needs 3,072,000,000 MB, [\d,]+ MB are free$"):
        sink.open(Shape(10**12, 768, ()), None)
    with no_file_above(1000), pytest.raises(DataError, match=r"out\.npy: cannot be written: File too large$"):
        sink.open(SHAPE, None)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told(out: Path) -> None:
    """A missing folder, and a folder where the file should be, are told in a line before a row is bought."""
    with pytest.raises(DataError, match=r"cannot be written: No such file or directory$"):
        open_sink(str(out.parent / "none" / out.name)).open(SHAPE, None)
    out.mkdir()
    with pytest.raises(DataError, match=r"cannot be written: Is a directory$"):
        open_sink(str(out)).open(SHAPE, None)
    with pytest.raises(DataError, match="cannot be read: "):
        open_sink(str(out)).vectors(0, 1)


@pytest.mark.parametrize("name", ["out.csv", "out", "npy", ".", "/"])
def test_an_unknown_form_is_told_with_those_there_are(name: str) -> None:
    """A suffix that nobody knows is answered with those that are known."""
    with pytest.raises(DataError, match=rf"{name}: is of no form.*\.npy, \.parquet, \.arrow or \.jsonl"):
        open_sink(name)


@pytest.mark.parametrize("form", [".parquet", ".arrow"])
def test_the_missing_package_is_named(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow a line says what to install; the other forms do not need it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "app.corpus.arrow_sink", raising=False)
    with pytest.raises(DataError, match=r"needs the package pyarrow \(embedgate\[data\]\)"):
        open_sink(f"out{form}")
    open_sink("out.npy")
    open_sink("out.jsonl")


# ── .npy ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_numpy_reads_its_own_file(tmp_path: Path) -> None:
    """The bytes are those that numpy.save itself writes: float32, C order, (rows, dimensions)."""
    make(tmp_path / "out.npy")
    np.save(tmp_path / "saved.npy", VECTORS)
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_an_array_has_no_more_rows_than_it_was_laid_out_for(tmp_path: Path) -> None:
    """To write more is a bug and not an output."""
    sink = open_sink(str(tmp_path / "out.npy"))
    sink.open(SHAPE, None)
    put(sink, 0, 50)
    with pytest.raises(AssertionError):
        put(sink, 0, 20)
    sink.close()
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_an_array_of_fewer_rows_has_their_shape(tmp_path: Path, rows: int) -> None:
    """As if it had been laid out for them; also for who died after the header told so, and goes on."""
    out, sink = tmp_path / "out.npy", open_sink(str(tmp_path / "out.npy"))
    sink.open(SHAPE, None)
    put(sink, 0, rows)
    state = sink.sync()
    sink.finish()
    np.save(tmp_path / "saved.npy", VECTORS[:rows])
    assert out.read_bytes() == (tmp_path / "saved.npy").read_bytes()
    out.rename(tmp_path / "out.npy.partial")
    sink.open(SHAPE, state)
    put(sink, rows, len(ROWS))
    sink.finish()
    np.testing.assert_array_equal(np.load(out), VECTORS)


def test_an_array_of_another_shape_is_not_gone_on_with(tmp_path: Path) -> None:
    """A partial that was laid out for other rows is told, and not filled up with these."""
    sink = open_sink(str(tmp_path / "out.npy"))
    sink.open(Shape(70, WIDE, COLUMNS), None)
    put(sink, 0, 20)
    state = sink.sync()
    with pytest.raises(DataError, match="does not hold"):
        sink.open(SHAPE, state)


def test_memory_does_not_grow_with_the_array(tmp_path: Path) -> None:
    """51 MB are written, and read, while the process stays as large as it was after the first piece."""
    piece = np.full((1000, 64), 0.5, np.float32)
    rows = [Row(number, str(number), "", {}) for number in range(1000)]
    sink = open_sink(str(tmp_path / "out.npy"))
    sink.open(Shape(200_000, 64, ()), None)
    sink.write(rows, piece)
    process, sizes_bytes = psutil.Process(), []
    for _ in range(199):
        sink.write(rows, piece)
        sizes_bytes.append(process.memory_info().rss)
    sink.finish()
    for start in range(0, 200_000, 1000):
        found = sink.vectors(start, 1000)
        sizes_bytes.append(process.memory_info().rss)
    assert found is not None
    assert (found == 0.5).all()
    assert max(sizes_bytes) - sizes_bytes[0] < 5e6


# ── what others do with it ──────────────────────────────────────────────────────────────────────────────────────────


def altered(out: Path, vectors: npt.NDArray[Any]) -> None:
    """Others put these in the place of the output's vectors."""
    match out.suffix:
        case ".npy":
            np.save(out, vectors)
        case ".jsonl":
            out.write_bytes(b"".join(orjson.dumps({"embedding": each.tolist()}) + b"\n" for each in vectors))
        case _:
            flat = pa.array(vectors.reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[-1]) if vectors.ndim > 1 else flat
            write_table(out, pa.table({"embedding": lists}))


def write_table(out: Path, table: pa.Table) -> None:
    """As a file of the form that the name says."""
    if out.suffix == ".parquet":
        pq.write_table(table, out)
    else:
        with pa.ipc.new_file(str(out), table.schema) as writer:
            writer.write_table(table)


def test_an_output_of_another_shape_is_another_one(out: Path) -> None:
    """Narrower, wider, longer, shorter, or no vectors at all: it holds none of the rows that are told of."""
    with closing(open_sink(str(out))) as sink:
        sink.open(SHAPE, None)
        put(sink, 0, 60)
        state = sink.sync()
        sink.finish()
        assert sink.kept(state, WIDE) == 60
    for vectors in (np.ones((60, 5)), np.ones((60, 7)), np.ones((61, WIDE)), np.ones((59, WIDE)), np.ones(60)):
        altered(out, vectors.astype(np.float32))
        with closing(open_sink(str(out))) as sink:
            assert sink.kept(state, WIDE) == 0
    altered(out, VECTORS)
    with closing(open_sink(str(out))) as sink:
        assert sink.kept(state, WIDE) == 60


def test_vectors_of_another_type_are_none(tmp_path: Path) -> None:
    """Doubles in an array, lists of any length in a table."""
    np.save(tmp_path / "out.npy", np.ones((3, WIDE)))
    assert open_sink(str(tmp_path / "out.npy")).vectors(0, 1) is None
    for name in ("out.parquet", "out.arrow"):
        write_table(tmp_path / name, pa.table({"embedding": pa.array([[1.0], [1.0, 2.0]])}))
        assert open_sink(str(tmp_path / name)).vectors(0, 1) is None


@pytest.mark.parametrize("state", [{}, {"rows": "x"}, {"rows": -1, "bytes": -1, "parts": -1}, {"rows": None}])
def test_a_state_that_is_none_is_told(out: Path, state: dict[str, Any]) -> None:
    """As one whose rows are gone."""
    with closing(open_sink(str(out))) as sink:
        sink.open(SHAPE, None)
        put(sink, 0, 60)
        sink.sync()
        sink.close()
        with pytest.raises(Lost, match="does not hold what an earlier run has written"):
            sink.open(SHAPE, state)


# ── .jsonl ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_says_what_its_row_carries(tmp_path: Path) -> None:
    """Id first, the columns, then the shortest digits; null without a vector; a column named as these is renamed."""
    out = tmp_path / "out.jsonl"
    sink = open_sink(str(out))
    sink.open(Shape(2, 3, ("title", "id", "embedding", "id_")), None)
    rows = [Row(0, "a", "", {"title": "ä", "id": 7, "id_": 8}), Row(1, "b", "", {"title": None, "embedding": [1]})]
    sink.write(rows, np.array([[0.1, -2, 1e-20], [np.nan] * 3], np.float32))
    sink.finish()
    assert out.read_text("utf-8").splitlines() == [
        '{"id":"a","title":"ä","id__":7,"id_":8,"embedding":[0.1,-2.0,1e-20]}',
        '{"id":"b","title":null,"embedding_":[1],"embedding":null}',
    ]


def test_an_output_without_any_vector_is_one(out: Path) -> None:
    """A row of NaN for each; the run that comes again finds all of them."""
    with closing(open_sink(str(out))) as sink:
        sink.open(SHAPE, None)
        sink.write(ROWS, np.full_like(VECTORS, np.nan))
        state = sink.sync()
        sink.finish()
        found = sink.vectors(0, len(ROWS))
        assert found is not None
        assert len(found) == len(ROWS)
        assert np.isnan(found).all(axis=1).all()
        assert found.shape[1]
        assert sink.kept(state, WIDE) == len(ROWS)


def test_rows_without_vectors_are_as_wide_as_the_others(tmp_path: Path) -> None:
    """A stretch of nulls is read as NaN of the output's width."""
    make(tmp_path / "out.jsonl")
    found = open_sink(str(tmp_path / "out.jsonl")).vectors(3, 1)
    assert found is not None
    assert found.shape == (1, WIDE)


# ── .parquet and .arrow ─────────────────────────────────────────────────────────────────────────────────────────────


def table_of(tmp_path: Path, form: str, columns: Sequence[str], values: Sequence[Mapping[str, Any]]) -> pa.Table:
    """What a reader sees of rows with these columns, written and synced one by one."""
    out = tmp_path / f"out{form}"
    sink = open_sink(str(out))
    sink.open(Shape(len(values), 2, columns), None)
    for number, each in enumerate(values):
        sink.write([Row(number, f"r{number}", "", each)], np.full((1, 2), number, np.float32))
        sink.sync()
    sink.finish()
    table: pa.Table = TABLES[form](out)
    return table


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize(
    ("values", "kind", "seen"),
    [
        ([True, None], pa.bool_(), [True, None]),
        ([1, None, -(2**63)], pa.int64(), [1, None, -(2**63)]),
        ([1, 2.5, None], pa.float64(), [1.0, 2.5, None]),
        ([2**53 + 1, 0.5], pa.string(), ["9007199254740993", "0.5"]),
        ([2**63], pa.string(), ["9223372036854775808"]),
        (["a", None, ""], pa.string(), ["a", None, ""]),
        ([1, 2, "n/a", None], pa.string(), ["1", "2", "n/a", None]),
        ([True, 1], pa.string(), ["true", "1"]),
        ([[1, "ä"], {"a": None}], pa.string(), ['[1,"ä"]', '{"a":null}']),
        ([None, None], pa.string(), [None, None]),
    ],
)  # fmt: skip
def test_a_column_is_of_the_type_that_all_its_values_have(
    tmp_path: Path, form: str, values: list[Any], kind: pa.DataType, seen: list[Any]
) -> None:
    """One type for all rows whatever came first, no value lost or refused: what is mixed is a string."""
    table = table_of(tmp_path, form, ["it"], [{"it": value} for value in values])
    assert table.schema.field("it").type == kind
    assert table.column("it").to_pylist() == seen


@pytest.mark.parametrize("form", TABLES)
def test_a_table_has_the_columns_of_its_shape(tmp_path: Path, form: str) -> None:
    """Id, the shape's columns, the embedding; a row that lacks one has null, one named as these has another name."""
    table = table_of(tmp_path, form, ["b", "id", "a", "embedding"], [{"a": 1, "c": 2, "id": 5}, {"b": "x"}])
    assert table.schema.names == ["id", "b", "id_", "a", "embedding_", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 2)
    assert table.to_pylist() == [
        {"id": "r0", "b": None, "id_": 5, "a": 1, "embedding_": None, "embedding": [0.0, 0.0]},
        {"id": "r1", "b": "x", "id_": None, "a": None, "embedding_": None, "embedding": [1.0, 1.0]},
    ]


@pytest.mark.parametrize("form", TABLES)
def test_groups_of_rows_do_not_tell_how_they_were_written(tmp_path: Path, form: str) -> None:
    """Written at once or in many small parts, a table has the same few groups of bounded size."""
    count, sizes = 20_000, []
    rows = [Row(number, str(number), "", {}) for number in range(count)]
    for name, piece in (("one", count), ("many", 333)):
        out = tmp_path / f"{name}{form}"
        sink = open_sink(str(out))
        sink.open(Shape(count, 2, ()), None)
        for at in range(0, count, piece):
            sink.write(rows[at : at + piece], np.full((len(rows[at : at + piece]), 2), at, np.float32))
            sink.sync()
        sink.finish()
        if form == ".parquet":
            told = pq.read_metadata(out)
            sizes.append([told.row_group(index).num_rows for index in range(told.num_row_groups)])
        else:
            sizes.append([len(batch) for batch in said(out).to_batches()])
        assert said(out).column("id").to_pylist() == [row.id for row in rows]
    assert sizes == [[8192, 8192, 3616]] * 2
