"""Hides how a key is recognised: only keyed hashes of keys are kept, and comparing takes the same time for all."""

import hmac
import secrets
from collections.abc import Iterable, Mapping
from hashlib import blake2b

from app.domain import ANONYMOUS, Tenant
from app.errors import Unauthenticated

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


def authorizations(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The values of all Authorization headers."""
    return [value for name, value in headers if name == b"authorization"]
