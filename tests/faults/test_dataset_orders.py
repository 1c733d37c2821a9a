"""What becomes of datasets that are bought in the vendor's batches: killed, refused, half done, changed meanwhile."""

import asyncio
import csv
import json
import os
import random
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests.books import calls_in
from tests.emulators.faults import Wire
from tests.emulators.openai import ModelCard, OpenAIEmulator
from tests.faults.vendors import FOR_EVER, always, heal
from tests.identity import identifying_vectors

ROOT = Path(__file__).parents[2]
MODEL, WIDTH = "tiny", 8
SPAN_ROWS = 8192
CONFIGURATION = """
[embed]
tier = "vendor_batch"
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "{key}"
model = "tiny"
usd_per_million_tokens = 20
batch_usd_per_million_tokens = 10
[models.tiny]
deployments = ["main"]
dimensions = 8
canary_interval_s = 0
"""


class Site:
    """A folder with a dataset and a configuration, and the vendor that stands in it."""

    def __init__(self, folder: Path, upstream: OpenAIEmulator, rows: int, key: str) -> None:
        self.folder, self.upstream = folder, upstream
        (folder / "embedgate.toml").write_text(CONFIGURATION.format(upstream=upstream.base_url, key=key))
        self.hold([f"text {number} of them" for number in range(rows)])

    def hold(self, texts: list[str]) -> None:
        """The dataset is of these from now on."""
        self.texts = texts
        with (self.folder / "in.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text",), *((text,) for text in texts)])

    async def start(self, *options: str) -> Process:
        """`embedgate embed in.csv --out out.npy` in a process."""
        environ = {"PYTHONPATH": str(ROOT), "HOME": str(self.folder), "PATH": os.environ["PATH"]}
        environ["EMBEDGATE_STORES__DATA_DIR"] = str(self.folder / "data")
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "embed", "in.csv", "--out", "out.npy", *options, cwd=self.folder, env=environ,
            stdout=PIPE, stderr=PIPE,
        )  # fmt: skip

    async def run(self, *options: str) -> tuple[int | None, str, str]:
        """The same to its end: exit code, output, complaints."""
        process = await self.start(*options)
        said, complaints = await process.communicate()
        return process.returncode, said.decode(), complaints.decode()

    async def report(self, *options: str) -> dict[str, Any]:
        """Of a run that did all."""
        code, said, complaints = await self.run("--json", *options)
        assert code == 0, complaints
        report: dict[str, Any] = json.loads(said)
        return report

    @property
    def ordered(self) -> Counter[str]:
        """How often each text is in a batch that did not fail."""
        desk = self.upstream.batches
        lines = [
            orjson.loads(line)
            for batch in desk.batches.values()
            if batch.status != "failed"
            for line in desk.files[batch.source].content.splitlines()
        ]
        inputs = [line["body"]["input"] for line in lines]
        return Counter(one for given in inputs for one in ([given] if isinstance(given, str) else given))

    @property
    def bought(self) -> Counter[str]:
        """How often each text was sent the ordinary way."""
        return Counter(text for arrival in self.upstream.arrivals for text in arrival.body["input"])

    def proves(self) -> None:
        """The output holds each text's own vector, and nothing but what belongs to it lies beside it."""
        np.save(self.folder / "expected.npy", identifying_vectors(self.texts, MODEL, WIDTH))
        assert (self.folder / "out.npy").read_bytes() == (self.folder / "expected.npy").read_bytes()
        beside = sorted(path.name for path in self.folder.iterdir() if path.name.startswith("out"))
        assert beside == ["out.npy", "out.npy.hashes", "out.npy.meta.json"]


@asynccontextmanager
async def site(folder: Path, rows: int, *, key: str = "sk-emulator-key") -> AsyncIterator[Site]:
    """See `Site`."""
    async with OpenAIEmulator(models={MODEL: ModelCard(WIDTH)}) as upstream:
        yield Site(folder, upstream, rows, key)


