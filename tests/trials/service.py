"""Hides how a trial runs the service and its callers: its own process, an open loop of requests, checked answers."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np

from tests.bench.processes import server
from tests.books import Vendor, balance
from tests.emulators.server import Emulator
from tests.identity import identifying_vector

MODEL, WIDTH = "text-embedding-3-small", 1536
KEY = "trial-key"
USD = "0.1337"
"""What a million tokens cost at every deployment."""
IN_FLIGHT = 8
"""As many calls one replica makes at once to a deployment that does not say how many."""


@dataclass(slots=True)
class Outcome:
    """One request: when it began (monotonic seconds), how long it took, what came back."""

    began_s: float
    took_s: float
    status: int
    deployment: str = ""
    right: bool = False


@dataclass
class Load:
    """An open loop: so many requests a second, each with a text of its own, whatever becomes of the others."""

    url: str
    per_second: float
    deadline_s: float
    outcomes: list[Outcome] = field(default_factory=list)
    _sent: int = 0

    async def run(self, seconds: float) -> list[Outcome]:
        """Sends for so long, waits for the last answer, and returns what this stretch brought."""
        first = len(self.outcomes)
        begun = asyncio.get_running_loop().time()
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            asyncio.TaskGroup() as group,
        ):
            for turn in range(int(seconds * self.per_second)):
                await asyncio.sleep(max(0.0, begun + turn / self.per_second - asyncio.get_running_loop().time()))
                self._sent += 1
                group.create_task(self._one(session, f"trial text {self._sent}"))
        return self.outcomes[first:]

    async def _one(self, session: aiohttp.ClientSession, text: str) -> None:
        began, started = time.monotonic(), time.perf_counter()
        body = {"model": MODEL, "input": text, "encoding_format": "base64"}
        headers = {
            "authorization": f"Bearer {KEY}",
            "x-embedgate-deadline-ms": str(int(self.deadline_s * 1000)),
        }
        async with session.post(f"{self.url}/v1/embeddings", json=body, headers=headers) as answer:
            content = await answer.json()
        outcome = Outcome(began, time.perf_counter() - started, answer.status)
        if answer.status == 200:
            found = np.frombuffer(base64.b64decode(content["data"][0]["embedding"]), "<f4")
            outcome.right = found.tobytes() == identifying_vector(text, MODEL, WIDTH).tobytes()
            outcome.deployment = answer.headers.get("x-embedgate-deployment", "")
        self.outcomes.append(outcome)


@asynccontextmanager
async def service(folder: Path, configuration: str, vendors: Mapping[str, Emulator]) -> AsyncIterator[str]:
    """The URL, without path, of a service with this configuration; its books are closed against the vendors' bills."""
    path = folder / "embedgate.toml"
    head = f"[server]\nlog_file = '{folder}/log.jsonl'\n[stores]\ndata_dir = '{folder}/data'\n"
    path.write_text(f"{head}[tenants.trial]\napi_key = '{KEY}'\n{configuration}")
    async with server("app", "serve", "--port", "{port}", "--config", str(path), cores=[]) as running:
        yield f"http://127.0.0.1:{running.port}"
    journals = folder / "data" / "journal"
    await close_books("the service", f"sqlite:///{folder}/data/embedgate.db", vendors, journals=journals)


async def close_books(
    name: str, database_url: str, vendors: Mapping[str, Emulator], *, journals: Path | None = None, replicas: int = 1
) -> None:
    """Proves and prints what is in the ledger of a service that has stopped; `vendors` by deployment.

    `name` is for people; see `balance` for `journals`.
    """
    priced = {deployment: Vendor(emulator, USD) for deployment, emulator in vendors.items()}
    books = await balance(database_url, priced, journals=journals, in_flight=replicas * IN_FLIGHT)
    print(f"\nledger of {name}: {books}")


def deployment(name: str, base_url: str, more: str = "") -> str:
    """The configuration of a deployment at an emulator."""
    return (
        f"[deployments.{name}]\ndialect = 'openai'\nbase_url = '{base_url}'\napi_key = 'sk-emulator-key'\n"
        f"model = '{MODEL}'\nusd_per_million_tokens = {USD}\n{more}\n"
    )


def model(*deployments: str) -> str:
    """The configuration of the model over these deployments."""
    return f"[models.{MODEL}]\ndeployments = {list(deployments)}\ncanary_interval_s = 0\n"


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return float(np.quantile(values, 0.99))
