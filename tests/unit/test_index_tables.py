"""An index in its folder: what is written, replaced and removed, what is found again, and what it says of itself."""

import re
from pathlib import Path
from typing import Any

import lancedb
import msgspec
import pytest

from app.corpus.rows import DataError, Lost
from app.corpus.tree import tables as module
from app.corpus.tree.pieces import Chunk
from app.corpus.tree.search import Mode, search
from app.corpus.tree.stored import Kept, Known, Made, Vectored, Whole
from app.corpus.tree.tables import Only, Tables, locked
from tests.identity import identifying_vector

WIDTH = 16
MADE = Made("tiny", "s1-abc", WIDTH, 256, 32, "/tree")
TEXTS = {
    "net/socket.py": ("connect", "def connect(address):\n    wait_for_the_handshake()\n    return Half.open"),
    "net/timer.py": ("Timer.tick", "def tick(self):\n    # it's the 'clock' that \"counts\"\n    self.clock += 1"),
    "docs/clocks.md": ("Clocks", "# Clocks\n\nA clock ticks.\n\nNobody hears it.\n\nBut a timer does."),
}


def chunk(path: str, *, text: str = "", symbol: str = "", line: int = 1) -> Chunk:
    """One of a file, with an id of its words."""
    text = text or TEXTS[path][1]
    language = "python" if path.endswith(".py") else "markdown"
    end = line + text.count("\n")
    return Chunk(f"{path}#{text}", path, language, symbol, line, end, text, len(text), f"hash of {text}")


def vector(text: str) -> bytes:
    """Like no other's."""
    return identifying_vector(text, "tiny", WIDTH).tobytes()


def vectored(*chunks: Chunk) -> list[Vectored]:
    """With the vectors of their passages."""
    return [Vectored(each, vector(each.passage)) for each in chunks]


def whole(each: Chunk) -> Whole:
    """A file of this chunk alone."""
    return Whole(each.path, each.language, len(each.text), "f", 1, each.tokens, vector(each.passage))


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """With a chunk in each of three files."""
    made = Tables(tmp_path / "index")
    made.begin(MADE)
    chunks = [chunk(path, symbol=symbol) for path, (symbol, _) in TEXTS.items()]
    made.write(vectored(*chunks))
    made.conclude([whole(each) for each in chunks])
    return made


def test_what_is_written_is_there_for_the_next_process(tables: Tables) -> None:
    """Files as they were, chunks with their vectors, to the last bit, and what it is all made with."""
    again = Tables(tables.folder)
    assert again.open() == MADE
    assert again.files() == {path: Known("f", 1, len(text)) for path, (_, text) in TEXTS.items()}
    assert again.paths() == set(TEXTS)
    timer = chunk("net/timer.py", symbol="Timer.tick")
    [kept] = again.kept([timer.id, "no such id"]).items()
    assert kept == (timer.id, Kept("Timer.tick", timer.hash, vector(timer.passage)))


def test_an_id_is_there_once(tables: Tables) -> None:
    """What is written again replaces what was there, and nothing else."""
    moved = chunk("net/timer.py", symbol="Clock.tick", line=40)
    tables.write(vectored(moved))
    assert tables.kept([moved.id]) == {moved.id: Kept("Clock.tick", moved.hash, vector(moved.passage))}
    [hit] = tables.matching("clock", 9, Only("python"))
    assert (hit.symbol, hit.start_line, hit.end_line) == ("Clock.tick", 40, 42)
    assert len(tables.ids(TEXTS)) == 3


def test_removed_files_leave_nothing(tables: Tables) -> None:
    """Neither their row nor their chunks, also if they are many and have quotes in their names."""
    names = [f"it's/{number}.py" for number in range(1200)]
    tables.write(vectored(*(chunk(name, text=f"text of {name}") for name in names)))
    assert len(tables.ids(names)) == 1200
    tables.remove([*names, "net/timer.py"])
    assert tables.paths() == set(tables.files()) == set(TEXTS) - {"net/timer.py"}
    socket = chunk("net/socket.py")
    tables.drop([socket.id])
    tables.doubt(["docs/clocks.md"])
    assert (tables.paths(), set(tables.files())) == ({"docs/clocks.md"}, {"net/socket.py"})


def test_a_new_index_forgets_the_old_one(tables: Tables) -> None:
    """Also with vectors of another width."""
    wide = msgspec.structs.replace(MADE, model="large", dimensions=32)
    tables.begin(wide)
    assert (tables.files(), tables.paths()) == ({}, set())
    assert Tables(tables.folder).open() == wide
    assert MADE.differs(wide) == "model was tiny, now it is large; dimensions was 16, now it is 32"
    assert MADE.differs(MADE) == ""


# ── searching ───────────────────────────────────────────────────────────────────────────────────────────────────────


