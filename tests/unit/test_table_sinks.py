"""Tables of LanceDB and Postgres are held to the promises of files, and leave alone what is not ours."""

import asyncio
import random
import re
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import lancedb
import numpy as np
import orjson
import pyarrow as pa
import pytest

from app.corpus.rows import DataError, Matrix, Row, Shape, Sink
from app.corpus.sinks import open_sink
from tests.identity import identifying_vectors

WIDE = 6
COLUMNS = ("title", "label", "score", "mixed", "flag")


def some_rows(count: int) -> list[Row]:
    """Rows whose columns tell which row it is; the last one of 60 changes the type of `mixed`."""
    return [
        Row(
            number, f"id-{number}", f"text {number}",
            {"title": f"Ünï'\"\n{number}", "label": number % 4 or None, "score": number / 8,
             "mixed": number if number < 59 else "n/a", "flag": number % 2 == 0},
        )
        for number in range(count)
    ]  # fmt: skip


def some_vectors(rows: Sequence[Row]) -> Matrix:
    """Each row's own; every seventh row has none."""
    vectors = identifying_vectors([row.text for row in rows], "m", WIDE)
    vectors[[index for index, row in enumerate(rows) if row.number % 7 == 3]] = np.nan
    return vectors


ROWS = some_rows(60)
VECTORS = some_vectors(ROWS)
SHAPE = Shape(len(ROWS), WIDE, COLUMNS)


def put(sink: Sink, start: int, end: int) -> None:
    """Writes these of the 60 rows."""
    sink.write(ROWS[start:end], VECTORS[start:end])


def make(out: str, rows: int = 60) -> Mapping[str, Any]:
    """The output of the first rows; the state at which it was finished."""
    with closing(open_sink(out)) as sink:
        sink.open(SHAPE._replace(rows=rows), None)
        for start in range(0, rows, 7):
            put(sink, start, min(rows, start + 7))
        state = sink.sync()
        sink.finish()
    return state


def vectors(out: str, start: int, count: int) -> Matrix | None:
    """What is read of an output."""
    with closing(open_sink(out)) as sink:
        return sink.vectors(start, count)


def holds(out: str, rows: int = 60) -> None:
    """Asserts that the output is of just the first rows, each with its own vector."""
    found = vectors(out, 0, rows)
    assert found is not None
    np.testing.assert_array_equal(found, VECTORS[:rows])
    assert vectors(out, 0, rows + 1) is None


def refused(out: str, shape: Shape = SHAPE, state: Mapping[str, Any] | None = None) -> str:
    """The line with which opening it is refused."""
    with closing(open_sink(out)) as sink, pytest.raises(DataError) as told:
        sink.open(shape, state)
    assert "\n" not in str(told.value)
    return str(told.value)


def sql(url: str, *statements: str) -> list[dict[str, Any]]:
    """What the last statement answers."""

    async def asked() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(url)
        try:
            answers = [await connection.fetch(statement) for statement in statements]
        finally:
            await connection.close()
        return [dict(row) for row in answers[-1]]

    return asyncio.run(asked())


@dataclass
class Place:
    """Where an output goes, and how others look at its table."""

    out: str
    folder: Path
    url: str

    @property
    def lance(self) -> bool:
        """Whether it is LanceDB's."""
        return not self.url

    def seen(self) -> list[dict[str, Any]]:
        """The table's rows as anybody reads them, by their number."""
        if not self.lance:
            rows = sql(self.url, 'SELECT *, embedding::text AS "text of it" FROM articles')
            found = [row | {"embedding": orjson.loads(row.pop("text of it") or "null")} for row in rows]
        else:
            found = self.table.to_arrow().to_pylist()
        return sorted(found, key=lambda row: row["embedgate_row"])

    @property
    def table(self) -> Any:
        """As LanceDB's own users open it."""
        return lancedb.connect(str(self.folder)).open_table("news")

    def change(self, condition: str) -> None:
        """Removes rows."""
        self.table.delete(condition) if self.lance else sql(self.url, f"DELETE FROM articles WHERE {condition}")

    def leftovers(self) -> list[str]:
        """What lies in the folder beside the table."""
        return sorted(path.name for path in self.folder.iterdir() if path.name != "news.lance")


