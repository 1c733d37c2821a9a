"""What becomes of jobs in the middle: called off, out of time or money, their runners gone, their database away."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pybase64
from sqlalchemy import update

from app.api import bulk
from app.job import ENDED, Job, Order, StoredFile, file_blob
from app.jobs.runner import Runner
from app.runtime import Runtime
from app.settings import load
from app.storage.sql.tables import job_tasks, jobs
from tests.contract.stored import change
from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vector
from tests.servers import PostgresProcess, ValkeyProcess

MODEL, LINES = "text-embedding-3-small", 1000

CONFIGURATION = """
[server]
secret = "what-all-of-them-share-0123456789"
log_file = "{folder}/log.jsonl"
[stores]
data_dir = "{folder}"
{stores}
[bulk]
blobs = "{blobs}"
shard_lines = 100
lines_at_once = 16
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "{model}"
usd_per_million_tokens = 20
max_batch_items = 16
max_in_flight = 4
{deployment}
[models."{model}"]
deployments = ["main"]
[tenants.search]
api_key = "key-of-search"
{tenant}
"""


@dataclass
class Site:
    """A replica, and where it buys."""

    runtime: Runtime
    upstream: OpenAIEmulator

    async def begin(self, lines: int = LINES, **order: Any) -> Job:
        """A job of so many lines, uploaded and created."""
        stores = self.runtime.stores
        said = {"method": "POST", "url": "/v1/embeddings"}
        async with stores.blobs.writing(file_blob("file-in")) as writer:
            for at in range(lines):
                body = {"model": MODEL, "input": text(at), "encoding_format": "base64"}
                await writer.write(orjson.dumps({"custom_id": f"line-{at}", **said, "body": body}) + b"\n")
        if await stores.jobs.file("search", "file-in") is None:
            await stores.jobs.add_file(StoredFile("file-in", "search", "batch", "in.jsonl", 1, 0), most_bytes=0)
        values: dict[str, Any] = {"window_s": 86_400, "metadata": {}} | order
        return await stores.jobs.create(Order("batch_x", "search", "", "", "file-in", **values), most_open=0)

    async def look(self) -> Job:
        """The job as it is."""
        job = await self.runtime.stores.jobs.job("search", "batch_x")
        assert job is not None
        return job

    async def until(self, done: int) -> None:
        """So many lines are done."""
        async with asyncio.timeout(30):
            while (await self.look()).completed < done:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def end(self) -> Job:
        """The job when it has ended."""
        async with asyncio.timeout(60):
            while (job := await self.look()).status not in ENDED:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return job

    async def lines(self, file_id: str) -> list[Any]:
        """What is in a file."""
        pieces = [piece async for piece in self.runtime.stores.blobs.reading(file_blob(file_id))] if file_id else []
        return [orjson.loads(line) for line in b"".join(pieces).splitlines()]

    async def check(self, job: Job, lines: int = LINES, *, code: str | None = None) -> int:
        """Each line is in one of the files, in order, with its own vector or this code; how many are good."""
        good, bad = await self.lines(job.output_file_id), await self.lines(job.error_file_id)
        assert [line["error"]["code"] for line in bad] == [code] * len(bad)
        found = [int(line["custom_id"].removeprefix("line-")) for line in good]
        left = [int(line["custom_id"].removeprefix("line-")) for line in bad]
        assert found == sorted(found)
        assert left == sorted(left)
        assert sorted(found + left) == list(range(lines))
        assert job.completed == len(good)
        for at, line in zip(found, good, strict=True):
            vector = pybase64.b64decode(line["response"]["body"]["data"][0]["embedding"])
            assert np.frombuffer(vector, "<f4").tobytes() == identifying_vector(text(at), MODEL, 1536).tobytes()
        return len(good)

    @property
    def bought(self) -> Counter[str]:
        """How often each text was."""
        inputs = [arrival.body["input"] for arrival in self.upstream.arrivals]
        return Counter(one for given in inputs for one in ([given] if isinstance(given, str) else given))


def text(line: int) -> str:
    """What a line asks for."""
    return f"the text of line {line}"


@asynccontextmanager
async def site(
    folder: Path, upstream: OpenAIEmulator, *, blobs: Path | None = None, stores: str = "", tenant: str = "",
    deployment: str = "",
) -> AsyncIterator[Site]:  # fmt: skip
    """A replica that nobody works in; begun again in the same folder it is the same one."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    where = {
        "folder": folder,
        "blobs": blobs or folder / "blobs",
        "stores": stores,
        "tenant": tenant,
        "deployment": deployment,
    }
    said = CONFIGURATION.format(upstream=upstream.base_url, model=MODEL, **where)
    await asyncio.to_thread((folder / "embedgate.toml").write_text, said)
    async with Runtime(load(folder / "embedgate.toml", {})) as runtime:
        yield Site(runtime, upstream)


@asynccontextmanager
async def provider() -> AsyncIterator[OpenAIEmulator]:
    """One that takes its time."""
    async with OpenAIEmulator(latency_s=0.3) as upstream:
        yield upstream


@asynccontextmanager
async def alone(folder: Path) -> AsyncIterator[Site]:
    """A replica and its provider."""
    async with provider() as upstream, site(folder, upstream) as only:
        yield only