def found(tables: Tables, query: str, mode: Mode = "text", **how: Any) -> list[str]:
    """The paths, the best first; the vector is that of the query as if it were a passage."""
    only = Only(how.pop("language", ""), how.pop("paths", ""))
    return [hit.path for hit in search(tables, query, vector(query), mode=mode, limit=3, only=only, **how)]


def test_words_find_texts_symbols_and_paths(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the indexes know of the rows and afterwards; in any case, and in the form that a question has."""
    monkeypatch.setattr(module, "_LATE_ROWS", 0)
    for _ in range(2):
        assert found(tables, "Handshakes?") == ["net/socket.py"]
        assert found(tables, "half open") == ["net/socket.py"]
        assert found(tables, "connect") == ["net/socket.py"]
        assert set(found(tables, "clocks")) == {"docs/clocks.md", "net/timer.py"}
        assert found(tables, "socket") == ["net/socket.py"]
        assert found(tables, "breakfast") == []
        tables.tend()


ODD = [
    '"clock', "clock AND (tick", "clock~2^ * ? \\ / [", "' OR 'clock' = 'clock", "clock:tick +counts -self", "clock++",
    "\x00clock", "clock " * 3000, "clock 世界 é",
]  # fmt: skip


@pytest.mark.parametrize("query", ODD, ids=range(len(ODD)))
def test_no_punctuation_breaks_a_question(tables: Tables, query: str) -> None:
    """What other engines read as operators is not looked at; a question without words finds nothing."""
    assert "net/timer.py" in found(tables, query)
    assert found(tables, '?! ("') == found(tables, " ") == []


def test_meaning_finds_the_nearest(tables: Tables) -> None:
    """The chunk whose vector it is comes first, with its cosine; both kinds of search together beat each alone."""
    passage = chunk("docs/clocks.md", symbol="Clocks").passage
    [first, *_] = search(tables, passage, vector(passage), mode="vector", limit=3, only=Only())
    assert (first.path, first.symbol) == ("docs/clocks.md", "Clocks")
    assert first.score == pytest.approx(1.0, abs=1e-5)
    [best, *others] = search(tables, "docs clocks", vector(passage), mode="hybrid", limit=3, only=Only())
    assert (best.path, best.score) == ("docs/clocks.md", 1.0)
    assert all(other.score < 1.0 for other in others)
    [first, *_] = search(tables, "handshake", vector(passage), mode="vector", limit=3, only=Only(), files=True)
    assert first.path == "docs/clocks.md"


def test_a_file_stands_in_the_list_once(tables: Tables) -> None:
    """With its best place, however many of its chunks fit."""
    more = [chunk("net/timer.py", text=f"clock number {number}", line=10 * number) for number in range(1, 30)]
    tables.write(vectored(*more))
    names = found(tables, "clock", "hybrid", files=True)
    assert sorted(names) == sorted(set(names))
    assert names[0] == "net/timer.py"


CONDITIONS = [
    ({"language": "python"}, ["net/socket.py", "net/timer.py"]),
    ({"language": "pyth'on"}, []),
    ({"paths": "*.md"}, ["docs/clocks.md"]),
    ({"paths": "net/"}, ["net/socket.py", "net/timer.py"]),
    ({"paths": "/net/t*.py"}, ["net/timer.py"]),
    ({"paths": "[!s]*.py"}, ["net/timer.py"]),
    ({"paths": "it's"}, []),
    ({"paths": "!net"}, ["docs/clocks.md"]),
    ({"language": "python", "paths": "**/socket.py"}, ["net/socket.py"]),
]


@pytest.mark.parametrize(("only", "paths"), CONDITIONS, ids=str)
def test_a_search_can_be_for_some_files_only(tables: Tables, only: dict[str, str], paths: list[str]) -> None:
    """By language and by the patterns of .gitignore, whatever kind of search; others do not take their places."""
    words = "clock connect"
    for mode in ("vector", "hybrid"):
        assert sorted(found(tables, words, mode, **only)) == paths
        assert sorted(found(tables, words, mode, files=True, **only)) == paths
    assert sorted(found(tables, words, "text", **only)) == paths


PATTERNS = [
    ("[[:alpha:]]*.md", ["docs/clocks.md"]), ("[z-a]*.py", []), ("[!a-r]*.py", ["net/socket.py", "net/timer.py"]),
    ("net/[[&&]*", []), ("[--~]ocs", ["docs/clocks.md"]), ("t\\imer.py", ["net/timer.py"]),
    ("*[[:punct:]]md", ["docs/clocks.md"]),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "paths"), PATTERNS, ids=str)
def test_patterns_mean_the_same_everywhere(tables: Tables, pattern: str, paths: list[str]) -> None:
    """Also with classes that other engines read otherwise."""
    assert sorted(found(tables, "clock connect", paths=pattern)) == paths


@pytest.mark.parametrize("pattern", ["#", "!", "\\", "[", " ", "/"])
def test_what_is_no_pattern_is_told_before_anything_is_searched(pattern: str) -> None:
    """In a line that says where it was given."""
    with pytest.raises(DataError, match=f"--path {re.escape(pattern)}: is no pattern"):
        Only(paths=pattern)


def test_the_lines_that_say_most_are_shown(tables: Tables) -> None:
    """With their own numbers, whatever else than a line feed may end a line elsewhere; names are taken apart."""
    lines = [f"line\f {number}\x85\u2028\v" for number in range(60)]
    lines[40:43] = ["def computeRetryDelay(self):", "    return self.BASE_DELAY", "    # retry, later"]
    tables.write(vectored(chunk("net/retry.py", text="\n".join(lines), line=100)))
    [hit, *_] = search(tables, "where is the retry delay computed", None, mode="text", limit=1, only=Only())
    assert (hit.path, hit.start_line, hit.end_line) == ("net/retry.py", 100, 159)
    shown = dict(enumerate(hit.snippet.split("\n"), hit.snippet_line))
    assert {number: shown.get(number) for number in (140, 141, 142)} == dict(enumerate(lines[40:43], 140))


def test_much_is_indexed(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many vectors have an index, and the nearest is still found, also of those that came later; as are words."""
    monkeypatch.setattr(module, "MOST_COMPARED", 500)
    monkeypatch.setattr(module, "_LATE_ROWS", 50)
    monkeypatch.setattr(module, "_MOST_FRAGMENTS", 4)
    many = [chunk(f"many/{number}.py", text=f"text {number} with word{number}") for number in range(1000)]
    tables.write(vectored(*many[:900]))
    tables.tend()
    for at in range(900, 1000, 20):
        tables.write(vectored(*many[at : at + 20]))
    tables.tend()
    indexes = {index.columns[0]: index for index in tables._chunks.list_indices()}
    assert indexes.keys() == {"id", "path", "text", "words", "vector"}
    assert {index.num_unindexed_rows for index in indexes.values()} == {0}
    assert len(tables.paths()) == 1003
    for number in range(0, 1000, 50):
        [nearest] = tables.nearest(vector(many[number].passage), 1, Only())
        [match] = tables.matching(f"word{number}", 9, Only())
        assert nearest.path == match.path == f"many/{number}.py"
        assert nearest.score == pytest.approx(1.0, abs=1e-3)


# ── what is wrong ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """The second hears so in a line, and may come when the first has gone; who made nothing leaves nothing."""
    with locked(tmp_path / "new" / "index"):
        with pytest.raises(DataError, match="another run is writing"), locked(tmp_path / "new" / "index"):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "new")
        with pytest.raises(DataError, match="another run is writing"), locked(tmp_path / "link" / "index"):
            pass
        (tmp_path / "link").unlink()
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "new" / "index"):
        (tmp_path / "new" / "index" / "table").touch()
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "index", "table"}
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"), locked(tmp_path / "file"):
        pass


