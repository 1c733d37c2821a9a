"""Hides how files, globs and stdin become one sequence of rows: which of them, in what order, under what names."""

import glob
import os
import re
import shutil
import sys
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from app.corpus.address import beside
from app.corpus.expression import Template, said
from app.corpus.formats import PATH, TEXT_FORMS, File, Places, Record, Table, within
from app.corpus.rows import DataError, Row, Source
from app.corpus.typed_formats import TYPED_FORMS

FORMS: Final[Mapping[str, Callable[[File], Table]]] = {**TEXT_FORMS, **TYPED_FORMS}

_STDIN = "-"
_ZIPPED = ".gz"
_SUFFIXES: Final = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "lines",
}
_LOOSE = "jsonl"  # of which no record says what columns others have
_ID = "id"


def open_source(
    inputs: Sequence[str], *, text: str, id: str | None, form: str | None = None,  # noqa: A002 — as people name it
    limit: int | None = None, seed: int | None = None, out: str = "",
) -> Source:  # fmt: skip
    """The rows of paths, globs and `-`, stdin, one after another; they have to be of one format. Blocks.

    `text` is a column's name or a Template. `id` is the column whose values name rows, each once; by default one that
    is called `id`, a file's path for the form `files`, else a row's number in the inputs. `form` is a key of `FORMS`,
    by default as the names' suffixes say. `limit` keeps so many rows, the first ones, or, with a `seed`, random ones in
    their order. A file that is named twice is read once; what belongs to the output `out` is no input.

    Raises DataError.
    """
    template = Template(text)
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit}: it has to be 1 or more rows")
    if seed is not None and limit is None:
        raise DataError("a seed chooses which rows a limit keeps: give a limit, too")
    if form is not None and form not in FORMS:
        raise DataError(f"there is no form {form!r}: name one of {', '.join(FORMS)}")
    names = _names(inputs, out)
    form = form or _common_form(names)
    tables = [FORMS[form](_stdin() if name == _STDIN else File(name, Path(name))) for name in names]
    usual = PATH if form == "files" else _ID if _ID in tables[0].columns else None
    reading = {"format": form, "text": text, "id": id or usual, "limit": limit, "seed": seed}
    return _Files(tables, _Wish(form, template, id or usual, limit, seed), reading)


class _Wish(NamedTuple):
    """What of the tables is asked for."""

    form: str
    template: Template
    id: str | None
    limit: int | None
    seed: int | None


class _Files:
    """Tables that follow one another, as a Source."""

    def __init__(self, tables: Sequence[Table], wish: _Wish, reading: Mapping[str, str | int | None]) -> None:
        self.reading = reading
        self.name = tables[0].file.name if len(tables) == 1 else f"{len(tables)} files"
        self._tables = tables
        self._wish = wish
        self._ends: list[int] = []
        """How many records there are up to the end of each table."""
        if wish.form != _LOOSE:
            self._refuse_columns()
        digest = blake2b(orjson.dumps(list(reading.values())), digest_size=16)
        hashes = self._survey(digest)
        if wish.form == _LOOSE:
            self._refuse_columns()
        self.columns: Sequence[str] = [name for name in self._all_columns() if name != wish.id]
        self.fingerprint = digest.hexdigest()
        self._places = self._chosen()
        self.rows = len(self._places)
        if wish.id is not None:
            self._refuse_twins(hashes)

    def read(self, start: int = 0) -> Iterator[Row]:
        """See Source."""
        template = self._wish.template
        for number, (place, record) in enumerate(self._records(self._places[start:]), start):
            columns = {name: record[name] for name in self.columns if name in record}
            yield Row(number, self._id(place, record), template(record), columns)

    def _records(self, places: Places) -> Iterator[tuple[int, Record]]:
        first = 0
        for table, end in zip(self._tables, self._ends, strict=True):
            here = within(places, first, end)
            records = table.records(here) if len(here) else iter(())
            for at in here:
                record = next(records, None)
                if record is None:
                    raise DataError(f"{table.file.name} has fewer rows than when it was opened: begin again")
                yield first + at, record
            first = end

    def _id(self, place: int, record: Record) -> str:
        return str(place) if self._wish.id is None else said(record.get(self._wish.id))

    # ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _all_columns(self) -> Sequence[str]:
        """In the order in which they come; each once."""
        return [*dict.fromkeys(chain.from_iterable(table.columns for table in self._tables))]

    def _refuse_columns(self) -> None:
        """Those that are asked for have to be there; all tables have the same, but for those of JSONL."""
        first = next((table for table in self._tables if table.columns), None)
        if first is None:
            raise DataError(f"{self.name} has no rows, or no columns that can be used")
        columns = self._all_columns() if self._wish.form == _LOOSE else first.columns
        for name in filter(None, (*self._wish.template.columns, self._wish.id)):
            if held := first.left_out.get(name):
                raise DataError(f"the column {name!r} in {first.file.name} holds {held}, no texts or numbers")
            if name not in columns:
                where = self.name if self._wish.form == _LOOSE else first.file.name
                raise DataError(f"no column {name!r} in {where}: it has {', '.join(columns)}")
        for table in self._tables if self._wish.form != _LOOSE else ():
            if set(table.columns) != set(first.columns):
                has, instead = ", ".join(table.columns), ", ".join(first.columns)
                raise DataError(f"{table.file.name} has the columns {has}, and {first.file.name} has {instead}")

    def _survey(self, digest: blake2b) -> npt.NDArray[np.int64]:
        """Counts, digests, and tells a hash of each row's id: they are as good as ids, and take 8 bytes."""
        most = self._wish.limit if self._wish.seed is None else None
        hashes, total = array("q"), 0
        for table in self._tables:
            for value in table.survey(self._wish.id, None if most is None else most - total, digest):
                if self._wish.id is not None:
                    if value is None or value == "":
                        raise DataError(f"{self._called(total)} has no {self._wish.id!r}: each row needs its id")
                    hashes.append(hash(said(value)))
                total += 1
            self._ends.append(total)
        if not total:
            raise DataError(f"{self.name} has no rows")
        return np.frombuffer(hashes, np.int64)

    def _chosen(self) -> Places:
        total, limit = self._ends[-1], self._wish.limit
        if limit is None or self._wish.seed is None:
            return range(total)
        rng = np.random.default_rng(self._wish.seed)
        return np.sort(rng.choice(total, min(limit, total), replace=False))

    def _refuse_twins(self, hashes: npt.NDArray[np.int64]) -> None:
        """Reads once more where two hashes are the same: that may be by chance."""
        ordered = np.sort(hashes if isinstance(self._places, range) else hashes[self._places])
        twins = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not twins:
            return
        seen: dict[str, int] = {}
        for place, record in self._records(self._places):
            name = self._id(place, record)
            if hash(name) in twins:
                if name in seen:
                    where = f"{self._called(seen[name])} and {self._called(place)}"
                    raise DataError(
                        f"{where} have the same {self._wish.id!r}, {name!r}: each row needs an id of its own"
                    )
                seen[name] = place

    def _called(self, place: int) -> str:
        """A record's name for people, who count from 1."""
        table = bisect_right(self._ends, place)
        first = self._ends[table - 1] if table else 0
        return f"row {place - first + 1} of {self._tables[table].file.name}"


