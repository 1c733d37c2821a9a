"""What operators do with the cache and its database from a shell: by exit code, output, and what it changes."""

import asyncio
import json
import re
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_cli import COMMAND, ENVIRON, embedgate, serving
from tests.emulators.openai import OpenAIEmulator
from tests.servers import HOST, free_port

MODEL = "text-embedding-3-small"
KEY, PASSWORD, SECRET = "sk-emulator-key", "password-of-a-store", "nothing-but-tests-knows-it"
CONFIGURATION = """
[server]
secret = "{secret}"
[stores]
{stores}
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "{key}"
model = "text-embedding-3-small"
attempts = 1
[models.text-embedding-3-small]
deployments = ["main"]
canary_interval_s = 0
"""


def configure(folder: Path, upstream: str = "http://127.0.0.1:9/v1", stores: str = "", key: str = KEY) -> None:
    """One model, bought at `upstream`."""
    text = CONFIGURATION.format(secret=SECRET, stores=stores, upstream=upstream, key=key)
    (folder / "embedgate.toml").write_text(text)


async def cache(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`embedgate cache …`, while the emulators of this process answer."""
    shown = await asyncio.to_thread(embedgate, "cache", *arguments, folder=folder)
    assert not re.search(f"{KEY}|{PASSWORD}|{SECRET}|Traceback", shown.stdout + shown.stderr)
    return shown


def told(shown: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The JSON objects of its lines; nothing else was said."""
    assert shown.stderr == ""
    return [json.loads(line) for line in shown.stdout.splitlines()]


def refusal(shown: subprocess.CompletedProcess[str]) -> str:
    """The one line with which it ended."""
    assert (shown.returncode, shown.stdout) == (2, "")
    (line,) = shown.stderr.splitlines()
    return line


@asynccontextmanager
async def shop(folder: Path) -> AsyncIterator[OpenAIEmulator]:
    """Somewhere to buy, configured."""
    async with OpenAIEmulator() as upstream:
        configure(folder, upstream.base_url)
        yield upstream


def bought(upstream: OpenAIEmulator) -> list[str]:
    """Every text that arrived there."""
    inputs = (arrival.body["input"] for arrival in upstream.arrivals)
    return [text for given in inputs for text in ([given] if isinstance(given, str) else given)]


def rows(folder: Path) -> int:
    """How many vectors the database has."""
    with closing(sqlite3.connect(f"file:{folder}/data/embedgate.db?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM cache").fetchone()[0])


async def written(folder: Path, wanted: int) -> None:
    """So many vectors are in the database, which may have to be made first."""
    async with asyncio.timeout(20):
        while True:
            with suppress(sqlite3.OperationalError):
                if rows(folder) >= wanted:
                    return
            await asyncio.sleep(0.05)


# ── help, migrate ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("cache",), ("stats", "warm", "invalidate", "beside running")),
        (("cache", "stats"), ("--json", "--config")),
        (("cache", "warm"), ("embedgate cache warm questions.txt --model", "standard input", "--cache-group")),
        (("cache", "invalidate"), ("embedgate cache invalidate --older-than 90d", "--all", "x-embedgate-space")),
        (("migrate",), ("embedgate migrate", "stop those first")),
    ],
    ids=" ".join,
)
def test_help_teaches(tmp_path: Path, command: tuple[str, ...], says: tuple[str, ...]) -> None:
    """Lines to copy, and what every option is for."""
    shown = embedgate(*command, "--help", folder=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [said for said in says if said not in shown.stdout] == []


def test_migrate_says_from_what_to_what(tmp_path: Path) -> None:
    """Once from nothing; then there is nothing to do."""
    first, second = embedgate("migrate", folder=tmp_path), embedgate("migrate", folder=tmp_path)
    assert (first.returncode, second.returncode) == (0, 0)
    found = re.fullmatch(r"migrated from nothing to (\w+)\n", first.stdout)
    assert found is not None
    assert second.stdout == f"up to date: {found[1]}\n"


async def test_a_database_that_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    """By every command that cannot do without it, with exit code 2 and without its password; stats say which is up."""
    port = free_port()
    stores = f'database_url = "postgresql://user:{PASSWORD}@{HOST}:{port}/d"\n'
    configure(tmp_path, stores=stores + f'redis_url = "redis://:{PASSWORD}@{HOST}:{port}"')
    migrate, invalidate, stats = await asyncio.gather(
        asyncio.to_thread(embedgate, "migrate", folder=tmp_path),
        cache(tmp_path, "invalidate", "--all"),
        cache(tmp_path, "stats", "--json"),
    )
    for shown in (migrate, invalidate):
        assert refusal(shown).startswith("embedgate: the database cannot be reached: ")
    assert PASSWORD not in migrate.stderr
    assert told(stats) == [{"level": "redis", "state": "down"}, {"level": "sql", "state": "down"}]


def test_check_and_models_open_no_store_and_write_nothing(tmp_path: Path) -> None:
    """Not a connection, not a file; and no password is shown."""
    with socket.create_server((HOST, 0)) as listener:
        at = f":{PASSWORD}@{HOST}:{listener.getsockname()[1]}"
        configure(tmp_path, stores=f'database_url = "postgresql://user{at}/d"\nredis_url = "redis://{at}"')
        for command in ("check", "models"):
            shown = embedgate(command, folder=tmp_path)
            assert shown.returncode == 0
            assert not re.search(f"{KEY}|{PASSWORD}|{SECRET}", shown.stdout + shown.stderr)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert [each.name for each in tmp_path.iterdir()] == ["embedgate.toml"]


# ── warm ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_warming_reads_lines_of_every_kind(tmp_path: Path) -> None:
    """Text, JSON, nonsense: each gives its texts; what cannot be embedded is counted and ends with exit code 3."""
    lines = {
        "plain text": ["plain text"],
        '"a \\"string\\""': ['a "string"'],
        '["one", "two"]': ["one", "two"],
        '{"input": "an input"}': ["an input"],
        '{"input": ["three", "four"]}': ["three", "four"],
        '{"text": "a text", "id": 7}': ["a text"],
        "42": ["42"],
        '{"broken': ['{"broken'],
        '"\\ud800"': ['"\\ud800"'],
        "[" * 5000: ["[" * 5000],
        "[citation needed] he said": ["[citation needed] he said"],
        "  indented": ["  indented"],
        "": [],
        "[]": [],
        '""': [],
        '["", 1, null]': [],
        '{"id": 7}': [],
        "word " * 9000: [],
        "poisonous": [],
    }
    path = tmp_path / "lines"
    path.write_text("\n".join(lines) + "\nplain text\n", "utf-8")
    wanted = [text for texts in lines.values() for text in texts]
    async with shop(tmp_path) as upstream:
        upstream.poison = {"poisonous"}
        shown = await cache(tmp_path, "warm", str(path), "--model", MODEL, "--json")
        upstream.arrivals.clear()
        again = await cache(tmp_path, "warm", str(path), "--model", MODEL)
    (row,) = told(shown)
    assert shown.returncode == again.returncode == 3
    assert (row["texts"], row["failed"]) == (len(wanted) + 3, 2)
    assert row["tokens"] >= len(wanted)
    assert not set(bought(upstream)) & set(wanted)
    head, values = (re.split(r"  +", line) for line in again.stdout.splitlines())
    assert dict(zip(head, values, strict=True)) | {"TOKENS": ""} == {
        "TEXTS": str(len(wanted) + 3), "BOUGHT": "0", "KEPT": str(len(wanted) + 1), "FAILED": "2", "TOKENS": "",
    }  # fmt: skip


@asynccontextmanager
async def piping(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A warming that reads a pipe."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "cache", "warm", "-", "--model", MODEL, "--json",
        cwd=folder, env=ENVIRON | {"EMBEDGATE_STORES__DATA_DIR": str(folder / "data")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs the tests may ignore it
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_what_is_piped_in_is_kept_while_more_is_awaited(tmp_path: Path) -> None:
    """Whoever writes to the pipe may take its time: what came is there for others before it ends."""
    async with shop(tmp_path), piping(tmp_path) as process, asyncio.timeout(30):
        assert process.stdin is not None
        process.stdin.write(b"".join(b"text %d\n" % number for number in range(256)) + b"text 256")
        await process.stdin.drain()
        await written(tmp_path, 256)
        output, errors = await process.communicate(b", the last\n")
    assert (process.returncode, errors) == (0, b"")
    row = json.loads(output)
    assert (row["texts"], row["bought"], row["kept"], row["failed"]) == (257, 257, 0, 0)


async def test_who_waits_for_a_pipe_can_be_interrupted(tmp_path: Path) -> None:
    """One Ctrl-C is enough, and nothing is said about it."""
    async with shop(tmp_path), piping(tmp_path) as process, asyncio.timeout(30):
        assert process.stdin is not None
        process.stdin.write(b"".join(b"text %d\n" % number for number in range(256)))
        await written(tmp_path, 256)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert process.stderr is not None
        assert await process.stderr.read() == b""


async def test_what_cannot_be_warmed_is_told_in_a_line(tmp_path: Path) -> None:
    """A model that is not served, a file that is not there or no text, a provider that does not know the key."""
    (tmp_path / "good").write_text("text\n")
    (tmp_path / "bad").write_bytes(b"text\n\xff\n")
    async with OpenAIEmulator(api_key="sk-another-key") as upstream:
        configure(tmp_path, upstream.base_url)
        unknown, missing, binary, stranger = await asyncio.gather(
            cache(tmp_path, "warm", "good", "--model", "nobody"),
            cache(tmp_path, "warm", "missing", "--model", MODEL),
            cache(tmp_path, "warm", "bad", "--model", MODEL),
            cache(tmp_path, "warm", "good", "--model", MODEL),
        )
    assert refusal(unknown) == "embedgate: The model `nobody` does not exist or you do not have access to it."
    assert refusal(missing) == "embedgate: missing cannot be read: No such file or directory"
    assert refusal(binary) == "embedgate: bad cannot be read: not UTF-8"
    assert refusal(stranger) == "embedgate: The upstream provider failed."


# ── stats, invalidate ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_stats_and_invalidate_count_what_is_there(tmp_path: Path) -> None:
    """For people and for programs; what was dropped is gone, what is younger stays."""
    (tmp_path / "lines").write_text("one\ntwo\nthree\n")
    async with shop(tmp_path):
        await cache(tmp_path, "warm", "lines", "--model", MODEL)
        head, values = map(str.split, (await cache(tmp_path, "stats")).stdout.splitlines())
        assert head == ["LEVEL", "STATE", "ENTRIES", "BYTES", "MAX"]
        assert (values[:3], int(values[3]) > 3 * 6144, values[4]) == (["sql", "up", "3"], True, "0")
        older = await cache(tmp_path, "invalidate", "--model", MODEL, "--older-than", "1h")
        assert (older.returncode, older.stdout) == (0, "invalidated; 0 rows dropped from the database\n")
        assert told(await cache(tmp_path, "invalidate", "--model", MODEL, "--json")) == [{"rows": 3}]
        assert rows(tmp_path) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Name one of"),
        (("--all", "--model", MODEL), "Name one of"),
        (("--space", "*"), "x-embedgate-space"),
        (("--model", "nobody"), "`nobody` does not exist"),
        (("--older-than", "90"), "90d, 12h or 30m"),
        (("--older-than", "-1d"), "90d, 12h or 30m"),
    ],
)
async def test_what_cannot_be_invalidated_is_told(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    """With exit code 2, and nothing has happened."""
    configure(tmp_path)
    shown = await cache(tmp_path, "invalidate", *arguments)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert says in shown.stderr


async def test_a_running_server_forgets_what_was_invalidated_beside_it(tmp_path: Path) -> None:
    """Its memory too, within 5 s: from then on what is asked for is bought again."""
    async with shop(tmp_path) as upstream:
        with serving(tmp_path) as (_, announced):
            url = announced[1].split()[-1]
            async with httpx.AsyncClient() as http:

                async def ask() -> str:
                    answer = await http.post(f"{url}/embeddings", json={"model": MODEL, "input": "stale"})
                    return answer.headers["x-embedgate-cache"]

                assert [await ask(), await ask()] == ["hit=0,miss=1", "hit=1,miss=0"]
                await written(tmp_path, 1)
                assert told(await cache(tmp_path, "invalidate", "--all", "--json")) == [{"rows": 1}]
                started = time.monotonic()
                while await ask() == "hit=1,miss=0":  # noqa: ASYNC110 — it tells nobody
                    await asyncio.sleep(0.05)
                assert time.monotonic() - started <= 5
                assert await ask() == "hit=1,miss=0"
    assert bought(upstream) == ["stale", "stale"]
