"""Hides how rows and their vectors become lines of JSON, and how one of many lines is found again."""

import os
from array import array
from collections.abc import Mapping, Sequence
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson

from app.corpus.rows import Count, Matrix, Row, Shape

_OWN = ("id", "embedding")


class _State(msgspec.Struct):
    rows: Count
    bytes: Count


class JsonlDraft:
    """See `Draft`: one object a line: `id`, the row's columns, `embedding`: numbers, or null for a row of NaN.

    A column that has one of these two names has another one here, see `Shape`.
    """

    def __init__(self, partial: Path) -> None:
        self._partial = partial
        self._file: FileIO | None = None
        self._rows = self._bytes = 0
        self._names: Mapping[str, str] = {}
        self._lines: array[int] | None = None  # where each of the finished file begins

    def begin(self, shape: Shape) -> None:
        """See `Draft`."""
        self._names = shape.names_beside(*_OWN)
        self._file, self._rows, self._bytes = FileIO(self._partial, "w"), 0, 0

    def go_on(self, shape: Shape, state: Mapping[str, Any]) -> bool:
        """See `Draft`."""
        known = msgspec.convert(state, _State)
        self._names, self._rows, self._bytes = shape.names_beside(*_OWN), known.rows, known.bytes
        try:
            self._file = FileIO(self._partial, "r+")
        except FileNotFoundError:
            return False
        if self._file.seek(0, os.SEEK_END) < self._bytes:
            return False
        self._file.truncate(self._bytes)
        self._file.seek(self._bytes)
        return True

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """See `Draft`."""
        assert self._file is not None  # noqa: S101
        left = memoryview(b"".join(map(self._line, rows, vectors)))
        self._rows, self._bytes = self._rows + len(rows), self._bytes + len(left)
        while left:
            left = left[self._file.write(left) :]

    def state(self) -> Mapping[str, Any]:
        """See `Draft`."""
        return {"rows": self._rows, "bytes": self._bytes}

    def whole(self) -> Path:
        """See `Draft`."""
        self._lines = None
        return self._partial

    def close(self) -> None:
        """See `Draft`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, path: Path, start: int, count: int) -> Matrix:
        """See `Draft`. The first call reads the file once to know where its lines are, 8 bytes for each."""
        with path.open("rb") as file:
            if self._lines is None:
                self._lines = array("q", [0])
                self._lines.extend(file.tell() for _ in iter(file.readline, b""))
            file.seek(self._lines[min(start, len(self._lines) - 1)])
            found = [orjson.loads(line)["embedding"] for line in islice(file, count)]
            width = next((len(vector) for vector in found if vector is not None), None)
            if width is None:
                file.seek(0)
                width = next((len(vector) for line in file if (vector := orjson.loads(line)["embedding"])), 1)
        none = [float("nan")] * width
        return np.array([none if vector is None else vector for vector in found], np.float32).reshape(-1, width)

    def _line(self, row: Row, vector: Matrix) -> bytes:
        columns = {self._names[name]: value for name, value in row.columns.items()}
        line = {"id": row.id, **columns, "embedding": None if np.isnan(vector).any() else vector}
        return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
