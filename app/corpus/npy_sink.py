"""Hides how a .npy file is written in place, row by row: whole in size from the start, and never whole in memory."""

import os
import shutil
from collections.abc import Mapping, Sequence
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from app.corpus.rows import Count, DataError, Matrix, Row, Shape


class _State(msgspec.Struct):
    rows: Count


class NpyDraft:
    """See `Draft`: float32 of shape (rows, dimensions) in C order; it ends after the last row that was written."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial
        self._file: FileIO | None = None
        self._shape = Shape(0, 0, ())
        self._rows = 0

    def begin(self, shape: Shape) -> None:
        """See `Draft`. A disk that is too small is told now, not when the last row comes."""
        self._file, self._shape, self._rows = FileIO(self._partial, "w+"), shape, 0
        try:
            self._take_room(self._file)
        except (OSError, DataError):
            self._partial.unlink()
            raise
        self._head(_header(shape))

    def go_on(self, shape: Shape, state: Mapping[str, Any]) -> bool:
        """See `Draft`. Rows behind the state stay until they are written again."""
        self._shape, self._rows = shape, msgspec.convert(state, _State).rows
        try:
            self._file = FileIO(self._partial, "r+")
        except FileNotFoundError:
            return False
        header, ended = _header(shape), _header(shape._replace(rows=self._rows))
        found = self._file.read(len(header))
        if found not in (header, ended) or self._file.seek(0, os.SEEK_END) < self._offset(self._rows):
            return False
        self._take_room(self._file)
        self._head(header)
        return True

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """See `Draft`."""
        assert self._file is not None  # noqa: S101
        assert self._rows + len(rows) <= self._shape.rows  # noqa: S101
        if rows:
            # A window of its own for each piece: pages of a map that is gone do not count as this process's memory.
            offset_bytes = self._offset(self._rows)
            np.memmap(self._file, "<f4", "r+", offset=offset_bytes, shape=vectors.shape)[:] = vectors
        self._rows += len(rows)

    def state(self) -> Mapping[str, Any]:
        """See `Draft`."""
        return {"rows": self._rows}

    def whole(self) -> Path:
        """See `Draft`."""
        assert self._file is not None  # noqa: S101
        self._file.truncate(self._offset(self._rows))
        self._head(_header(self._shape._replace(rows=self._rows)))
        return self._partial

    def close(self) -> None:
        """See `Draft`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, path: Path, start: int, count: int) -> Matrix:
        """See `Draft`."""
        found = np.lib.format.open_memmap(path, mode="r")
        if found.ndim != 2 or found.dtype != np.float32:
            raise ValueError("no vectors of float32")
        return np.array(found[start : start + count])

    def _offset(self, row: int) -> int:
        """Where the row begins, in bytes."""
        return len(_header(self._shape)) + row * self._shape.dimensions * 4

    def _head(self, header: bytes) -> None:
        """Says what the file holds; such words are of one length, however many rows there are."""
        assert self._file is not None  # noqa: S101
        self._file.seek(0)
        self._file.write(header)

    def _take_room(self, file: FileIO) -> None:
        """Its full size and no more; a map over room that is not there would end the process."""
        size_bytes = self._offset(self._shape.rows)
        lacking_bytes = size_bytes - os.fstat(file.fileno()).st_blocks * 512
        free_bytes = shutil.disk_usage(self._partial.parent).free
        if lacking_bytes > free_bytes:
            needs = f"needs {lacking_bytes / 1e6:,.0f} MB, {free_bytes / 1e6:,.0f} MB are free"
            raise DataError(f"{self._partial}: {needs}")
        file.truncate(size_bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size_bytes)


def _header(shape: Shape) -> bytes:
    written = BytesIO()
    told = {"descr": "<f4", "fortran_order": False, "shape": (shape.rows, shape.dimensions)}
    np.lib.format.write_array_header_1_0(written, told)
    return written.getvalue()
