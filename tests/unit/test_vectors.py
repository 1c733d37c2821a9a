import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from app import vectors
from app.errors import MalformedReply
from tests.identity import identifying_vector, identifying_vectors

finite_vectors = st_numpy.arrays(
    np.dtype("<f4"), st.integers(1, 64), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@given(finite_vectors)
def test_base64_brings_back_every_bit(vector: vectors.Matrix) -> None:
    """A vector that went through base64 has the very same bytes."""
    text = vectors.encode_base64(vector.tobytes()).decode()
    assert vectors.decode_base64(text).tobytes() == vector.tobytes()


@given(finite_vectors)
def test_json_numbers_read_back_as_the_same_float32(vector: vectors.Matrix) -> None:
    """Every finite float32 survives JSON, the smallest, the largest and minus zero included."""
    numbers = orjson.loads(vectors.encode_json(vector.tobytes()))
    assert np.array(numbers, dtype="<f4").tobytes() == vector.tobytes()


def test_json_numbers_are_as_short_as_float32_allows() -> None:
    """A tenth is written as 0.1 and not with the sixteen digits of its float64."""
    assert vectors.encode_json(np.array([0.1], dtype="<f4").tobytes()) == b"[0.1]"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_cannot_hold_is_never_written(value: float) -> None:
    """A NaN or an infinity is an error and not a null in the caller's answer."""
    with pytest.raises(ValueError, match="not finite"):
        vectors.encode_json(np.array([1.0, value], dtype="<f4").tobytes())


@pytest.mark.parametrize(
    "text", ["AACAPw", "AACA", "AACAPw=", "AACA Pw==", "AACAPw==\n", "A-CAPw==", "AACAPw==AACAPw==", "é", "AAC\0Pw=="]
)
def test_base64_is_read_strictly(text: str) -> None:
    """Missing padding, foreign characters and bytes that are no whole float32s are refused, not repaired."""
    with pytest.raises(MalformedReply):
        vectors.decode_base64(text)


def test_rows_do_not_keep_the_reply_alive() -> None:
    """Each row is its own copy of exactly its own components, in order."""
    matrix = identifying_vectors(["a", "b"], "m", 8)
    kept = vectors.rows(matrix)
    matrix[:] = 0
    assert kept == [identifying_vector(text, "m", 8).tobytes() for text in ("a", "b")]


def test_a_cut_is_the_head_at_unit_length() -> None:
    """The cut points where the first components point, and its length is one to float32's precision."""
    full = identifying_vector("text", "m", 1536)
    head = np.frombuffer(vectors.cut(full.tobytes(), 256), "<f4")
    assert head.shape == (256,)
    assert np.linalg.norm(head.astype(np.float64)) == pytest.approx(1, abs=1e-7)
    np.testing.assert_allclose(head, full[:256] / np.linalg.norm(full[:256]), rtol=1e-6)


def test_a_head_of_zeros_stays_zeros() -> None:
    """A head without direction is not turned into NaNs."""
    assert vectors.cut(np.array([0, 0, 1], dtype="<f4").tobytes(), 2) == bytes(8)


def test_a_vector_is_never_cut_longer() -> None:
    """Asking for more components than there are is an error and not a short vector."""
    with pytest.raises(ValueError, match="asked of a vector"):
        vectors.cut(bytes(8), 3)


def test_good_vectors_pass() -> None:
    """What is finite, of the right shape and of unit length is accepted, promised or not."""
    good = identifying_vectors(["a", "b"], "m", 8)
    vectors.check(good, 2, 8, unit_norm=True)
    vectors.check(good * 3, 2, 8, unit_norm=False)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_vector_may_be_very_short_or_long(size: float) -> None:
    """Components whose squares float32 cannot hold are still a finite, non-zero vector."""
    vectors.check(np.full((1, 8), size, dtype=np.float32), 1, 8, unit_norm=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(bad: float) -> None:
    """A single NaN or infinity anywhere refuses the reply."""
    matrix = identifying_vectors(["a", "b", "c"], "m", 8)
    matrix[1, 5] = bad
    with pytest.raises(MalformedReply, match="not finite"):
        vectors.check(matrix, 3, 8, unit_norm=False)


def test_a_row_of_zeros_is_no_vector() -> None:
    """A row of zeros refuses the reply even where no length was promised."""
    matrix = identifying_vectors(["a", "b"], "m", 8)
    matrix[1] = 0
    with pytest.raises(MalformedReply, match="zeros"):
        vectors.check(matrix, 2, 8, unit_norm=False)


@pytest.mark.parametrize(("factor", "accepted"), [(0.98, False), (0.995, True), (1.005, True), (1.02, False)])
def test_a_promised_length_is_held_to_one_percent(factor: float, accepted: bool) -> None:
    """Rounding is forgiven, another normalisation is not."""
    matrix = identifying_vectors(["a"], "m", 256) * np.float32(factor)
    if accepted:
        vectors.check(matrix, 1, 256, unit_norm=True)
    else:
        with pytest.raises(MalformedReply, match="unit length"):
            vectors.check(matrix, 1, 256, unit_norm=True)


@pytest.mark.parametrize(("count", "dimensions"), [(1, 8), (3, 8), (2, 7), (2, 9)])
def test_another_shape_is_refused(count: int, dimensions: int) -> None:
    """Too few, too many, too short and too long vectors are all refused."""
    with pytest.raises(MalformedReply, match="shape"):
        vectors.check(identifying_vectors(["a", "b"], "m", 8), count, dimensions, unit_norm=False)
