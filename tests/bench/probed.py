"""Serves embedgate with a probe of the event loop beside it: `python -m tests.bench.probed PORT CONFIG SAMPLES`."""

import asyncio
import sys
import time
from pathlib import Path

import orjson
import uvloop

from app.api.server import serve
from app.settings import Settings, load

_NAP_S = 0.001


async def _serve(settings: Settings) -> list[tuple[float, float]]:
    """Serves until SIGTERM, then tells when the loop was how late: pairs of seconds, by the system's clock."""
    late: list[tuple[float, float]] = []
    async with asyncio.TaskGroup() as tasks:
        probe = tasks.create_task(_watch(late))
        await serve(settings, lambda _: None)
        probe.cancel()
    return late


async def _watch(late: list[tuple[float, float]]) -> None:
    while True:
        before_s = time.monotonic()
        await asyncio.sleep(_NAP_S)
        after_s = time.monotonic()
        late.append((after_s, after_s - before_s - _NAP_S))


if __name__ == "__main__":
    port, configuration, samples_file = sys.argv[1:]
    understood = load(Path(configuration), {}, options={"port": int(port)})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        Path(samples_file).write_bytes(orjson.dumps(runner.run(_serve(understood))))
