"""Hides how a file whose columns have types, Parquet or Arrow, becomes records, a piece of it at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from app.corpus.formats import File, Places, Record, Table, digested, within
from app.corpus.rows import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_ARROW = b"ARROW1"
_BUFFER_BYTES = 2**18
_PIECE_ROWS = 1000

_Batches: TypeAlias = "Iterable[pa.RecordBatch]"
_Groups: TypeAlias = Callable[[Sequence[str]], Iterator[tuple[int, _Batches]]]
"""Of some columns what is stored together: each group with its number of rows, and them in small pieces."""
_Opened: TypeAlias = "Iterator[tuple[pa.Schema, _Groups]]"


class _TypedTable:
    """A file that pyarrow opens; a piece of it is in memory at a time."""

    def __init__(
        self, file: File, *, opened: "Callable[[Path], AbstractContextManager[tuple[pa.Schema, _Groups]]]"
    ) -> None:
        self.file = file
        self._opened = opened

    @cached_property
    def columns(self) -> Sequence[str]:
        """See Table."""
        return [field.name for field in self._schema if _is_scalar(field.type)]

    @property
    def left_out(self) -> Mapping[str, str]:
        """See Table: lists, binaries and the like."""
        return {field.name: str(field.type) for field in self._schema if not _is_scalar(field.type)}

    @cached_property
    def _schema(self) -> "pa.Schema":
        with _arrow_errors(self.file), self._opened(self.file.path) as (schema, _):
            names = schema.names
            if len(set(names)) < len(names):
                twice = next(each for each in names if names.count(each) > 1)
                raise DataError(f"{self.file.name}: two columns are named {twice!r}")
            return schema

    def survey(self, column: str | None, most: int | None, digest: blake2b) -> Iterator[Any]:
        """See Table."""
        yield from islice(self._values(column), most)
        digested(self.file, digest)

    def records(self, places: Places) -> Iterator[Record]:
        """See Table."""
        first = 0
        with _arrow_errors(self.file), self._opened(self.file.path) as (_, groups):
            for count, batches in groups(self.columns):
                yield from _chosen(batches, within(places, first, first + count), self.columns)
                first += count

    def _values(self, column: str | None) -> Iterator[Any]:
        with _arrow_errors(self.file), self._opened(self.file.path) as (_, groups):
            for count, batches in groups([column or self.columns[0]]):
                if column is None:
                    yield from repeat(None, count)
                else:
                    yield from chain.from_iterable(_json_values(batch.column(column)) for batch in batches)


@contextmanager
def _parquet(path: Path) -> _Opened:
    """A row group may be large: it is read through a small buffer."""
    from pyarrow import parquet as pq

    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:

        def groups(columns: Sequence[str]) -> Iterator[tuple[int, _Batches]]:
            for number in range(file.num_row_groups):
                batches = file.iter_batches(_PIECE_ROWS, row_groups=[number], columns=list(columns))
                yield file.metadata.row_group(number).num_rows, batches

        yield file.schema_arrow, groups


@contextmanager
def _arrow(path: Path) -> _Opened:
    """A file or a stream; a record batch may be all there is: so it is mapped into memory."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW)) == _ARROW
        source.seek(0)
        reader: Any = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader

        def groups(columns: Sequence[str]) -> Iterator[tuple[int, _Batches]]:
            for batch in whole:
                chosen = batch.select(list(columns))
                yield batch.num_rows, (chosen.slice(at, _PIECE_ROWS) for at in range(0, batch.num_rows, _PIECE_ROWS))

        yield reader.schema, groups


@contextmanager
def _arrow_errors(file: File) -> Iterator[None]:
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{file.name} needs the package pyarrow (embedgate[data])") from None
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(f"{file.name}: {what}") from None


def _chosen(batches: "Iterable[pa.RecordBatch]", places: Places, columns: Sequence[str]) -> Iterator[Record]:
    first = 0
    for batch in batches if len(places) else ():
        here = within(places, first, first + batch.num_rows)
        if len(here):
            rows = list(zip(*(_json_values(batch.column(name)) for name in columns), strict=True))
            for place in here:
                yield dict(zip(columns, rows[place], strict=True))
        first += batch.num_rows
        if first > places[-1]:
            return


def _is_scalar(kind: "pa.DataType") -> bool:
    """Whether its values can be JSON's, or be written as one of its strings."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_scalar(kind.value_type)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)
    return texts or numbers or types.is_null(kind) or (types.is_temporal(kind) and not types.is_interval(kind))


def _json_values(column: "pa.Array[Any]") -> list[Any]:
    """Dates and times in ISO 8601, spans in seconds, decimals as strings, None for what is no number."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(column.type):
        return _json_values(column.cast(column.type.value_type))
    if types.is_duration(column.type):
        spans = column.cast(pa.duration("us"), safe=False).to_pylist()
        return [None if span is None else span.total_seconds() for span in spans]
    if types.is_temporal(column.type) or types.is_decimal(column.type):
        texts = column.cast(pa.string()).to_pylist()  # as Python's own values they may be too exact, or too far away
        return [text and _moment(text) for text in texts]
    values = column.to_pylist()
    if types.is_floating(column.type):
        return [value if value is not None and math.isfinite(value) else None for value in values]
    return values


def _moment(text: str) -> str:
    """As ISO 8601 has it; one too far away for a date, of which Arrow says so, is its number."""
    return text.rstrip(">").rpartition(" ")[2] if text.startswith("<") else text.replace(" ", "T")


TYPED_FORMS: Final[Mapping[str, Callable[[File], Table]]] = {
    "parquet": partial(_TypedTable, opened=_parquet),
    "arrow": partial(_TypedTable, opened=_arrow),
}
"""What makes a table of a file of each form."""
