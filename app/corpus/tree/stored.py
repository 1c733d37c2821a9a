"""The nouns of an index: what it is made with, what is known of files and chunks in it, and what is found; no I/O."""

from typing import NamedTuple

import msgspec

from app.corpus.tree.pieces import Chunk


class Made(msgspec.Struct, frozen=True):
    """What decides what an index holds; vectors and chunks of two kinds are never in one, nor are two trees.

    `root` is where the tree lies.
    """

    model: str
    space: str
    dimensions: int
    chunk_tokens: int
    overlap_tokens: int
    root: str
    version: int = 1

    def differs(self, other: "Made") -> str:
        """What is not the same in `other`, for people; "" where all is."""
        now = msgspec.structs.asdict(other)
        told = msgspec.structs.asdict(self).items()
        return "; ".join(f"{name} was {before}, now it is {now[name]}" for name, before in told if before != now[name])


class Vectored(NamedTuple):
    """A chunk and its vector, float32 little-endian."""

    chunk: Chunk
    vector: bytes


class Kept(NamedTuple):
    """The vector of a chunk that is in the table, and what it was the vector of."""

    symbol: str
    hash: str
    vector: bytes


class Known(NamedTuple):
    """What is known of a file that was indexed as a whole."""

    hash: str
    chunks: int
    tokens: int


class Whole(NamedTuple):
    """A file whose chunks are all there; its vector is their mean, by tokens."""

    path: str
    language: str
    size_bytes: int
    hash: str
    chunks: int
    tokens: int
    vector: bytes


class Match(NamedTuple):
    """A chunk that was found, and how well it fits: more is better."""

    path: str
    language: str
    symbol: str
    start_line: int
    end_line: int
    text: str
    score: float
