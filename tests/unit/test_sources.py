"""How files of every format become rows: the same rows whatever the format, and one clear line for what is wrong."""

import gzip
import io
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from app.corpus.expression import Template
from app.corpus.rows import DataError, Row, Source
from app.corpus.sources import open_source

Records = list[dict[str, Any]]
RECORDS: Records = [
    {"key": "a", "title": "First", "body": 'with "quotes", a comma', "note": "x"},
    {"key": "b", "title": "Zweite Zeile – ünïcode", "body": "two\nlines\r\nor three", "note": ""},
    {"key": "c", "title": "", "body": "🦜", "note": "y"},
    {"key": "d", "title": "\ttabs\t", "body": " spaces ", "note": ""},
    {"key": "e", "title": "last", "body": "of all", "note": "z"},
]


def separated(records: Records, path: Path, *, delimiter: str) -> None:
    """Written by hand, with every field in quotes."""
    rows = [list(records[0]), *(list(record.values()) for record in records)]
    lines = [delimiter.join('"' + field.replace('"', '""') + '"' for field in row) for row in rows]
    path.write_bytes("".join(line + "\r\n" for line in lines).encode())


def jsonl(records: Records, path: Path) -> None:
    """With a blank line at the end."""
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records) + b"\n")


def parquet(records: Records, path: Path) -> None:
    """With two rows a row group, so that there are several."""
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)


