"""Hides how a table in a database comes to be there whole or not at all, and is known again; whatever the database."""

import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import msgspec
import numpy as np
import pyarrow as pa

from app.corpus.rows import DataError, Lost, Matrix, Row, Shape
from app.corpus.sinks import fsync, reason
from app.corpus.typed_rows import TypedRows

NUMBER: Final = "embedgate_row"
"""The column with a row's place in the output, from 0: databases keep no order."""


class Store(Protocol):
    """One table of a database, there or not. Every method blocks, and raises DataError."""

    name: str
    """For people."""
    vector: str
    """What its column of vectors is named."""

    def there(self) -> bool:
        """Whether anything has its name."""

    def mark(self) -> str | None:
        """What `replace` was told; None where it did not make the table."""

    def rehearse(self, schema: pa.Schema) -> None:
        """Raises now what `replace` would raise with columns of these names; changes no table."""

    def replace(self, schema: pa.Schema, tables: Iterator[pa.Table], mark: str) -> None:
        """From one moment to the next the table holds these rows, and no others, safely. Null vectors stay null."""

    def rows(self) -> int:
        """How many of the rows that were put there still are."""

    def read(self, start: int, count: int) -> Matrix | None:
        """The vectors of rows from this number on, in order, those that are there; NaN for null."""

    def close(self) -> None:
        """Lets go of connections until something is asked again."""


class _State(msgspec.Struct):
    mark: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class TableSink:
    """See `Output`. Rows wait in a folder beside, and go into the table at the end, at once.

    So readers see all of them or what was there before, a database that is away meanwhile disturbs nobody, and columns
    have types. A table that was made by others is not touched.
    """

    def __init__(self, store: Store, companions: str) -> None:
        self.name = store.name
        self.companions = companions
        self._store = store
        self._folder = Path(f"{companions}.partial")
        self._rows = TypedRows(self._folder, store.vector, NUMBER)
        self._dimensions = 0
        self._mark = ""
        self._finished_at: Mapping[str, Any] | None = None

    def open(self, shape: Shape, state: Mapping[str, Any] | None) -> None:
        """See `Sink`. An output that was finished at that state, by who died before telling so, is finished."""
        self.close()
        self._dimensions, self._finished_at = shape.dimensions, None
        with self._told():
            self._mark = uuid.uuid4().hex if state is None else msgspec.convert(state, _State).mark
            if state is not None and not self._rows.go_on(shape, state):
                if self._store.mark() != self._mark:
                    raise self._lost()
                self._finished_at = state
            else:
                self._refuse_foreign()
                self._store.rehearse(_numbered(self._rows.rehearsed(shape)))
            if state is None:
                self._rows.begin(shape)
                fsync(self._folder.parent)
            self._store.close()  # until the end, which may be far

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """See `Sink`."""
        assert vectors.shape == (len(rows), self._dimensions)  # noqa: S101
        if self._finished_at is not None:
            raise self._lost()
        with self._told():
            self._rows.write(rows, np.ascontiguousarray(vectors, "<f4"))

    def sync(self) -> Mapping[str, Any]:
        """See `Sink`."""
        if self._finished_at is not None:
            return self._finished_at
        with self._told():
            state = self._rows.state()
            fsync(self._folder)
        return {**state, "mark": self._mark}

    def finish(self) -> None:
        """See `Sink`. Who dies in it can go on from the last state."""
        with self._told():
            if self._finished_at is None:
                self._rows.state()
                self._refuse_foreign()
                schema = self._rows.schema()
                self._store.replace(_numbered(schema), _with_numbers(self._rows.tables(schema)), self._mark)
            shutil.rmtree(self._folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """See `Sink`."""
        self._rows.close()
        self._store.close()

    def vectors(self, start: int, count: int) -> Matrix | None:
        """See `Sink`. Any thread may ask."""
        found = self._store.read(start, count)
        return found if found is not None and len(found) == count else None

    def there(self) -> bool:
        """See `Output`."""
        self._refuse_foreign()
        return self._store.there()

    def kept(self, state: Mapping[str, Any], dimensions: int) -> int | None:
        """See `Output`."""
        mark = self._store.mark()
        if mark is None or mark != state.get("mark"):
            return None
        first = self.vectors(0, 1)
        return self._store.rows() if first is None or first.shape[1] == dimensions else 0

    def _refuse_foreign(self) -> None:
        if self._store.there() and self._store.mark() is None:
            raise DataError(f"{self.name} is there, and was not made by embedgate, which leaves it alone: name another")

    def _lost(self) -> Lost:
        return Lost(f"{self._folder}: does not hold what an earlier run has written; begin anew with --force")

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
            raise DataError(f"{self._folder}: cannot be written: {reason(error)}") from error


def _numbered(schema: pa.Schema) -> pa.Schema:
    return schema.insert(1, pa.field(NUMBER, pa.int64()))


def _with_numbers(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    first = 0
    for table in tables:
        numbers = pa.array(np.arange(first, first + len(table)))
        yield table.add_column(1, pa.field(NUMBER, pa.int64()), numbers)
        first += len(table)
