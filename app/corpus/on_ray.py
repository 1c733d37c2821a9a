"""Hides Ray: how workers of a cluster, or of this machine, do partitions by their numbers, and say what came of it."""

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Final, NamedTuple, TypeAlias

from app.corpus.rows import DataError
from app.corpus.stream import GaveUp
from app.errors import EmbedgateError

Work: TypeAlias = Callable[[int], None]
"""Does the partition of this number, counted from 1, or what is left of it. Raises what `Said` tells."""

_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
_LOOPBACK: Final = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
_REACH_S = 10.0
_STORE_BYTES = 80 * 2**20  # the least that Ray takes; what we keep there are numbers


class Said(NamedTuple):
    """What became of a partition: "" or in a line why it is not done; `gave_up`: for now."""

    number: int
    why: str
    gave_up: bool


def spread(numbers: Sequence[int], begin: Callable[[], Work], *, workers: int, address: str) -> Iterator[Said]:
    """Every partition that has one of the numbers, as it is done.

    `begin` is called once in each worker, `workers` of them, 0: one for each CPU; it has to be picklable. The cluster
    at the `address` does it, "": one on this machine, which nobody else can reach, and which ends with the iteration.
    Who dies is started again, with what it was at. Blocks. Raises DataError.
    """
    count = len(numbers)
    with _ray(address, min(workers or os.cpu_count() or 1, count)) as (ray, data):
        size = min(workers or int(ray.cluster_resources().get("CPU", 1)), count)
        items = data.from_items([{"number": number} for number in numbers], override_num_blocks=count)
        pool = data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
        said = items.map_batches(_Worker, batch_size=1, compute=pool, num_cpus=1, fn_constructor_args=[begin])
        for each in said.iter_rows():
            yield Said(each["number"], each["why"], each["gave_up"])


class _Worker:
    """What a worker keeps between partitions. Who had to give up does not try the next one, but says so."""

    def __init__(self, begin: Callable[[], Work]) -> None:
        self._begin = begin
        self._work: Work | None = None
        self._gave_up = ""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """One partition."""
        (number,) = map(int, batch["number"])
        why = self._gave_up or self._tried(number)
        return {"number": [number], "why": [why], "gave_up": [bool(self._gave_up)]}

    def _tried(self, number: int) -> str:
        try:
            self._work = self._work or self._begin()
            self._work(number)
        except GaveUp as gave_up:
            self._gave_up = str(gave_up)
            return self._gave_up
        except (DataError, EmbedgateError) as error:
            return str(error)
        return ""


@contextmanager
def _ray(address: str, cpus: int) -> Iterator[tuple[Any, Any]]:
    """Ray and its datasets, silent, and connected; Ray reads its environment when it is imported."""
    if address:
        _reach(address)
    if find_spec("ray") is None:
        raise DataError("--on ray needs the package ray (embedgate[ray])")
    os.environ.update(_QUIET)
    if not address:
        os.environ.update(_LOOPBACK, RAY_AUTH_TOKEN=secrets.token_hex(16))  # not for other users of this machine
    import ray
    from ray import data

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    local: dict[str, Any] = (
        {} if address else {"num_cpus": cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    )
    try:
        with _hushed():
            ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **local)
        data.DataContext.get_current().enable_progress_bars = False
        yield ray, data
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError) as error:
        where = f"the cluster {address}" if address else "Ray"
        raise DataError(f"{where}: {str(error).strip().partition(chr(10))[0]}") from error
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises DataError where nobody listens; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), _REACH_S).close()
    except OSError as error:
        raise DataError(f"the cluster {address} cannot be reached: {error.strerror or error}") from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing reaches the standard error of this process: Ray tells it there that it was told to be silent."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