def arrow_file(records: Records, path: Path) -> None:
    """With two rows a batch."""
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def arrow_stream(records: Records, path: Path) -> None:
    """The same, as it is sent."""
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def zipped(write: Callable[[Records, Path], None]) -> Callable[[Records, Path], None]:
    """The same, gzipped."""

    def write_zipped(records: Records, path: Path) -> None:
        write(records, path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_zipped


def csv_file(records: Records, path: Path) -> None:
    """With commas."""
    separated(records, path, delimiter=",")


def tsv_file(records: Records, path: Path) -> None:
    """With tabs."""
    separated(records, path, delimiter="\t")


WRITERS: dict[str, Callable[[Records, Path], None]] = {
    "a.csv": csv_file,
    "a.csv.gz": zipped(csv_file),
    "a.tsv": tsv_file,
    "a.jsonl": jsonl,
    "a.NDJSON.gz": zipped(jsonl),
    "a.parquet": parquet,
    "a.arrow": arrow_file,
    "a.feather": arrow_file,
    "a.ipc": arrow_stream,
}


@pytest.fixture(params=WRITERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A file of each format in turn, which says the same."""
    path = tmp_path / request.param
    WRITERS[request.param](RECORDS, path)
    return str(path)


def rows(*inputs: str | Path, text: str = "text", id: str | None = None, **more: Any) -> list[Row]:  # noqa: A002
    """All rows of these inputs."""
    return list(open_source([str(each) for each in inputs], text=text, id=id, **more).read())


def refusal(*inputs: str | Path, text: str = "text", **more: Any) -> str:
    """The line that is told instead of rows."""
    with pytest.raises(DataError) as refused:
        rows(*inputs, text=text, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def named(path: Path, data: bytes | str) -> Path:
    """A file that says this."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ── the same in every format ────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_is_the_same_in_every_format(path: str) -> None:
    """Its number, its id, its text by a template, and the columns beside its id."""
    source = open_source([path], text=r"{title}\n{body}", id="key")
    expected = [
        Row(
            number,
            record["key"],
            f"{record['title']}\n{record['body']}",
            {n: record[n] for n in ("title", "body", "note")},
        )
        for number, record in enumerate(RECORDS)
    ]
    assert list(source.read()) == expected
    assert (source.name, source.rows, list(source.columns)) == (path, 5, ["title", "body", "note"])


def test_reading_begins_anywhere(path: str) -> None:
    """From any row on come the rows that would have come."""
    source = open_source([path], text="title", id=None)
    whole = list(source.read())
    assert [row.id for row in whole] == ["0", "1", "2", "3", "4"]
    for start in range(7):
        assert list(source.read(start)) == whole[start:]


def test_a_limit_keeps_the_first_rows_or_random_ones(path: str) -> None:
    """Random ones in their order, the same for the same seed; numbers have no gaps, and ids are those of all rows."""
    first = rows(path, text="body", limit=2)
    assert [row.text for row in first] == [record["body"] for record in RECORDS[:2]]
    picks = set()
    for seed in range(20):
        source = open_source([path], text="body", id=None, limit=3, seed=seed)
        found = list(source.read())
        assert (source.rows, [row.number for row in found]) == (3, [0, 1, 2])
        places = [int(row.id) for row in found]
        assert places == sorted(set(places))
        assert [row.text for row in found] == [RECORDS[place]["body"] for place in places]
        assert [list(source.read(start)) for start in range(4)] == [found[start:] for start in range(4)]
        picks.add(tuple(places))
    assert len(picks) > 3
    assert len(rows(path, text="body", limit=9)) == len(rows(path, text="body", limit=9, seed=1)) == 5


def test_several_files_follow_one_another(path: str, tmp_path: Path) -> None:
    """As one sequence, wherever reading begins and whatever is chosen."""
    other = tmp_path / ("z" + Path(path).name)
    WRITERS[Path(path).name]([record | {"key": record["key"] * 2} for record in RECORDS], other)
    source = open_source([path, str(other)], text="title", id="key")
    ids = [*"abcde", "aa", "bb", "cc", "dd", "ee"]
    assert (source.name, source.rows) == ("2 files", 10)
    for start in range(11):
        assert [row.id for row in source.read(start)] == ids[start:]
    assert [row.id for row in rows(path, other, text="title", id="key", limit=6)] == ids[:6]
    some = rows(path, other, text="title", id="key", limit=6, seed=3)
    assert [row.id for row in some] == [each for each in ids if each in {row.id for row in some}]


def test_a_column_that_is_called_id_names_rows_unless_another_one_does(tmp_path: Path) -> None:
    """It is no column besides, since outputs have one of that name."""
    file = tmp_path / "named.csv"
    file.write_text("id,text,nr\nx,one,1\ny,two,2\n")
    usual = open_source([str(file)], text="text", id=None)
    assert ([row.id for row in usual.read()], list(usual.columns)) == (["x", "y"], ["text", "nr"])
    other = open_source([str(file)], text="text", id="nr")
    assert [row.id for row in other.read()] == ["1", "2"]


def test_an_id_that_is_there_twice_is_told_with_both_rows(path: str, tmp_path: Path) -> None:
    """In one file or in two; rows that are not chosen do not matter."""
    other = tmp_path / ("z" + Path(path).name)
    WRITERS[Path(path).name]([RECORDS[0] | {"key": "new"}, RECORDS[3]], other)
    told = refusal(path, other, text="title", id="key")
    assert told.startswith(f"row 4 of {path} and row 2 of {other} have the same 'key', 'd'")
    assert len(rows(path, other, text="title", id="key", limit=6)) == 6


def test_a_missing_column_is_told_with_those_there_are(path: str) -> None:
    """At the start, for the text and for the id; of objects, which may differ, the first one has to have its id."""
    assert refusal(path, text="{titel}").endswith(f"no column 'titel' in {path}: it has key, title, body, note")
    told = refusal(path, text="title", id="nr")
    if "json" in path.lower():
        assert told == f"row 1 of {path} has no 'nr': each row needs its id"
    else:
        assert told == f"no column 'nr' in {path}: it has key, title, body, note"


def test_an_empty_id_is_told_with_its_row(path: str) -> None:
    """As no id at all is."""
    assert refusal(path, text="title", id="note") == f"row 2 of {path} has no 'note': each row needs its id"


def test_the_fingerprint_is_that_of_what_rows_say(path: str, tmp_path: Path) -> None:
    """Of the data and of what is asked for, not of names; also of rows behind the limit."""
    asked: Sequence[dict[str, Any]] = [
        {"text": "title", "id": "key"},
        {"text": "body", "id": "key"},
        {"text": "title", "id": None},
        {"text": "title", "id": "key", "limit": 2},
        {"text": "title", "id": "key", "limit": 2, "seed": 1},
        {"text": "title", "id": "key", "limit": 2, "seed": 2},
    ]
    before = [open_source([path], **each).fingerprint for each in asked]
    assert len(set(before)) == len(before)
    renamed = Path(path).rename(tmp_path / f"b{Path(path).name}")
    assert [open_source([str(renamed)], **each).fingerprint for each in asked] == before
    WRITERS[Path(path).name]([*RECORDS[:4], RECORDS[4] | {"title": "lost"}], renamed)
    assert not {open_source([str(renamed)], **each).fingerprint for each in asked} & set(before)


def test_the_fingerprint_tells_where_a_file_ends(tmp_path: Path) -> None:
    """The same bytes cut elsewhere are other rows."""
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    prints = []
    for first, second in (("ab", "c"), ("a", "bc"), ("c", "ab")):
        named(one, first)
        named(two, second)
        prints.append(open_source([str(one), str(two)], text="text", id=None).fingerprint)
    assert len(set(prints)) == 3


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("title", "T"),
        ("{title}", "T"),
        (r"{title}\n{body}\t.", "T\nB\t."),
        ("{title}\n{body}", "T\nB"),
        ("a {{title}} is {title}{body}", "a {title} is TB"),
        (r"C:\\{title}\d", r"C:\T\d"),
        ("{none}{gone}|", "|"),
        ("{int} {float} {yes} {list}", '3 0.5 true [1,"x"]'),
        ("{a column: with ü}", "odd"),
    ],
)
def test_a_template_is_filled_from_columns(template: str, text: str) -> None:
    """Strings as they are, nothing for what is missing or None, and others as JSON says them."""
    record = {"title": "T", "body": "B", "none": None, "int": 3, "float": 0.5, "yes": True, "list": [1, "x"]}
    assert Template(template)(record | {"a column: with ü": "odd"}) == text


