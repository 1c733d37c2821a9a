"""Fifty thousand lines over workers that are killed, frozen and cut off: each line once, hardly a text bought twice."""

import asyncio
import base64
import json
import random
import signal
import sys
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis

from tests.bench.processes import ROOT
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vector
from tests.servers import PostgresProcess, ValkeyProcess
from tests.trials.service import MODEL, WIDTH, close_books, deployment, model

LINES, KILLS = 50_000, 30
INVALID, TWICE = 50, 500  # lines that nobody can embed, and texts that stand in the file a second time
NARROW = 64
LINES_AT_ONCE, TASKS, IN_FLIGHT = 256, 4, 8

CONFIGURATION = """
[server]
log_file = "{folder}/{name}.log"
secret = "nothing-but-trials-know-it"
[stores]
data_dir = "{folder}/data"
redis_url = "{redis}"
database_url = "{database}"
[bulk]
blobs = "{folder}/blobs"
tasks = {tasks}
[tenants.team]
api_key = "team-key"
{served}
"""


class Worker:
    """A worker's process, started again whenever it was killed."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self.process: Process
        self.frozen = False

    async def start(self) -> None:
        """Begins a life."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "worker", "--config", str(self._config), cwd=ROOT,
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip

    async def kill(self) -> None:
        """Ends it without a word, and begins another one."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self.start()


def text_of(line: int) -> str:
    """What a line asks for; some ask for what another one asks, too."""
    return f"trial line {line - 1 if line % (LINES // TWICE) == 7 else line}"


def invalid(line: int) -> bool:
    """Whether its input is empty."""
    return line % (LINES // INVALID) == 11


def write_input(path: Path) -> None:
    """The file of requests."""
    with path.open("w") as file:
        for line in range(LINES):
            body = {"model": MODEL, "dimensions": NARROW, "encoding_format": "base64",
                    "input": "" if invalid(line) else text_of(line)}  # fmt: skip
            if invalid(line):
                body["input"] = []
            request = {"custom_id": f"line-{line}", "method": "POST", "url": "/v1/embeddings", "body": body}
            file.write(json.dumps(request) + "\n")


@asynccontextmanager
async def workplace(folder: Path, valkey: ValkeyProcess, postgres: PostgresProcess, emulator: OpenAIEmulator
                    ) -> AsyncIterator[tuple[str, list[Worker]]]:  # fmt: skip
    """A server that works on nothing itself, and two workers; the server's URL."""
    served = deployment("only", emulator.base_url, f"max_in_flight = {IN_FLIGHT}") + model("only")
    paths = {}
    for name, tasks in (("server", 0), ("one", TASKS), ("two", TASKS)):
        paths[name] = folder / f"{name}.toml"
        paths[name].write_text(
            CONFIGURATION.format(
                folder=folder, name=name, redis=valkey.url, database=postgres.url, tasks=tasks, served=served
            )
        )
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", "serve", "--port", "0", "--config", str(paths["server"]), cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    workers = [Worker(paths["one"]), Worker(paths["two"])]
    try:
        assert server.stdout is not None
        url = ""
        async for line in server.stdout:
            if line.startswith(b"base URL"):
                url = line.decode().split()[-1].removesuffix("/v1")
                break
        for worker in workers:
            await worker.start()
        yield url, workers
    finally:
        for process in (server, *(worker.process for worker in workers)):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in (server, *(worker.process for worker in workers)):
            await process.wait()


