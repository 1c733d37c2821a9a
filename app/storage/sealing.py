"""Hides what a vector looks like in a shared store, so that nothing but what was put there ever comes back."""

import hmac
import importlib
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from types import ModuleType
from typing import Literal, TypeAlias

import numpy as np

from app import vectors
from app.domain import Space, Vector
from app.errors import ConfigurationError, MalformedReply

Compression: TypeAlias = Literal["none", "zstd"]

_HEADER = struct.Struct("<BBIII")  # version, how the payload is written, dimensions, tokens, Unix second made
_VERSION = 1
_FLOAT16, _ZSTD = 1, 2
_MAC_BYTES = 16
_LEAST_BYTES = _HEADER.size + _MAC_BYTES
_FLOAT16_LEAST, _FLOAT16_MOST = 2.0**-8, 65504.0
_ZSTD_LEVEL = 3


class Sealer:
    """Turns vectors into what is kept under a key in shared stores, and back.

    A sealed value is a header, the components and a keyed BLAKE2b over the cache key and both. `float16` halves the
    bytes at the price of exactness where the largest component allows it; `compression` needs the package zstandard,
    else ConfigurationError. Whatever they are, all values are read, those
    sealed with `older` keys too.
    """

    def __init__(
        self,
        key: bytes,
        *,
        older: Sequence[bytes] = (),
        float16: bool = False,
        compression: Compression = "none",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keyed, *self._older = [
            blake2b(key=each, digest_size=_MAC_BYTES, person=b"embedgate sealed") for each in (key, *older)
        ]
        self._float16 = float16
        self._clock = clock
        self._compress: Callable[[bytes], bytes] | None = None
        if compression == "zstd":
            if (zstandard := _zstandard()) is None:
                raise ConfigurationError('cache.compression: "zstd" needs the package zstandard (embedgate[zstd])')
            self._compress = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress

    def seal(self, key: bytes, vector: Vector) -> bytes:
        """What to keep under `key`."""
        flags, payload = 0, vector.data
        if self._float16 and (halved := _halved(payload)) is not None:
            flags, payload = flags | _FLOAT16, halved
        if self._compress is not None and len(packed := self._compress(payload)) < len(payload):
            flags, payload = flags | _ZSTD, packed
        header = _HEADER.pack(_VERSION, flags, len(vector.data) // 4, vector.tokens, int(self._clock()))
        body = header + payload
        return body + _mac(self._keyed, key, body)

    def open(self, key: bytes, sealed: bytes, space: Space) -> Vector | None:
        """What was sealed under `key`, if it is sound as a vector of `space`; None for any other bytes."""
        return self.open_many({key: sealed}, space).get(key)

    def open_many(self, sealed: Mapping[bytes, bytes], space: Space) -> dict[bytes, Vector]:
        """What of `sealed`, by key, is sound; much cheaper than one by one, and never an error."""
        opened = {}
        for key, value in sealed.items():
            if len(value) < _LEAST_BYTES:
                continue
            version, flags, width, tokens, _ = _HEADER.unpack_from(value)
            body = value[:-_MAC_BYTES]
            if version == _VERSION and width == space.dimensions and self._made(key, body, value[-_MAC_BYTES:]):
                payload = body[_HEADER.size :]
                data = _components(payload, flags, width) if flags else payload
                if data is not None and len(data) == 4 * width:
                    opened[key] = Vector(data, tokens)
        if not opened or _sound([vector.data for vector in opened.values()], space):
            return opened
        return {key: vector for key, vector in opened.items() if _sound([vector.data], space)}

    def _made(self, key: bytes, body: bytes, mac: bytes) -> bool:
        """Whether it was sealed here, now or with an older secret."""
        if hmac.compare_digest(_mac(self._keyed, key, body), mac):
            return True
        return any(hmac.compare_digest(_mac(keyed, key, body), mac) for keyed in self._older)


def _mac(keyed: blake2b, key: bytes, body: bytes) -> bytes:
    mac = keyed.copy()
    mac.update(len(key).to_bytes(4, "little") + key)
    mac.update(body)
    return mac.digest()


def made_at_s(sealed: bytes) -> int:
    """The Unix second in which a value says that it was sealed; 0 for bytes that are none."""
    return int(_HEADER.unpack_from(sealed)[4]) if len(sealed) >= _HEADER.size else 0


def _components(payload: bytes, flags: int, dimensions: int) -> bytes | None:
    """The float32 bytes that `payload` stands for; never more of them than `dimensions` take."""
    expected = dimensions * (2 if flags & _FLOAT16 else 4)
    if flags & _ZSTD:
        unpacked = _unpacked(payload, expected)
        if unpacked is None:
            return None
        payload = unpacked
    if len(payload) != expected or flags & ~(_FLOAT16 | _ZSTD):
        return None
    return np.frombuffer(payload, "<f2").astype("<f4").tobytes() if flags & _FLOAT16 else payload


def _unpacked(payload: bytes, expected_bytes: int) -> bytes | None:
    """What zstd packed, if it says that it is of the expected size: it is asked before anything is unpacked."""
    zstandard = _zstandard()
    if zstandard is None:
        return None
    try:
        if zstandard.frame_content_size(payload) != expected_bytes:
            return None
        unpacked: bytes = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError:
        return None
    return unpacked


def _halved(data: bytes) -> bytes | None:
    """The float16 bytes of a vector; None where they would lose more than a few parts in ten thousand of it."""
    vector = np.frombuffer(data, "<f4")
    if not _FLOAT16_LEAST <= np.abs(vector).max() <= _FLOAT16_MOST:  # a NaN is neither
        return None
    return vector.astype("<f2").tobytes()


def _sound(rows: list[bytes], space: Space) -> bool:
    matrix = np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), -1)
    try:
        vectors.check(matrix, len(rows), space.dimensions, space.normalised)
    except MalformedReply:
        return False
    return True


@cache
def _zstandard() -> ModuleType | None:
    """The package, if it is installed: only who asks for compression needs it."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None
