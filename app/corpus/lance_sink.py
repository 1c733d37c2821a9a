"""Hides how LanceDB keeps a table: where it lies, how it is replaced and marked, and how its rows are found again."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from app.corpus.rows import DataError, Matrix
from app.corpus.sinks import fsync
from app.corpus.table_sink import NUMBER
from app.corpus.typed_rows import matrix

_MARK: Final = b"embedgate"
_TRACE = re.compile(r"^lance error: LanceError\(\w+\): |, \S+\.rs:\d+:\d+")


class LanceStore:
    """See `Store`: the table `news` in the database `data` for `data/news.lance`.

    Versions of before stay readable for seven days. LanceDB is imported once it is needed, for that takes seconds.
    """

    vector = "vector"

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._asking = threading.Lock()
        self._found: _Numbered | None = None
        if not re.fullmatch(r"[\w.-]+", path.stem, re.ASCII):
            raise DataError(f"{path}: a table's name may have only letters, digits, _, - and .")

    def there(self) -> bool:
        """See `Store`."""
        return self._path.is_file() or any((self._path / "_versions").glob("*"))  # else a write was cut off

    def mark(self) -> str | None:
        """See `Store`."""
        with self._asking:
            table = self._table()
            mark = None if table is None else (table.schema.metadata or {}).get(_MARK)
        return None if mark is None else mark.decode()

    def rehearse(self, schema: pa.Schema) -> None:
        """See `Store`. In memory: a folder that cannot be written is told by who writes beside it."""
        with self._told("written"):
            import lancedb

            made = lancedb.connect("memory://").create_table("rehearsal", schema=schema)
            made.optimize()
            made.to_arrow()

    def replace(self, schema: pa.Schema, tables: Iterator[pa.Table], mark: str) -> None:
        """See `Store`."""
        schema = schema.with_metadata({_MARK: mark.encode()})
        batches = (batch for table in tables for batch in table.cast(schema).to_batches())
        with self._asking, self._told("written"):
            mode = "overwrite" if self.there() else "create"
            reader = pa.RecordBatchReader.from_batches(schema, batches)
            made = self._database.create_table(self._path.stem, reader, mode=mode, on_bad_vectors="null")
            made.optimize()
            for path in (*self._path.rglob("*"), self._path, self._path.parent):
                fsync(path)
            self._found = None

    def rows(self) -> int:
        """See `Store`."""
        found = self._numbered()
        return 0 if found is None else found.rows

    def read(self, start: int, count: int) -> Matrix | None:
        """See `Store`. The first call reads the numbers of all rows, 16 bytes for each."""
        found = self._numbered()
        with self._asking, self._told("read"):
            return None if found is None else found.read(start, count)

    def close(self) -> None:
        """See `Store`."""
        self._found = None

    @cached_property
    def _database(self) -> Any:
        import lancedb

        return lancedb.connect(str(self._path.parent))

    def _table(self) -> Any:
        """None where there is none."""
        if not self._path.exists():
            return None
        try:
            with self._told("read"):
                return self._database.open_table(self._path.stem)
        except _NoTable:
            return None

    def _numbered(self) -> "_Numbered | None":
        with self._asking, self._told("read"):
            if self._found is None and (table := self._table()) is not None:
                names = table.schema.names
                self._found = _Numbered(table, self.vector) if {NUMBER, self.vector} <= {*names} else None
            return self._found

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """LanceDB has no errors of its own."""
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            said = _TRACE.sub("", (str(error).splitlines() or [type(error).__name__])[0])
            kind = _NoTable if "was not found" in said else DataError
            raise kind(f"{self._path}: cannot be {what}: {said}") from error


class _NoTable(DataError):
    """What has the name is no table."""


class _Numbered:
    """A table at one version, and where in it which of our rows are; others may have been put there, or moved."""

    def __init__(self, table: Any, vector: str) -> None:
        self._table = table
        self._vector = vector
        column = table.search().select([NUMBER]).limit(None).to_arrow().column(NUMBER)
        there: npt.NDArray[np.int64] = np.flatnonzero(column.is_valid().to_numpy())
        numbers = column.drop_null().to_numpy()
        order = np.argsort(numbers, kind="stable")
        self._numbers, self._places = numbers[order], there[order]
        self.rows = len(numbers)

    def read(self, start: int, count: int) -> Matrix:
        """See `Store`."""
        first, end = np.searchsorted(self._numbers, [start, start + count])
        found = self._table.take_offsets(self._places[first:end].tolist()).select([NUMBER, self._vector]).to_arrow()
        return matrix(found.sort_by(NUMBER).column(self._vector).combine_chunks())
