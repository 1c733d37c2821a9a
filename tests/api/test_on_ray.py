"""What `embedgate embed --on ray` needs, and how it says so; what Ray then does is a trial: `trial_ray.py`."""

import sys
from pathlib import Path

import pytest

from app.corpus.on_ray import Work, _Worker
from app.corpus.rows import DataError
from app.corpus.stream import GaveUp
from tests.api.conftest import KEY, SMALL, running
from tests.api.test_embed_command import command, names, one_line


async def test_what_ray_needs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a line: a package that is not there, a cluster that is not there, a key that the server does not accept."""
    source, out = tmp_path / "in.csv", str(tmp_path / "out.npy")
    source.write_text("text\none\ntwo\n")
    environ = {"EMBEDGATE_API_KEY": KEY, "EMBEDGATE_STORES__DATA_DIR": str(tmp_path / "own"), "RAY_ADDRESS": ""}
    monkeypatch.setitem(sys.modules, "ray", None)
    async with running(tmp_path) as edge:
        wish = (str(source), "--out", out, "--server", edge.url, "--model", SMALL, "--on", "ray")
        said = await command(*wish, environ=environ | {"EMBEDGATE_API_KEY": "wrong"})
        one_line(said, "Incorrect API key")
        one_line(await command(*wish, "--partitions", "3", environ=environ), "2 rows")
        one_line(await command(*wish, "--ray-address", "127.0.0.1:9", environ=environ), "127.0.0.1:9 cannot be reached")
        one_line(await command(*wish, environ=environ), "embedgate[ray]")
    assert names(tmp_path, "out.npy") == []


def test_a_worker_says_what_became_of_each_partition() -> None:
    """What is wrong with one is told, and the next one is done; who has given up tries no other."""
    tried = []

    def begin() -> Work:
        def work(number: int) -> None:
            tried.append(number)
            if number == 2:
                raise DataError("full")
            if number == 4:
                raise GaveUp("nobody there")

        return work

    worker = _Worker(begin)
    said = [worker({"number": [number]}) for number in (1, 2, 3, 4, 5)]
    assert [(*each["why"], *each["gave_up"]) for each in said] == [
        ("", False), ("full", False), ("", False), ("nobody there", True), ("nobody there", True),
    ]  # fmt: skip
    assert tried == [1, 2, 3, 4]
