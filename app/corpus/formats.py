"""Hides how a file of text becomes records, each once and in order, and how what is wrong with it is told."""

import csv
import gzip
import io
import json
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import orjson

from app.corpus.rows import DataError

Record: TypeAlias = Mapping[str, Any]
Places: TypeAlias = range | npt.NDArray[np.int64]
"""Which records, counted from 0, ascending."""

PATH: Final = "path"
TEXT: Final = "text"

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"  # no text in UTF-8 begins like this
_PIECE_BYTES = 2**18
_MOST_FIELD_CHARS = 2**25
_MOST_COLUMNS = 2000
_SHALLOW = 200  # orjson writes nothing that is nested deeper than 253
_DIGITS, _LONG = bytes.maketrans(b"123456789", b"0" * 9), b"0" * 19  # the shortest number beyond 64 bits


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
        """What its records have; JSONL: those that were read so far, at least one."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Columns that have no place in a record, and what they hold."""

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

    left_out: Mapping[str, str] = MappingProxyType({})

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
            _exhaust(stream)

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


def digested(file: File, digest: blake2b) -> None:
    """All that a file says goes into the digest. Raises DataError."""
    with _reading(file, digest) as stream:
        _exhaust(stream)


def _exhaust(stream: BinaryIO) -> None:
    while stream.read(_PIECE_BYTES):
        pass


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
        lone = "a carriage return that ends no line; convert its line ends, with tr '\\r' '\\n' for example"
        raise DataError(f"{name}, line {line}: {lone if 'new-line' in str(error) else error}") from None


class _ObjectTable(_TextTable):
    """A file of JSON objects, which may differ: a column is what any of them has."""

    def __init__(self, file: File) -> None:
        super().__init__(file, parse=lambda lines, name: ((), self._met(lines, name)))
        self._names: dict[str, None] = {}

    @property
    def columns(self) -> Sequence[str]:
        """See Table."""
        if not self._names:
            next(self.records(range(1)), None)
        return tuple(self._names)

    def _met(self, lines: _Lines, name: str) -> Iterator[Record]:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            record = _object(line, f"{name}, line {number}")
            if not record.keys() <= self._names.keys():
                self._names.update(dict.fromkeys(record))
                if len(self._names) > _MOST_COLUMNS:
                    many = f"more than {_MOST_COLUMNS} columns up to here; put what differs into one object"
                    raise DataError(f"{name}, line {number}: {many}")
            yield record


def _object(line: bytes, where: str) -> Record:
    """Whole numbers beyond 64 bits are their digits; what is nested too deep to be written again is refused."""
    try:
        record = orjson.loads(line)
        if line.count(b"[") + line.count(b"{") > _SHALLOW:
            orjson.dumps(record)
    except orjson.JSONDecodeError as error:
        if not line.lstrip().startswith(b"["):
            raise DataError(f"{where}: no JSON, {error.msg} at character {error.pos + 1}") from None
        record = None
    except orjson.JSONEncodeError:
        raise DataError(f"{where}: nested too deep") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: no JSON object; each line has to be one: jq -c '.[]' makes them of an array")
    if _LONG not in line.translate(_DIGITS):
        return record
    exact: Record = json.loads(line, parse_int=_whole)
    return exact


def _whole(digits: str) -> int | str:
    fits = len(digits) <= len(str(-(2**64))) and -(2**63) <= int(digits) < 2**64
    return int(digits) if fits else digits


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


TEXT_FORMS: Final[Mapping[str, Callable[[File], Table]]] = {
    "csv": partial(_TextTable, parse=partial(_separated, delimiter=",")),
    "tsv": partial(_TextTable, parse=partial(_separated, delimiter="\t")),
    "jsonl": _ObjectTable,
    "lines": partial(_TextTable, parse=_texts),
    "files": _WholeTable,
}
"""What makes a table of a file of each form."""
