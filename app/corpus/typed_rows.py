"""Hides how rows wait on disk, by parts, until all are there: only together do they say of what type a column is."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import orjson
import pyarrow as pa
from pyarrow import ipc

from app.corpus.rows import Count, Matrix, Row, Shape

ID: Final = "id"
_GROUP_BYTES, _GROUP_ROWS = 2**22, 2**13
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


class _State(msgspec.Struct):
    rows: Count
    parts: Count


class TypedRows:
    """Rows on their way into a table: `id`, the shape's columns, `vector`: a list of fixed size, null for a row of NaN.

    A column that is named as one of these, or of `others`, has another name here, see `Shape`. They lie in a folder:
    what is written between two calls of `state` is one part, an Arrow file that gets its name once it is whole and
    synced. The columns of a row lie in it as JSON. Every method may raise OSError.
    """

    def __init__(self, folder: Path, vector: str, *others: str) -> None:
        self._folder = folder
        self._vector = vector
        self._own = (ID, vector, *others)
        self._shape = Shape(0, 0, ())
        self._rows = self._parts = 0
        self._file: pa.OSFile | None = None
        self._writer: ipc.RecordBatchFileWriter | None = None

    def begin(self, shape: Shape) -> None:
        """Empty, whatever lay there."""
        self._folder.mkdir(exist_ok=True)
        self.go_on(shape, {"rows": 0, "parts": 0})

    def go_on(self, shape: Shape, state: Mapping[str, Any]) -> bool:
        """As it was at that `state`, without what lies behind; False: what the state tells of is not there."""
        known = msgspec.convert(state, _State)
        self._shape, self._rows, self._parts = shape, known.rows, known.parts
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
        """The next rows; `vectors` are C-contiguous, little-endian."""
        if not rows:
            return
        values = [orjson.dumps([row.columns.get(name) for name in self._shape.columns]).decode() for row in rows]
        ids = pa.array([row.id for row in rows], pa.string())
        batch = pa.record_batch([ids, pa.array(values, pa.string()), _lists(vectors)], ["id", "values", "vector"])
        if self._writer is None:
            self._file = pa.OSFile(str(self._draft), "wb")
            self._writer = ipc.new_file(self._file, batch.schema)
        self._writer.write_batch(batch)
        self._rows += len(rows)

    def state(self) -> Mapping[str, Any]:
        """How many `rows` and `parts` there are; once the folder itself is synced, they are safe."""
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self.close()
            self._draft.rename(self._part(self._parts))
            self._parts += 1
        return {"rows": self._rows, "parts": self._parts}

    def schema(self) -> pa.Schema:
        """Of all that was written until the last `state`; it is read once for that."""
        return self._schema(self._shape, self._types())

    def rehearsed(self, shape: Shape) -> pa.Schema:
        """As it will be, but for the columns' types, which are not known yet."""
        return self._schema(shape, [pa.string() for _ in shape.columns])

    def _schema(self, shape: Shape, types: Sequence[pa.DataType]) -> pa.Schema:
        columns = zip(shape.names_beside(*self._own).values(), types, strict=True)
        vectors = pa.list_(pa.float32(), shape.dimensions)
        return pa.schema([(ID, pa.string()), *columns, (self._vector, vectors)])

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """The same rows, in order; in groups of bounded size, which do not tell where parts ended, each one chunk."""
        group_rows = max(1, min(_GROUP_ROWS, _GROUP_BYTES // (4 * self._shape.dimensions)))
        return _regrouped((_typed(batch, schema) for batch in self._batches()), group_rows)

    def close(self) -> None:
        """Lets go of files. A part that has no name yet is torn, and goes when this is opened again."""
        self._writer = None
        if self._file is not None:
            self._file.close()
            self._file = None

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
        seen: list[set[str]] = [set() for _ in self._shape.columns]
        for batch in self._batches():
            for kinds, values in zip(seen, _columns(batch), strict=True):
                kinds.update(_kind(value) for value in values if value is not None)
        return [_TYPES.get(frozenset(kinds), pa.string()) for kinds in seen]


def matrix(lists: Any) -> Matrix:
    """Of an array of lists of fixed size; NaN where there is no list. ValueError: it is none of float32."""
    if not (pa.types.is_fixed_size_list(lists.type) and pa.types.is_float32(lists.type.value_type)):
        raise ValueError("no vectors of float32")
    found = np.full((len(lists), lists.type.list_size), np.nan, np.float32)
    there = lists.is_valid().to_numpy(zero_copy_only=False)
    found[there] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, lists.type.list_size)
    return found


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lists(vectors: Matrix) -> "pa.FixedSizeListArray[Any, Any]":
    """Null where the vector is NaN."""
    missing = pa.array(np.asarray(np.isnan(vectors).any(axis=1)))
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1], mask=missing)


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
