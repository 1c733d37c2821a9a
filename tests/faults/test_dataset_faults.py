"""What becomes of `embedgate embed` when its process is killed, its disk is full, or its provider falls silent."""

import asyncio
import csv
import json
import os
import random
import resource
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.books import Vendor, balance
from tests.emulators import faults
from tests.emulators.openai import ModelCard, OpenAIEmulator
from tests.identity import identifying_vectors

ROOT = Path(__file__).parents[2]
MODEL, WIDTH = "tiny", 16
POOL, BATCH = 4, 100
SAFE_S = 0.25
"""After which an answer is on disk, in the output or in the cache."""
CONFIGURATION = """
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "tiny"
usd_per_million_tokens = 20
max_in_flight = {pool}
max_batch_items = {batch}
[models.tiny]
deployments = ["main"]
dimensions = {width}
"""


class Site:
    """A folder with a dataset and a configuration, and the provider that stands in it."""

    def __init__(self, folder: Path, upstream: OpenAIEmulator, rows: int, width: int) -> None:
        self.folder, self.upstream = folder, upstream
        self.texts = [f"text {number} of them" for number in range(rows)]
        text = CONFIGURATION.format(upstream=upstream.base_url, pool=POOL, batch=BATCH, width=width)
        (folder / "embedgate.toml").write_text(text)
        with (folder / "in.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text",), *((text,) for text in self.texts)])

    async def start(self, out: str, *options: str, data: str, file_bytes: int = -1) -> Process:
        """`embedgate embed in.csv --out OUT` in a process that may write files of so many bytes."""
        environ = {"PYTHONPATH": str(ROOT), "HOME": str(self.folder), "PATH": os.environ["PATH"]}
        environ["EMBEDGATE_STORES__DATA_DIR"] = str(self.folder / data)
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "embed", "in.csv", "--out", out, *options, cwd=self.folder, env=environ,
            stdout=PIPE, stderr=PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY)),
        )  # fmt: skip

    async def run(self, out: str, *options: str, data: str, file_bytes: int = -1) -> tuple[int | None, str, str]:
        """The same to its end: exit code, output, complaints."""
        process = await self.start(out, *options, data=data, file_bytes=file_bytes)
        said, complaints = await process.communicate()
        return process.returncode, said.decode(), complaints.decode()

    async def killed(self, out: str, after_calls: int, *, data: str) -> int:
        """The same, killed once so many calls have arrived; how many texts were asked for just before."""
        before = len(self.upstream.arrivals)
        process = await self.start(out, data=data)
        while len(self.upstream.arrivals) < before + after_calls and process.returncode is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        process.kill()
        killed_at_s = time.monotonic()
        await process.communicate()
        assert process.returncode == -signal.SIGKILL
        since_s = killed_at_s - self.upstream.latency_s - SAFE_S
        return sum(each.items for each in self.upstream.arrivals if each.at_s >= since_s)


@asynccontextmanager
async def site(folder: Path, *, rows: int, width: int = WIDTH, latency_s: float = 0.0) -> AsyncIterator[Site]:
    """See `Site`."""
    async with OpenAIEmulator(models={MODEL: ModelCard(width)}, latency_s=latency_s) as upstream:
        yield Site(folder, upstream, rows, width)


async def test_no_kill_leaves_a_trace(tmp_path: Path) -> None:
    """After five of them every row is there; bought twice is only what was under way, or answered a moment before."""
    chance = random.Random(7)
    async with site(tmp_path, rows=20_000, latency_s=0.1) as here:
        at_risk = 0
        for _ in range(5):
            at_risk += await here.killed("out.npy", chance.randint(5, 35), data="data")
        code, said, _ = await here.run("out.npy", data="data")
        assert code == 0, said
        bought = Counter(text for arrival in here.upstream.arrivals for text in arrival.body["input"])
        assert sorted(bought) == sorted(here.texts)
        twice = bought.total() - len(here.texts)
        print(f"{twice} texts bought twice, {at_risk} at risk")
        assert twice <= at_risk
        vendors, url = (
            {"main": Vendor(here.upstream, "20", exact=False)},
            f"sqlite:///{tmp_path / 'data' / 'embedgate.db'}",
        )
        await balance(url, vendors, journals=tmp_path / "data" / "journal", in_flight=5 * POOL)
    np.save(tmp_path / "saved.npy", identifying_vectors(here.texts, MODEL, WIDTH))
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()
    beside = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out"))  # noqa: ASYNC240
    assert beside == ["out.npy", "out.npy.hashes", "out.npy.meta.json"]


