"""Real trees: questions about the standard library are answered, and thousands of files cost little beside them."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tests.bench.processes import ROOT
from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator
from tests.trials.service import deployment, model

PACKAGES = ("asyncio", "email", "http", "json", "logging", "sqlite3")
QUESTIONS = {
    "How can I run a blocking function in another thread without stopping the event loop?": "asyncio/threads.py",
    "How do I limit how many coroutines are in a section at the same time?": "asyncio/locks.py",
    "How is the TLS handshake done over an existing transport?": "asyncio/sslproto.py",
    "How is the body of a mail encoded as quoted-printable?": "email/quoprimime.py",
    "Where are cookies that servers set remembered and sent back?": "http/cookiejar.py",
    "How do I serve the files of a folder to a browser?": "http/server.py",
    "Where are dictionaries written as JSON text, with indentation?": "json/encoder.py",
    "How do I begin a new log file every midnight and keep only some old ones?": "logging/handlers.py",
    "How are loggers set up from a dictionary?": "logging/config.py",
    "How do I print a whole database as SQL statements?": "sqlite3/dump.py",
}
"""What a person might ask about the standard library, and the file that answers it."""

FEW, MANY, PACED, TOUCHED = 1000, 5000, 600, 10
OUTSIDE_MS = 5.0
TOKENS_PER_MINUTE = 1_200_000
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """What a command said, and what its process took."""

    code: int
    out: str
    peak_mb: float
    cpu_s: float


async def embedgate(folder: Path, *arguments: str) -> Ended:
    """`embedgate …` in a process of its own, with the configuration of the folder if it has one."""
    config = ["--config", str(folder / "embedgate.toml")] if (folder / "embedgate.toml").exists() else []
    command = [sys.executable, "-m", "app", *arguments, *config]
    environ = os.environ | {"EMBEDGATE_STORES__DATA_DIR": str(folder / "data")}

    def ended() -> Ended:
        with (folder / "out").open("w+") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, env=environ)
            peak_mb, gone = 0.0, 0
            while not gone:  # what `usage` says of memory holds that of this process, which has forked
                peak_mb = max(peak_mb, _peak_mb(process.pid))
                time.sleep(_LOOK_S)
                gone, status, usage = os.wait4(process.pid, os.WNOHANG)
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            return Ended(process.returncode, out.read(), peak_mb, usage.ru_utime + usage.ru_stime)

    return await asyncio.to_thread(ended)


def _peak_mb(pid: int) -> float:
    """The most that it had at once so far; 0 once it has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


async def index(folder: Path, tree: Path, db: str = "index") -> tuple[dict[str, Any], Ended]:
    """`embedgate index`, which must succeed; its report."""
    ended = await embedgate(folder, "index", str(tree), "--db", str(folder / db), "--json")
    assert ended.code == 0, ended
    return json.loads(ended.out), ended


# ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_questions_about_the_standard_library_are_answered(tmp_path: Path) -> None:
    """With the model on this machine, of ten questions at least eight find their file among the first five."""
    for package in PACKAGES:
        leave = shutil.ignore_patterns("test", "__pycache__")
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, tmp_path / "tree" / package, ignore=leave)
    told, ended = await index(tmp_path, tmp_path / "tree")
    print(f"\n{told['files']} files, {told['chunks']} chunks, {told['tokens']} tokens in {told['seconds']:.0f} s")
    found = 0
    for question, path in QUESTIONS.items():
        said = await embedgate(tmp_path, "search", str(tmp_path / "index"), question, "--files", "-k", "5", "--json")
        paths = [json.loads(line)["path"] for line in said.out.splitlines()]
        rank = paths.index(path) + 1 if path in paths else 0
        print(f"{rank or '-':>4}  {path:24} {question}")
        found += rank > 0
    assert found >= 8
    assert told["seconds"] <= 300
    assert ended.code == 0


# ── many files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def vendor(folder: Path, *, tokens_per_minute: int = 0) -> AsyncIterator[OpenAIEmulator]:
    """A stand-in that answers at once, and the configuration for it."""
    quota = f"tokens_per_minute = {tokens_per_minute}" if tokens_per_minute else ""
    judge = Judge(0, tokens_per_minute) if tokens_per_minute else None
    async with OpenAIEmulator(constant=True, judge=judge) as emulator:
        served = deployment("only", emulator.base_url, quota) + model("only")
        (folder / "embedgate.toml").write_text(f"{served}\n")
        yield emulator


def plant(tree: Path, files: int) -> None:
    """So many files of the installed packages, in a tree of their own."""
    packages = Path(sysconfig.get_path("purelib"))
    sources = (path for path in sorted(packages.rglob("*.py")) if path.stat().st_size)
    for source in islice(sources, files):
        copy = tree / source.relative_to(packages)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


async def test_thousands_of_files_cost_little_beside_the_model(tmp_path: Path) -> None:
    """At most 5 ms a chunk beside the model, memory for 5,000 files as for 1,000; only touched ones are bought."""
    peaks = {}
    for files in (FEW, MANY):
        folder = tmp_path / str(files)
        plant(folder / "tree", files)
        async with vendor(folder) as emulator:
            told, ended = await index(folder, folder / "tree")
            peaks[files] = ended.peak_mb
            print(
                f"\n{told['files']} files, {told['chunks']} chunks, {told['tokens']} tokens, {told['seconds']:.0f} s: "
                f"{told['outside_ms']:.2f} ms a chunk beside the model, {1000 * ended.cpu_s / told['chunks']:.2f} ms "
                f"of all processors, {ended.peak_mb:.0f} MB at most"
            )
            assert told["failed"] == 0
            assert told["new_chunks"] == told["chunks"] == emulator.bill.items + told["cached"]
            assert told["outside_ms"] <= OUTSIDE_MS
            bought = emulator.bill.items
            touched = sorted((folder / "tree").rglob("*.py"))[:: files // TOUCHED][:TOUCHED]
            for path in touched:
                path.write_text(f"{path.read_text()}\n\ndef touched_by_the_trial():\n    return {path.name!r}\n")
            again, ended = await index(folder, folder / "tree")
            print(f"after {TOUCHED} were touched: {again['new_chunks']} chunks in {again['seconds']:.1f} s")
            assert (again["changed"], again["unchanged"]) == (TOUCHED, told["files"] - TOUCHED)
            assert emulator.bill.items - bought == again["new_chunks"] <= 3 * TOUCHED
    assert peaks[MANY] <= 1.15 * peaks[FEW]


async def test_a_paced_vendor_is_used_up(tmp_path: Path) -> None:
    """More than nine tenths of its tokens per minute are used, and it never says 429."""
    plant(tmp_path / "tree", PACED)
    async with vendor(tmp_path, tokens_per_minute=TOKENS_PER_MINUTE) as emulator:
        told, _ = await index(tmp_path, tmp_path / "tree")
        arrivals = [*emulator.arrivals]
        span_s = arrivals[-1].at_s - arrivals[0].at_s
        used = sum(arrival.tokens for arrival in arrivals[1:]) / (TOKENS_PER_MINUTE / 60 * span_s)
        print(f"\n{told['tokens']} tokens in {told['seconds']:.0f} s, {span_s:.0f} s of calls: {used:.1%} of the quota")
        assert emulator.bill.items == told["chunks"]
        assert span_s > 60
        assert used > 0.9