async def drop(runner: Runner) -> None:
    """The runner dies: nobody hears of it any more, and what it held stays leased."""
    for loop in runner._loops:
        loop.cancel()
    for work in runner._held:
        work.cancel()
    await asyncio.sleep(0)


async def test_a_job_that_is_called_off_keeps_what_is_done(tmp_path: Path) -> None:
    """The rest is told line by line, and no call begins any more."""
    async with alone(tmp_path) as at, bulk.runner(at.runtime):
        await at.begin()
        await at.until(50)
        assert await at.runtime.stores.jobs.cancel("search", "batch_x") is not None
        job = await at.end()
        assert job.status == "cancelled"
        assert 50 <= await at.check(job, code="batch_cancelled") < LINES


async def test_a_job_whose_time_is_over_keeps_what_is_done(tmp_path: Path) -> None:
    """Just so."""
    async with alone(tmp_path) as at, bulk.runner(at.runtime):
        await at.begin()
        await at.until(50)
        await change(at.runtime.stores.database, update(jobs).values(expires_at_ms=1))
        job = await at.end()
        assert job.status == "expired"
        assert 50 <= await at.check(job, code="batch_expired") < LINES


async def test_another_runner_goes_on_where_one_died(tmp_path: Path) -> None:
    """Once its leases are over; nothing that was committed is done again, and hardly anything is bought again."""
    async with alone(tmp_path) as at:
        async with bulk.runner(at.runtime) as first:
            await at.begin()
            await at.until(100)
            await drop(first)
        async with bulk.runner(at.runtime):
            await change(at.runtime.stores.database, update(job_tasks).values(held_until_ms=1))
            job = await at.end()
        assert job.status == "completed"
        assert await at.check(job) == LINES
        assert sum(count - 1 for count in at.bought.values()) <= 4 * 16


async def test_two_replicas_share_a_job(
    tmp_path: Path, own_valkey: ValkeyProcess, own_postgres: PostgresProcess
) -> None:  # fmt: skip
    """Each takes shards of it, and Postgres is killed in between: nobody loses a line."""
    stores = f'redis_url = "{own_valkey.url}"\ndatabase_url = "{own_postgres.url}"'
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(provider())
        one, two = [
            await stack.enter_async_context(site(tmp_path / name, upstream, blobs=tmp_path / "blobs", stores=stores))
            for name in ("one", "two")
        ]
        first = await stack.enter_async_context(bulk.runner(one.runtime))
        async with bulk.runner(two.runtime) as second:
            await one.begin()
            async with asyncio.timeout(30):
                while not (first.at_work and second.at_work):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(own_postgres.kill)
            await asyncio.sleep(1.0)
            await asyncio.to_thread(own_postgres.restart)
            async with asyncio.timeout(60):
                while one.runtime.stores.database.up is False:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            job = await one.end()
        assert job.status == "completed"
        assert await one.check(job) == LINES


async def test_a_spent_budget_pauses_a_job(tmp_path: Path) -> None:
    """No line fails for it; with more money it goes on, and what was bought is not bought again."""
    async with provider() as upstream:
        async with site(tmp_path, upstream, tenant="budget_usd_per_month = 0.02") as at, bulk.runner(at.runtime):
            await at.begin()
            async with asyncio.timeout(30):
                while not (await at.look()).pause:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            paused = await at.look()
            assert (paused.status, paused.pause, paused.failed) == ("in_progress", "budget", 0)
            assert upstream.bill.tokens <= 1000
            assert 0 < paused.completed < LINES
            assert 0 < (paused.work.nano_usd or 0) <= 1000 * 20_000
        async with site(tmp_path, upstream, tenant="budget_usd_per_month = 2") as at, bulk.runner(at.runtime):
            await change(at.runtime.stores.database, update(jobs).values(paused_until_ms=1))
            job = await at.end()
            assert (job.status, job.failed) == ("completed", 0)
            assert await at.check(job) == LINES
            assert set(at.bought.values()) == {1}


async def test_who_gets_again_what_it_had_goes_on_once(tmp_path: Path) -> None:
    """A runner that was away for longer than its leases takes its own tasks anew, and stops what it was doing."""
    async with alone(tmp_path) as at, bulk.runner(at.runtime) as runner:
        await at.begin()
        await at.until(50)
        for _ in range(3):
            await change(at.runtime.stores.database, update(job_tasks).values(held_until_ms=1))
            runner._bounds = replace(runner._bounds, tasks=runner._bounds.tasks + 4)
            runner.wake()
            await asyncio.sleep(0.3)
        job = await at.end()
        assert job.status == "completed"
        assert await at.check(job) == LINES


async def test_a_provider_that_is_out_is_waited_for(tmp_path: Path) -> None:
    """Accepted while nobody answers, and done by itself when somebody does, by a process that was not there before."""
    async with provider() as upstream:
        upstream.inject(faults.status(503))
        async with site(tmp_path, upstream) as at, bulk.runner(at.runtime):
            await at.begin(lines=20)
            await asyncio.sleep(2.0)
            assert (await at.look()).status == "in_progress"
        upstream.heal()
        async with site(tmp_path, upstream) as at, bulk.runner(at.runtime):
            job = await at.end()
            assert (job.status, job.failed) == ("completed", 0)
            assert await at.check(job, lines=20) == 20