# ── which files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _names(inputs: Sequence[str], out: str) -> list[str]:
    """Each file once."""
    if inputs.count(_STDIN) > 1:
        raise DataError("- is given twice: stdin can be read once")
    found: dict[str, str] = {}
    try:
        for name in chain.from_iterable(_matching(given, out) for given in inputs):
            found.setdefault(os.path.realpath(name) if name != _STDIN else name, name)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    if not found:
        raise DataError("no input: name files, or - for stdin")
    for name in found.values():
        if not name.isascii() and name.encode(errors="ignore").decode() != name:
            raise DataError(f"{name!r}: a name that is no UTF-8; rename the file")
    return [*found.values()]


def _matching(given: str, out: str) -> list[str]:
    """The file of this name, or those that match it, but for what belongs to the output."""
    path = Path(given)
    if given == _STDIN:
        return [given]
    if path.is_file():
        if out and Path(out).exists() and path.samefile(out):
            raise DataError(f"{given} is the output: name another with --out")
        return [given]
    if path.is_dir():
        raise DataError(f"{given} is a folder: name its files, as in '{path / '**' / '*.csv'}'")
    if path.exists():
        raise DataError(f"{given} is no file that can be read twice: give it as stdin, by the name -")
    if not glob.has_magic(given):
        raise DataError(f"there is no file {given}")
    found = sorted(name for name in glob.glob(given, recursive=True) if Path(name).is_file())  # noqa: PTH207 — as given
    own = _beside(out) if out else None
    names = [name for name in found if not (own and own.fullmatch(str(_placed(name))))]
    if not names:
        raise DataError(f"no file matches {given!r}" + (", but what belongs to the output" if found else ""))
    return names


def _beside(out: str) -> re.Pattern[str]:
    """The path of the output, of a part of it, or of what lies beside one of these."""
    own = _placed(beside(out))
    stem, suffix = re.escape(str(own.parent / own.stem)), re.escape(own.suffix)
    return re.compile(rf"{stem}(\.part-\d+-of-\d+)?{suffix}([./].*)?", re.DOTALL)


def _placed(name: str) -> Path:
    """Its path, the same by whatever way its folder is reached."""
    path = Path(name)
    return path.parent.resolve() / path.name


def _common_form(names: Sequence[str]) -> str:
    forms: dict[str, str] = {}
    for name in names:
        forms.setdefault(_form(name), name)
    if len(forms) > 1:
        (one, first), (other, second) = list(forms.items())[:2]
        raise DataError(f"{first} is {one}, {second} {other}: inputs have to be of one format; give them one by one")
    return next(iter(forms))


def _form(name: str) -> str:
    """As the suffix says."""
    path = Path(name.lower())
    zipped = path.suffix == _ZIPPED
    form = _SUFFIXES.get((path.with_suffix("") if zipped else path).suffix)
    if form is None or (zipped and form in TYPED_FORMS):
        what = "stdin has no name" if name == _STDIN else f"the name {name} does not say its format"
        suffixes = " ".join(_SUFFIXES)
        raise DataError(f"{what}: give the form, one of {', '.join(FORMS)}, or a name that ends in one of {suffixes}")
    return form


def _stdin() -> File:
    """Kept on disk as long as the file is in use: it is read twice."""
    if sys.stdin is None:
        raise DataError("there is no standard input")
    try:
        with tempfile.NamedTemporaryFile(prefix="embedgate-", delete=False) as spool:
            file = File("stdin", Path(spool.name))
            weakref.finalize(file, file.path.unlink, missing_ok=True)
            shutil.copyfileobj(sys.stdin.buffer, spool)
    except OSError as error:
        raise DataError(f"stdin cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}") from None
    return file
