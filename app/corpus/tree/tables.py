"""Hides how an index lies in a folder: two LanceDB tables that belong together, what they are of, and who may write."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from app.corpus.alone import alone
from app.corpus.rows import DataError, Lost
from app.corpus.tree.ignored import named
from app.corpus.tree.names import words_of
from app.corpus.tree.stored import Kept, Known, Made, Match, Vectored, Whole
from app.vectors import rows as bytes_of

os.environ.setdefault("LANCE_LOG", "error")  # its warnings are for its makers; read when it is imported

try:
    import lancedb
    import pyarrow as pa
    from lancedb.index import FTS, BTree, IvfSq
    from lancedb.query import FullTextOperator, LanceVectorQueryBuilder, MultiMatchQuery
    from lancedb.table import Table
    from pyarrow.compute import list_flatten
except ModuleNotFoundError as error:
    raise DataError(f"an index needs the package {error.name} (embedgate[index])") from None

MOST_COMPARED: Final = 100_000
"""So many vectors are compared one by one, which is exact; an index over more finds nearly the same, and faster."""

_KEPT = timedelta(minutes=10)  # who searches sees the tables as they were when that began
_TABLES = {"chunks", "files"}
_ABOUT = b"embedgate"  # the schema's metadata with what a table is of
_LATE_ROWS, _MOST_FRAGMENTS = 2000, 200
_INDEX_MB = 64
_NAMES_AT_ONCE = 500
_PROBES, _REFINED = 50, 5  # of an index: how many of its parts are looked into, and how many more are compared exactly
_READ = ("text", "words")
_SHOWN = ("path", "language", "symbol", "start_line", "end_line", "text")
_OF_CHUNKS = {
    "id": pa.string(), "path": pa.string(), "language": pa.string(), "symbol": pa.string(), "start_line": pa.int32(),
    "end_line": pa.int32(), "text": pa.string(), "tokens": pa.int32(), "hash": pa.string(),
    "words": pa.string(),
}  # fmt: skip
_OF_FILES = {
    "id": pa.string(), "language": pa.string(), "size_bytes": pa.int64(), "hash": pa.string(), "chunks": pa.int32(),
    "tokens": pa.int64(),
}  # fmt: skip
_WORD = re.compile(r"\w+")
_SOURCE = re.compile(r",? \S+\.rs:\d+:\d+")


@dataclass(frozen=True, slots=True)
class Only:
    """Which files are searched: of a language, of paths that a pattern of .gitignore names; "" is no condition.

    Raises DataError where that is no pattern.
    """

    language: str = ""
    paths: str = ""

    def __post_init__(self) -> None:
        """See the class."""
        self.sql("")

    def sql(self, column: str) -> str:
        """As a condition, where the path is in that column."""
        told = [f"language = {_quoted(self.language)}"] if self.language else []
        if self.paths:
            pattern, is_meant = named(self.paths)
            told.append(f"{'' if is_meant else 'NOT '}regexp_like({column}, {_quoted(pattern)})")
        return " AND ".join(told)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps every other run away from it; it goes again if nothing came into it.

    Raises DataError.
    """
    there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from error
    with alone(str(folder.resolve())):
        try:
            yield
        finally:
            if not there:
                with suppress(OSError):  # there is something in it
                    folder.rmdir()


