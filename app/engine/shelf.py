"""Hides how what was bought before is found: under today's keys, or under those of before a rotation."""

from collections.abc import Sequence

from app.domain import Space, Text, Vector
from app.engine.keys import CacheKeys
from app.ports import Cache


class Shelf:
    """A `cache` under keys made with `secret`; what is there under `older_secrets` is kept under today's once found."""

    def __init__(self, cache: Cache, secret: bytes, older_secrets: Sequence[bytes]) -> None:
        self._cache = cache
        self._keys, *self._older_keys = [CacheKeys(each, cache) for each in (secret, *older_secrets)]

    def keys(self, space: Space, group: str, texts: Sequence[Text]) -> list[bytes]:
        """One for each text, for tenants of the cache group."""
        return self._keys.of(space, group, texts)

    async def find(
        self, space: Space, group: str, texts: Sequence[Text], *, patient: bool
    ) -> tuple[list[bytes], list[Vector | None]]:  # fmt: skip
        """The key of each text, and its vector if there is one; of `patient` see `Cache.get_many`."""
        keys = self._keys.of(space, group, texts)
        found = await self._cache.get_many(space, keys, patient=patient)
        for older in self._older_keys if None in found else ():
            missing = {key: text for key, text, vector in zip(keys, texts, found, strict=True) if vector is None}
            names = older.of(space, group, list(missing.values()))
            kept = dict(zip(missing, await self._cache.get_many(space, names, patient=patient), strict=True))
            self._cache.put_many(space, [(key, vector) for key, vector in kept.items() if vector is not None])
            found = [vector or kept[key] for key, vector in zip(keys, found, strict=True)]
        return keys, found
