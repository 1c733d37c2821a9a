"""The commands about jobs: a file handed over, watched and fetched; what was wrong is one line and an exit code."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from app.api import bulk
from tests.api.conftest import KEY, SMALL, Edge, running

_ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def working(folder: Path) -> AsyncIterator[Edge]:
    """A service that works on jobs."""
    async with running(folder) as edge, bulk.runner(edge.runtime):
        yield edge


async def jobs(edge: Edge | None, *arguments: str, folder: Path, key: str = KEY) -> tuple[int, str, str]:
    """Exit code, output and complaints of `embedgate jobs ...` against the service."""
    url = edge.url if edge is not None else ""
    environ = {"EMBEDGATE_URL": url, "EMBEDGATE_API_KEY": key, "PYTHONPATH": str(_ROOT), "HOME": str(folder)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", "jobs", *arguments, cwd=folder, env=environ,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, complaints = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), complaints.decode()


def write(path: Path, *inputs: object, model: str = SMALL) -> None:
    """A file of requests."""
    bodies = [{"model": model, "input": given} for given in inputs]
    said = {"method": "POST", "url": "/v1/embeddings"}
    lines = [{"custom_id": f"id{at}", **said, "body": body} for at, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ids(text: str) -> list[str]:
    """The custom_ids of lines."""
    return [json.loads(line)["custom_id"] for line in text.splitlines()]


async def test_a_file_is_done_and_told_of(tmp_path: Path) -> None:
    """The last word says what was done, and what came of it lies beside the file, in the order of its lines."""
    write(tmp_path / "in.jsonl", *(f"text {number}" for number in range(50)))
    async with working(tmp_path) as edge:
        code, said, _ = await jobs(edge, "submit", "in.jsonl", "--wait", "--metadata", "team=search", folder=tmp_path)
        assert code == 0, said
        name, status = said.splitlines()[0].split()
        assert status == "completed"
        assert "lines     50: 50 ok, 0 failed, 0 skipped" in said
        assert "texts     50, 0 of them cached" in said
        assert "USD" in said
        written = (tmp_path / "in.jsonl.output.jsonl").read_text()
        assert ids(written) == [f"id{number}" for number in range(50)]
        assert not (tmp_path / "in.jsonl.errors.jsonl").exists()
        assert (await jobs(edge, "output", name, folder=tmp_path))[1] == written
        code, listed, _ = await jobs(edge, "list", "--json", folder=tmp_path)
        found = [json.loads(line) for line in listed.splitlines()]
        assert [(job["id"], job["metadata"]) for job in found] == [(name, {"team": "search"})]
        assert name in (await jobs(edge, "list", folder=tmp_path))[1]


async def test_lines_that_failed_are_tried_again_as_a_new_job(tmp_path: Path) -> None:
    """Exit code 3; of the new job only they are part, and those that were bought are not bought again.

    It has the metadata of the first, thus its tier.
    """
    write(tmp_path / "in.jsonl", "good", [], "better", [])
    noted = ("--metadata", "team=search", "--tier", "online")
    async with working(tmp_path) as edge:
        code, said, _ = await jobs(edge, "submit", "in.jsonl", "--wait", *noted, folder=tmp_path)
        assert code == 3
        assert "lines     4: 2 ok, 2 failed, 0 skipped" in said
        name = said.split()[0]
        assert ids((tmp_path / "in.jsonl.errors.jsonl").read_text()) == ["id1", "id3"]
        assert ids((await jobs(edge, "output", name, "--errors", folder=tmp_path))[1]) == ["id1", "id3"]
        code, said, _ = await jobs(edge, "retry", name, "--wait", folder=tmp_path)
        assert code == 3
        assert "lines     2: 0 ok, 2 failed, 0 skipped" in said
        _, shown, _ = await jobs(edge, "show", said.split()[0], "--json", folder=tmp_path)
        assert json.loads(shown)["metadata"] == {"team": "search", "embedgate_tier": "online"}


async def test_a_job_can_go_through_the_vendors_batches(tmp_path: Path) -> None:
    """Where it says so: --tier goes before the same said as metadata, and is shown beside every job."""
    write(tmp_path / "in.jsonl", "text")
    said = ("--metadata", "embedgate_tier=online", "--metadata", "team=search")
    async with running(tmp_path) as edge:
        _, plain, _ = await jobs(edge, "submit", "in.jsonl", folder=tmp_path)
        _, cheap, _ = await jobs(edge, "submit", "in.jsonl", "--tier", "vendor_batch", *said, folder=tmp_path)
        _, listed, _ = await jobs(edge, "list", "--json", folder=tmp_path)
        found = {job["id"]: (job["embedgate"]["tier"], job["metadata"]) for job in map(json.loads, listed.splitlines())}
        assert found == {
            plain.strip(): ("online", None),
            cheap.strip(): ("vendor_batch", {"embedgate_tier": "vendor_batch", "team": "search"}),
        }
        for command in (("list",), ("show", cheap.strip())):
            columns, first, *_ = (await jobs(edge, *command, folder=tmp_path))[1].splitlines()
            assert first[columns.index("TIER") :].split()[0] == "vendor_batch"
        code, said_nothing, complaints = await jobs(edge, "submit", "in.jsonl", "--tier", "free", folder=tmp_path)
        assert (code, said_nothing) == (2, "")
        assert "--tier" in complaints
        assert "vendor_batch" in complaints


async def test_a_file_that_is_wrong_is_told_line_by_line(tmp_path: Path) -> None:
    """Exit code 2."""
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a"}\nno json\n')
    async with working(tmp_path) as edge:
        code, said, complaints = await jobs(edge, "submit", "in.jsonl", "--wait", folder=tmp_path)
        assert code == 2
        assert said.split()[1] == "failed"
        assert "line 1: missing_required_parameter" in complaints
        assert "line 2: invalid_json_line" in complaints
        assert "line 2: invalid_json_line" in (await jobs(edge, "show", said.split()[0], folder=tmp_path))[1]


async def test_a_job_can_be_stopped(tmp_path: Path) -> None:
    """Nobody works on it here, so it ends at once."""
    write(tmp_path / "in.jsonl", "text")
    async with running(tmp_path) as edge:
        _, name, _ = await jobs(edge, "submit", "in.jsonl", folder=tmp_path)
        code, said, _ = await jobs(edge, "cancel", name.strip(), folder=tmp_path)
        assert (code, said.split()) == (0, [name.strip(), "cancelled"])
        code, _, complaints = await jobs(edge, "cancel", name.strip(), folder=tmp_path)
        assert (code, complaints.count("\n")) == (2, 1)
        assert "Cannot cancel a batch with status 'cancelled'" in complaints


async def test_what_goes_wrong_is_one_line(tmp_path: Path) -> None:
    """A wrong key, a job that there is not, a file that there is not, nobody listening."""
    write(tmp_path / "in.jsonl", "text")
    async with running(tmp_path) as edge:
        failures = [
            (("list",), "wrong", "Incorrect API key"),
            (("show", "batch_none"), KEY, "No such Batch object: batch_none"),
            (("submit", "none.jsonl"), KEY, "none.jsonl cannot be read: No such file or directory"),
            (("list", "--server", "http://127.0.0.1:9"), KEY, "http://127.0.0.1:9 cannot be asked"),
            (("output", "batch_none"), KEY, "No such Batch object"),
        ]
        for arguments, key, told in failures:
            code, said, complaints = await jobs(edge, *arguments, folder=tmp_path, key=key)
            assert (code, said, complaints.count("\n")) == (2, "", 1), complaints
            assert told in complaints
            assert "Traceback" not in complaints


@pytest.mark.parametrize("command", ["submit", "list", "show", "cancel", "output", "retry"])
async def test_every_command_explains_itself(tmp_path: Path, command: str) -> None:
    """With its options."""
    code, said, _ = await jobs(None, command, "--help", folder=tmp_path)
    assert code == 0
    assert "--server" in said
