"""Hides how an API key is written, what of it may be kept, and how it is recognised again."""

import secrets
import string
from hashlib import blake2b
from typing import Final
from zlib import crc32

from app.storage.secret import MasterSecret

PREFIX: Final = "eg_live_"
ID_LENGTH: Final = 8
LENGTH: Final = 65
"""Characters of every key: the prefix, its public id, its secret in base 62, and a checksum of all that."""

_PURPOSE = "api keys"
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET, _SUM = 43, 6
_SECRET_BYTES = 32
_ID_PLACE = slice(len(PREFIX), len(PREFIX) + ID_LENGTH)


def make(again: str = "") -> str:
    """A new key, to be shown once; `again` is the public id of one that gets another secret."""
    secret = _base62(int.from_bytes(secrets.token_bytes(_SECRET_BYTES)), _SECRET)
    body = PREFIX + (again or "".join(secrets.choice(_ALPHABET) for _ in range(ID_LENGTH))) + secret
    return body + _checksum(body.encode())


def public_id(key: bytes) -> str:
    """By what a key is looked up and shown; of what is no key of ours something that no key has."""
    return key[_ID_PLACE].decode("latin-1") if len(key) == LENGTH else ""


def is_sound(key: bytes) -> bool:
    """Whether it may have been made here: a slip of the pen is noticed without asking anybody."""
    if len(key) != LENGTH or not key.startswith(PREFIX.encode()):
        return False
    return key[-_SUM:] == _checksum(key[:-_SUM]).encode()


class KeyHash:
    """What is kept of keys in their place: nobody without the server's secret can make or check it."""

    def __init__(self, secret: MasterSecret) -> None:
        self._pepper = secret.derive(_PURPOSE)
        self._older = secret.derive_older(_PURPOSE)

    def of(self, key: bytes) -> bytes:
        """The 32 bytes that are kept of `key`."""
        return blake2b(key, key=self._pepper, digest_size=32).digest()

    def older(self, key: bytes) -> list[bytes]:
        """What was kept of `key` before each rotation of the server's secret."""
        return [blake2b(key, key=pepper, digest_size=32).digest() for pepper in self._older]


def _checksum(body: bytes) -> str:
    return _base62(crc32(body), _SUM)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