@pytest.fixture(params=["lance", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty one of each kind."""
    monkeypatch.chdir(tmp_path)
    if request.param == "lance":
        return Place(str(tmp_path / "news.lance"), tmp_path, "")
    url = str(request.getfixturevalue("postgres_url"))
    return Place(f"{url}#articles", tmp_path, url)


# ── what is there in the end ────────────────────────────────────────────────────────────────────────────────────────


def test_every_row_has_its_own_vector(place: Place) -> None:
    """All vectors come back bit by bit in their order, from any row on, and NaN where there was none."""
    make(place.out)
    for start, count in [(0, 60), (0, 1), (59, 1), (17, 30), (3, 1), (4, 2)]:
        found = vectors(place.out, start, count)
        assert found is not None
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.nan_to_num(found), np.nan_to_num(VECTORS[start : start + count]))
    assert vectors(place.out, 58, 3) is None
    assert vectors(place.out, 70, 1) is None


def test_others_find_the_rows_with_typed_columns(place: Place) -> None:
    """Id, number, the source's columns of the type that all their values have, and a null for no vector."""
    make(place.out)
    seen = place.seen()
    assert list(seen[0]) == ["id", "embedgate_row", *COLUMNS, "vector" if place.lance else "embedding"]
    for row, told, vector in zip(ROWS, seen, VECTORS, strict=True):
        embedding = told.pop("vector" if place.lance else "embedding")
        assert told == {"id": row.id, "embedgate_row": row.number, **row.columns, "mixed": str(row.columns["mixed"])}
        assert (embedding is None) == bool(np.isnan(vector).any())
        if embedding is not None:
            np.testing.assert_array_equal(np.array(embedding, np.float32), vector)


def test_columns_that_are_named_as_the_tables_own_have_another_name(place: Place) -> None:
    """One that is free."""
    own = "vector" if place.lance else "embedding"
    with closing(open_sink(place.out)) as sink:
        sink.open(Shape(1, WIDE, ("id", own, "embedgate_row", "a")), None)
        sink.write([Row(0, "x", "", {"id": 5, own: [1], "embedgate_row": 9, "a": 1})], VECTORS[:1])
        sink.finish()
    [seen] = place.seen()
    assert {**seen, own: None} == {
        "id": "x", "embedgate_row": 0, "id_": 5, f"{own}_": "[1]", "embedgate_row_": 9, "a": 1, own: None,
    }  # fmt: skip


def test_readers_see_what_was_there_until_all_is(place: Place) -> None:
    """Until the end an older table stays what it was; then there is the new one, and nothing beside it."""
    make(place.out, rows=5)
    with closing(open_sink(place.out)) as sink:
        sink.open(SHAPE, None)
        put(sink, 0, 60)
        sink.sync()
        assert [row["embedgate_row"] for row in place.seen()] == [0, 1, 2, 3, 4]
        assert len(place.leftovers()) == 1
        sink.finish()
    holds(place.out)
    assert len(place.seen()) == 60
    assert place.leftovers() == []


def test_an_output_of_no_rows_is_one(place: Place) -> None:
    """A table without rows, with the columns that it would have."""
    with closing(open_sink(place.out)) as sink:
        sink.open(Shape(0, WIDE, COLUMNS), None)
        state = sink.sync()
        sink.finish()
        assert sink.there()
        assert sink.kept(state, WIDE) == 0
    assert place.seen() == []


# ── crashes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_no_crash_leaves_a_trace(place: Place, seed: int) -> None:
    """Cut off anywhere, again and again, no row is lost and none is there twice."""
    chance = random.Random(seed)
    state: Mapping[str, Any] | None = None
    for _ in range(4):
        with closing(open_sink(place.out)) as sink:
            sink.open(SHAPE, state)
            at = state["rows"] if state else 0
            for _ in range(chance.randrange(5)):
                end = min(60, at + chance.randrange(9))
                put(sink, at, end)
                at = end
                if chance.random() < 0.5:
                    state = orjson.loads(orjson.dumps(sink.sync()))
    assert place.leftovers()
    with closing(open_sink(place.out)) as sink:
        sink.open(SHAPE, state)
        put(sink, state["rows"] if state else 0, 60)
        sink.finish()
    holds(place.out)
    assert [row["id"] for row in place.seen()] == [row.id for row in ROWS]


def test_who_dies_after_the_last_step_is_done(place: Place) -> None:
    """A table whose writer died before it could say so is neither lost nor made again."""
    state = make(place.out)
    with closing(open_sink(place.out)) as sink:
        sink.open(SHAPE, state)
        assert sink.sync() == state
        sink.finish()
    holds(place.out)


def test_a_state_without_its_rows_is_told(place: Place) -> None:
    """Where what an earlier run has written is gone a line says so, though another output of as many rows is there."""
    with closing(open_sink(place.out)) as sink:
        sink.open(SHAPE, None)
        put(sink, 0, 60)
        state = sink.sync()
    for part in place.folder.glob("*.partial/*"):
        part.unlink()
    assert "does not hold what an earlier run has written; begin anew with --force" in refused(place.out, state=state)
    make(place.out)
    assert "does not hold" in refused(place.out, state=state)
    holds(place.out)


@pytest.mark.parametrize("change", [{"rows": "x"}, {"parts": -1}, {"mark": "'"}, {"mark": None}])
def test_a_state_that_is_none_is_told(place: Place, change: dict[str, Any]) -> None:
    """As one whose rows are gone."""
    with closing(open_sink(place.out)) as sink:
        sink.open(SHAPE, None)
        put(sink, 0, 60)
        state = sink.sync()
    assert "does not hold what an earlier run has written" in refused(place.out, state={**state, **change})


def test_an_output_is_known_by_its_state(place: Place) -> None:
    """One that another run has made since is not taken for it, though it has as many rows."""
    before = make(place.out)
    after = make(place.out)
    with closing(open_sink(place.out)) as sink:
        assert [sink.kept(state, WIDE) for state in (before, after, {"rows": 60})] == [None, 60, None]


# ── what others do with it ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_of_others_is_left_alone(place: Place) -> None:
    """Whatever it holds, it is refused in a line before a row is bought, and stays as it was."""
    if place.lance:
        lancedb.connect(str(place.folder)).create_table("news", pa.table({"id": ["a"]}))
    else:
        sql(place.url, "CREATE TABLE articles (id text)", "INSERT INTO articles VALUES ('a')")
    name = place.out if place.lance else r"postgresql://user@\S+#articles"
    assert re.fullmatch(rf"{name} is there, and was not made by embedgate, .*: name another", refused(place.out))
    with closing(open_sink(place.out)) as sink, pytest.raises(DataError, match="was not made by embedgate"):
        sink.there()
    assert place.leftovers() == []
    assert vectors(place.out, 0, 1) is None
    table = place.table.to_arrow().to_pylist() if place.lance else sql(place.url, "SELECT * FROM articles")
    assert table == [{"id": "a"}]


def test_one_that_others_made_meanwhile_is_left_alone(place: Place) -> None:
    """What was bought stays, and goes into the table once the place is free."""
    with closing(open_sink(place.out)) as sink:
        sink.open(SHAPE, None)
        put(sink, 0, 60)
        state = sink.sync()
        if place.lance:
            lancedb.connect(str(place.folder)).create_table("news", pa.table({"id": ["a"]}))
        else:
            sql(place.url, "CREATE TABLE articles (id text)")
        with pytest.raises(DataError, match="was not made by embedgate"):
            sink.finish()
        if place.lance:
            lancedb.connect(str(place.folder)).drop_table("news")
        else:
            sql(place.url, "DROP TABLE articles")
        sink.open(SHAPE, state)
        sink.finish()
    holds(place.out)


def test_rows_that_are_gone_are_noticed(place: Place) -> None:
    """Removed ones have no vectors, their neighbours keep theirs; a table that was dropped is not there."""
    state = make(place.out)
    place.change("embedgate_row = 20 OR embedgate_row = 59")
    with closing(open_sink(place.out)) as sink:
        assert sink.kept(state, WIDE) == 58
        assert sink.vectors(19, 3) is None
        found = sink.vectors(21, 2)
        assert found is not None
        np.testing.assert_array_equal(found, VECTORS[21:23])
    if place.lance:
        lancedb.connect(str(place.folder)).drop_table("news")
    else:
        sql(place.url, "DROP TABLE articles")
    with closing(open_sink(place.out)) as sink:
        assert not sink.there()
        assert sink.kept(state, WIDE) is None
        assert sink.vectors(0, 1) is None


def test_rows_that_were_moved_keep_their_vectors(place: Place) -> None:
    """Databases keep no order: a row that was changed lies elsewhere, one of somebody else's has no number."""
    state = make(place.out)
    if place.lance:
        place.table.update("embedgate_row < 10", {"title": "new"})
        place.table.add([{"id": "foreign", "vector": [9.0] * WIDE}])
        place.table.optimize()
    else:
        sql(
            place.url, "UPDATE articles SET title = 'new' WHERE embedgate_row < 10",
            f"INSERT INTO articles (id, embedding) VALUES ('foreign', '{[9] * WIDE}')",
        )  # fmt: skip
    holds(place.out)
    with closing(open_sink(place.out)) as sink:
        assert sink.kept(state, WIDE) == 60


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


def test_a_full_disk_is_a_line_and_loses_nothing(tmp_path: Path) -> None:
    """Of LanceDB, too; what was synced goes in once there is room."""
    out = str(tmp_path / "news.lance")
    with closing(open_sink(out)) as sink:
        sink.open(SHAPE, None)
        put(sink, 0, 60)
        state = sink.sync()
        with no_file_above(300), pytest.raises(DataError) as told:
            sink.finish()
        assert re.fullmatch(rf"{out}: cannot be written: File too large.*", str(told.value))
        sink.open(SHAPE, state)
        sink.finish()
    holds(out)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    """Before a row is bought, and none is made."""
    out = str(tmp_path / "none" / "news.lance")
    assert refused(out) == f"{out}.partial: cannot be written: No such file or directory"
    assert [*tmp_path.iterdir()] == []


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    """LanceDB has but one: the table and all that belongs to it are spelt so."""
    out = str(tmp_path / "news.LANCE")
    make(out)
    holds(out)
    assert [path.name for path in tmp_path.iterdir()] == ["news.lance"]
    assert open_sink(out).companions == str(tmp_path / "news.lance")


def test_a_name_that_lancedb_does_not_take_is_told(tmp_path: Path) -> None:
    """With what it may be made of."""
    with pytest.raises(DataError, match=r"my news\.lance: a table's name may have only letters, digits, _, - and \.$"):
        open_sink(str(tmp_path / "my news.lance"))


@pytest.mark.parametrize("column", ["a.b", "", "a`b", "_rowid"])
def test_a_column_that_lancedb_does_not_take_is_told_before_a_row_is_bought(tmp_path: Path, column: str) -> None:
    """In its words, without the place in its own source."""
    out = str(tmp_path / "news.lance")
    said = refused(out, Shape(1, WIDE, (column,)))
    assert said.startswith(f"{out}: cannot be written: ")
    assert column in said
    assert ".rs:" not in said
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("out", "package", "extra"),
    [("x.lance", "pyarrow", "lance"), ("x.lance", "lancedb", "lance"), ("postgresql://h/d#t", "pgvector", "data")],
)
def test_the_missing_package_is_named(out: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs the package {package} \(embedgate\[{extra}\]\)$"):
        open_sink(out)
