"""A dataset of the size and shape of AG News becomes an array, at the vendor's batch price, whatever kills it."""

import asyncio
import csv
import json
import os
import random
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil

from tests.books import calls_in
from tests.emulators.gemini import GeminiEmulator

ROOT = Path(__file__).parents[2]
MODEL, WIDTH = "gemini-embedding-001", 768
TRAIN_ROWS, TEST_ROWS, KILLS = 120_000, 7_600, 5
MOST_MB, MOST_USD, MOST_AGAIN_S = 300, 5.0, 5.0
CONFIGURATION = """
[embed]
tier = "vendor_batch"
[deployments.gemini]
dialect = "gemini"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "gemini-embedding-001"
usd_per_million_tokens = 0.15
batch_usd_per_million_tokens = 0.075
[models.gemini-embedding-001]
deployments = ["gemini"]
dimensions = 768
canary_interval_s = 0
"""
_PROSE = (
    "oil prices rose again on Tuesday as traders weighed reports of lower stocks and a storm in the Gulf that may shut "
    "wells for days the company said its new chip will ship next spring analysts expect sales to grow striker scores "
    "twice in the second half as the champions hold on ministers met in Geneva to discuss the ceasefire officials said"
)


def rows(count: int, seed: int) -> Iterator[tuple[int, str, str]]:
    """Class, title and description, about as long as those of AG News: 8 and 32 words."""
    chance, words = random.Random(seed), _PROSE.split()
    for number in range(count):
        title = " ".join(chance.choices(words, k=chance.randint(4, 12)))
        description = " ".join(chance.choices(words, k=chance.randint(12, 52)))
        yield chance.randint(1, 4), f"{title} ({number})", description


class Desk:
    """A folder in which somebody works with the command line."""

    def __init__(self, folder: Path, upstream: GeminiEmulator) -> None:
        self.folder, self.upstream = folder, upstream
        (folder / "embedgate.toml").write_text(CONFIGURATION.format(upstream=upstream.base_url))
        self.texts: dict[str, list[str]] = {}
        self.most_mb = 0.0

    def write(self, name: str, count: int) -> None:
        """A file in the form that AG News is spread in."""
        found = [*rows(count, len(name))]
        self.texts[name] = [f"{title}\n{description}" for _, title, description in found]
        with (self.folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("class", "title", "description"), *found])

    async def start(self, name: str, *options: str) -> Process:
        """`embedgate embed NAME.csv` as a process."""
        environ = {"PYTHONPATH": str(ROOT), "HOME": str(self.folder), "PATH": os.environ["PATH"]}
        environ["EMBEDGATE_STORES__DATA_DIR"] = str(self.folder / "data")
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "embed", f"{name}.csv", "--text", "{title}\\n{description}", "--split", name,
            "--out", f"{name}.npy", *options, cwd=self.folder, env=environ, stdout=PIPE, stderr=PIPE,
        )  # fmt: skip

    async def run(self, name: str, *options: str) -> tuple[float, dict[str, Any]]:
        """The same to its end: seconds, report. Watches its memory."""
        started_s = time.monotonic()
        process = await self.start(name, "--json", *options)
        watching = asyncio.create_task(self._watch(process.pid))
        said, complaints = await process.communicate()
        watching.cancel()
        assert process.returncode == 0, complaints.decode()
        report: dict[str, Any] = json.loads(said)
        return time.monotonic() - started_s, report

    async def _watch(self, pid: int) -> None:
        """What it takes in memory at most, beside the pages of the output that it has written."""
        process = psutil.Process(pid)
        while True:
            try:
                maps = await asyncio.to_thread(process.memory_maps)
            except psutil.Error:
                return
            beside = sum(each.rss for each in maps if ".npy" not in each.path)
            self.most_mb = max(self.most_mb, beside / 1e6)
            await asyncio.sleep(0.2)

    async def killed(self, name: str, after_s: float) -> None:
        """One that lives so long at most."""
        process = await self.start(name)
        heard = asyncio.create_task(process.communicate())
        await asyncio.wait([heard], timeout=after_s)
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await heard
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"

    def proves(self, name: str) -> None:
        """The array is bit for bit the one that the model makes."""
        found = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        texts = self.texts[name]
        assert (found.shape, found.dtype) == ((len(texts), WIDTH), np.float32)
        for at in range(0, len(texts), 5000):
            expected = np.stack([self.upstream.vector(MODEL, text, WIDTH) for text in texts[at : at + 5000]])
            norms = np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(found[at : at + 5000], expected / norms, atol=1e-6)

    async def calls(self, data: str = "data") -> Counter[int]:
        """What each call or batch cost that is in the ledger, in nano-USD."""
        return Counter(call.nano_usd for call in await calls_in(f"sqlite:///{self.folder / data}/embedgate.db"))

    @property
    def ordered(self) -> Counter[str]:
        """How often each text is in one of the vendor's batches."""
        desk = self.upstream.batches
        return Counter(
            orjson.loads(line)["request"]["content"]["parts"][0]["text"]
            for batch in desk.batches.values()
            for line in desk.files[batch.source].content.splitlines()
        )


