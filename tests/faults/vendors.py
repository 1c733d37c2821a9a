"""Hides a replica whose jobs go to its vendor's own batches: what it orders and owes, and how nobody has to wait."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
import pybase64
from sqlalchemy import select, update

from app.api import bulk
from app.domain import EmbeddingRequest
from app.errors import EmbedgateError
from app.job import ENDED, Job, Order, StoredFile, file_blob
from app.jobs.runner import Runner
from app.runtime import Runtime
from app.settings import load
from app.storage.sql.database import DatabaseDown
from app.storage.sql.tables import job_tasks, jobs
from tests.books import Call, calls_in
from tests.contract.stored import change, scalars
from tests.emulators.batches import Batch
from tests.emulators.faults import Fault, Wire
from tests.emulators.gemini import GeminiEmulator
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.voyage import VoyageEmulator

LINES, SHARD_LINES = 60, 20
BATCHES = LINES // SHARD_LINES
BATCH_NANO_USD, NANO_USD = 10_000, 20_000
"""What a token costs in the vendor's batches, and the ordinary way."""
FOR_EVER = 10**9
"""Looks that a batch takes that never ends."""

Emulated: TypeAlias = OpenAIEmulator | GeminiEmulator | VoyageEmulator
Bodies: TypeAlias = Sequence[Mapping[str, Any]]

CONFIGURATION = """
[server]
secret = "what-all-of-them-share-0123456789"
log_file = "{folder}/log.jsonl"
[stores]
data_dir = "{folder}"
[bulk]
shard_lines = {shard_lines}
[deployments.main]
dialect = "{dialect}"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "{model}"
usd_per_million_tokens = 20
connect_timeout_s = 2
max_batch_items = 16
max_in_flight = 4
{priced}
[models."{model}"]
deployments = ["main"]
canary_interval_s = 0
{served}
[tenants.search]
api_key = "key-of-search"
{tenant}
"""


class Vendor(NamedTuple):
    """Who sells, and which model."""

    dialect: str
    model: str
    emulator: type[Emulated]
    width: int


OPENAI = Vendor("openai", "text-embedding-3-small", OpenAIEmulator, 1536)
GEMINI = Vendor("gemini", "gemini-embedding-001", GeminiEmulator, 3072)
VOYAGE = Vendor("voyage", "voyage-4", VoyageEmulator, 1024)


def text(line: int) -> str:
    """What a line asks for."""
    return f"the text of line {line}"


@dataclass
class Replica:
    """A replica, and where it buys."""

    runtime: Runtime
    upstream: Emulated
    vendor: Vendor

    # ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def bodies(self, lines: int = LINES) -> list[dict[str, Any]]:
        """What so many lines ask for, each another text."""
        return [self.body(text(at)) for at in range(lines)]

    def body(self, said: str, **more: Any) -> dict[str, Any]:
        """What a line asks for."""
        return {"model": self.vendor.model, "input": said, "encoding_format": "base64", **more}

    async def begin(self, bodies: Bodies | None = None, name: str = "x", **order: Any) -> Job:
        """A job with a line for each of `bodies`, uploaded and created."""
        stores, file_id = self.runtime.stores, f"file-{name}"
        said = {"method": "POST", "url": "/v1/embeddings"}
        async with stores.blobs.writing(file_blob(file_id)) as writer:
            for at, body in enumerate(self.bodies() if bodies is None else bodies):
                await writer.write(orjson.dumps({"custom_id": f"line-{at}", **said, "body": body}) + b"\n")
        await stores.jobs.add_file(StoredFile(file_id, "search", "batch", "in.jsonl", 1, 0), most_bytes=0)
        values: dict[str, Any] = {"window_s": 86_400, "metadata": {}, "tier": "vendor_batch"} | order
        return await stores.jobs.create(Order(f"batch_{name}", "search", "", "", file_id, **values), most_open=0)

    async def look(self, name: str = "x") -> Job:
        """The job as it is."""
        job = await self.runtime.stores.jobs.job("search", f"batch_{name}")
        assert job is not None
        return job

    async def end(self, runner: Runner, name: str = "x") -> Job:
        """The job when it has ended; what rests does so no longer."""
        async with asyncio.timeout(30):
            while (job := await self.look(name)).status not in ENDED:
                await self.hurry(runner)
        return job

    async def hurry(self, runner: Runner) -> None:
        """See `hurry`."""
        await hurry(self.runtime, runner)

    async def until(self, runner: Runner, happened: Callable[[], bool]) -> None:
        """It has; nobody waits for time meanwhile."""
        async with asyncio.timeout(20):
            while not happened():
                await self.hurry(runner)

    async def do(self, bodies: Bodies | None = None, name: str = "x", **order: Any) -> Job:
        """A job that was done as a whole."""
        async with bulk.runner(self.runtime) as runner:
            await self.begin(bodies, name, **order)
            return await self.end(runner, name)

    async def age(self, part: float, name: str = "x") -> None:
        """So much of the job's window has passed."""
        now = time.time() * 1000
        times = {"created_at_ms": int(now - part * 86_400_000), "expires_at_ms": int(now + (1 - part) * 86_400_000)}
        await change(self.runtime.stores.database, update(jobs).where(jobs.c.id == f"batch_{name}").values(times))

    async def notes(self) -> list[bytes]:
        """What the tasks noted."""
        return [note for note in await scalars(self.runtime.stores.database, select(job_tasks.c.note)) if note]

    def request(self, said: str) -> EmbeddingRequest:
        """An ordinary one of the same tenant."""
        tenant, deadline = self.runtime.tenants["key-of-search"], asyncio.get_running_loop().time() + 10
        return EmbeddingRequest(tenant, self.vendor.model, (said,), deadline)

    async def ask(self, said: str) -> str:
        """What becomes of an ordinary request of the same tenant."""
        try:
            await self.runtime.gateway.embed(self.request(said))
        except EmbedgateError as error:
            return type(error).__name__
        return "ok"

    # ── what came ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def lines(self, file_id: str) -> dict[int, Any]:
        """What is in a file, by line; none is in there twice, and all are in order."""
        pieces = [piece async for piece in self.runtime.stores.blobs.reading(file_blob(file_id))] if file_id else []
        said = [orjson.loads(line) for line in b"".join(pieces).splitlines()]
        found = {int(line["custom_id"].removeprefix("line-")): line for line in said}
        assert [*found] == sorted(found)
        assert len(found) == len(said)
        return found

    async def check(self, job: Job, bodies: Bodies | None = None) -> dict[int, Any]:
        """Each line is in one of the files, the good ones with their own vectors; the others, by line."""
        bodies = self.bodies() if bodies is None else bodies
        good, bad = await self.lines(job.output_file_id), await self.lines(job.error_file_id)
        assert sorted([*good, *bad]) == [*range(len(bodies))]
        assert (job.completed, job.failed) == (len(good), len(bad) if job.status == "completed" else job.failed)
        for at, line in good.items():
            width = bodies[at].get("dimensions", self.vendor.width)
            expected = self.upstream.vector(self.vendor.model, bodies[at]["input"], width)
            np.testing.assert_allclose(vector_of(line), expected / np.linalg.norm(expected), atol=1e-6)
        return bad

    # ── what was bought ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def orders(self) -> list[Batch]:
        """The vendor's batches that did not fail."""
        return [batch for batch in self.upstream.batches.batches.values() if batch.status != "failed"]

    @property
    def ordered(self) -> Counter[str]:
        """How often each text is in one of them."""
        files = self.upstream.batches.files
        return Counter(_text(line) for batch in self.orders for line in files[batch.source].content.splitlines())

    @property
    def bought(self) -> Counter[str]:
        """How often each text was sent the ordinary way."""
        inputs = [arrival.body["input"] for arrival in self.upstream.arrivals]
        return Counter(one for given in inputs for one in ([given] if isinstance(given, str) else given))