@pytest.mark.parametrize("memory_bytes", [0, 2**20])
async def test_what_a_refused_row_travelled_with_is_bought_once_and_told(tmp_path: Path, memory_bytes: int) -> None:
    """Its neighbours are there; the report, the books and the vendor's bill say the same, with and without a cache."""
    async with site(tmp_path, rows=300) as here:
        here.upstream.poison.update(here.texts[7::100])
        with (tmp_path / "embedgate.toml").open("a") as file:
            file.write(f"canary_interval_s = 0\n[cache]\nmemory_bytes = {memory_bytes}\n")
        code, said, complaints = await here.run("out.npy", "--json", data="data")
        report = json.loads(said)
        assert (code, report["failed"], report["cached"]) == (3, 3, 0), complaints
        found = np.load(tmp_path / "out.npy")
        assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [7, 107, 207]
        bill = here.upstream.bill
        probes = bill.items - 297
        assert 0 <= probes <= 12  # single words, when nobody can say yet whether a text or a provider is to blame
        assert report["tokens"] <= bill.tokens <= report["tokens"] + 2 * probes
        assert report["cost_usd"] == pytest.approx(report["tokens"] * 20e-6)
        assert report["calls"] >= 3


async def test_a_blip_fails_no_row_that_travels_alone(tmp_path: Path) -> None:
    """It is asked for again, once somebody else is served."""
    async with site(tmp_path, rows=1) as here:
        here.upstream.inject(faults.status(503), 3)
        code, _, complaints = await here.run("out.npy", data="data")
        assert code == 0, complaints


@pytest.mark.parametrize(("form", "most_bytes"), [("jsonl", 8_000_000), ("npy", 2_000_000)])
async def test_a_full_disk_is_a_line_and_keeps_what_was_done(tmp_path: Path, form: str, most_bytes: int) -> None:
    """Exit code 2; with room again the same command goes on where it stopped."""
    async with site(tmp_path, rows=1000, width=1024) as here:
        code, said, complaints = await here.run(f"out.{form}", data="data", file_bytes=most_bytes)
        assert (code, said, complaints.count("Traceback")) == (2, "", 0), complaints
        assert complaints.count("embedgate: ") == 1
        assert complaints.splitlines()[-1].startswith(f"embedgate: out.{form}")
        assert "File too large" in complaints
        assert (await here.run(f"out.{form}", data="data"))[0] == 0
        assert (await here.run(f"fresh.{form}", data="fresh"))[0] == 0
    assert (tmp_path / f"out.{form}").read_bytes() == (tmp_path / f"fresh.{form}").read_bytes()


async def test_a_full_data_dir_is_told_at_once(tmp_path: Path) -> None:
    """Nothing is bought that could not be booked: exit code 4, and the command that goes on once there is room."""
    async with site(tmp_path, rows=100) as here:
        run = here.run("out.npy", data="data", file_bytes=2_000_000)
        code, said, complaints = await asyncio.wait_for(run, 60)
        assert (code, said) == (4, ""), complaints
        line = complaints.splitlines()[-1]
        assert line.startswith(f"embedgate: {tmp_path}/data: the journal cannot grow: File too large")
        assert line.endswith("go on with: embedgate embed in.csv --out out.npy")
        assert not here.upstream.arrivals
        assert (await here.run("out.npy", data="data"))[0] == 0
