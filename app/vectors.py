"""Hides how vectors are written down: float32 little-endian bytes, base64, JSON numbers, and what makes one valid."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from app.errors import MalformedReply

Matrix = npt.NDArray[np.float32]

_FLOAT32 = np.dtype("<f4")
_NORM_TOLERANCE = 1e-2
_ROUNDING = 1e-6


def encode_base64(data: bytes) -> bytes:
    """The standard base64, padded, of one vector's bytes: what OpenAI calls `encoding_format: base64`."""
    return pybase64.b64encode(data)


def encode_json(data: bytes) -> bytes:
    """One vector's bytes as a JSON array: for each component the shortest number that reads back as the same float32.

    Raises ValueError for a component that JSON cannot hold (NaN, an infinity).
    """
    vector = np.frombuffer(data, _FLOAT32)
    if not np.isfinite(vector).all():
        raise ValueError("This is a bug: a vector that is not finite was kept.")
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_base64(text: str) -> Matrix:
    """The vector of a padded standard base64 `text`, read-only; raises MalformedReply for anything else."""
    try:
        return np.frombuffer(pybase64.b64decode(text, validate=True), _FLOAT32)
    except ValueError as error:  # a foreign character, bad padding, or bytes that are no whole float32s
        raise MalformedReply("base64 that holds no float32 vector") from error


def rows(vectors: Matrix) -> list[bytes]:
    """The float32 little-endian bytes of each row, copied, so that keeping one row keeps nothing of the others."""
    return [row.tobytes() for row in vectors.astype(_FLOAT32, copy=False)]


def cut(data: bytes, dimensions: int) -> bytes:
    """The first `dimensions` components, brought back to unit length: a Matryoshka model's own smaller vector.

    A head without any length stays as it is. Raises ValueError if the vector is shorter than that.
    """
    vector = np.frombuffer(data, _FLOAT32)
    if dimensions > vector.size:
        raise ValueError(f"This is a bug: {dimensions} components asked of a vector that has {vector.size}.")
    head = vector[:dimensions].astype(np.float64)
    norm = float(np.sqrt(head @ head))
    return (head / (norm or 1.0)).astype(_FLOAT32).tobytes()


def mean(rows: Sequence[bytes], weights: Sequence[int], *, unit: bool) -> bytes:
    """The weighted mean of vectors of one width; brought to unit length if the vectors have it."""
    stacked = np.stack([np.frombuffer(row, _FLOAT32) for row in rows]).astype(np.float64)
    summed = np.asarray(weights, np.float64) @ stacked
    length = float(np.sqrt(summed @ summed)) if unit else float(sum(weights))
    return (summed / (length or 1.0)).astype(_FLOAT32).tobytes()


def normalised(vectors: Matrix) -> Matrix:
    """Each row brought to unit length; rows that have it up to rounding stay as they are, and so does what has none."""
    norms = np.sqrt(_squares(vectors))
    odd = (np.abs(norms - 1.0) > _ROUNDING) & (norms > 0) & np.isfinite(norms)
    if odd.any():
        vectors = vectors.copy()
        vectors[odd] = (vectors[odd] / norms[odd, None]).astype(np.float32)
    return vectors


def check(vectors: Matrix, count: int, dimensions: int, unit_norm: bool) -> None:
    """Raises MalformedReply unless `vectors` are `count` finite non-zero rows of `dimensions` components.

    With `unit_norm` each row's length must also be 1 ± 0.01. One pass, cheap enough for the event loop: the largest
    legal reply (2,048 × 3,072) takes a millisecond or two.
    """
    if vectors.shape != (count, dimensions):
        raise MalformedReply(f"vectors of shape {vectors.shape} instead of {(count, dimensions)}")
    norms = np.sqrt(_squares(vectors))
    if not np.isfinite(norms).all():
        raise MalformedReply("a vector that is not finite")
    if not norms.all():
        raise MalformedReply("a vector of zeros")
    if unit_norm and (np.abs(norms - 1.0) > _NORM_TOLERANCE).any():
        raise MalformedReply("a vector that is not of unit length")


def _squares(vectors: Matrix) -> npt.NDArray[np.float64]:
    """Each row's squared length; not finite exactly if a component is not, zero exactly if all are."""
    squares: npt.NDArray[np.float64]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = np.vecdot(vectors, vectors).astype(np.float64)
    odd = ~((squares > np.finfo(np.float32).tiny) & np.isfinite(squares))
    if odd.any():  # float32 squares over- and underflow long before their components do
        wide = vectors[odd].astype(np.float64)
        squares[odd] = np.vecdot(wide, wide)
    return squares
