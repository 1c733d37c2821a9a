"""A server that is not there for now, or not as it should be: what Python and the commands say, and for how long."""

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import client, homes
from tests.api import test_index_command
from tests.api.conftest import KEY, SMALL, running
from tests.api.test_cli import COMMAND, ENVIRON, embedgate
from tests.api.test_embed_command import MODEL, Site, names, one_line, some
from tests.api.test_embed_server import embed
from tests.api.test_python_face import same
from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator

SLOW_DOWN = faults.error_body("Slow down.", "requests", code="rate_limit_exceeded")
LIMIT = faults.status(429, SLOW_DOWN, {"retry-after": "7"})
NO_CREDIT = faults.status(429, faults.error_body("You have none.", "insufficient_quota", code="insufficient_quota"))
AWAY = faults.status(503, b"<html>")


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """What a test has opened does not outlive its servers for long."""
    yield
    homes.close_all()


def at(folder: Path, url: str, patience_s: float = 60.0) -> dict[str, Any]:
    """How the server there is asked, with a configuration that says how long it is waited for."""
    path = folder / "embedgate.toml"
    path.write_text(
        f'[stores]\ndata_dir = "{folder}/data"\n[embed]\nbackoff_base_s = 0.05\nbackoff_cap_s = 0.1\n'
        f"give_up_after_s = {patience_s}\n"
    )
    return {"config": path, "base_url": url, "model": SMALL, "api_key": KEY}


