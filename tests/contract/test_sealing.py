"""What lies in a shared store comes back as it was put there, or not at all."""

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Space, Vector
from app.errors import ConfigurationError
from app.storage import sealing
from app.storage.sealing import Compression, Sealer, made_at_s
from tests.levels import SPACE, WIDE, entry

SECRET = bytes(range(32))
KEY, VECTOR = entry("a text", WIDE)
SETTINGS: list[tuple[bool, Compression]] = [(False, "none"), (True, "none"), (False, "zstd"), (True, "zstd")]


def sealer(float16: bool = False, compression: Compression = "none") -> Sealer:
    """One whose clock stands still."""
    return Sealer(SECRET, float16=float16, compression=compression, clock=lambda: 1_800_000_000.7)


def vector_of(*components: float) -> Vector:
    """What holds just these."""
    return Vector(np.array(components, "<f4").tobytes(), 3)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_float32_is_exact(compression: Compression) -> None:
    """Byte for byte, packed or not."""
    one = sealer(compression=compression)
    assert one.open(KEY, one.seal(KEY, VECTOR), WIDE) == VECTOR


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_float16_takes_half_and_keeps_the_direction(compression: Compression) -> None:
    """The cosine to what was sealed is within 1e-6 of 1."""
    one = sealer(True, compression)
    sealed = one.seal(KEY, VECTOR)
    opened = one.open(KEY, sealed, WIDE)
    assert opened is not None
    assert opened.tokens == VECTOR.tokens
    was, now = (np.frombuffer(each.data, "<f4").astype(np.float64) for each in (VECTOR, opened))
    assert 1 - was @ now / (np.linalg.norm(was) * np.linalg.norm(now)) < 1e-6
    assert len(sealed) <= 2 * WIDE.dimensions + 30


@pytest.mark.parametrize("components", [(70_000.0, 1.0), (1e-6, -2e-6), (1e-30, 1e-30)])
def test_what_float16_cannot_hold_stays_exact(components: tuple[float, ...]) -> None:
    """Components too large for it, or all so small that little would be left of them."""
    space, vector = Space("m", 2, normalised=False), vector_of(*components)
    one = sealer(float16=True)
    assert one.open(KEY, one.seal(KEY, vector), space) == vector


def test_zstd_packs_what_can_be_packed() -> None:
    """And leaves as it is what would only grow."""
    flat = Vector(np.full(1536, 1 / np.sqrt(1536), "<f4").tobytes(), 1)
    one = sealer(compression="zstd")
    assert len(one.seal(KEY, flat)) < 100
    assert one.open(KEY, one.seal(KEY, flat), WIDE) == flat
    short = entry("short")[1]
    assert one.seal(KEY, short) == sealer().seal(KEY, short)


@pytest.mark.parametrize("written", SETTINGS)
@pytest.mark.parametrize("reading", SETTINGS)
def test_other_settings_read_what_was_sealed_before(
    written: tuple[bool, Compression], reading: tuple[bool, Compression]
) -> None:
    """A change of `float16` or `compression` loses nothing."""
    sealed = sealer(*written).seal(KEY, VECTOR)
    assert sealer(*reading).open(KEY, sealed, WIDE) == sealer(*written).open(KEY, sealed, WIDE) is not None


def test_when_a_value_was_made_can_be_read_off_it() -> None:
    """In whole Unix seconds; other bytes were made long ago."""
    assert made_at_s(sealer().seal(KEY, VECTOR)) == 1_800_000_000
    assert made_at_s(b"") == made_at_s(b"x" * 13) == 0


