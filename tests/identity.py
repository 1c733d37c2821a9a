"""Self-identifying vectors: each is seeded by text, model and width, so that any mix-up fails any test."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def identifying_vector(text: str | Sequence[int], model: str, dimensions: int) -> npt.NDArray[np.float32]:
    """The one unit vector, float32, shape (dimensions,), that only this text, model and width have."""
    raw = text.encode() if isinstance(text, str) else b"ids:" + ",".join(map(str, text)).encode()
    seed = hashlib.sha256(b"\0".join([model.encode(), str(dimensions).encode(), raw])).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
    vector = generator.standard_normal(dimensions, dtype=np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def identifying_vectors(texts: Sequence[str | Sequence[int]], model: str, dimensions: int) -> npt.NDArray[np.float32]:
    """One identifying vector per text, float32, shape (n, dimensions)."""
    return np.stack([identifying_vector(text, model, dimensions) for text in texts])