@pytest.mark.parametrize("template", ["", "{", "}", "{title", "title}", "{}", "{a{b}}", "{{title}}", "{title} }"])
def test_a_template_that_is_none_is_refused(template: str) -> None:
    """Also one without a column: every row would say the same."""
    with pytest.raises(DataError, match="the text "):
        Template(template)


@given(st.text())
def test_any_literal_can_be_written(literal: str) -> None:
    """With braces and backslashes doubled."""
    written = literal.replace("\\", "\\\\").replace("{", "{{").replace("}", "}}")
    assert Template(written + "{a}" + written)({"a": "{x}"}) == literal + "{x}" + literal


# ── single formats ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_are_texts(tmp_path: Path) -> None:
    """Without their ends; blank ones are rows, and a BOM is none of the text."""
    path = named(tmp_path / "a.txt", b"\xef\xbb\xbffirst\r\n\n  third \nlast")
    assert [row.text for row in rows(path)] == ["first", "", "  third ", "last"]
    assert [row.columns for row in rows(path, limit=1)] == [{"text": "first"}]
    assert len(rows(named(path, "one\n"))) == 1


def test_files_are_texts(tmp_path: Path) -> None:
    """A row each, by a glob in the order of names; its id is its path, and its text is what it says to the byte."""
    (tmp_path / "sub").mkdir()
    texts = {"b.md": "b\r\n\n", "a.md": "a", "sub/c.md": "", "sub/d.rst": "another"}
    for name, text in texts.items():
        named(tmp_path / name, text)
    found = rows(tmp_path / "**/*.md", form="files")
    assert [(row.id, row.text) for row in found] == [
        (str(tmp_path / name), texts[name]) for name in ("a.md", "b.md", "sub/c.md")
    ]
    one = rows(tmp_path / "a.md", form="files", text="{path}: {text}")
    assert [(row.text, row.columns) for row in one] == [(f"{tmp_path / 'a.md'}: a", {"text": "a"})]


def test_stdin_is_read_as_a_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice, gzipped or not, in the form that is named; nothing is left of it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = b"title,n\nx,1\ny,2\n"
    for given_data in (data, gzip.compress(data)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given_data)))
        source: Source | None = open_source(["-"], text="title", id=None, form="csv")
        assert source is not None
        assert [[row.text for row in source.read()] for _ in range(2)] == [["x", "y"]] * 2
        assert (source.name, source.rows) == ("stdin", 2)
        source = None
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"title\n\xff\n")))
    assert refusal("-", text="title", form="csv").startswith("stdin, line 2: no UTF-8")


