"""What somebody reads once does not push out what everybody reads: a scan costs the memory cache little."""

import hashlib
from collections.abc import Callable

import numpy as np
from cachetools import LRUCache

from app.domain import Space, Vector
from app.storage.memory import MemoryCache

KEPT, KNOWN, ASKED = 5_000, 50_000, 100_000
SPACE = Space("m", 8)
VECTOR = Vector(bytes(1536), 7)

Access = Callable[[bytes], bool]
"""Asks for one key, and puts it if it was not there; whether it was."""


def memory() -> Access:
    """The cache of this project, with room for about `KEPT` vectors."""
    cache = MemoryCache(KEPT * (len(VECTOR.data) + 352))

    def access(key: bytes) -> bool:
        found = cache.recall([key])[0] is not None
        if not found:
            cache.put_many(SPACE, [(key, VECTOR)])
        return found

    return access


def least_recently_used() -> Access:
    """The control: the usual policy, with room for as many."""
    cache: LRUCache[bytes, Vector] = LRUCache(KEPT)

    def access(key: bytes) -> bool:
        found = cache.get(key) is not None
        if not found:
            cache[key] = VECTOR
        return found

    return access


def key(kind: str, number: int) -> bytes:
    """A cache key like the gateway's."""
    return hashlib.blake2b(f"{kind} {number}".encode(), digest_size=32).digest()


def hit_rate(access: Access, scan_share: int) -> float:
    """Of a Zipf(1.0) load of `ASKED` texts, once warm, in points.

    `scan_share` texts of one pass over 10 × the cache's size come for each text of the load until the pass is over.
    """
    weights = 1 / np.arange(1, KNOWN + 1)
    numbers = np.random.default_rng(4).choice(KNOWN, 2 * ASKED, p=weights / weights.sum())
    known = [key("load", number) for number in range(KNOWN)]
    for number in numbers[:ASKED]:
        access(known[number])
    hits, scanned = 0, iter(range(10 * KEPT))
    for number in numbers[ASKED:]:
        for _, once in zip(range(scan_share), scanned, strict=False):
            access(key("scan", once))
        hits += access(known[number])
    return 100 * hits / ASKED


def test_a_scan_costs_the_load_little() -> None:
    """At most 5 points of hit rate while and after it runs, and less than it costs the usual policy."""
    for share in (1, 10, 10 * KEPT):
        cost = {}
        for name, make in (("S3-FIFO", memory), ("LRU", least_recently_used)):
            alone, beside = hit_rate(make(), 0), hit_rate(make(), share)
            cost[name] = alone - beside
            print(f"{name:8} {share:6} scanned per text: {alone:.1f} % of hits, {beside:.1f} % with the scan")
        assert cost["S3-FIFO"] <= 5.0
        assert cost["S3-FIFO"] < cost["LRU"]
