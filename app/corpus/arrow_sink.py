"""Hides how rows and their vectors become columns of a Parquet or Arrow file, whose groups of rows are read again."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from app.corpus.rows import Matrix
from app.corpus.typed_rows import TypedRows, matrix

_EMBEDDING = "embedding"
_GROUPS_KEPT = 8


class _TableWriter(Protocol):
    def write_table(self, table: pa.Table) -> None: ...


class _TableDraft(TypedRows, ABC):
    """See `Draft`: `id`, the shape's columns, `embedding`; see `TypedRows`."""

    def __init__(self, partial: Path) -> None:
        super().__init__(partial, _EMBEDDING)
        self._finished: _Finished | None = None

    def whole(self) -> Path:
        """See `Draft`. No more than a group of rows and a part are in memory."""
        self.state()
        self._finished = None
        schema = self.schema()
        path = self._folder / "whole"
        with pa.OSFile(str(path), "wb") as file, self.table_writer(file, schema) as writer:
            for group in self.tables(schema):
                writer.write_table(group)
        return path

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


class ParquetDraft(_TableDraft):
    """See `Draft`: a Parquet file."""

    def table_writer(self, file: pa.OSFile, schema: pa.Schema) -> AbstractContextManager[_TableWriter]:
        """See `_TableDraft`."""
        options: dict[str, Any] = {"use_dictionary": schema.names[1:-1]}  # no two ids or vectors are the same
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
        self._group = lru_cache(_GROUPS_KEPT)(lambda index: matrix(form.group(path, index)))

    def read(self, start: int, count: int) -> Matrix:
        """Those of so many rows, fewer where the file ends."""
        first, end = bisect_right(self._starts, start) - 1, min(start + count, self._starts[-1])
        groups = range(first, bisect_right(self._starts, end - 1))
        found = [
            self._group(index)[max(0, start - self._starts[index]) : end - self._starts[index]] for index in groups
        ]
        return np.concatenate(found) if start < end else np.empty((0, 0), np.float32)
