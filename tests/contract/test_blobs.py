"""What every `Blobs` promises, over a folder and over a server that speaks S3; and how the place for them is chosen."""

import asyncio
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from moto.server import ThreadedMotoServer

from app.errors import ConfigurationError
from app.job_ports import Blobs
from app.storage.blobs import open_blobs

MIB = 2**20
DAY_S = 86_400
BUCKET = "kept"
BAD_NAMES = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "a/..",
    "./a",
    ".a",
    "a/.b",
    "a b",
    "a\n",
    "a\0",
    "ä",
    "a\\b",
]


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """A bucket of a server on loopback, which is found as AWS' tools would find it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "a-key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "its-secret")
        environment.setenv("AWS_REGION", "us-east-1")
        httpx.put(f"http://{host}:{port}/{BUCKET}").raise_for_status()
        yield f"s3://{BUCKET}"
    server.stop()
    assert server._server is not None
    server._server.server_close()


Opened = Callable[[], Blobs]


@pytest.fixture(params=["folder", "s3"])
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """Opens what one more process would see of the same place."""
    if request.param == "folder":
        return lambda: open_blobs("", tmp_path)
    url = f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return lambda: open_blobs(url, tmp_path)


@pytest.fixture
def blobs(replica: Opened) -> Blobs:
    """Those of one process."""
    return replica()


def told(number: int, size_bytes: int) -> bytes:
    """Bytes that are no others'."""
    return (b"%d:" % number * (size_bytes // 2 + 1))[:size_bytes]


async def write(blobs: Blobs, name: str, *pieces: bytes) -> None:
    """All of it."""
    async with blobs.writing(name) as writer:
        for piece in pieces:
            await writer.write(piece)


async def fail(blobs: Blobs, name: str, data: bytes) -> None:
    """Writes it, and then something goes wrong."""
    async with blobs.writing(name) as writer:
        await writer.write(data)
        raise ZeroDivisionError


async def read(blobs: Blobs, name: str, offset_bytes: int = 0, size_bytes: int | None = None) -> bytes:
    """All that is asked for, in pieces that are not too large."""
    pieces = [piece async for piece in blobs.reading(name, offset_bytes=offset_bytes, size_bytes=size_bytes)]
    assert all(0 < len(piece) <= MIB for piece in pieces)
    return b"".join(pieces)


async def is_there(blobs: Blobs, name: str) -> bool:
    """Whether it can be read."""
    try:
        await read(blobs, name)
    except FileNotFoundError:
        return False
    return True


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, MIB, MIB + 1, 19 * MIB + 7])
async def test_what_was_written_is_read_by_every_process(replica: Opened, size_bytes: int) -> None:
    """Byte for byte, of whatever size, however it was cut."""
    data = told(1, size_bytes)
    await write(replica(), "files/file-1", data[:5], data[5:700], data[700:])
    assert await read(replica(), "files/file-1") == data


async def test_any_part_of_it_can_be_read(blobs: Blobs) -> None:
    """From any offset, and no more than there is."""
    data = told(1, 10 * MIB + 5)
    await write(blobs, "a/b", data)
    spans = [
        (0, 0),
        (0, 1),
        (3, 10),
        (MIB - 1, 2),
        (8 * MIB - 1, MIB + 2),
        (10 * MIB, 100),
        (10 * MIB + 5, 1),
        (11 * MIB, 1),
    ]
    for offset_bytes, size_bytes in spans:
        assert await read(blobs, "a/b", offset_bytes, size_bytes) == data[offset_bytes : offset_bytes + size_bytes]
    assert await read(blobs, "a/b", 9 * MIB) == data[9 * MIB :]


async def test_nothing_is_there_before_it_is_whole(blobs: Blobs) -> None:
    """Neither under its name nor, when it was there before, another than that; however much has been written."""
    for size_bytes in (10, 20 * MIB):
        async with blobs.writing("files/new") as new, blobs.writing("files/old") as old:
            await old.write(b"old")
        async with blobs.writing("files/new") as new, blobs.writing("files/old") as old:
            await new.write(told(1, size_bytes))
            await old.write(told(2, size_bytes))
            assert await read(blobs, "files/old") == b"old"
        assert await read(blobs, "files/old") == told(2, size_bytes)
        await blobs.delete(["files/new"])


async def test_after_an_exception_nothing_is_there(blobs: Blobs) -> None:
    """And what was there before still is."""
    await write(blobs, "files/old", b"old")
    for name, size_bytes in (("files/new", 10), ("files/new", 20 * MIB), ("files/old", 10), ("files/old", 20 * MIB)):
        with pytest.raises(ZeroDivisionError):
            await fail(blobs, name, told(1, size_bytes))
    assert not await is_there(blobs, "files/new")
    assert await read(blobs, "files/old") == b"old"


async def test_who_is_cancelled_leaves_nothing(blobs: Blobs) -> None:
    """Wherever it was: between two writes, or in one."""
    for turns in range(0, 40, 3):
        task = asyncio.ensure_future(write(blobs, "files/new", *[told(1, MIB)] * 1000))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await is_there(blobs, "files/new")


