"""Hides how rows and their vectors become columns of a Parquet or Arrow file: by parts, which are joined at the end."""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from app.corpus.rows import Matrix, Row, Shape

_ID, _EMBEDDING = "id", "embedding"
_GROUP_BYTES, _GROUP_ROWS = 2**22, 2**13
_GROUPS_KEPT = 8
_EXACT = 2**53  # a whole number beyond it may be none as a double
_TYPES: Final[Mapping[frozenset[str], pa.DataType]] = {
    frozenset({"bool"}): pa.bool_(),
    frozenset({"int"}): pa.int64(),
    frozenset({"long"}): pa.int64(),
    frozenset({"int", "long"}): pa.int64(),
    frozenset({"float"}): pa.float64(),
    frozenset({"int", "float"}): pa.float64(),
}
"""Of a column, by what its values are; any other mixture is a string."""


class _TableWriter(Protocol):
    def write_table(self, table: pa.Table) -> None: ...


class _TableDraft(ABC):
    """See `Draft`: `id`, the shape's columns, `embedding`: a list of fixed size, null for a row of NaN.

    Where a column has one of these two names, the output's own stands in its place. The draft is a folder: what is
    written between two syncs is one part, an Arrow file that gets its name once it is whole and synced. The columns of
    a row lie in it as JSON, for only all rows together say of what type a column is.
    """

    def __init__(self, partial: Path) -> None:
        self._folder = partial
        self._shape = Shape(0, 0, ())
        self._names: Sequence[str] = ()
        self._rows = self._parts = 0
        self._file: pa.OSFile | None = None
        self._writer: ipc.RecordBatchFileWriter | None = None
        self._finished: _Finished | None = None

    def begin(self, shape: Shape) -> None:
        """See `Draft`."""
        self._folder.mkdir(exist_ok=True)
        self.go_on(shape, {"rows": 0, "parts": 0})

    def go_on(self, shape: Shape, state: Mapping[str, Any]) -> bool:
        """See `Draft`."""
        self._shape, self._rows, self._parts = shape, state["rows"], state["parts"]
        self._names = [name for name in shape.columns if name not in (_ID, _EMBEDDING)]
        kept = {self._part(index) for index in range(self._parts)}
        try:
            there = set(self._folder.iterdir())
        except FileNotFoundError:
            return False
        if kept <= there:
            for path in there - kept:
                path.unlink()
        return kept <= there

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """See `Draft`."""
        if not rows:
            return
        values = [orjson.dumps([row.columns.get(name) for name in self._names]).decode() for row in rows]
        ids = pa.array([row.id for row in rows], pa.string())
        batch = pa.record_batch([ids, pa.array(values, pa.string()), _lists(vectors)], [_ID, "values", _EMBEDDING])
        if self._writer is None:
            self._file = pa.OSFile(str(self._draft), "wb")
            self._writer = ipc.new_file(self._file, batch.schema)
        self._writer.write_batch(batch)
        self._rows += len(rows)

    def state(self) -> Mapping[str, Any]:
        """See `Draft`."""
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self.close()
            self._draft.rename(self._part(self._parts))
            self._parts += 1
        return {"rows": self._rows, "parts": self._parts}

    def whole(self) -> Path:
        """See `Draft`. Its groups of rows do not tell where parts ended; no more than one and a part are in memory."""
        self.state()
        self._finished = None
        embeddings = pa.list_(pa.float32(), self._shape.dimensions)
        schema = pa.schema(
            [(_ID, pa.string()), *zip(self._names, self._types(), strict=True), (_EMBEDDING, embeddings)]
        )
        group_rows = max(1, min(_GROUP_ROWS, _GROUP_BYTES // (4 * self._shape.dimensions)))
        path = self._folder / "whole"
        with pa.OSFile(str(path), "wb") as file, self.table_writer(file, schema) as writer:
            for group in _regrouped((_typed(batch, schema) for batch in self._batches()), group_rows):
                writer.write_table(group)
        return path

    def close(self) -> None:
        """See `Draft`. A part that has no name yet is torn, and goes when this is opened again."""
        self._writer = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, path: Path, start: int, count: int) -> Matrix:
        """See `Draft`. What was read last is kept, for neighbours are asked for soon."""
        if self._finished is None:
            self._finished = _Finished(self, path)
        return self._finished.read(start, count)

    # ── the two forms ───────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def table_writer(self, file: pa.OSFile, schema: pa.Schema) -> AbstractContextManager[_TableWriter]:
        """What writes the finished file, each table as one group of rows."""

    @abstractmethod
    def group_rows(self, path: Path) -> Sequence[int]:
        """How many rows each group of a finished file has."""

    @abstractmethod
    def group(self, path: Path, index: int) -> Any:
        """The embeddings of one of them, an array of lists."""

    # ── the parts ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _draft(self) -> Path:
        return self._folder / "draft"

    def _part(self, index: int) -> Path:
        return self._folder / f"{index:08d}.arrow"

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, as they were written."""
        for index in range(self._parts):
            with pa.memory_map(str(self._part(index))) as source, ipc.open_file(source) as reader:
                yield from (reader.get_batch(each) for each in range(reader.num_record_batches))

    def _types(self) -> list[pa.DataType]:
        """Of each column."""
        seen: list[set[str]] = [set() for _ in self._names]
        for batch in self._batches():
            for kinds, values in zip(seen, _columns(batch), strict=True):
                kinds.update(_kind(value) for value in values if value is not None)
        return [_TYPES.get(frozenset(kinds), pa.string()) for kinds in seen]


class ParquetDraft(_TableDraft):
    """See `Draft`: a Parquet file."""

    def table_writer(self, file: pa.OSFile, schema: pa.Schema) -> AbstractContextManager[_TableWriter]:
        """See `_TableDraft`."""
        options: dict[str, Any] = {"use_dictionary": [*self._names]}  # no two ids or vectors are the same
        return pq.ParquetWriter(file, schema, **options)

    def group_rows(self, path: Path) -> Sequence[int]:
        """See `_TableDraft`."""
        metadata = pq.read_metadata(path)
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]

    def group(self, path: Path, index: int) -> Any:
        """See `_TableDraft`."""
        with pq.ParquetFile(path) as file:
            return file.read_row_group(index, columns=[_EMBEDDING]).column(_EMBEDDING).combine_chunks()


class ArrowDraft(_TableDraft):
    """See `Draft`: an Arrow IPC file, also called Feather, not compressed, so that it can be mapped into memory."""

    def table_writer(self, file: pa.OSFile, schema: pa.Schema) -> AbstractContextManager[_TableWriter]:
        """See `_TableDraft`."""
        return ipc.new_file(file, schema)

    def group_rows(self, path: Path) -> Sequence[int]:
        """See `_TableDraft`."""
        with pa.memory_map(str(path)) as source, ipc.open_file(source) as reader:
            return [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]

    def group(self, path: Path, index: int) -> Any:
        """See `_TableDraft`."""
        with pa.memory_map(str(path)) as source, ipc.open_file(source) as reader:
            return reader.get_batch(index).column(_EMBEDDING)


class _Finished:
    """The vectors of a finished file, by groups of rows."""

    def __init__(self, form: _TableDraft, path: Path) -> None:
        self._starts = [0, *accumulate(form.group_rows(path))]
        self._group = lru_cache(_GROUPS_KEPT)(lambda index: _matrix(form.group(path, index)))

    def read(self, start: int, count: int) -> Matrix:
        """Those of so many rows, fewer where the file ends."""
        first, end = bisect_right(self._starts, start) - 1, min(start + count, self._starts[-1])
        groups = range(first, bisect_right(self._starts, end - 1))
        found = [
            self._group(index)[max(0, start - self._starts[index]) : end - self._starts[index]] for index in groups
        ]
        return np.concatenate(found) if start < end else np.empty((0, 0), np.float32)


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lists(vectors: Matrix) -> "pa.FixedSizeListArray[Any, Any]":
    """Null where the vector is NaN."""
    missing = pa.array(np.asarray(np.isnan(vectors).any(axis=1)))
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1], mask=missing)


def _matrix(lists: Any) -> Matrix:
    """NaN where there is no list."""
    matrix = np.full((len(lists), lists.type.list_size), np.nan, np.float32)
    there = lists.is_valid().to_numpy(zero_copy_only=False)
    matrix[there] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, lists.type.list_size)
    return matrix


def _columns(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    """For each column of the rows in a part, its values."""
    values: list[Any] = batch.column(1).to_pylist()
    return zip(*map(orjson.loads, values), strict=True)


def _typed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """Rows of a part, as they are in the finished file."""
    types = schema.types[1:-1]
    columns = [_column(values, kind) for values, kind in zip(_columns(batch), types, strict=True)]
    return pa.Table.from_arrays([batch.column(0), *columns, batch.column(2)], schema=schema)


def _column(values: Sequence[Any], kind: pa.DataType) -> "pa.Array[Any]":
    """What is no string stands in a column of strings as JSON."""
    if pa.types.is_string(kind):
        values = [each if each is None or isinstance(each, str) else orjson.dumps(each).decode() for each in values]
    return pa.array(values, kind)


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() if -(2**63) <= value < 2**63:
            return "int" if abs(value) <= _EXACT else "long"
        case float():
            return "float"
    return "string"


def _regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows, so many in each table but the last; each a single chunk."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= rows:
            joined = pa.concat_tables(held)
            yield joined.slice(0, rows).combine_chunks()
            held = [joined.slice(rows)]
    if any(map(len, held)):
        yield pa.concat_tables(held).combine_chunks()
