"""Hides what of a tree is not in its index as it is: files are compared by their hash, and cut into lots."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from app.corpus.tree.chunks import Chunker
from app.corpus.tree.pieces import Chunk, SourceFile
from app.corpus.tree.stored import Known
from app.corpus.tree.walk import Omitted, Skipped, walk

Piece: TypeAlias = Chunk | SourceFile
Lot: TypeAlias = list[Piece]
"""Chunks in the order of their files; behind the last one of each stands the file, without its text."""


class Failure(msgspec.Struct, frozen=True):
    """What could not be read, cut or embedded, and why; line 0: all of the file."""

    path: str
    start_line: int
    end_line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Cut:
    """A tree, which files of it are read, see `walk`, and how they are cut; `count` tells the tokens of a text."""

    root: Path
    max_file_bytes: int
    chunk_tokens: int
    overlap_tokens: int
    count: Callable[[str], int]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()


class Changes:
    """What is in a tree and not `known` as it is, one pass; what it has met so far can be asked for."""

    def __init__(self, cut: Cut, known: Mapping[str, Known]) -> None:
        self.files = 0
        """With words, also those that failed."""
        self.unchanged_files = self.unchanged_chunks = self.unchanged_tokens = 0
        self.omitted: Counter[str] = Counter()
        """How many files are not for a model, by reason."""
        self.failures: list[Failure] = []
        self._cut = cut
        self._chunker = Chunker(chunk_tokens=cut.chunk_tokens, overlap_tokens=cut.overlap_tokens, count=cut.count)
        self._known = known
        self._seen: set[str] = set()

    def lots(self, most_chunks: int, most_tokens: int) -> Iterator[Lot]:
        """Everything, so much at once. Blocks; raises DataError without a tree."""
        lot: Lot = []
        chunks = tokens = 0
        for piece in self._pieces():
            if isinstance(piece, Chunk):
                if chunks and (chunks == most_chunks or tokens + piece.tokens > most_tokens):
                    yield lot
                    lot, chunks, tokens = [], 0, 0
                chunks, tokens = chunks + 1, tokens + piece.tokens
            lot.append(piece)
        if lot:
            yield lot

    def gone(self, paths: set[str]) -> set[str]:
        """Those that are in the tree no longer, once all of it was met; what cannot be read now may be there."""
        left = paths - self._seen
        hidden = tuple(failure.path.removeprefix("/") for failure in self.failures if failure.path.endswith("/"))
        return {path for path in left if not path.startswith(hidden)}

    def _pieces(self) -> Iterator[Piece]:
        cut = self._cut
        for found in walk(cut.root, max_file_bytes=cut.max_file_bytes, include=cut.include, exclude=cut.exclude):
            match found:
                case Omitted():
                    self.omitted[found.reason] += 1
                case Skipped():
                    self._failed(found.path, found.reason)
                case SourceFile():
                    yield from self._of(found)

    def _of(self, file: SourceFile) -> Iterator[Piece]:
        """The chunks of a file and itself; nothing where it has no words, or is known as it is."""
        before = self._known.get(file.path)
        if before is not None and before.hash == file.hash:
            self.files += 1
            self._seen.add(file.path)
            self.unchanged_files += 1
            self.unchanged_chunks += before.chunks
            self.unchanged_tokens += before.tokens
            return
        try:
            chunks = self._chunker.chunks(file)
        except Exception as error:  # whatever a grammar makes of one file, the others are not to blame
            self._failed(file.path, f"cannot be cut: {error or type(error).__name__}")
            return
        if chunks:
            self.files += 1
            self._seen.add(file.path)
            yield from chunks
            yield file._replace(text="")

    def _failed(self, path: str, reason: str) -> None:
        self.files += 1
        self._seen.add(path)
        self.failures.append(Failure(path, 0, 0, reason))
