"""Hides how a key is recognised: only keyed hashes of keys are kept, and comparing takes the same time for all."""

import hmac
import secrets
from collections.abc import Iterable
from hashlib import blake2b

from aiolimiter import AsyncLimiter
from cachetools import LRUCache
from starlette.types import Scope

from app.api.errors import NotReady
from app.directory import ANYBODY, Caller
from app.domain import Scope as Right
from app.errors import EmbedgateError, InsufficientScope, RateLimited, Unauthenticated
from app.runtime import Runtime
from app.storage import api_key

_SCHEME = b"Bearer "
_NO_KEY = "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'."
_WRONG_KEY = "Incorrect API key provided."


class Keys:
    """Who calls: by a configured key or one made at run time; where there is neither, on loopback, `ANONYMOUS`."""

    def __init__(self, runtime: Runtime) -> None:
        server, self._directory = runtime.settings.server, runtime.directory
        self._secret = secrets.token_bytes(32)
        found = ((self._digest(key.encode()), Caller(tenant)) for key, tenant in runtime.tenants.items())
        self._configured = {digest: (digest, caller) for digest, caller in found}
        self._nobody = (secrets.token_bytes(32), None)
        self._may_be_open = server.loopback and not self._configured
        self._admin_digest = self._digest(server.admin_key.get_secret_value().encode()) if server.admin_key else None

    def caller(self, scope: Scope, needs: Right | None = None) -> Caller:
        """Who sends the request, with a key that is good for what it `needs`.

        Raises Unauthenticated, InsufficientScope, and NotReady while nobody can know.
        """
        given, directory = authorizations(scope["headers"]), self._directory
        if self._may_be_open and directory.loaded and not directory.keyed:
            return ANYBODY
        caller = self._presented(given, scope)
        if caller is None:
            raise self._refusal(given)
        if needs is not None and needs not in caller.scopes:
            raise InsufficientScope(needs)
        return caller

    def is_operator(self, scope: Scope) -> bool:
        """Whether the request comes with the configured admin key, or with one made for operators."""
        given = authorizations(scope["headers"])
        digest = self._digest(_key(given))
        if self._admin_digest is not None and hmac.compare_digest(self._admin_digest, digest):
            return _is_proper(given)
        caller = self._presented(given, scope)
        return caller is not None and "admin" in caller.scopes

    def refusal(self, scope: Scope) -> EmbedgateError:
        """Why a request that needs a key is not served."""
        return self._refusal(authorizations(scope["headers"]))

    def _presented(self, given: list[bytes], scope: Scope) -> Caller | None:
        """Whose key it is; a wrong one takes as long as a right one, and none is as wrong as any."""
        key = _key(given)
        caller = self._directory.find(key) if api_key.public_id(key) else None
        if caller is None:
            digest = self._digest(key)
            kept, caller = self._configured.get(digest, self._nobody)
            caller = caller if hmac.compare_digest(kept, digest) else None
        if caller is None or not _is_proper(given):
            return None
        return caller if caller.may_come_from((scope.get("client") or ("",))[0]) else None

    def _refusal(self, given: list[bytes]) -> EmbedgateError:
        if not self._directory.loaded and (self._may_be_open or api_key.is_sound(_key(given))):
            return NotReady(["the keys cannot be read yet"])
        return Unauthenticated(_WRONG_KEY, "invalid_api_key") if given else Unauthenticated(_NO_KEY)

    def _digest(self, key: bytes) -> bytes:
        return blake2b(key, key=self._secret, digest_size=32).digest()


def _key(given: list[bytes]) -> bytes:
    return given[0][len(_SCHEME) :] if given else b""


def _is_proper(given: list[bytes]) -> bool:
    return len(given) == 1 and given[0].startswith(_SCHEME)


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
