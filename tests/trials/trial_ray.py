"""`embedgate embed --on ray`: workers of a local Ray leave what a single run leaves, whoever is killed meanwhile."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.api.conftest import KEY, SMALL, Edge, running
from tests.api.test_embed_command import content, meta_of, names, some
from tests.bench.processes import ROOT
from tests.emulators import faults

POISON = "text 1700"


class Site:
    """A folder with a dataset, the service that stands beside it, and where Ray keeps its files."""

    def __init__(self, folder: Path, edge: Edge, ray_folder: Path, rows: int) -> None:
        self.folder, self.edge, self.ray_folder, self.texts = folder, edge, ray_folder, some(rows)
        (folder / "in.csv").write_text("text\n" + "".join(f"{text}\n" for text in self.texts))

    async def start(self, out: str, *options: str) -> Process:
        """`embedgate embed in.csv` at the service."""
        environ = {
            "PYTHONPATH": str(ROOT), "HOME": str(self.folder), "PATH": os.environ["PATH"], "EMBEDGATE_API_KEY": KEY,
            "RAY_TMPDIR": str(self.ray_folder),
        }  # fmt: skip
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "embed", "in.csv", "--out", out, "--server", self.edge.url, "--model", SMALL,
            *options, cwd=self.folder, env=environ, stdout=PIPE, stderr=PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    async def run(self, out: str, *options: str) -> tuple[int | None, str, str]:
        """The same to its end: exit code, output, complaints."""
        return await ended(await self.start(out, *options))

    def bought(self) -> Counter[str]:
        """How often each text was asked for at the provider."""
        inputs = [each.body["input"] for each in self.edge.upstream.arrivals]
        return Counter(text for given in inputs for text in ([given] if isinstance(given, str) else given))

    async def until(self, rows: int, process: Process) -> None:
        """So many of them were asked for, and the run goes on."""
        while len(self.bought()) < rows:
            assert process.returncode is None
            await asyncio.sleep(0.02)

    def same(self, one: str, other: str) -> None:
        """Asserts that two outputs are the same to the byte, and are of the same."""
        for end in ("", ".hashes"):
            assert content(str(self.folder / f"{one}{end}")) == content(str(self.folder / f"{other}{end}"))
        assert meta_of(str(self.folder / one))["subject"] == meta_of(str(self.folder / other))["subject"]


async def ended(process: Process) -> tuple[int | None, str, str]:
    """Exit code, output, complaints."""
    said, complaints = await process.communicate()
    return process.returncode, said.decode(), complaints.decode()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short name: Ray has sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    yield folder
    shutil.rmtree(folder)


async def test_workers_leave_what_a_single_run_leaves(tmp_path: Path, ray_folder: Path) -> None:
    """To the byte, failed rows, too; nobody else can reach Ray, and the key is in none of its files."""
    seen: set[str] = set()

    async def looking(wire: faults.Wire, body: bytes) -> None:
        mine = psutil.Process().children(recursive=True)
        found = [each for process in mine for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
        seen.update(each.laddr.ip.removeprefix("::ffff:") for each in found)
        await wire.answer(200, body, {})

    async with running(tmp_path) as edge:
        here = Site(tmp_path, edge, ray_folder, 2500)
        edge.upstream.poison.add(POISON)
        edge.upstream.inject(looking)
        code, said, complaints = await here.run("out.npy", "--on", "ray", "--workers", "2", "--partitions", "4")
        assert (code, "2499 ok, 1 failed" in said) == (3, True), complaints
        told = complaints.splitlines()
        assert told
        assert all("/2500 rows, " in line for line in told)
        assert (await here.run("one.npy"))[0] == 3
        code, said, _ = await here.run("out.npy", "--on", "ray")
        assert (code, "is there and fits" in said) == (3, True)
        here.same("out.npy", "one.npy")
    failed = msgspec.json.decode(content(str(tmp_path / "out.npy.failed.jsonl")))
    assert (failed["row"], failed["id"]) == (1700, "1700")
    assert names(tmp_path, "out*") == [f"out.npy{end}" for end in ("", ".failed.jsonl", ".hashes", ".meta.json")]
    assert seen == {"127.0.0.1"}
    told_files = {path.name for path in files_with(ray_folder, b"session")}
    assert told_files
    assert files_with(ray_folder, KEY.encode()) == []


def files_with(folder: Path, word: bytes) -> list[Path]:
    """The files that say it."""
    return [path for path in folder.rglob("*") if path.is_file() and word in path.read_bytes()]


async def test_no_kill_leaves_a_trace(tmp_path: Path, ray_folder: Path) -> None:
    """The driver is killed, then interrupted, then a worker is killed: every row is there, and no text bought twice."""
    async with running(tmp_path) as edge:
        here = Site(tmp_path, edge, ray_folder, 12_000)
        edge.upstream.latency_s = 0.3
        wish = ("out.npy", "--on", "ray", "--workers", "2", "--partitions", "4")
        driver = await here.start(*wish)
        await here.until(2000, driver)
        orphans = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        await driver.communicate()
        await asyncio.to_thread(psutil.wait_procs, orphans, timeout=60)  # they go on buying until they see it

        driver = await here.start(*wish)
        await here.until(min(here.bought().total() + 1000, 9000), driver)
        workers = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGINT)
        code, _, complaints = await ended(driver)
        assert (code, complaints.splitlines()[-1].startswith("embedgate: stopped; go on with: ")) == (130, True)
        assert psutil.wait_procs(workers, timeout=30)[1] == []

        driver = await here.start(*wish)
        await here.until(min(here.bought().total() + 1000, 10_500), driver)
        workers = [each for each in psutil.Process(driver.pid).children(recursive=True) if "MapWorker" in each.name()]
        workers[0].kill()
        code, said, complaints = await ended(driver)
        assert (code, "12000 ok, 0 failed" in said) == (0, True), complaints
        assert {text: here.bought()[text] for text in here.texts} == dict.fromkeys(here.texts, 1)
        assert (await here.run("one.npy"))[0] == 0
        here.same("out.npy", "one.npy")
        assert names(tmp_path, "out*") == ["out.npy", "out.npy.hashes", "out.npy.meta.json"]