async def test_ag_news_becomes_an_array(tmp_path: Path) -> None:
    """Complete, exact, cheap and in little memory; done again for nothing; killed five times the same to the bit."""
    async with GeminiEmulator() as upstream:
        desk = Desk(tmp_path, upstream)
        for name, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            desk.write(name, count)
            seconds, report = await desk.run(name)
            desk.proves(name)
            assert (report["rows"], report["failed"]) == (count, 0)
            print(
                f"{name}: {count} rows in {seconds:.0f} s ({count / report['seconds']:.0f} rows/s), "
                f"{report['tokens']} tokens, ${report['cost_usd']:.4f}, {desk.most_mb:.0f} MB beside the map"
            )
            again_s, again = await desk.run(name)
            print(f"again: {again_s:.1f} s")
            assert again["was_there"]
            assert again_s <= MOST_AGAIN_S
        assert not upstream.arrivals
        assert desk.ordered == Counter(desk.texts["train"] + desk.texts["test"])
        assert desk.most_mb <= MOST_MB
        spent = await desk.calls()
        metas = [json.loads((tmp_path / f"{name}.npy.meta.json").read_bytes()) for name in desk.texts]
        spent_nano_usd = sum(spent.elements())  # this model does not tell what it bills
        assert spent_nano_usd == sum(round(float(meta["cost_usd"]) * 1e9) for meta in metas)
        assert upstream.batch_bill.tokens * 75 <= spent_nano_usd < MOST_USD * 1e9
        await _killed_again_and_again(desk, metas[0]["seconds"])


async def _killed_again_and_again(desk: Desk, whole_s: float) -> None:
    """The same train rows once more, somewhere else, where nobody knows them."""
    (desk.folder / "train.npy").rename(desk.folder / "whole.npy")
    for path in ("train.npy.meta.json", "train.npy.hashes"):
        (desk.folder / path).unlink()
    (desk.folder / "data").rename(desk.folder / "data-of-the-first")
    before, chance = desk.ordered, random.Random(23)
    for _ in range(KILLS):
        moment_s = chance.uniform(3.0, 4.0 + 0.15 * whole_s)
        await desk.killed("train", moment_s)
        progress = desk.folder / "train.npy.progress"
        done = json.loads(progress.read_bytes())["rows"] if progress.exists() else 0
        print(f"killed after {moment_s:.1f} s: {done} rows were done")
    await desk.run("train")
    assert (desk.folder / "train.npy").read_bytes() == (desk.folder / "whole.npy").read_bytes()
    twice = desk.ordered - before - Counter(desk.texts["train"])
    print(f"{twice.total()} texts were ordered twice; {desk.most_mb:.0f} MB beside the map at most")
    assert not twice
    assert not desk.upstream.arrivals
    assert (await desk.calls()) <= (await desk.calls("data-of-the-first"))
