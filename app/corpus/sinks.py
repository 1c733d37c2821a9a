"""Hides how an output file comes to be there whole or not at all, whatever its form; and which form is meant."""

import errno
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from app.corpus.address import address, beside, is_address
from app.corpus.jsonl_sink import JsonlDraft
from app.corpus.npy_sink import NpyDraft
from app.corpus.rows import DataError, Lost, Matrix, Row, Shape, Sink


class Output(Sink, Protocol):
    """A sink with a place, where an output of an earlier run may be."""

    name: str
    """For people; says nothing secret."""
    companions: str
    """What the names of files that belong to it begin with."""

    def there(self) -> bool:
        """Whether anything lies at its place. Raises DataError where that is to be left alone."""

    def kept(self, state: Mapping[str, Any], dimensions: int) -> int | None:
        """Of the output that was finished at this state of `sync`, how many rows are there, with vectors so wide.

        None: it is another one.
        """


class Draft(Protocol):
    """An output in the making, at a path that nobody asks for, in one form. Every method may raise OSError."""

    def begin(self, shape: Shape) -> None:
        """Empty, whatever lay there. Raises DataError where there is no room for it."""

    def go_on(self, shape: Shape, state: Mapping[str, Any]) -> bool:
        """As it was at that `state`, without what lies behind; False: what the state tells of is not there.

        Raises msgspec.ValidationError where it is no state.
        """

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """The next rows; `vectors` are C-contiguous, little-endian."""

    def state(self) -> Mapping[str, Any]:
        """How many `rows` there are, and what the form needs; once the path itself is synced, they are safe."""

    def whole(self) -> Path:
        """The file of all that was written, which is not yet synced."""

    def close(self) -> None:
        """Lets go of files."""

    def read(self, path: Path, start: int, count: int) -> Matrix:
        """Vectors of the finished file at `path`, fewer where it ends; ValueError, KeyError, TypeError: it is none."""


def open_sink(out: str) -> Output:
    """The sink for a file, in the form that its suffix names, or for a table. Raises DataError where there is none."""
    if is_address(out):
        return _postgres(out)
    path = Path(out)
    partial = Path(f"{path}.partial")
    match path.suffix.lower():
        case ".npy":
            return _FileSink(path, partial, NpyDraft(partial))
        case ".jsonl":
            return _FileSink(path, partial, JsonlDraft(partial))
        case ".parquet" | ".arrow" as suffix:
            _need(f"{out}: {suffix}", "pyarrow", extra="data")
            from app.corpus.arrow_sink import ArrowDraft, ParquetDraft

            return _FileSink(path, partial, (ParquetDraft if suffix == ".parquet" else ArrowDraft)(partial))
        case ".lance":
            return _lance(Path(beside(out)))
    forms = ".npy, .parquet, .arrow or .jsonl, or for a table .lance or postgresql://…#table"
    raise DataError(f"{out}: is of no form that can be written: use {forms}")


def _lance(path: Path) -> Output:
    _need(f"{path}: .lance", "pyarrow", "lancedb", extra="lance")
    from app.corpus.lance_sink import LanceStore
    from app.corpus.table_sink import TableSink

    return TableSink(LanceStore(path), str(path))


def _postgres(out: str) -> Output:
    place = address(out)
    _need(f"{place.name}: Postgres", "pyarrow", "pgvector", extra="data")
    from app.corpus.pgvector_sink import PgvectorStore
    from app.corpus.table_sink import TableSink

    return TableSink(PgvectorStore(place), place.companions)


def _need(what: str, *packages: str, extra: str) -> None:
    """Raises DataError where one is not installed; imports none."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{what} needs the package {package} (embedgate[{extra}])")


class _FileSink:
    """See `Sink`. After a DataError it is closed, and may be opened again."""

    def __init__(self, path: Path, partial: Path, draft: Draft) -> None:
        self.name = self.companions = str(path)
        self._path = path
        self._partial = partial
        self._draft = draft
        self._dimensions = 0
        self._finished_at: Mapping[str, Any] | None = None
        self._reading = threading.Lock()

    def open(self, shape: Shape, state: Mapping[str, Any] | None) -> None:
        """See `Sink`. An output that was finished at that state, by who died before telling so, is finished."""
        self.close()
        self._dimensions, self._finished_at = shape.dimensions, None
        with self._told():
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "It is a folder")
            if state is None:
                self._draft.begin(shape)
                fsync(self._partial.parent)
            elif not self._draft.go_on(shape, state):
                if not self._has(state["rows"], shape.dimensions):
                    raise self._lost()
                self._draft.close()
                self._finished_at = state

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """See `Sink`."""
        assert vectors.shape == (len(rows), self._dimensions)  # noqa: S101
        if self._finished_at is not None:
            raise self._lost()
        with self._told():
            self._draft.write(rows, np.ascontiguousarray(vectors, "<f4"))

    def sync(self) -> Mapping[str, Any]:
        """See `Sink`."""
        if self._finished_at is not None:
            return self._finished_at
        with self._told():
            state = self._draft.state()
            fsync(self._partial)
        return state

    def finish(self) -> None:
        """See `Sink`. Who dies in it can go on from the last state."""
        with self._told():
            if self._finished_at is None:
                whole = self._draft.whole()
                fsync(whole)
                whole.replace(self._path)
                fsync(self._path.parent)
            if self._partial.is_dir():
                shutil.rmtree(self._partial)
            self._draft.close()

    def close(self) -> None:
        """See `Sink`."""
        self._draft.close()

    def vectors(self, start: int, count: int) -> Matrix | None:
        """See `Sink`. An output that ends before, or is not of its form, is no such output. Any thread may ask."""
        try:
            with self._reading:
                found = self._draft.read(self._path, start, count)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError):
            return None
        return found if len(found) == count else None

    def there(self) -> bool:
        """See `Output`."""
        return self._path.exists()

    def kept(self, state: Mapping[str, Any], dimensions: int) -> int | None:
        """See `Output`. Of a file of more or fewer rows, none."""
        rows: int = state["rows"]
        return rows if self._has(rows, dimensions) else 0

    def _has(self, rows: int, dimensions: int) -> bool:
        """Whether there is a finished output of just so many rows, so wide; lines without any vector tell no width."""
        last = self.vectors(max(rows - 1, 0), min(rows, 1))
        if last is None or self.vectors(rows, 1) is not None:
            return False
        return not rows or last.shape[1] == dimensions or (last.shape[1] == 1 and bool(np.isnan(last).all()))

    def _lost(self) -> Lost:
        return Lost(f"{self._partial}: does not hold what an earlier run has written; begin anew with --force")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong is told in a line, and nothing is written any more."""
        try:
            yield
        except DataError:
            self.close()
            raise
        except msgspec.ValidationError:
            self.close()
            raise self._lost() from None
        except OSError as error:
            self.close()
            raise DataError(f"{self._path}: cannot be written: {reason(error)}") from error


def reason(error: OSError) -> str:
    """What is wrong, for people."""
    return os.strerror(error.errno) if error.errno else str(error)


def fsync(path: Path) -> None:
    """What the file holds, or which files the folder has, survives a power cut from now on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
