"""The nouns of datasets: rows with their texts, where they come from and where their vectors go; no I/O."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
"""What of a number is checked when it is read again."""


class DataError(Exception):
    """The input, the output or what was left by an earlier run is not as it has to be; a line for people."""


class Lost(DataError):
    """What an earlier run left cannot be gone on with; who may, begins anew."""


class Row(NamedTuple):
    """One row: its place in the source, counted from 0; its name; what is embedded; its other columns, JSON values."""

    number: int
    id: str
    text: str
    columns: Mapping[str, Any]


class Source(Protocol):
    """Rows in an order that is the same each time.

    Opening one reads it once: so it knows how many `rows` there are, and a `fingerprint` of all that decides what they
    say. Raises DataError.
    """

    name: str
    """For people: the file's name, or how many files."""
    rows: int
    fingerprint: str
    reading: Mapping[str, str | int | None]
    """How it was asked to be read, by what people call that: a part of what decides."""
    columns: Sequence[str]
    """The names of what a row may carry."""

    def read(self, start: int = 0) -> Iterator[Row]:
        """From the row with this number on. Blocks."""


class Shape(NamedTuple):
    """What an output will hold: so many rows at most, vectors of so many float32, the names of the other columns."""

    rows: int
    dimensions: int
    columns: Sequence[str]

    def names_beside(self, *own: str) -> Mapping[str, str]:
        """What each column is called in an output that has these names of its own: with as many `_` as make it free."""
        taken, names = {*own, *self.columns}, {name: name for name in self.columns}
        for name in own:
            if name in names:
                while names[name] in taken:
                    names[name] += "_"
                taken.add(names[name])
        return names


class Sink(Protocol):
    """Where vectors go, row after row. Every method blocks, and raises DataError for what cannot be written.

    Nothing is seen under the output's own name before `finish`, unless the output is a table.
    """

    def open(self, shape: Shape, state: Mapping[str, Any] | None) -> None:
        """Begins anew, or goes on from the `state` that `sync` told last: what was written behind it is forgotten.

        Raises Lost where what the state tells of is not there.
        """

    def write(self, rows: Sequence[Row], vectors: Matrix) -> None:
        """The next rows and their vectors, shape (n, d); a row of NaN has none."""

    def sync(self) -> Mapping[str, Any]:
        """All that was written will survive a power cut from now on; the state to go on from, JSON values."""

    def finish(self) -> None:
        """The output is whole, and there."""

    def close(self) -> None:
        """Lets go of files; what was synced stays for the next `open`."""

    def vectors(self, start: int, count: int) -> Matrix | None:
        """Of a finished output, those of so many rows from `start` on; None where there is no such output."""
