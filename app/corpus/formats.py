"""Hides how a file of each format becomes records, each once and in order, and how what is wrong with it is told."""

import csv
import gzip
import io
import math
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import orjson

from app.corpus.rows import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Record: TypeAlias = Mapping[str, Any]
Places: TypeAlias = range | npt.NDArray[np.int64]
"""Which records, counted from 0, ascending."""

PATH: Final = "path"
TEXT: Final = "text"

_BOM = b"\xef\xbb\xbf"
_ARROW = b"ARROW1"
_GZIP = b"\x1f\x8b"  # no text in UTF-8 begins like this
_PIECE_BYTES = 2**18
_PIECE_ROWS = 1000
_MOST_FIELD_CHARS = 2**25


class File:
    """An input: its name for people, and where its bytes are."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path


class Table(Protocol):
    """A file as records. Every use of it opens the file, blocks, and raises DataError with file, line or row."""

    file: File

    @property
    def columns(self) -> Sequence[str]:
        """What its records have; JSONL: what the first one has. Binaries and lists of a typed file are left out."""

    def survey(self, column: str | None, most: int | None, digest: blake2b) -> Iterator[Any]:
        """For each of the first `most` records its value in the column, None where no column is named.

        At the end the digest has taken in all that the file says, other records, too.
        """

    def records(self, places: Places) -> Iterator[Record]:
        """These records, as JSON values; those that are not there any more are left out."""


def within(places: Places, first: int, end: int) -> Places:
    """Those from `first` to before `end`, counted from `first`."""
    found = places[bisect_left(places, first) : bisect_left(places, end)]
    return range(found.start - first, found.stop - first) if isinstance(found, range) else found - first


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_Parsed: TypeAlias = tuple[tuple[str, ...], Iterator[Record]]
_Lines: TypeAlias = Iterator[bytes]


class _TextTable:
    """A file of UTF-8 text, gzipped or not; `parse` makes columns and records of its lines."""

    def __init__(self, file: File, *, parse: Callable[[_Lines, str], _Parsed]) -> None:
        self.file = file
        self._parse = parse

    @cached_property
    def columns(self) -> Sequence[str]:
        """See Table."""
        with _reading(self.file) as stream:
            return self._parse(_lines(stream), self.file.name)[0]

    def survey(self, column: str | None, most: int | None, digest: blake2b) -> Iterator[Any]:
        """See Table."""
        with _reading(self.file, digest) as stream:
            for record in islice(self._parse(_lines(stream), self.file.name)[1], most):
                yield None if column is None else record.get(column)
            while stream.read(_PIECE_BYTES):
                pass

    def records(self, places: Places) -> Iterator[Record]:
        """See Table."""
        with _reading(self.file) as stream:
            found = self._parse(_lines(stream), self.file.name)[1]
            at = 0
            for place in places:
                yield from islice(found, place - at, place - at + 1)
                at = place + 1


class _Digested(io.RawIOBase):
    """A stream whose bytes go into a digest as they are read, and at its end their number."""

    def __init__(self, inner: io.RawIOBase, digest: blake2b) -> None:
        self._inner = inner
        self._digest = digest
        self._size_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._inner.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        self._size_bytes += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._digest.update(self._size_bytes.to_bytes(8))
        super().close()


@contextmanager
def _reading(file: File, digest: blake2b | None = None) -> Iterator[BinaryIO]:
    """What a file says, unzipped; what goes wrong with it meanwhile is a DataError."""
    try:
        with file.path.open("rb", buffering=0) as raw:
            zipped = raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            plain = cast("io.RawIOBase", gzip.GzipFile(fileobj=raw) if zipped else raw)
            source = _Digested(plain, digest) if digest else plain
            with io.BufferedReader(source, _PIECE_BYTES) as stream:
                yield stream
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file.name}: it is cut short or broken ({error})") from None
    except OSError as error:
        raise DataError(f"{file.name}: {error.strerror or error}") from None


def _lines(stream: BinaryIO) -> _Lines:
    first = stream.readline().removeprefix(_BOM)
    return chain((first,) if first else (), stream)


def _separated(lines: _Lines, name: str, *, delimiter: str) -> _Parsed:
    rows = _fields(lines, name, delimiter)
    header = tuple(next(rows, ()))
    if not header:
        raise DataError(f"{name} is empty: its first line has to name the columns")
    if not all(map(str.strip, header)):
        raise DataError(f"{name}, line 1: a column without a name; the first line has to name the columns")
    if len(set(header)) < len(header):
        twice = next(each for each in header if header.count(each) > 1)
        raise DataError(f"{name}, line 1: two columns are named {twice!r}")
    return header, (dict(zip(header, row, strict=True)) for row in rows)


def _fields(lines: _Lines, name: str, delimiter: str) -> Iterator[list[str]]:
    """Rows with as many fields as the first one; blank lines are skipped."""
    csv.field_size_limit(_MOST_FIELD_CHARS)
    reader = csv.reader(map(bytes.decode, lines), delimiter=delimiter, strict=True)
    width, line = 0, 1  # the line is where a row begins: it may have several
    try:
        for row in reader:
            if row:
                width = width or len(row)
                if len(row) != width:
                    raise DataError(f"{name}, line {line}: {len(row)} fields, and the first line has {width}")
                yield row
            line = reader.line_num + 1
    except UnicodeDecodeError:
        raise _no_utf8(name, reader.line_num + 1) from None
    except csv.Error as error:
        raise DataError(f"{name}, line {line}: {error}") from None


def _objects(lines: _Lines, name: str) -> _Parsed:
    found = _parsed(lines, name)
    first = next(found, None)
    return ((), found) if first is None else (tuple(first), chain((first,), found))


def _parsed(lines: _Lines, name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{name}, line {number}: no JSON, {error.msg} at character {error.pos + 1}") from None
        if not isinstance(record, dict):
            raise DataError(f"{name}, line {number}: no JSON object")
        yield record


def _texts(lines: _Lines, name: str) -> _Parsed:
    bare = (line.removesuffix(b"\n").removesuffix(b"\r") for line in lines)
    return (TEXT,), ({TEXT: _decoded(line, name, number)} for number, line in enumerate(bare, 1))


def _decoded(text: bytes, name: str, line: int = 1) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _no_utf8(name, line + text.count(b"\n", 0, error.start)) from None


class _WholeTable(_TextTable):
    """A file as one record: its path and its text."""

    def __init__(self, file: File) -> None:
        super().__init__(file, parse=self._whole)

    @property
    def columns(self) -> Sequence[str]:
        """Of every file the same: none is opened for them."""
        return PATH, TEXT

    def survey(self, column: str | None, most: int | None, digest: blake2b) -> Iterator[Any]:
        """See Table; the path is part of what it says."""
        yield from super().survey(column, most, digest)
        path = self.file.name.encode()
        digest.update(path + len(path).to_bytes(8))

    def _whole(self, lines: _Lines, name: str) -> _Parsed:
        return (PATH, TEXT), ({PATH: name, TEXT: _decoded(text, name)} for text in (b"".join(lines),))


def _no_utf8(name: str, line: int) -> DataError:
    return DataError(f"{name}, line {line}: no UTF-8; convert the file first, with iconv for example")


# ── typed columns ───────────────────────────────────────────────────────────────────────────────────────────────────

_Batches: TypeAlias = "Iterable[pa.RecordBatch]"
_Groups: TypeAlias = Callable[[Sequence[str]], Iterator[tuple[int, _Batches]]]
"""Of some columns what is stored together: each group with its number of rows, and them in small pieces."""
_Opened: TypeAlias = "Iterator[tuple[pa.Schema, _Groups]]"


class _TypedTable:
    """A file that pyarrow opens; a piece of it is in memory at a time."""

    def __init__(
        self, file: File, *, opened: "Callable[[Path], AbstractContextManager[tuple[pa.Schema, _Groups]]]"
    ) -> None:
        self.file = file
        self._opened = opened

    @cached_property
    def columns(self) -> Sequence[str]:
        """See Table."""
        with _arrow_errors(self.file), self._opened(self.file.path) as (schema, _):
            return [field.name for field in schema if _is_scalar(field.type)]

    def survey(self, column: str | None, most: int | None, digest: blake2b) -> Iterator[Any]:
        """See Table."""
        yield from islice(self._values(column), most)
        with _reading(self.file, digest) as stream:
            while stream.read(_PIECE_BYTES):
                pass

    def records(self, places: Places) -> Iterator[Record]:
        """See Table."""
        first = 0
        with _arrow_errors(self.file), self._opened(self.file.path) as (_, groups):
            for count, batches in groups(self.columns):
                yield from _chosen(batches, within(places, first, first + count), self.columns)
                first += count

    def _values(self, column: str | None) -> Iterator[Any]:
        with _arrow_errors(self.file), self._opened(self.file.path) as (_, groups):
            for count, batches in groups([column or self.columns[0]]):
                if column is None:
                    yield from repeat(None, count)
                else:
                    yield from chain.from_iterable(_json_values(batch.column(column)) for batch in batches)


@contextmanager
def _parquet(path: Path) -> _Opened:
    """A row group may be large: it is read through a small buffer."""
    from pyarrow import parquet as pq

    with pq.ParquetFile(path, buffer_size=_PIECE_BYTES, pre_buffer=False) as file:

        def groups(columns: Sequence[str]) -> Iterator[tuple[int, _Batches]]:
            for number in range(file.num_row_groups):
                batches = file.iter_batches(_PIECE_ROWS, row_groups=[number], columns=list(columns))
                yield file.metadata.row_group(number).num_rows, batches

        yield file.schema_arrow, groups


@contextmanager
def _arrow(path: Path) -> _Opened:
    """A file or a stream; a record batch may be all there is: so it is mapped into memory."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW)) == _ARROW
        source.seek(0)
        reader: Any = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader

        def groups(columns: Sequence[str]) -> Iterator[tuple[int, _Batches]]:
            for batch in whole:
                chosen = batch.select(list(columns))
                yield batch.num_rows, (chosen.slice(at, _PIECE_ROWS) for at in range(0, batch.num_rows, _PIECE_ROWS))

        yield reader.schema, groups