async def test_a_dataset_is_bought_at_the_batch_price(tmp_path: Path) -> None:
    """Every row in one batch, none the ordinary way; report, sidecar and ledger say what the vendor's bill says."""
    async with site(tmp_path, 2 * SPAN_ROWS + 100) as here:
        report = await here.report()
        here.proves()
        assert len(here.upstream.batches.batches) == 3
        assert here.ordered == Counter(here.texts)
        assert not here.bought
        tokens = here.upstream.batch_bill.tokens
        assert report["tokens"] == tokens
        assert (report["calls"], report["cached"], report["failed"]) == (3, 0, 0)
        assert report["cost_usd"] == pytest.approx(tokens * 10e-6)
        calls = await calls_in(f"sqlite:///{tmp_path}/data/embedgate.db")
        assert sum(call.nano_usd for call in calls) == tokens * 10_000
        assert {call.state for call in calls} == {"billed"}
        again = await here.report()
        assert again["was_there"]
        here.hold([here.texts[0], *here.texts[5000:], "a new one", "another"])
        changed = await here.report("--force")
        assert changed["kept"] == len(here.texts) - 2
        here.proves()
        assert max(here.ordered.values()) == 1
        assert not here.bought


async def test_no_kill_makes_anybody_order_twice(tmp_path: Path) -> None:
    """Six, at random moments of packing, ordering, looking, fetching and writing."""
    pauses = random.Random(11)

    async def slowly(wire: Wire, content: bytes) -> None:
        await asyncio.sleep(0.3)
        await wire.answer(200, content, {})

    async with site(tmp_path, 3 * SPAN_ROWS) as here:
        for operation in ("upload", "create", "list", "poll", "content"):
            always(here.upstream, operation, slowly)
        ends = []
        for _ in range(6):
            process = await here.start()
            heard = asyncio.create_task(process.communicate())
            await asyncio.sleep(pauses.uniform(1.5, 6.0))
            ends.append(process.returncode)
            if process.returncode is None:
                process.kill()
            await heard
        assert ends.count(None) >= 3
        heal(here.upstream)
        code, _, complaints = await here.run()
        assert code == 0, complaints
        here.proves()
        assert here.ordered == Counter(here.texts)
        assert not here.bought
        meta = json.loads((tmp_path / "out.npy.meta.json").read_bytes())
        tokens = here.upstream.batch_bill.tokens
        assert meta["tokens"] == tokens
        assert float(meta["cost_usd"]) == pytest.approx(tokens * 10e-6)
        calls = await calls_in(f"sqlite:///{tmp_path}/data/embedgate.db")
        assert sum(call.nano_usd for call in calls if call.state == "billed") == tokens * 10_000
        assert {call.state for call in calls} == {"billed"}


async def test_what_the_vendor_did_not_do_goes_the_ordinary_way(tmp_path: Path) -> None:
    """A batch that lapses half-way brings what it has; the rest is bought once, and costs what it costs there."""
    async with site(tmp_path, 3000) as here:
        here.upstream.batches.lapses_after = 1000
        report = await here.report()
        here.proves()
        assert here.bought.total() == 2000
        assert max(here.bought.values()) == 1
        in_batch, else_ = here.upstream.batch_bill.tokens, here.upstream.bill.tokens
        assert report["cost_usd"] == pytest.approx(in_batch * 10e-6 + else_ * 20e-6)
        assert report["cached"] == 0


async def test_a_row_that_the_vendor_refuses_fails_alone(tmp_path: Path) -> None:
    """In its batch and by itself; its neighbours are there."""
    async with site(tmp_path, 1500) as here:
        here.upstream.poison.add(here.texts[77])
        code, said, complaints = await here.run("--json")
        assert (code, json.loads(said)["failed"]) == (3, 1), complaints
        found = np.load(tmp_path / "out.npy")
        assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [77]


@pytest.mark.parametrize("tier", ["vendor_batch", "online"])
async def test_a_wrong_key_is_told_at_once(tmp_path: Path, tier: str) -> None:
    """Exit code 4 and the command that goes on once it is mended, in one line; that one buys each row once."""
    key = "sk-wrong-one"
    async with site(tmp_path, 1500, key=key) as here:
        code, _, complaints = await asyncio.wait_for(here.run("--tier", tier), 30)
        assert code == 4, complaints
        line = complaints.splitlines()[-1]
        assert "deployments.main does not accept the key" in line
        assert f"go on with: embedgate embed in.csv --out out.npy --tier {tier}" in line
        assert key not in complaints
        configuration = CONFIGURATION.format(upstream=here.upstream.base_url, key="sk-emulator-key")
        (tmp_path / "embedgate.toml").write_text(configuration)
        await here.report("--tier", tier)
        here.proves()
        assert here.ordered + here.bought == Counter(here.texts)


