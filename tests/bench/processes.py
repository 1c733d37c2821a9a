"""Hides how the bench's processes are started, placed on cores, configured and stopped."""

import asyncio
import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".bench"
KEY = "bench-key"
UPSTREAM_MODEL = "text-embedding-3-small"
DIMENSIONS = 1536

_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
SERVING, LOADING = _CORES[:1], _CORES[-1:]
"""One core for whoever is measured; another, if there is one, for callers and upstreams."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server on loopback."""

    port: int
    pid: int


@asynccontextmanager
async def server(*module: str, cores: list[int]) -> AsyncIterator[Server]:
    """Runs `python -m MODULE...` on `cores`, with `{port}` replaced, from when it listens until the block is left."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [part.replace("{port}", str(port)) for part in module]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
    )
    place(cores, process.pid)
    try:
        await _listening(port, process)
        yield Server(port, process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), timeout=20)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _listening(port: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(30):
        while process.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
    raise RuntimeError(f"a server of the bench ended with {process.returncode}")


def place(cores: list[int], pid: int = 0) -> None:
    """Keeps a process (0: this one) on `cores`, where the system can do that."""
    if cores:
        os.sched_setaffinity(pid, cores)


async def apart(measure: Callable[[], T]) -> T:
    """What `measure` returns in a fresh process that may use every core."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=place, initargs=(_CORES,)) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, measure)


def upstream(latency_ms: float, *options: str) -> tuple[str, ...]:
    """The module of a provider's stand-in that answers every call after `latency_ms`, with one vector for all texts."""
    return ("tests.emulators", "openai", "--constant", "--port", "{port}", "--latency-ms", str(latency_ms), *options)


def configured(name: str, models: Mapping[str, tuple[Server, str]], *, tenant: str = "") -> Path:
    """Writes embedgate's configuration: a key, a complete log, and per model its upstream and that one's limits.

    `tenant` is what else is set for the one whose key it is.
    """
    RESULTS.mkdir(exist_ok=True)
    log = RESULTS / f"{name}.log"
    log.unlink(missing_ok=True)
    stores = RESULTS / f"{name}.stores"
    shutil.rmtree(stores, ignore_errors=True)
    lines = [f"[server]\nlog_sample = 1.0\nlog_file = '{log}'", f"[stores]\ndata_dir = '{stores}'"]
    lines += [f"[tenants.bench]\napi_key = '{KEY}'\n{tenant}"]
    for model, (stand_in, limits) in models.items():
        lines += [
            f"[deployments.'{model}']\ndialect = 'openai'\nmodel = '{UPSTREAM_MODEL}'\n{limits}",
            f"base_url = 'http://127.0.0.1:{stand_in.port}/v1'",
            f"[models.'{model}']\ndeployments = ['{model}']\ncanary_interval_s = 0",
        ]
    path = RESULTS / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def embedgate(configuration: Path) -> tuple[str, ...]:
    """The module that serves by `configuration`."""
    return ("app", "serve", "--port", "{port}", "--config", str(configuration))


async def read(of: Server, path: str) -> httpx.Response:
    """The answer to `GET path`."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return await client.get(f"http://127.0.0.1:{of.port}{path}", headers={"authorization": f"Bearer {KEY}"})