@contextmanager
def _arrow_errors(file: File) -> Iterator[None]:
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{file.name} needs the package pyarrow (embedgate[data])") from None
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(f"{file.name}: {what}") from None


def _chosen(batches: "Iterable[pa.RecordBatch]", places: Places, columns: Sequence[str]) -> Iterator[Record]:
    first = 0
    for batch in batches if len(places) else ():
        here = within(places, first, first + batch.num_rows)
        if len(here):
            rows = list(zip(*(_json_values(batch.column(name)) for name in columns), strict=True))
            for place in here:
                yield dict(zip(columns, rows[place], strict=True))
        first += batch.num_rows
        if first > places[-1]:
            return


def _is_scalar(kind: "pa.DataType") -> bool:
    """Whether its values can be JSON's, or be written as one of its strings."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_scalar(kind.value_type)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)
    return texts or numbers or types.is_null(kind) or (types.is_temporal(kind) and not types.is_interval(kind))


def _json_values(column: "pa.Array[Any]") -> list[Any]:
    """Dates and times in ISO 8601, spans in seconds, decimals as strings, None for what is no number."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(column.type):
        return _json_values(column.cast(column.type.value_type))
    if types.is_duration(column.type):
        spans = column.cast(pa.duration("us"), safe=False).to_pylist()
        return [None if span is None else span.total_seconds() for span in spans]
    if types.is_temporal(column.type) or types.is_decimal(column.type):
        texts = column.cast(pa.string()).to_pylist()  # as Python's own values they may be too exact, or too far away
        return [text and text.replace(" ", "T") for text in texts]
    values = column.to_pylist()
    if types.is_floating(column.type):
        return [value if value is not None and math.isfinite(value) else None for value in values]
    return values


FORMS: Final[Mapping[str, Callable[[File], Table]]] = {
    "csv": partial(_TextTable, parse=partial(_separated, delimiter=",")),
    "tsv": partial(_TextTable, parse=partial(_separated, delimiter="\t")),
    "jsonl": partial(_TextTable, parse=_objects),
    "parquet": partial(_TypedTable, opened=_parquet),
    "arrow": partial(_TypedTable, opened=_arrow),
    "lines": partial(_TextTable, parse=_texts),
    "files": _WholeTable,
}
"""What makes a table of a file of each form."""
