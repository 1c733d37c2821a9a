"""The whole service on loopback: our server, the real runtime, and a stand-in for OpenAI behind it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from app.api.server import EdgeServer, listening
from app.runtime import Runtime
from app.settings import load
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vectors

SMALL, ADA = "text-embedding-3-small", "text-embedding-ada-002"
KEY, ADA_KEY = "key-of-search", "key-of-archive"

CONFIGURATION = """
[server]
log_file = "{log}"
{server}
[queue]
{queue}
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
attempts = 1
breaker_failures_in_a_row = 5
[deployments.ada]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-ada-002"
[models.text-embedding-3-small]
deployments = ["main"]
[models.text-embedding-ada-002]
deployments = ["ada"]
"""

TENANTS = f"""
[tenants.search]
api_key = "{KEY}"
[tenants.archive]
api_key = "{ADA_KEY}"
models = ["{ADA}"]
priority = "bulk"
"""


@dataclass
class Edge:
    """A running service: `url` without path, and what stands behind it."""

    url: str
    log: Path
    runtime: Runtime
    server: EdgeServer
    upstream: OpenAIEmulator
    http: httpx.AsyncClient

    async def post(self, body: object = None, content: bytes | None = None, **headers: str) -> httpx.Response:
        """POSTs to the hot route with the key of `search`; header names with `_` for `-`."""
        named = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent: dict[str, Any] = {"json": body} if content is None else {"content": content}
        return await self.http.post("/v1/embeddings", headers=named, **sent)

    async def raw(self, *parts: bytes) -> bytes:
        """What comes back on a new connection for the bytes `parts`, until the server closes it."""
        reader, writer = await self.connect()
        for part in parts:
            writer.write(part)
        async with asyncio.timeout(10):
            answer = await reader.read(-1)
        writer.close()
        return answer

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection."""
        host, port = self.url.removeprefix("http://").split(":")
        return await asyncio.open_connection(host, int(port))

    def answers(self, status: int, code: str = "") -> float:
        """How many answers with `status` and `code` were told of."""
        found = 0.0
        for metric in self.runtime.telemetry.requests.collect():
            for sample in metric.samples:
                said = (sample.labels.get("status"), sample.labels.get("code"))
                found += sample.value * (sample.name.endswith("_total") and said == (str(status), code))
        return found


def expected(texts: Sequence[str], model: str = SMALL, dimensions: int = 1536) -> np.ndarray:
    """The vectors that `texts` must get."""
    return identifying_vectors(texts, model, dimensions)


@asynccontextmanager
async def serving(folder: Path, text: str) -> AsyncIterator[tuple[str, EdgeServer, Runtime, httpx.AsyncClient]]:
    """A service with the configuration `text`: its URL without path, and what it is made of."""
    (folder / "embedgate.toml").write_text(text)
    settings = load(folder / "embedgate.toml", {"EMBEDGATE_STORES__DATA_DIR": str(folder / "data")})
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        with ExitStack() as stack:
            ports = [0, *filter(None, [settings.server.admin_port])]
            listeners = [stack.enter_context(listening("127.0.0.1", port)) for port in ports]
            async with Runtime(settings) as runtime:
                server = EdgeServer(runtime, ready.set_result)
                task = group.create_task(server.serve(listeners))
                url = (await ready).removesuffix("/v1")
                try:
                    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
                        yield url, server, runtime, http
                finally:
                    server.drain()
                    await task


@asynccontextmanager
async def running(folder: Path, *, server: str = "", queue: str = "", tenants: str = TENANTS) -> AsyncIterator[Edge]:
    """A service with lines of `server` and `queue` in its configuration."""
    log = folder / "log.jsonl"
    async with OpenAIEmulator() as upstream:
        text = CONFIGURATION.format(log=log, server=server, queue=queue, upstream=upstream.base_url) + tenants
        async with serving(folder, text) as (url, edge, runtime, http):
            yield Edge(url, log, runtime, edge, upstream, http)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    """One service for all tests of a module that leave it as it was."""
    ready: asyncio.Future[Edge] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def run() -> None:  # setting up and closing belong into one task
        async with running(tmp_path_factory.mktemp("edge")) as made:
            ready.set_result(made)
            await done.wait()

    task = asyncio.ensure_future(run())
    task.add_done_callback(lambda _: ready.done() or ready.cancel("the service did not start"))
    yield await ready
    done.set()
    await task