class Tables:
    """The index in a folder. Every method blocks, and raises Lost for what cannot be read or written.

    A file that has a row has all its chunks, whenever a process dies; chunks without a file are worth their vectors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self._told():
            self._db = lancedb.connect(folder)
        self._chunks: Table
        self._files: Table
        self._dimensions = 0

    # ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> Made | None:
        """What the index is of; None: there is none. Raises DataError where a table is none of ours."""
        opened: dict[str, Table] = {}
        lost: Lost | None = None
        with self._told():
            there = self._db.list_tables().tables
        for name in _TABLES & {*there}:
            try:
                with self._told():
                    opened[name] = self._db.open_table(name)
            except Lost as error:  # the other one may still be somebody else's
                lost = error
            else:
                made = self._made(opened[name])
        if lost is not None:
            raise lost
        if opened.keys() != _TABLES:
            return None
        self._chunks, self._files = opened["chunks"], opened["files"]
        self._dimensions = made.dimensions
        return made

    def _made(self, table: Table) -> Made:
        with self._told():
            schema = table.schema
        try:
            return msgspec.json.decode((schema.metadata or {}).get(_ABOUT, b""), type=Made)
        except msgspec.MsgspecError:
            raise DataError(f"{self.folder}: holds tables that are none of ours; name another folder") from None

    def begin(self, made: Made) -> None:
        """Empty tables for what is made so, whatever was there."""
        with self._told():
            there = self._db.list_tables().tables
            for name in ("files", "chunks"):  # no file without its chunks, whoever dies here
                if name in there:
                    self._db.drop_table(name)
            self._dimensions = made.dimensions
            self._chunks = self._create("chunks", _OF_CHUNKS, made)
            self._files = self._create("files", _OF_FILES, made)
            for column, config in _indexes(0).items():
                self._chunks.create_index(column, config=config)

    def _create(self, name: str, columns: Mapping[str, Any], made: Made) -> Table:
        vector = pa.field("vector", pa.list_(pa.float32(), made.dimensions))
        fields = [pa.field(column, kind) for column, kind in columns.items()]
        return self._db.create_table(
            name, schema=pa.schema([*fields, vector], metadata={_ABOUT: msgspec.json.encode(made)})
        )

    # ── what is there ───────────────────────────────────────────────────────────────────────────────────────────────

    def files(self) -> dict[str, Known]:
        """All files that were indexed as a whole, by path."""
        found = {}
        with self._told():
            columns = ["id", "hash", "chunks", "tokens"]
            for batch in self._files.search().select(columns).to_batches():
                values = (batch.column(column).to_pylist() for column in columns)
                found.update({path: Known(*about) for path, *about in zip(*values, strict=True)})
        return found

    def paths(self) -> set[str]:
        """Of all chunks, also of files that were not indexed as a whole."""
        with self._told():
            batches = self._chunks.search().select(["path"]).to_batches()
            return {str(path) for batch in batches for path in batch.column("path").unique().to_pylist()}

    def kept(self, ids: Sequence[str]) -> dict[str, Kept]:
        """What is in the table of these chunks."""
        columns = ["id", "symbol", "hash"]
        with self._told():
            found = self._chunks.search().where(_among("id", ids)).select([*columns, "vector"]).to_arrow()
        flat = list_flatten(found["vector"]).to_numpy().astype("<f4")
        vectors = bytes_of(flat.reshape(-1, self._dimensions))
        told = zip(*(found[column].to_pylist() for column in columns), vectors, strict=True)
        return {id_: Kept(*of) for id_, *of in told}

    def ids(self, paths: Collection[str]) -> set[str]:
        """Of all chunks of these files."""
        found: set[str] = set()
        for names in _some(paths):
            with self._told():
                read = self._chunks.search().where(_among("path", names)).select(["id"]).to_arrow()
            found.update(map(str, read.column("id").to_pylist()))
        return found

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, chunks: Sequence[Vectored]) -> None:
        """Chunks with their vectors, each in the place of what has its id."""
        rows = [(*each.chunk, words_of(each.chunk)) for each in chunks]
        self._merge(self._chunks, rows, [each.vector for each in chunks])

    def conclude(self, files: Sequence[Whole]) -> None:
        """Rows of files, whose chunks must be written."""
        self._merge(self._files, [each[:-1] for each in files], [each.vector for each in files])

    def doubt(self, paths: Collection[str]) -> None:
        """From now on these files are not indexed as a whole."""
        self._delete(self._files, "id", paths)

    def drop(self, ids: Collection[str]) -> None:
        """Removes chunks."""
        self._delete(self._chunks, "id", ids)

    def remove(self, paths: Collection[str]) -> None:
        """Removes files and their chunks."""
        self.doubt(paths)
        self._delete(self._chunks, "path", paths)

    def tend(self) -> None:
        """Brings indexes up to what was written where that is much, and lets go of what was replaced, now and then.

        An index that is made is small in memory, however large the table; to bring one up to date is not.
        """
        with self._told():
            for table in (self._chunks, self._files):
                stats: Any = table.stats()
                if stats["fragment_stats"]["num_small_fragments"] > _MOST_FRAGMENTS:
                    table.optimize(cleanup_older_than=_KEPT)
            rows = self._chunks.count_rows()
            known = {index.columns[0]: index.num_indexed_rows or 0 for index in self._chunks.list_indices()}
            for column, config in _indexes(rows).items():
                if rows - known.get(column, 0) > max(_LATE_ROWS, rows // 20):
                    self._chunks.create_index(column, config=config)

    def _merge(self, table: Table, rows: Sequence[Sequence[Any]], vectors: Sequence[bytes]) -> None:
        if not rows:
            return
        columns = [pa.array(column) for column in zip(*rows, strict=True)]
        joined = pa.array(np.frombuffer(b"".join(vectors), "<f4"))
        columns.append(pa.FixedSizeListArray.from_arrays(joined, self._dimensions))
        with self._told():
            data = pa.Table.from_arrays(columns, names=table.schema.names).cast(table.schema)
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(data)

    def _delete(self, table: Table, column: str, values: Collection[str]) -> None:
        for some in _some(values):
            with self._told():
                table.delete(_among(column, some))

    # ── searching ───────────────────────────────────────────────────────────────────────────────────────────────────

    def nearest(self, vector: bytes, limit: int, only: Only) -> list[Match]:
        """Chunks by the cosine with this vector."""
        found = self._near(self._chunks, vector, limit, only.sql("path"), _SHOWN)
        return [Match._make((*row[:-1], 1.0 - row[-1])) for row in found]

    def nearest_files(self, vector: bytes, limit: int, only: Only) -> list[str]:
        """Paths of files by the cosine of their mean with this vector."""
        return [path for path, _ in self._near(self._files, vector, limit, only.sql("id"), ("id",))]

    def matching(self, words: str, limit: int, only: Only) -> list[Match]:
        """Chunks with any of these words in their text, symbol or path, by BM25; what is no word is not looked at."""
        said = " ".join(_WORD.findall(words))
        with self._told():
            query = MultiMatchQuery(said, [*_READ], boosts=[1.0] * len(_READ), operator=FullTextOperator.OR)
            search = self._chunks.search(query, query_type="fts")
            found = search.where(only.sql("path") or "true").select([*_SHOWN, "_score"]).limit(limit).to_arrow()
        return [Match(*row) for row in zip(*(found[name].to_pylist() for name in (*_SHOWN, "_score")), strict=True)]

    def _near(
        self, table: Table, vector: bytes, limit: int, where: str, columns: Sequence[str]
    ) -> Iterator[tuple[Any, ...]]:
        """These columns and the distance of what is near."""
        with self._told():
            search = table.search(np.frombuffer(vector, "<f4"), vector_column_name="vector", query_type="vector")
            assert isinstance(search, LanceVectorQueryBuilder)  # noqa: S101
            search = search.distance_type("cosine").nprobes(_PROBES).refine_factor(_REFINED).where(where or "true")
            found = search.select([*columns, "_distance"]).limit(limit).to_arrow()
        return zip(*(found[name].to_pylist() for name in (*columns, "_distance")), strict=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong in the library is told in a line."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:  # the library's own errors share no better base
            said = _SOURCE.sub("", str(error).partition("\n")[0])
            hint = "if it is damaged, embedgate index --force makes it anew"
            raise Lost(f"{self.folder}: the index cannot be read or written: {said}; {hint}") from error


def _indexes(rows: int) -> dict[str, FTS | BTree | IvfSq]:
    """Of a table of so many chunks; what is in no index yet is looked through."""
    ordered: dict[str, FTS | BTree | IvfSq] = {column: BTree() for column in ("id", "path")}
    words = {column: FTS(memory_limit=_INDEX_MB, num_workers=1) for column in _READ}
    near = {"vector": IvfSq(distance_type="cosine")} if rows > MOST_COMPARED else {}
    return ordered | words | near


def _among(column: str, values: Collection[str]) -> str:
    return f"{column} IN ({', '.join(map(_quoted, values))})" if values else "false"


def _quoted(text: str) -> str:
    return "'{}'".format(text.replace("'", "''"))


def _some(values: Collection[str]) -> Iterator[Collection[str]]:
    """Not too many at once for a condition."""
    names = [*values]
    return (names[at : at + _NAMES_AT_ONCE] for at in range(0, len(names), _NAMES_AT_ONCE))