def test_objects_may_differ(tmp_path: Path) -> None:
    """A column is what any of them has, in any file: what is missing in one is empty."""
    path = named(tmp_path / "a.jsonl", '\ufeff{"k": 7, "t": "x", "n": {"a": [1]}}\n \n{"k": true, "more": 1}\n')
    source = open_source([str(path)], text="{t}!", id="k")
    assert [*source.read()] == [
        Row(0, "7", "x!", {"t": "x", "n": {"a": [1]}}),
        Row(1, "true", "!", {"more": 1}),
    ]
    assert list(source.columns) == ["t", "n", "more"]
    assert [row.text for row in rows(path, text="more", id="k")] == ["", "1"]
    other = named(tmp_path / "b.jsonl", '{"k": 8, "last": 2}\n')
    assert list(open_source([str(path), str(other)], text="last", id="k").columns) == ["t", "n", "more", "last"]
    assert refusal(path, other, text="gone") == "no column 'gone' in 2 files: it has k, t, n, more, last"
    empty = named(tmp_path / "0.jsonl", "\n")
    assert [row.id for row in rows(empty, path, text="t", id="k")] == ["7", "true"]


def test_objects_have_no_more_columns_than_a_table_can(tmp_path: Path) -> None:
    """Where every line brings names of its own, the line that is too much is told."""
    path = named(tmp_path / "a.jsonl", "".join(f'{{"text": "x", "k{number}": 1}}\n' for number in range(2100)))
    assert refusal(path) == f"{path}, line 2000: more than 2000 columns up to here; put what differs into one object"
    assert len(rows(path, limit=1999)) == 1999


def test_whole_numbers_of_any_length_are_exact(tmp_path: Path) -> None:
    """Those beyond 64 bits are their digits, wherever they stand; others stay numbers."""
    few = [2**64 - 1, -(2**63)]
    many = ["12345678901234567890123", "12345678901234567890124", str(2**64), str(-(2**63) - 1), "1" * 300]
    lines = [f'{{"id": {each}, "text": "x", "n": [{each}, 1.0]}}\n' for each in (*few, *many)]
    found = rows(named(tmp_path / "a.jsonl", "".join(lines)))
    assert [(row.id, row.columns["n"]) for row in found[:2]] == [(str(each), [each, 1.0]) for each in few]
    assert [(row.id, row.columns["n"]) for row in found[2:]] == [(each, [each, 1.0]) for each in many]
    deep = rows(named(tmp_path / "b.jsonl", f'{{"text": {{"a": [{many[0]}, 0.5]}}}}\n'))
    assert [(row.text, row.columns) for row in deep] == [
        ('{"a":["12345678901234567890123",0.5]}', {"text": {"a": ["12345678901234567890123", 0.5]}})
    ]


def test_typed_values_become_json(tmp_path: Path) -> None:
    """Dates and times in ISO 8601, decimals as strings, NaN as None; binaries and lists are left out."""
    values: dict[str, tuple[Any, pa.DataType, Any]] = {
        "day": (date(2024, 1, 2), pa.date32(), "2024-01-02"),
        "clock": (time(3, 4, 5), pa.time32("s"), "03:04:05"),
        "moment": (datetime(2024, 1, 2, 3, 4, 5), pa.timestamp("s"), "2024-01-02T03:04:05"),
        "exact": (1, pa.timestamp("ns", tz="UTC"), "1970-01-01T00:00:00.000000001Z"),
        "span": (timedelta(minutes=2), pa.duration("ns"), 120.0),
        "price": (Decimal("1.50"), pa.decimal128(5, 2), "1.50"),
        "odd": (float("nan"), pa.float64(), None),
        "far": (float("inf"), pa.float32(), None),
        "half": (0.5, pa.float64(), 0.5),
        "yes": (True, pa.bool_(), True),
        "count": (2**60, pa.int64(), 2**60),
        "none": (None, pa.null(), None),
        "word": ("w", pa.large_string(), "w"),
    }
    arrays = {name: pa.array([value, None], kind) for name, (value, kind, _) in values.items()}
    arrays["kind"] = pa.array(["k", None]).dictionary_encode()
    arrays["bytes"] = pa.array([b"x", None])
    arrays["list"] = pa.array([[1.0], None])
    table, path = pa.table(arrays), tmp_path / "a.parquet"
    pq.write_table(table, path)
    arrow = tmp_path / "a.arrow"
    with pa.ipc.new_file(str(arrow), table.schema) as writer:
        writer.write_table(table)
    expected = {name: said for name, (_, _, said) in values.items()} | {"kind": "k"}
    assert [row.columns for row in rows(arrow, text="word")] == [expected, dict.fromkeys(expected)]
    clock = {"clock": "03:04:05.000", "moment": "2024-01-02T03:04:05.000"}  # parquet knows no whole seconds
    assert [row.columns for row in rows(path, text="word")] == [expected | clock, dict.fromkeys(expected)]
    assert orjson.loads(orjson.dumps(expected)) == expected
    assert rows(path, text="{day} {half} {count}", limit=1)[0].text == f"2024-01-02 0.5 {2**60}"


