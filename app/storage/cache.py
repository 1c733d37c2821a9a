"""Hides how vectors are kept in this process's memory within a bound in bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cachetools import LRUCache

from app.domain import Vector

_OVERHEAD_BYTES = 512  # of an entry's objects and its places in three tables; about 370 measured, tables half empty


@dataclass(frozen=True, slots=True)
class CacheStats:
    """How full a cache is; `used_bytes` counts vectors, keys and what Python needs to hold them."""

    entries: int
    used_bytes: int
    max_bytes: int


def _bytes_of(entry: tuple[bytes, Vector]) -> int:
    key, vector = entry
    return len(key) + len(vector.data) + _OVERHEAD_BYTES


class MemoryCache:
    """A `Cache` of at most `max_bytes` that forgets the least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[bytes, tuple[bytes, Vector]] = LRUCache(max_bytes, getsizeof=_bytes_of)

    async def get_many(self, keys: Sequence[bytes]) -> list[Vector | None]:
        """See `ports.Cache`."""
        entries = self._entries
        return [entries[key][1] if key in entries else None for key in keys]

    def put_many(self, entries: Iterable[tuple[bytes, Vector]]) -> None:
        """See `ports.Cache`; an entry larger than the whole cache is dropped, with what was kept under its key."""
        for entry in entries:
            if _bytes_of(entry) <= self._entries.maxsize:
                self._entries[entry[0]] = entry
            else:
                self._entries.pop(entry[0], None)

    def stats(self) -> CacheStats:
        """How full it is now."""
        return CacheStats(len(self._entries), int(self._entries.currsize), int(self._entries.maxsize))