def vector_of(line: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The first vector of a good line."""
    return np.frombuffer(pybase64.b64decode(line["response"]["body"]["data"][0]["embedding"]), "<f4")


def _text(line: bytes) -> str:
    said = orjson.loads(line)
    if "request" in said:
        return str(said["request"]["content"]["parts"][0]["text"])
    given = said["body"]["input"]
    return str(given[0] if isinstance(given, list) else given)


@asynccontextmanager
async def replica(
    folder: Path, upstream: Emulated, vendor: Vendor = OPENAI, *, tenant: str = "", shard_lines: int = SHARD_LINES,
    served: str = "", priced: str = "batch_usd_per_million_tokens = 10",
) -> AsyncIterator[Replica]:  # fmt: skip
    """A replica that nobody works in; begun again in the same folder it is another one of the same database."""
    said = CONFIGURATION.format(
        folder=folder, upstream=upstream.base_url, dialect=vendor.dialect, model=vendor.model,
        tenant=tenant, shard_lines=shard_lines, served=served, priced=priced,
    )  # fmt: skip
    await asyncio.to_thread((folder / "embedgate.toml").write_text, said)
    async with Runtime(load(folder / "embedgate.toml", {})) as runtime:
        yield Replica(runtime, upstream, vendor)


@asynccontextmanager
async def alone(folder: Path, vendor: Vendor = OPENAI, **options: Any) -> AsyncIterator[Replica]:
    """A replica and its vendor."""
    async with AsyncExitStack() as stack:
        upstream: Emulated = vendor.emulator()
        await stack.enter_async_context(upstream)
        yield await stack.enter_async_context(replica(folder, upstream, vendor, **options))


async def hurry(runtime: Runtime, runner: Runner) -> None:
    """What rests does so no longer, and somebody looks for it."""
    resting = update(job_tasks).where(job_tasks.c.owner == "", job_tasks.c.held_until_ms > 0)
    await change(runtime.stores.database, resting.values(held_until_ms=0))
    runner.wake()
    await asyncio.sleep(0.02)


async def free_all(runtime: Runtime) -> None:
    """All leases are over, as they are after a time."""
    await change(runtime.stores.database, update(job_tasks).values(held_until_ms=0))


async def work_until_killed(runtime: Runtime) -> None:
    """For a process of its own: works on jobs, and waits for nothing."""
    async with bulk.runner(runtime) as runner:
        while True:
            try:
                await hurry(runtime, runner)
            except DatabaseDown:
                await asyncio.sleep(0.05)


async def ledger(folder: Path) -> list[Call]:
    """What was booked, of a replica that has been left."""
    return await calls_in(f"sqlite:///{folder}/embedgate.db")


def cost(calls: Sequence[Call], *states: str) -> int:
    """What those calls cost that ended so, in nano-USD."""
    return sum(call.nano_usd for call in calls if call.state in states)


def always(at: Emulated, operation: str, fault: Fault) -> None:
    """Every such `operation` gets `fault`, until another one is injected and answered."""

    async def again(wire: Wire, content: bytes) -> None:
        at.batches.inject(operation, again)
        await fault(wire, content)

    at.batches.inject(operation, again)


def heal(at: Emulated) -> None:
    """No faults any more."""
    at.batches._faults.clear()