def test_what_is_no_index_is_told(tables: Tables, tmp_path: Path) -> None:
    """An empty folder is none, a table of somebody else is left alone, a broken one is a line."""
    (tmp_path / "empty").mkdir()
    assert Tables(tmp_path / "empty").open() is None
    for name in ("chunks", "files"):
        lancedb.connect(tmp_path / "other").create_table(name, [{"id": 1}])
    with pytest.raises(DataError, match="none of ours"):
        Tables(tmp_path / "other").open()
    for manifest in (tables.folder / "chunks.lance" / "_versions").iterdir():
        manifest.write_bytes(b"garbage")
    with pytest.raises(Lost, match=r"the index cannot be read.*; if it is damaged, embedgate index --force") as told:
        Tables(tables.folder).open()
    assert "\n" not in str(told.value)
    tables.begin(MADE)
    assert Tables(tables.folder).open() == MADE


@pytest.mark.parametrize("name", ["chunks", "files"])
def test_a_table_of_somebody_else_is_none_of_ours(tables: Tables, tmp_path: Path, name: str) -> None:
    """Even if it is there alone, or beside a damaged one; one of ours that is alone is what a death has left."""
    [other] = {"chunks", "files"} - {name}
    tables._db.drop_table(other)
    assert Tables(tables.folder).open() is None
    tables._db.drop_table(name)
    tables._db.create_table(name, [{"id": 1}])
    (tables.folder / f"{other}.lance" / "_versions").mkdir(parents=True)
    (tables.folder / f"{other}.lance" / "_versions" / "1.manifest").write_bytes(b"garbage")
    with pytest.raises(DataError, match="none of ours"):
        Tables(tables.folder).open()
    assert lancedb.connect(tables.folder).open_table(name).count_rows() == 1