async def test_writers_of_one_name_do_not_mix(blobs: Blobs) -> None:
    """One of them is there afterwards, as a whole."""
    size_bytes = 9 * MIB
    await asyncio.gather(*(write(blobs, "a/b", *[told(n, MIB)] * 9) for n in range(3)))
    found = await read(blobs, "a/b")
    assert found in [told(n, MIB) * 9 for n in range(3)]
    assert len(found) == size_bytes


async def test_what_is_deleted_is_gone(blobs: Blobs) -> None:
    """What was never there, too."""
    for name in ("files/1", "files/2", "files/3"):
        await write(blobs, name, b"x")
    await blobs.delete([])
    await blobs.delete(["files/1", "files/none", "none/none", "files/3"])
    assert [await is_there(blobs, f"files/{n}") for n in (1, 2, 3)] == [False, True, False]


async def test_everything_under_a_prefix_is_deleted(blobs: Blobs) -> None:
    """And not what only begins with the same letters."""
    inside = [f"parts/job/{task:06}/{piece:06}-1.out" for task in range(3) for piece in range(2)]
    beside = ["parts/job1/000001/a", "parts/jo/a", "files/a"]
    for name in (*inside, *beside):
        await write(blobs, name, b"x")
    await blobs.delete_under("parts/job")
    await blobs.delete_under("parts/none")
    assert not any([await is_there(blobs, name) for name in inside])
    assert all([await is_there(blobs, name) for name in beside])


async def test_no_name_leads_anywhere_else(blobs: Blobs) -> None:
    """What is not a proper name is an OSError to everybody, whoever asks for what."""
    for name in BAD_NAMES:
        with pytest.raises(OSError, match="name"):
            await write(blobs, name, b"x")
        with pytest.raises(OSError, match="name"):
            await read(blobs, name)
        with pytest.raises(OSError, match="name"):
            await blobs.delete(["a", name])
        with pytest.raises(OSError, match="name"):
            await blobs.delete_under(name)


# ── a folder ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_nobody_else_may_look_into_the_folder(tmp_path: Path) -> None:
    """By the rights of every file and folder in it."""
    blobs = open_blobs("", tmp_path)
    await write(blobs, "parts/job/a", b"x")
    folder = tmp_path / "bulk"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert modes == {"bulk": 0o700, ".drafts": 0o700, "parts": 0o700, "job": 0o700, "a": 0o600}


async def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    """When the next one starts; what may still be in use does not."""
    drafts = tmp_path / "bulk" / ".drafts"
    await write(open_blobs("", tmp_path), "files/kept", b"x")
    for name, age_s in (("old", DAY_S + 60), ("new", DAY_S - 60)):
        (drafts / name).write_bytes(b"x")
        changed_s = (drafts / name).stat().st_mtime - age_s
        os.utime(drafts / name, (changed_s, changed_s))
    blobs = open_blobs("", tmp_path)
    assert [path.name for path in drafts.iterdir()] == ["new"]
    assert await read(blobs, "files/kept") == b"x"


async def test_no_draft_is_left_of_what_failed(tmp_path: Path) -> None:
    """Nor of what did not, nor of whoever was cancelled in the middle of a write."""
    blobs = open_blobs("", tmp_path)
    await write(blobs, "files/whole", b"x")
    with pytest.raises(ZeroDivisionError):
        await fail(blobs, "files/new", told(1, 2 * MIB))
    for turns in range(0, 40, 3):
        task = asyncio.ensure_future(write(blobs, "files/new", *[told(1, MIB)] * 1000))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
    assert [*(tmp_path / "bulk" / ".drafts").iterdir()] == []


async def test_what_cannot_be_put_in_its_place_is_an_oserror(tmp_path: Path) -> None:
    """And nothing is left of it."""
    blobs = open_blobs("", tmp_path)
    (tmp_path / "bulk" / "files").write_bytes(b"no folder")
    with pytest.raises(OSError, match="files"):
        await write(blobs, "files/file-1", b"x")
    assert [*(tmp_path / "bulk" / ".drafts").iterdir()] == []


# ── which place ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_folder_of_ones_own_may_be_named(tmp_path: Path) -> None:
    """It is made if it is not there."""
    await write(open_blobs(str(tmp_path / "my" / "files"), tmp_path / "data"), "a", b"x")
    assert (tmp_path / "my" / "files" / "a").read_bytes() == b"x"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("url", ["gs://bucket/x", "https://host/bucket", "s3://", "s3:///x"])
def test_a_place_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    """In one line that says what would be one."""
    with pytest.raises(ConfigurationError, match=r'^bulk.blobs: must be a folder or "s3://bucket/prefix"$'):
        open_blobs(url, tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """In one line that names it."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"^bulk.blobs: .*file/x cannot be written: .+$"):
        open_blobs(str(tmp_path / "file" / "x"), tmp_path)


def test_without_its_package_s3_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that says what to install."""
    monkeypatch.delitem(sys.modules, "app.storage.object_blobs", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigurationError, match=r"^bulk.blobs: .*embedgate\[s3\]\)$"):
        open_blobs("s3://bucket/x", tmp_path)


async def test_a_bucket_that_there_is_not_is_an_oserror(s3_url: str, tmp_path: Path) -> None:
    """To whoever writes, and to whoever reads."""
    blobs = open_blobs(f"{s3_url}-not/x", tmp_path)
    with pytest.raises(FileNotFoundError):
        await write(blobs, "a", b"x")
    with pytest.raises(FileNotFoundError):
        await read(blobs, "a")
