"""Hides how vectors are kept in this process's memory within a bound in bytes, and which of them are given up first."""

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from app.domain import Space, Vector
from app.storage.level import LevelStats

_OVERHEAD_BYTES = 320  # of the objects of an entry and its places in the tables; about 250 measured
_GHOST_BYTES = 200  # of a key remembered without its vector; 126 measured, 195 while they are few
_SMALL_SHARE = 10
_MOST_USES = 3


class _Entry(msgspec.Struct, gc=False, eq=False):
    """One vector, how often it was wanted lately, and whether that was often enough for the main queue."""

    key: bytes
    vector: Vector
    uses: int = 0
    proven: bool = False


class MemoryCache:
    """A `Cache` of at most `max_bytes` that one pass over many texts cannot sweep empty (S3-FIFO).

    What is new waits in a small queue, a tenth of the bytes, and only what is wanted again there, or again soon after
    it left, gets into the main one. A hit only counts. What fits and was just put is there.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._entries: dict[bytes, _Entry] = {}
        self._small: deque[_Entry] = deque()
        self._main: deque[_Entry] = deque()
        self._ghosts: deque[bytes] = deque()
        self._is_ghost: set[bytes] = set()
        self._small_bytes = self._main_bytes = 0

    def base(self, space: Space) -> bytes:
        """See `ports.Cache`; vectors of a lone process are invalidated by `clear`."""
        del space
        return b""

    async def get_many(
        self, space: Space, keys: Sequence[bytes], *, patient: bool = False
    ) -> list[Vector | None]:  # fmt: skip
        """See `ports.Cache`."""
        del space
        return self.recall(keys)

    def recall(self, keys: Sequence[bytes]) -> list[Vector | None]:
        """`get_many` for those who cannot wait."""
        found: list[Vector | None] = []
        entry_of = self._entries.get
        for key in keys:
            entry = entry_of(key)
            if entry is None:
                found.append(None)
                continue
            if entry.uses < _MOST_USES:
                entry.uses += 1
            found.append(entry.vector)
        return found

    def put_many(self, space: Space, entries: Iterable[tuple[bytes, Vector]]) -> None:
        """See `ports.Cache`; an entry larger than the whole cache is dropped, with what was kept under its key."""
        del space
        for key, vector in entries:
            entry = self._entries.get(key)
            if entry is not None and len(entry.vector.data) == len(vector.data):
                entry.vector = vector
                continue
            if entry is not None:
                self._remove(entry)
            self._insert(_Entry(key, vector))

    def stats(self) -> LevelStats:
        """How full it is now."""
        return LevelStats(len(self._entries), self._used_bytes(), self._max_bytes)

    def _used_bytes(self) -> int:
        return self._small_bytes + self._main_bytes + len(self._ghosts) * _GHOST_BYTES

    def _insert(self, entry: _Entry) -> None:
        size = _bytes_of(entry)
        if size > self._max_bytes:
            return
        while self._used_bytes() + size > self._max_bytes:
            self._evict()
        self._entries[entry.key] = entry
        if entry.key in self._is_ghost:
            self._is_ghost.remove(entry.key)
            self._prove(entry)
        else:
            self._small.append(entry)
            self._small_bytes += size

    def _evict(self) -> None:
        """Gives up one entry, or moves one on so that the next call will; each entry moves a few times at most."""
        if self._small and (not self._main or self._small_bytes * _SMALL_SHARE >= self._max_bytes):
            entry = self._small.popleft()
            self._small_bytes -= _bytes_of(entry)
            if entry.uses > 1:
                self._prove(entry)
            else:
                del self._entries[entry.key]
                self._ghosts.append(entry.key)
                self._is_ghost.add(entry.key)
        elif self._main:
            entry = self._main.popleft()
            if entry.uses:
                entry.uses -= 1
                self._main.append(entry)
            else:
                self._main_bytes -= _bytes_of(entry)
                del self._entries[entry.key]
        while len(self._ghosts) > len(self._entries):
            self._is_ghost.discard(self._ghosts.popleft())

    def _prove(self, entry: _Entry) -> None:
        entry.uses, entry.proven = 0, True
        self._main.append(entry)
        self._main_bytes += _bytes_of(entry)

    def _remove(self, entry: _Entry) -> None:
        """Takes out an entry from anywhere, which is slow: only for a key whose vectors change their width."""
        del self._entries[entry.key]
        if entry.proven:
            self._main.remove(entry)
            self._main_bytes -= _bytes_of(entry)
        else:
            self._small.remove(entry)
            self._small_bytes -= _bytes_of(entry)


def _bytes_of(entry: _Entry) -> int:
    return len(entry.key) + len(entry.vector.data) + _OVERHEAD_BYTES
