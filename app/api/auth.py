"""Hides how a key is recognised: only keyed hashes of keys are kept, and comparing takes the same time for all."""

import hmac
import secrets
from collections.abc import Iterable, Mapping
from hashlib import blake2b

from aiolimiter import AsyncLimiter
from cachetools import LRUCache
from starlette.types import Scope

from app.domain import ANONYMOUS, Tenant
from app.errors import RateLimited, Unauthenticated

_SCHEME = b"Bearer "
_NO_KEY = "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'."
_WRONG_KEY = "Incorrect API key provided."


class Keys:
    """Who calls, by API key; without any key everybody is `ANONYMOUS`."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._secret = secrets.token_bytes(32)
        found = ((self._digest(key.encode()), tenant) for key, tenant in tenants.items())
        self._tenants = {digest: (digest, tenant) for digest, tenant in found}
        self._nobody = (secrets.token_bytes(32), ANONYMOUS)

    def tenant(self, authorizations: list[bytes]) -> Tenant:
        """The tenant whose key is in the one Authorization header, given the values of all. Raises Unauthenticated."""
        if not self._tenants:
            return ANONYMOUS
        if not authorizations:
            raise Unauthenticated(_NO_KEY)
        value = authorizations[0]
        digest = self._digest(value[len(_SCHEME) :])
        kept, tenant = self._tenants.get(digest, self._nobody)
        same = hmac.compare_digest(kept, digest)
        if not same or not value.startswith(_SCHEME) or len(authorizations) > 1:
            raise Unauthenticated(_WRONG_KEY, "invalid_api_key")
        return tenant

    def _digest(self, key: bytes) -> bytes:
        return blake2b(key, key=self._secret, digest_size=32).digest()


class Attempts:
    """How many wrong keys may come from one address: after `MOST` in a minute it is told to wait, right keys pass."""

    MOST = 30
    _SOURCES = 10_000  # remembered; the least recent is forgotten first

    def __init__(self) -> None:
        self._limiters: LRUCache[str, AsyncLimiter] = LRUCache(self._SOURCES)

    async def failed(self, scope: Scope) -> None:
        """One more from where `scope` comes. Raises RateLimited."""
        source = (scope.get("client") or ("",))[0]
        limiter = self._limiters.get(source)
        if limiter is None:
            limiter = self._limiters[source] = AsyncLimiter(self.MOST, 60)
        if not limiter.has_capacity():
            text = "Too many requests with a wrong API key. Please try again later."
            raise RateLimited(text, kind="requests", retry_after_s=60 / self.MOST)
        await limiter.acquire()


def authorizations(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The values of all Authorization headers."""
    return [value for name, value in headers if name == b"authorization"]