def test_a_time_that_has_no_date_is_its_number(tmp_path: Path) -> None:
    """It is further away than calendars go."""
    path = tmp_path / "a.arrow"
    table = pa.table({"at": pa.array([2**62, 5], pa.timestamp("s")), "on": pa.array([-(2**31), 5], pa.date32())})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    assert [row.text for row in rows(path, text="{at} {on}")] == [
        f"{2**62} {-(2**31)}",
        "1970-01-01T00:00:05 1970-01-06",
    ]


def test_parquet_is_read_from_the_row_group_that_is_asked_for(tmp_path: Path) -> None:
    """Those before it are not touched: whatever they say, going on in the middle does not fail."""
    path = tmp_path / "a.parquet"
    parquet(RECORDS, path)
    source = open_source([str(path)], text="title", id=None)
    with pq.ParquetFile(path) as file:
        end = file.metadata.row_group(1).column(0).dictionary_page_offset
    assert end
    data = path.read_bytes()
    named(path, data[:4] + b"\xff" * (end - 4) + data[end:])
    assert [row.text for row in source.read(2)] == [record["title"] for record in RECORDS[2:]]
    with pytest.raises(DataError, match=r"a\.parquet: "):
        next(source.read(1))


def test_a_long_field_is_read(tmp_path: Path) -> None:
    """Longer ones than the csv module takes by itself."""
    path = named(tmp_path / "a.csv", f"text\n{'x' * 2**20}\n")
    assert [len(row.text) for row in rows(path)] == [2**20]


# ── what is wrong ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.csv", b"", " is empty: its first line has to name the columns"),
        ("a.csv", b"text\n", " has no rows"),
        ("a.csv", b"text,,b\nx,y,z\n", ", line 1: a column without a name"),
        ("a.csv", b"text,text\nx,y\n", ", line 1: two columns are named 'text'"),
        ("a.csv", b'text,b\n"x\ny",1\nz\n', ", line 4: 1 fields, and the first line has 2"),
        ("a.csv", b"text,b\nx,1\n\ny,2,3\n", ", line 4: 3 fields, and the first line has 2"),
        ("a.csv", b'text\n"x\ny"\nz\xff\n', ", line 4: no UTF-8"),
        ("a.csv", b'text\nx\n"never\nclosed\n', ", line 3: unexpected end of data"),
        ("a.csv", b"text,b\rx,y\r", ", line 1: a carriage return that ends no line; convert its line ends, with tr"),
        ("a.csv", b'text\n"x" y\n', ", line 2: ',' expected after '\"'"),
        ("a.csv.gz", gzip.compress(b"text\nx\n", mtime=0)[:-3], ": it is cut short or broken"),
        ("a.csv.gz", b"\x1f\x8bnonsense and more", ": "),
        ("a.jsonl", b"", " has no rows"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n', ", line 3: no JSON, "),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', ", line 2: no JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', ", line 1: no JSON, "),
        (
            "a.jsonl",
            b'[{"text": "x"}]\n',
            ", line 1: no JSON object; each line has to be one: jq -c '.[]' makes them of",
        ),
        ("a.jsonl", b'[\n{"text": "x"}\n]\n', ", line 1: no JSON object; each line has to be one: jq -c '.[]' makes"),
        ("a.jsonl", b'{"text": 1}\n{"text": ' + b"[" * 300 + b"]" * 300 + b"}", ", line 2: nested too deep"),
        ("a.txt", b"", " has no rows"),
        ("a.txt", b"x\ny\xff\n", ", line 2: no UTF-8"),
        ("a.parquet", b"PAR1 not at all PAR1", ": "),
        ("a.parquet", b"", ": "),
        ("a.arrow", b"ARROW1 not at all", ": "),
        ("a.arrow", b"", ": "),
        ("a.arrow", b"neither a file nor a stream", ": "),
    ],
)
def test_a_broken_file_is_told_in_a_line(name: str, data: bytes, told: str, tmp_path: Path) -> None:
    """With its name, and with the line at which a row begins where that can be said."""
    path = named(tmp_path / name, data)
    assert refusal(path).startswith(f"{path}{told}")


