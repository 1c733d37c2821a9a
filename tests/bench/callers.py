"""Hides a load generator that costs a few microseconds per exchange: prebuilt requests on raw connections."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import orjson
import psutil

from tests.bench.processes import KEY, UPSTREAM_MODEL, Server

_WARM_UP_S = 0.3
_OK = b"HTTP/1.1 200"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Load:
    """What callers saw within `seconds`, and the processor time that the server took for it."""

    seconds: float
    cpu_s: float
    latencies_s: Sequence[float]

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies_s) / self.seconds

    @property
    def core_rate(self) -> float:
        """Answers per second of processor time: what a core of its own would give, whoever else runs here."""
        return len(self.latencies_s) / self.cpu_s

    def ms(self, percentile: float) -> float:
        """A percentile of the latencies, in milliseconds."""
        return float(np.percentile(self.latencies_s, percentile)) * 1000


def request(
    texts: str | Sequence[str], *, model: str = UPSTREAM_MODEL, base64: bool = True, headers: str = ""
) -> bytes:
    """The bytes of one embeddings request; `headers` are further lines."""
    body = orjson.dumps({"input": texts, "model": model, "encoding_format": "base64" if base64 else "float"})
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


def unique(text: str) -> Iterator[bytes]:
    """Requests for `text` with another number before it each time, so that no cache knows it."""
    before, _, after = request(f"{0:010d} {text}").partition(b"0" * 10)
    return (b"%b%010d%b" % (before, number, after) for number in _numbers)


async def drive(to: Server, requests: Iterator[bytes], *, callers: int, seconds: float, awake: bool = False) -> Load:
    """Lets each of `callers` ask, wait for the answer and ask again; a moment for warming up is not counted.

    `awake`: the callers' process never sleeps. A server pays for waking it with every answer (40 µs on some virtual
    machines), and only one that is slower than its callers would.
    """
    latencies_s: list[float] = []
    loop, failed = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
    connections = []
    spinning = awake

    def spin() -> None:
        if spinning:
            loop.call_soon(spin)

    spin()
    try:
        for _ in range(callers):
            caller = partial(_Caller, requests, latencies_s, failed)
            connections.append((await loop.create_connection(caller, "127.0.0.1", to.port))[0])
        await asyncio.wait([failed], timeout=_WARM_UP_S)
        latencies_s.clear()
        started_s, cpu_s = time.perf_counter(), _cpu_s(to)
        await asyncio.wait([failed], timeout=seconds)
        load = Load(time.perf_counter() - started_s, _cpu_s(to) - cpu_s, latencies_s.copy())
        if failed.done():
            failed.result()
        return load
    finally:
        spinning = False
        failed.cancel()
        for connection in connections:
            connection.abort()


def _cpu_s(of: Server) -> float:
    times = psutil.Process(of.pid).cpu_times()
    return float(times.user + times.system)


async def ask(to: Server, asked: bytes) -> bytes:
    """The whole answer to one request with `connection: close`, of any length; raises unless it is a 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", to.port, limit=2**20)
    try:
        writer.write(asked)
        answer = await reader.read(-1)
    finally:
        writer.transport.abort()
    if not answer.startswith(_OK):
        raise RuntimeError(answer[:500].decode("latin-1"))
    return answer


class _Caller(asyncio.Protocol):
    """One connection in a closed loop."""

    def __init__(self, requests: Iterator[bytes], latencies_s: list[float], failed: asyncio.Future[None]) -> None:
        self._requests = requests
        self._latencies_s = latencies_s
        self._failed = failed
        self._head = b""
        self._missing_bytes = 0
        self._asked_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._write = transport.write
        self._ask()

    def data_received(self, data: bytes) -> None:
        if not self._missing_bytes:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            self._head = b""
            self._missing_bytes = end + 4 + self._length(data, end)
        self._missing_bytes -= len(data)
        if not self._missing_bytes:
            self._latencies_s.append(time.perf_counter() - self._asked_s)
            self._ask()

    def connection_lost(self, _: Exception | None) -> None:
        if self._missing_bytes and not self._failed.done():
            self._failed.set_exception(ConnectionError("a server of the bench closed a connection"))

    def _ask(self) -> None:
        self._asked_s = time.perf_counter()
        self._write(next(self._requests))

    def _length(self, data: bytes, end: int) -> int:
        if not data.startswith(_OK) and not self._failed.done():
            self._failed.set_exception(RuntimeError(data[:500].decode("latin-1")))
        at = data.index(b"content-length: ", 0, end) + 16
        return int(data[at : data.index(b"\r", at)])
