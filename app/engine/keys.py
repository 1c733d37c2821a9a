"""Hides under which keys vectors are kept: who has the secret can compute them, nobody else can."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from app.domain import Space, Text
from app.ports import Cache

_MOST_SEEDS = 1024


class CacheKeys:
    """Makes keys with `secret`, a 32-byte hash for every text, never truncated."""

    def __init__(self, secret: bytes, cache: Cache) -> None:
        self._secret = secret
        self._cache = cache
        self._seeds: dict[tuple[str, str, bytes], blake2b] = {}

    def of(self, space: Space, group: str, texts: Sequence[Text]) -> list[bytes]:
        """One for each text, for tenants of the cache group: over all that tells it apart, and its raw bytes."""
        seed = self._seed(space, group)
        keys = []
        for text in texts:
            digest = seed.copy()
            raw = text.encode() if isinstance(text, str) else array("I", text).tobytes()
            digest.update((b"t" if isinstance(text, str) else b"i") + len(raw).to_bytes(8, "little") + raw)
            keys.append(digest.digest())
        return keys

    def _seed(self, space: Space, group: str) -> blake2b:
        """The hash with which every key of `space` begins, for tenants of `group`, until it is invalidated."""
        place = (space.id, group, self._cache.base(space))
        seed = self._seeds.get(place)
        if seed is None:
            if len(self._seeds) >= _MOST_SEEDS:
                self._seeds.clear()
            seed = self._seeds[place] = blake2b(key=self._secret, digest_size=32)
            for raw in (space.id.encode(), group.encode(), place[2]):
                seed.update(len(raw).to_bytes(8, "little") + raw)
        return seed