@asynccontextmanager
async def mute(asked: asyncio.Event | None = None) -> AsyncIterator[str]:
    """The URL of a server that takes connections, and says nothing."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if asked is not None:
            asked.set()
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


# ── in Python ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (LIMIT, client.EmbeddingRateLimitError, r"http://127\.0\.0\.1:\d+ cannot be asked: Slow down\."),
        (AWAY, client.EmbeddingPoolExhausted, r"http://127\.0\.0\.1:\d+ cannot be asked: HTTP 503"),
        (faults.status(502), client.EmbeddingPoolExhausted, "cannot be asked: The server had an error"),
        (faults.reset, client.EmbeddingPoolExhausted, r"cannot be asked: \S+"),
        (NO_CREDIT, client.ConfigurationError, "cannot be asked: You have none"),
    ],
)
async def test_a_server_that_is_away_at_the_first_call_is_told_by_kind(
    tmp_path: Path, fault: faults.Fault, kind: type[Exception], said: str
) -> None:
    """A limit is a limit, an outage an outage; what only somebody can mend is not waited for. Then it is asked anew."""
    async with OpenAIEmulator(api_key=KEY) as upstream:
        how = at(tmp_path, upstream.base_url)
        upstream.inject(fault, 2)  # what it serves, and what it makes of a text
        with pytest.raises(kind, match=said) as told:
            await client.aembed_texts(["a"], **how)
        upstream.heal()
        assert same(await client.aembed_texts(["a"], **how), ["a"])
    if isinstance(told.value, client.EmbeddingRateLimitError):
        assert told.value.retry_after_s == 7.0


async def test_nobody_listens_is_an_outage(tmp_path: Path) -> None:
    """EmbeddingPoolExhausted names the server; what takes any number of texts waits, then it is an EmbeddingError."""
    how = at(tmp_path, "http://127.0.0.1:9", patience_s=0.2)
    with pytest.raises(client.EmbeddingPoolExhausted, match=r"^http://127\.0\.0\.1:9 cannot be asked: \w+"):
        await client.aembed_texts(["a"], **how)
    with pytest.raises(client.EmbeddingError, match=r"^http://127\.0\.0\.1:9 cannot be asked: .*for 0\.2 s"):
        await client.agenerate_embeddings(["a"], **how)


async def test_any_number_of_texts_waits_for_a_server_that_comes_back(tmp_path: Path) -> None:
    """Also where it is away before it has ever been asked."""
    async with OpenAIEmulator(api_key=KEY) as upstream:
        upstream.inject(AWAY, 1)
        assert same(await client.agenerate_embeddings(["a", "b"], **at(tmp_path, upstream.base_url)), ["a", "b"])


async def test_a_first_call_ends_in_time(tmp_path: Path) -> None:
    """A server that says nothing keeps nobody longer than the call may last, nor the end of what was opened."""
    async with mute() as url:
        began = time.monotonic()
        with pytest.raises(client.EmbeddingPoolExhausted, match=rf"^{url} has not answered in 0\.3 s"):
            await client.aembed_texts(["a"], timeout_s=0.3, **at(tmp_path, url))
        with pytest.raises(client.EmbeddingPoolExhausted):
            await asyncio.to_thread(client.embed_texts, ["a"], timeout_s=0.3, **at(tmp_path, url))
        await asyncio.to_thread(homes.close_all)
        assert time.monotonic() - began < 5


async def test_a_server_that_dies_is_named(tmp_path: Path) -> None:
    """Fewer texts would not help; the same of a deployment."""
    async with OpenAIEmulator(api_key=KEY) as upstream:
        how = at(tmp_path, upstream.base_url)
        await client.aembed_texts(["a"], **how)
        upstream.inject(faults.hang)
        with pytest.raises(client.EmbeddingPoolExhausted, match=rf"^{upstream.base_url[:-3]} has not answered"):
            await client.aembed_texts(["b"], timeout_s=2.5, **how)
        upstream.heal()


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-geheimé"])
async def test_a_key_that_no_header_carries_is_not_shown(tmp_path: Path, key: str) -> None:
    """Such as one with the line end of the file that it was read from."""
    how = at(tmp_path, "http://127.0.0.1:9") | {"api_key": key}
    with pytest.raises(client.ConfigurationError, match="characters that HTTP cannot carry") as told:
        await client.aembed_texts(["a"], **how)
    assert "sk-" not in str(told.value)


@pytest.mark.parametrize("url", ["http://me:S3CRET@127.0.0.1:9/v1", "http://me:S3/CRET@127.0.0.1:9", "me:S3CRET@h"])
async def test_a_password_in_an_address_is_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    """By Python and by the command."""
    with pytest.raises(client.ConfigurationError, match="cannot be asked: it must") as told:
        await client.aembed_texts(["a"], **at(tmp_path, url))
    here = Site(tmp_path, OpenAIEmulator())
    said = await embed(here, url, here.write("in.csv", ["a"]), "--out", here.path("out.npy"), "--model", SMALL)
    one_line(said, "cannot be asked: it must")
    for told_in in (str(told.value), said.err):
        assert "S3" not in told_in
        assert "CRET" not in told_in


# ── by commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_waits_for_a_server_that_comes_back(tmp_path: Path) -> None:
    """It says for whom it waits, then every row is there."""
    async with OpenAIEmulator(api_key=KEY) as upstream:
        here = Site(tmp_path, upstream)
        upstream.inject(AWAY, 1)
        out = here.path("out.npy")
        said = await embed(here, upstream.base_url, here.write("in.csv", some(3)), "--out", out, "--model", SMALL)
    assert said.code == 0, said
    assert f"{upstream.base_url[:-3]} cannot be asked: HTTP 503; it is waited for" in said.err
    assert np.load(out).shape == (3, 1536)


async def test_a_run_gives_up_on_a_server_that_stays_away(tmp_path: Path) -> None:
    """After as long as it was told: exit code 4, and the line that goes on."""
    here = Site(tmp_path, OpenAIEmulator())
    wish = (here.write("in.csv", some(3)), "--out", here.path("out.npy"), "--model", SMALL, "--give-up-after", "1s")
    said = await embed(here, "http://127.0.0.1:9", *wish)
    *_, last = said.err.splitlines()
    assert (said.code, said.out) == (4, "")
    assert last.startswith("embedgate: http://127.0.0.1:9 cannot be asked: ")
    assert "; go on with: embedgate embed " in last
    assert names(tmp_path, "out*") == []


async def test_what_a_server_would_cost_is_told_by_the_server(tmp_path: Path) -> None:
    """Its own price of its own model, and nothing is bought; who tells no price, is away or lacks it is a line."""
    async with running(tmp_path) as edge:
        here = Site(tmp_path, edge.upstream)
        wish = (here.write("in.csv", some(3)), "--dry-run", "--json", "--model")
        said = await embed(here, edge.url, *wish, SMALL)
        assert said.code == 0, said
        assert f'"model":"{SMALL}","rows":3,"tokens":9,"exact":true,"usd":"0.0000"' in said.out.replace(" ", "")
        one_line(await embed(here, edge.url, *wish, "nope"), "The model `nope` does not exist")
        assert here.bought() == []
    async with OpenAIEmulator(api_key=KEY) as upstream:
        one_line(await embed(here, upstream.base_url, *wish, SMALL), "does not tell what that costs")
        assert upstream.bill.requests == 0
    one_line(await embed(here, "http://127.0.0.1:9", *wish, SMALL), "http://127.0.0.1:9 cannot be asked: ")


async def test_what_a_tree_would_cost_is_told_by_the_server(tmp_path: Path) -> None:
    """Of its own model alone; in process of the one that is named, if there is one."""
    async with running(tmp_path) as edge, test_index_command.site(tmp_path) as here:
        wish = ("index", here.path("tree"), "--dry-run", "--json", "--model")
        said = await here.command(*wish, SMALL, "--server", edge.url, environ={"EMBEDGATE_API_KEY": KEY})
        assert (said.code, said.out.count(f'"model": "{SMALL}"'), said.out.count("\n")) == (0, 1, 1)
        assert edge.upstream.bill.requests == 0
        said = await here.command(*wish, MODEL)
        assert (said.code, said.out.count(f'"model": "{MODEL}"'), said.out.count("\n")) == (0, 1, 1)
        one_line(await here.command(*wish, "nope"), "the model nope is not configured; there is tiny, other")


async def test_a_question_waits_for_no_server(tmp_path: Path) -> None:
    """One that is away is a line; Ctrl-C ends the question to one that says nothing, with the usual exit code."""
    asked = asyncio.Event()
    async with test_index_command.site(tmp_path) as here, mute(asked) as url:
        assert (await here.index()).code == 0
        said = await here.search("rain", "--server", "http://127.0.0.1:9")
        one_line(said, "embedgate: http://127.0.0.1:9 cannot be asked: ")
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "search", here.path("index"), "rain", "--server", url, env=ENVIRON, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        async with asyncio.timeout(30):
            await asked.wait()
            process.send_signal(signal.SIGINT)
            assert await process.communicate() == (b"", b"")
        assert process.returncode == 130


def test_jobs_say_why_a_server_cannot_be_asked(tmp_path: Path) -> None:
    """In words, without a password of the address."""
    for url, told in (
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://me:S3CRET@h", "it must hold no credentials"),
    ):
        shown = embedgate("jobs", "list", "--server", url, folder=tmp_path)
        assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
        assert f"cannot be asked: {told}" in shown.stderr.replace("[Errno 111] ", "")
        assert "S3CRET" not in shown.stderr