@pytest.mark.parametrize(("name", "lists"), [("a.parquet", "list<element: string>"), ("a.arrow", "list<item: string>")])
def test_typed_columns_that_cannot_be_used_are_told(name: str, lists: str, tmp_path: Path) -> None:
    """Two of one name, and what holds no texts or numbers."""
    path = tmp_path / name

    def write(table: pa.Table) -> None:
        if name == "a.parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)

    write(pa.table([["x"], [["y"]]], ["text", "tags"]))
    assert refusal(path, text="tags") == f"the column 'tags' in {path} holds {lists}, no texts or numbers"
    write(pa.table([["x"], [1], ["y"]], ["text", "n", "text"]))
    assert refusal(path) == f"{path}: two columns are named 'text'"


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    """With the line, also where the whole file is the text."""
    path = named(tmp_path / "a.bin", b"x\ny\n\xff")
    assert refusal(path, form="files").startswith(f"{path}, line 3: no UTF-8")


def test_a_parquet_file_that_is_cut_or_changed_is_told(tmp_path: Path) -> None:
    """Not as a traceback of the library, whichever byte it is."""
    whole = tmp_path / "whole.parquet"
    parquet(RECORDS, whole)
    data = whole.read_bytes()
    for at in range(0, len(data), 97):
        path = named(tmp_path / "cut.parquet", data[:at])
        assert refusal(path, text="title").startswith(str(path))


def test_inputs_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    """Missing ones, folders, globs that match nothing, formats that are unknown or mixed."""
    csv = named(tmp_path / "a.csv", "text\nx\n")
    other = named(tmp_path / "b.csv", "text,more\nx,y\n")
    lines = named(tmp_path / "a.txt", "x\n")
    odd = named(tmp_path / "a.xyz", "x\n")
    named(tmp_path / "a.parquet.gz", "x\n")
    assert refusal(tmp_path / "gone.csv") == f"there is no file {tmp_path / 'gone.csv'}"
    assert refusal(tmp_path).startswith(f"{tmp_path} is a folder")
    assert refusal(tmp_path / "*.tsv") == f"no file matches '{tmp_path / '*.tsv'}'"
    assert refusal("x" * 5000 + ".csv") == "x" * 5000 + ".csv: File name too long"
    assert refusal() == "no input: name files, or - for stdin"
    assert "csv, tsv, jsonl, lines, files, parquet, arrow" in refusal(odd)
    assert "does not say its format" in refusal(tmp_path / "a.parquet.gz")
    assert refusal("-").startswith("stdin has no name: give the form, one of csv")
    assert refusal("-", "-", form="csv") == "- is given twice: stdin can be read once"
    assert refusal(csv, form="xml").startswith("there is no form 'xml': name one of csv, tsv")
    assert refusal(csv, lines).startswith(f"{csv} is csv, {lines} lines: inputs have to be of one format")
    assert refusal(csv, other) == f"{other} has the columns text, more, and {csv} has text"
    assert refusal(csv, limit=0).startswith("the limit is 0")
    assert refusal(csv, seed=1).startswith("a seed chooses")
    assert [row.text for row in rows(odd, form="lines")] == ["x"]


def test_a_file_that_is_given_twice_is_read_once(tmp_path: Path) -> None:
    """Whatever it is called, where it came first."""
    path, other = named(tmp_path / "b.txt", "x\n"), named(tmp_path / "a.txt", "y\n")
    (tmp_path / "c.txt").symlink_to(path)
    given_twice = (path, path, f"{tmp_path}/./b.txt", tmp_path / "c.txt", tmp_path / "*.txt", other)
    assert [row.text for row in rows(*given_twice)] == ["x", "y"]