async def begin(here: Site, batches: int = 1) -> None:
    """A run that is killed when so much is ordered."""
    process = await here.start()
    heard = asyncio.create_task(process.communicate())
    while len(here.upstream.batches.batches) < batches:
        assert process.returncode is None
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)  # and noted
    process.kill()
    await heard


async def test_what_was_begun_in_batches_goes_on_so(tmp_path: Path) -> None:
    """Else it would be bought twice; nobody joins parts over it either."""
    async with site(tmp_path, 1500) as here:
        here.upstream.batches.steps = FOR_EVER
        await begin(here)
        code, _, complaints = await here.run("--tier", "online")
        assert code == 2
        line = complaints.splitlines()[-1]
        assert "in the vendor's batches: go on with --tier vendor_batch, or with --force" in line
        here.upstream.batches.steps = 1
        assert (await here.run("--part", "1/1"))[0] == 0
        code, _, complaints = await here.run("--join", "1")
        assert code == 2
        assert "rows are under way in the vendor's batches" in complaints.splitlines()[-1]
        for beside in tmp_path.glob("out.part-*"):  # noqa: ASYNC240
            beside.unlink()
        await here.report()
        here.proves()


@pytest.mark.parametrize("tier", ["vendor_batch", "online"])
@pytest.mark.parametrize("grown", [False, True])
async def test_who_has_changed_his_mind_pays_for_no_batch_on_top(tmp_path: Path, tier: str, *, grown: bool) -> None:
    """With --force what is ordered is called off, and what came of it is kept, whether the input is the same or not."""
    async with site(tmp_path, 2 * SPAN_ROWS) as here:
        desk = here.upstream.batches
        desk.steps = FOR_EVER
        await begin(here, batches=2)
        desk.steps = 1
        same = tier == "vendor_batch" and not grown
        before = [*desk.batches.values()]
        if not same:
            desk.lapses_after = 1000
            for batch in before:
                batch.polls = -FOR_EVER
        if grown:
            here.hold([*here.texts, "a new one"])
        report = await here.report("--tier", tier, "--force")
        here.proves()
        assert {batch.status for batch in before} == {"completed" if same else "cancelled"}
        bought = here.bought
        tokens = here.upstream.bill.tokens + here.upstream.batch_bill.tokens
        calls = await calls_in(f"sqlite:///{tmp_path}/data/embedgate.db")
        assert sum(call.tokens for call in calls) == tokens
        assert {call.state for call in calls} <= {"billed", "failed"}
        assert max(bought.values(), default=0) <= 1
        assert report["cached"] == (0 if same else 2000)


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ("main", "other", 2, "under way at deployments.main, which is not configured here"),
        ("sk-emulator-key", "sk-wrong-one", 4, "deployments.main does not accept the key; go on with"),
    ],
)
async def test_what_cannot_be_called_off_is_not_forgotten(
    tmp_path: Path, old: str, new: str, code: int, said: str
) -> None:  # fmt: skip
    """A forced run stops with a line, and the next one calls the batches off once that can be."""
    async with site(tmp_path, 1500) as here:
        desk, file = here.upstream.batches, tmp_path / "embedgate.toml"
        desk.steps = FOR_EVER
        await begin(here)
        [batch] = desk.batches.values()
        before = file.read_text()
        file.write_text(before.replace(old, new))
        ended, _, complaints = await asyncio.wait_for(here.run("--tier", "online", "--force"), 30)
        assert (ended, batch.status) == (code, "validating"), complaints
        assert said in complaints.splitlines()[-1]
        assert not here.bought
        file.write_text(before)
        await here.report("--tier", "online", "--force")
        here.proves()
        assert batch.status == "cancelled"


async def test_a_model_without_batches_is_refused_in_words(tmp_path: Path) -> None:
    """Before anything is read or bought."""
    async with site(tmp_path, 10) as here:
        text = (tmp_path / "embedgate.toml").read_text().replace('dialect = "openai"', 'dialect = "cohere"')
        text = text.replace("batch_usd_per_million_tokens = 10\n", "")
        (tmp_path / "embedgate.toml").write_text(text)
        code, _, complaints = await here.run()
        assert code == 2
        assert "the model tiny has no vendor's batches" in complaints
        assert not (tmp_path / "out.npy.partial").exists()
