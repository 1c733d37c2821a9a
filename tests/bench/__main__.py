"""Measures embedgate beside what it competes with: `python -m tests.bench`, or with names, only those.

Prints one table, keeps all figures in `.bench/results.json`, and exits with 1 when a target is missed.
"""

import argparse
import asyncio
import sys
import time

import uvloop

from tests.bench import batching, bulk, cached, datasets, growth, idle, largest, local_model, waiting
from tests.bench.figures import Figure, keep, table
from tests.bench.processes import LOADING, RESULTS, place

_MEASUREMENTS = {
    "cached": cached.measure,
    "batching": batching.measure,
    "idle": idle.measure,
    "waiting": waiting.measure,
    "largest": largest.measure,
    "local": local_model.measure,
    "growth": growth.measure,
    "bulk": bulk.measure,
    "datasets": datasets.measure,
}


async def _measured(names: list[str]) -> list[Figure]:
    figures = []
    for name in names:
        print(f"measuring: {name}", file=sys.stderr)
        figures += await _MEASUREMENTS[name]()
    return figures


def main() -> None:
    """Runs the named measurements, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_MEASUREMENTS)}; default: all")
    names = parser.parse_args().names or list(_MEASUREMENTS)
    if unknown := set(names) - set(_MEASUREMENTS):
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    place(LOADING)
    RESULTS.mkdir(exist_ok=True)
    started_s = time.monotonic()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(_measured(names))
    seconds = time.monotonic() - started_s
    keep(figures, seconds, RESULTS / "results.json")
    print(f"\n{table(figures)}\n\n{seconds:.0f} s, log_sample = 1.0; details in .bench/results.json")
    sys.exit(0 if all(figure.ok for figure in figures) else 1)


if __name__ == "__main__":
    main()