@pytest.mark.parametrize(
    "components",
    [
        (float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("-inf")), (0.0, 0.0), (1.0, 1.0), (0.5, 0.0),
        (1e38, 1e38), (1.0,), (1.0, 0.0, 0.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("float16", "compression"), SETTINGS)
def test_what_is_no_vector_of_the_space_is_not_opened(
    components: tuple[float, ...], float16: bool, compression: Compression
) -> None:
    """Though we sealed it ourselves: not finite, zero, not of unit length, of another width."""
    one, sound = sealer(float16, compression), vector_of(0.6, 0.8)
    space = Space("m", 2)
    sealed = {KEY: one.seal(KEY, vector_of(*components)), b"sound": one.seal(b"sound", sound)}
    assert one.open(KEY, sealed[KEY], space) is None
    assert one.open_many(sealed, space).keys() == {b"sound"}


def test_a_space_that_is_not_normalised_takes_any_length() -> None:
    """But not a vector without any."""
    space, one = Space("m", 2, normalised=False), sealer()
    assert one.open(KEY, one.seal(KEY, vector_of(3.0, 4.0)), space) == vector_of(3.0, 4.0)
    assert one.open(KEY, one.seal(KEY, vector_of(0.0, 0.0)), space) is None


def forged(change: Callable[[bytes], bytes]) -> bytes:
    """A value changed by somebody who does not know the secret."""
    return change(sealer().seal(KEY, VECTOR))


@pytest.mark.parametrize(
    "poison",
    [
        b"",
        b"not a vector",
        forged(lambda value: value[:-1]),
        forged(lambda value: value + b"\0"),
        forged(lambda value: value[:100] + bytes([value[100] ^ 1]) + value[101:]),
        forged(lambda value: b"\x02" + value[1:]),
        forged(lambda value: value[:1] + b"\x01" + value[2:]),
        forged(lambda value: value[:6] + b"\xff" + value[7:]),
        sealer().seal(b"another key", VECTOR),
        Sealer(b"another secret").seal(KEY, VECTOR),
        VECTOR.data,
    ],
)
def test_poison_is_not_opened(poison: bytes) -> None:
    """Cut, grown, flipped, renamed, of another secret, or never sealed at all."""
    assert sealer().open(KEY, poison, WIDE) is None


@given(st.binary(max_size=200))
def test_no_bytes_are_an_error(poison: bytes) -> None:
    """Whatever lies in the store."""
    assert sealer().open(KEY, poison, SPACE) is None
    made_at_s(poison)


@given(st.binary(max_size=100), st.integers(0, 255), st.integers(0, 3))
def test_no_payload_is_an_error_even_if_it_verifies(payload: bytes, flags: int, width: int) -> None:
    """A bug of another version that knows the secret does no harm."""
    one = sealer()
    body = sealing._HEADER.pack(1, flags, width, 1, 1) + payload
    opened = one.open(KEY, body + sealing._mac(one._keyed, KEY, body), Space("m", width, normalised=False))
    assert opened is None or len(opened.data) == 4 * width > 0


def test_what_unpacks_to_more_than_a_vector_is_never_unpacked() -> None:
    """Neither when the frame says so nor when it does not say."""
    one, space = sealer(), SPACE
    bomb = bytes(1 << 28)
    for writes_size in (True, False):
        payload = zstandard.ZstdCompressor(write_content_size=writes_size).compress(bomb)
        body = sealing._HEADER.pack(1, sealing._ZSTD, space.dimensions, 1, 1) + payload
        assert one.open(KEY, body + sealing._mac(one._keyed, KEY, body), space) is None


def test_who_asks_for_zstd_without_the_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; and values that others packed are misses."""
    packed = sealer(compression="zstd").seal(KEY, VECTOR)
    sealing._zstandard.cache_clear()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigurationError, match="zstandard"):
        sealer(compression="zstd")
    assert sealer().open(KEY, packed, WIDE) is None
    sealing._zstandard.cache_clear()


def test_another_space_is_another_width_or_another_key() -> None:
    """A value never opens for a Space of another width, whatever key it lies under."""
    assert sealer().open(KEY, sealer().seal(KEY, VECTOR), replace(WIDE, dimensions=1535)) is None
