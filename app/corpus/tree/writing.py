"""Hides in what order an index is written, so that whoever dies meanwhile leaves one that is right."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from app.corpus.tree.changes import Lot
from app.corpus.tree.pieces import Chunk, SourceFile
from app.corpus.tree.stored import Vectored, Whole
from app.corpus.tree.tables import Tables
from app.vectors import mean


class Settled(NamedTuple):
    """A lot, and the vectors of its chunks by id; those that have none have failed."""

    lot: Lot
    vectors: Mapping[str, bytes]


class Writer:
    """Writes lots in their order into `tables`. Blocks; one thread at a time.

    A file is first no longer known, then its chunks are replaced, then it is known again: one that is not, is cut and
    embedded again by the next run, and chunks that are there need not be bought.
    """

    def __init__(self, tables: Tables) -> None:
        self.known = tables.files()
        self.took_s = 0.0
        self._tables = tables
        self._partly = tables.paths()
        self._ids: set[str] = set()  # of all chunks so far of the file that has begun and not ended
        self._written: list[Vectored] = []  # those of them that have a vector

    def kept(self, chunks: Sequence[Chunk]) -> dict[str, bytes]:
        """Vectors of those that are in the table as they are, by id. Any thread may ask."""
        asked = {chunk.id: chunk for chunk in chunks if chunk.path in self._partly}
        found = self._tables.kept([*asked]) if asked else {}
        return {
            id_: kept.vector
            for id_, kept in found.items()
            if (kept.symbol, kept.hash) == (asked[id_].symbol, asked[id_].hash)
        }

    def write(self, settled: Sequence[Settled]) -> None:
        """The next lots."""
        began_s = time.perf_counter()
        touched = {piece.path for lot, _ in settled for piece in lot}
        self._tables.doubt(touched & self.known.keys())
        self._tables.write([each for lot in settled for each in _vectored(lot)])
        whole, ended, ids = [], set(), set()
        for each in settled:
            for piece in each.lot:
                if isinstance(piece, Chunk):
                    self._ids.add(piece.id)
                    vector = each.vectors.get(piece.id)
                    self._written += [] if vector is None else [Vectored(piece, vector)]
                    continue
                ended.add(piece.path)
                ids |= self._ids
                whole += self._whole(piece)
                self._ids, self._written = set(), []
        if again := ended & self._partly:
            self._tables.drop(self._tables.ids(again) - ids)
        self._tables.conclude(whole)
        self.took_s += time.perf_counter() - began_s

    def finish(self, gone: set[str]) -> None:
        """Without files that are gone; ready to be searched."""
        began_s = time.perf_counter()
        self._tables.remove(gone)
        self._tables.tend()
        self.took_s += time.perf_counter() - began_s

    @property
    def paths(self) -> set[str]:
        """Of all files that were there before, or a part of them."""
        return self._partly | self.known.keys()

    def _whole(self, file: SourceFile) -> list[Whole]:
        """Its row, if all its chunks were written."""
        if len(self._written) < len(self._ids):
            return []
        tokens = [each.chunk.tokens for each in self._written]
        vector = mean([each.vector for each in self._written], tokens, unit=True)
        about = (file.path, file.language, file.size_bytes, file.hash)
        return [Whole(*about, len(tokens), sum(tokens), vector)]


def _vectored(settled: Settled) -> list[Vectored]:
    chunks = (piece for piece in settled.lot if isinstance(piece, Chunk))
    return [Vectored(chunk, settled.vectors[chunk.id]) for chunk in chunks if chunk.id in settled.vectors]