async def torment(workers: list[Worker], valkey: ValkeyProcess, postgres: PostgresProcess, http: httpx.AsyncClient,
                  job: str) -> list[int]:  # fmt: skip
    """Thirty kills at random moments, one worker frozen beyond its leases, Postgres restarted, Redis emptied."""
    rng, done = random.Random(38), []
    for number in range(KILLS):
        await asyncio.sleep(rng.uniform(0.7, 1.8))
        worker = rng.choice(workers)
        if not worker.frozen:
            await worker.kill()
        if number == 5:
            stale = workers[0]
            stale.frozen = True
            stale.process.send_signal(signal.SIGSTOP)
            frozen_at = time.monotonic()
        if workers[0].frozen and time.monotonic() - frozen_at > 33.0:
            workers[0].process.send_signal(signal.SIGCONT)
            workers[0].frozen = False
        if number == 12:
            await asyncio.to_thread(_empty, valkey)
        if number == 18:
            await asyncio.to_thread(postgres.kill)
            await asyncio.to_thread(postgres.restart)
        with suppress(httpx.HTTPError):
            counts = (await http.get(f"/v1/batches/{job}")).json().get("request_counts")
            if counts:
                done.append(counts["completed"] + counts["failed"])
    if workers[0].frozen:
        await asyncio.sleep(max(0.0, 33.0 - (time.monotonic() - frozen_at)))
        workers[0].process.send_signal(signal.SIGCONT)
        workers[0].frozen = False
    return done


@pytest.mark.timeout(900)
async def test_kills_lose_no_line_and_double_none(tmp_path: Path) -> None:
    """T38: the job ends by itself, every custom_id is there once with its vector, and the ledger equals the bill."""
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(ValkeyProcess())
        postgres = stack.enter_context(PostgresProcess(durable=True))
        emulator = await stack.enter_async_context(OpenAIEmulator(latency_s=0.05))
        await asyncio.to_thread(write_input, tmp_path / "input.jsonl")
        headers = {"authorization": "Bearer team-key"}
        async with workplace(tmp_path, valkey, postgres, emulator) as (url, workers), AsyncExitStack() as inner:
            http = await inner.enter_async_context(httpx.AsyncClient(base_url=url, headers=headers, timeout=60.0))
            data = await asyncio.to_thread((tmp_path / "input.jsonl").read_bytes)
            files = {"file": ("input.jsonl", data)}
            uploaded = (await http.post("/v1/files", data={"purpose": "batch"}, files=files)).json()
            wish = {"input_file_id": uploaded["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
            started = time.monotonic()
            job = (await http.post("/v1/batches", json=wish)).json()
            done = await torment(workers, valkey, postgres, http, job["id"])
            assert done == sorted(done)
            while job["status"] not in {"completed", "failed", "expired", "cancelled"}:
                await asyncio.sleep(0.5)
                job = (await http.get(f"/v1/batches/{job['id']}")).json()
            took_s = time.monotonic() - started
            assert job["status"] == "completed", job
            output = (await http.get(f"/v1/files/{job['output_file_id']}/content")).content
            errors = (await http.get(f"/v1/files/{job['error_file_id']}/content")).content
        check(output, errors)
        counts = job["request_counts"]
        assert (counts["completed"], counts["failed"]) == (LINES - INVALID, INVALID)
        bought = Counter(text for arrival in emulator.arrivals for text in _texts(arrival.body["input"]))
        twice = sum(count - 1 for count in bought.values())
        most = KILLS * LINES_AT_ONCE * TASKS
        print(f"\n{LINES} lines, {KILLS} kills: {took_s:.0f} s, {len(emulator.arrivals)} calls")
        print(f"{twice} texts bought again, at most {most} were in flight at the kills")
        assert twice <= most
        journals = tmp_path / "data" / "journal"
        await close_books("two workers", postgres.url, {"only": emulator}, journals=journals, replicas=2 + KILLS)


def _empty(valkey: ValkeyProcess) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()


def _texts(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def check(output: bytes, errors: bytes) -> None:
    """Each line once, in the order of the input, with the right vector or the right error."""
    good, bad = [json.loads(line) for line in output.splitlines()], [json.loads(line) for line in errors.splitlines()]
    assert [each["custom_id"] for each in good] == [f"line-{line}" for line in range(LINES) if not invalid(line)]
    assert [each["custom_id"] for each in bad] == [f"line-{line}" for line in range(LINES) if invalid(line)]
    assert {each["response"]["status_code"] for each in bad} == {400}
    for each in good:
        line = int(each["custom_id"].removeprefix("line-"))
        found = np.frombuffer(base64.b64decode(each["response"]["body"]["data"][0]["embedding"]), "<f4")
        full = identifying_vector(text_of(line), MODEL, WIDTH)[:NARROW]
        assert np.allclose(found, full / np.linalg.norm(full), atol=1e-6), line