def test_an_output_is_not_its_own_input(tmp_path: Path) -> None:
    """Nor is what lies beside it, or parts of it: a glob passes over them, and the output's own name is refused."""
    folder = tmp_path / "g"
    for name in (
        "a.jsonl", "out.jsonl", "out.jsonl.failed.jsonl", "out.part-1-of-2.jsonl", "out.part-1-of-2.jsonl.failed.jsonl",
        "out.jsonl.parts/out.part-1-of-2.jsonl", "out.part-1.jsonl", "other.out.jsonl",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        named(folder / name, orjson.dumps({"text": name}))
    (tmp_path / "link").symlink_to(folder)
    out = str(tmp_path / "link" / "out.jsonl")
    found = [row.text for row in rows(folder / "**" / "*.jsonl", out=out)]
    assert found == ["a.jsonl", "other.out.jsonl", "out.part-1.jsonl"]
    assert refusal(folder / "out.jsonl", out=out) == f"{folder / 'out.jsonl'} is the output: name another with --out"
    assert refusal(folder / "out.jso*", out=str(folder / "out.jsonl")).endswith("but what belongs to the output")
    named(tmp_path / "x.lance.failed.jsonl", b'{"text": "x"}')
    told = refusal(tmp_path / "*.jsonl", out=str(tmp_path / "x.LANCE"))
    assert told == f"no file matches '{tmp_path}/*.jsonl', but what belongs to the output"


def test_a_closed_stdin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell closes it with <&-."""
    monkeypatch.setattr(sys, "stdin", None)
    assert refusal("-", form="lines") == "there is no standard input"


def test_a_source_that_shrank_is_told(path: str) -> None:
    """Rows that were counted and are gone are not passed over."""
    source = open_source([path], text="title", id=None)
    WRITERS[Path(path).name](RECORDS[:3], Path(path))
    with pytest.raises(DataError, match="has fewer rows than when it was opened"):
        list(source.read())


def test_without_pyarrow_its_formats_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a line that says what to install; others do not need it."""
    parquet(RECORDS, tmp_path / "a.parquet")
    csv_file(RECORDS, tmp_path / "a.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = f"{tmp_path / 'a.parquet'} needs the package pyarrow (embedgate[data])"
    assert refusal(tmp_path / "a.parquet", text="title") == told
    assert len(rows(tmp_path / "a.csv", text="title")) == 5


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def long_lines() -> Iterator[bytes]:
    """About 12 MB of JSONL."""
    for number in range(8_000):
        yield orjson.dumps({"text": f"{number} " + "x" * 1480}) + b"\n"


@pytest.mark.parametrize(
    ("name", "form"), [("a.txt", "lines"), ("a.txt.gz", "lines"), ("a.jsonl", "jsonl"), ("a.csv", "csv")]
)
def test_a_text_is_never_whole_in_memory(name: str, form: str, tmp_path: Path) -> None:
    """A piece of the stream is, whatever the size of the file."""
    path = tmp_path / name
    with gzip.open(path, "wb", 1) if name.endswith(".gz") else path.open("wb") as file:
        file.writelines([b"text\n"] if form == "csv" else [])
        file.writelines(line.replace(b'"', b"") if form == "csv" else line for line in long_lines())
    tracemalloc.start()
    try:
        source = open_source([str(path)], text="text", id="text" if form == "lines" else None)
        assert sum(1 for _ in source.read()) == source.rows == 8_000
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_typed_columns_are_never_whole_in_memory(name: str, tmp_path: Path) -> None:
    """Not even where they are one row group, or one batch."""
    path = tmp_path / name
    table = pa.table({"text": [f"{number} " + "x" * 480 for number in range(40_000)]})
    if name.endswith("parquet"):
        pq.write_table(table, path, compression="none", use_dictionary=False)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    del table
    before, peak_bytes, count = pa.total_allocated_bytes(), 0, 0
    for _ in open_source([str(path)], text="text", id="text").read():
        peak_bytes, count = max(peak_bytes, pa.total_allocated_bytes() - before), count + 1
    assert count == 40_000
    assert peak_bytes < 6e6
