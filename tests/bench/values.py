"""Measures what one vector takes in a shared store, what it loses there, and what sealing and opening it costs.

`python -m tests.bench.values` prints a line for each setting and width.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product

import numpy as np

from app.domain import Space, Vector
from app.storage.sealing import Sealer
from tests.identity import identifying_vectors

_ITEMS, _ROUNDS = 256, 7


def main() -> None:
    """Unit vectors of the usual widths, 256 at a time as they are read."""
    print(f"{'':>25} {'bytes':>8} {'of float32':>11} {'1 − cosine':>11} {'seal':>8} {'open':>8}")
    for dimensions, float16, compression in product((384, 1536, 3072), (False, True), ("none", "zstd")):
        space = Space("m", dimensions)
        rows = identifying_vectors([str(number) for number in range(_ITEMS)], "m", dimensions)
        kept = {b"%032d" % number: Vector(row.tobytes(), 7) for number, row in enumerate(rows)}
        sealer = Sealer(bytes(32), float16=float16, compression="zstd" if compression == "zstd" else "none")
        sealed = {key: sealer.seal(key, vector) for key, vector in kept.items()}
        opened = sealer.open_many(sealed, space)
        size = sum(map(len, sealed.values())) / _ITEMS
        lost = max(_distance(kept[key].data, opened[key].data) for key in kept)
        seal_us = _microseconds(partial(_seal_all, sealer, kept))
        open_us = _microseconds(partial(sealer.open_many, sealed, space))
        name = f"{dimensions} × {'float16' if float16 else 'float32'} {compression}"
        share = size / (4 * dimensions)
        print(f"{name:>25} {size:8.0f} {share:11.1%} {lost:11.1e} {seal_us:5.1f} µs {open_us:5.1f} µs")


def _seal_all(sealer: Sealer, kept: Mapping[bytes, Vector]) -> None:
    for key, vector in kept.items():
        sealer.seal(key, vector)


def _distance(was: bytes, now: bytes) -> float:
    """1 − the cosine of two vectors; exactly 0 for equal ones."""
    if was == now:
        return 0.0
    one, other = (np.frombuffer(data, "<f4").astype(np.float64) for data in (was, now))
    return float(1 - one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _microseconds(work: Callable[[], object]) -> float:
    """The best of a few rounds, for one vector."""
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        rounds.append(time.perf_counter() - started)
    return min(rounds) / _ITEMS * 1e6


if __name__ == "__main__":
    main()
