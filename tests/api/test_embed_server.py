"""What `embedgate embed` finds out of a server before it asks for vectors, and how it recognises what it made there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.api.conftest import ADA, KEY, SMALL, TENANTS, Edge, running, serving
from tests.api.test_embed_command import HURRIED, Said, Site, command, meta_of, names, one_line, site, some, vectors
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vectors

TYPED = '[models.mine]\ndeployments = ["{}"]\nquery_prompt = "{}"\n' + TENANTS


async def embed(here: Site, url: str, *arguments: str) -> Said:
    """The command at a server, with nothing that an earlier one could have remembered but its output."""
    here.runs += 1
    environ = {"EMBEDGATE_API_KEY": KEY, "EMBEDGATE_STORES__DATA_DIR": here.path(f"own{here.runs}")}
    return await command(*arguments, "--server", url, environ=environ)


@asynccontextmanager
async def mine(folder: Path, deployment: str = "main", prompt: str = "query: ") -> AsyncIterator[Edge]:
    """A server whose model `mine` tells queries apart."""
    await asyncio.to_thread(folder.mkdir)
    async with running(folder, tenants=TYPED.format(deployment, prompt)) as edge:
        yield edge


# ── an embedgate ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_text_is_tried_and_what_is_there_is_not_asked_for(tmp_path: Path) -> None:
    """Every text that is bought is a row; a second run asks for no vector at all."""
    async with running(tmp_path) as edge:
        here = Site(tmp_path, edge.upstream)
        wish = (here.write("in.csv", some(150)), "--out", here.path("out.npy"), "--model", SMALL)
        assert (await embed(here, edge.url, *wish)).code == 0
        assert sorted(here.bought()) == sorted(some(150))
        asked = edge.answers(200)
        said = await embed(here, edge.url, *wish)
        assert (said.code, "is there and fits" in said.out) == (0, True)
        assert (here.bought(), edge.answers(200)) == ([], asked)
        assert float(meta_of(here.path("out.npy"))["cost_usd"]) == pytest.approx(edge.upstream.bill.tokens * 2e-8)


async def test_a_server_whose_model_has_changed_is_noticed(tmp_path: Path) -> None:
    """By the spaces that it names: the same model elsewhere fits, another one under its name or in its prompts not."""
    here = Site(tmp_path, OpenAIEmulator())
    source, out = here.write("in.csv", some(5)), here.path("out.npy")
    wish = (source, "--out", out, "--model", "mine", "--input-type", "query")
    async with mine(tmp_path / "first") as edge:
        assert (await embed(here, edge.url, *wish)).code == 0
    async with mine(tmp_path / "same") as edge:
        assert "is there and fits" in (await embed(here, edge.url, *wish)).out
    for name, deployment, prompt in (("model", "ada", "query: "), ("prompt", "main", "question: ")):
        async with mine(tmp_path / name, deployment, prompt) as edge:
            one_line(await embed(here, edge.url, *wish), "space was ")
            assert edge.upstream.bill.requests == 0
    expected = identifying_vectors([f"query: {text}" for text in some(5)], SMALL, 1536)
    np.testing.assert_array_equal(np.load(out), expected)


async def test_input_types_are_told_to_the_server(tmp_path: Path) -> None:
    """Queries get what the server puts in front of them; where it tells none apart, all is one."""
    async with mine(tmp_path / "server") as edge:
        here = Site(tmp_path, edge.upstream)
        source = here.write("in.csv", ["a"])
        for model, kind, text in (("mine", "query", "query: a"), ("mine", "document", "a"), (SMALL, "query", "a")):
            out = here.path(f"{model}-{kind}.npy")
            said = await embed(here, edge.url, source, "--out", out, "--model", model, "--input-type", kind)
            assert said.code == 0, said
            np.testing.assert_array_equal(np.load(out), identifying_vectors([text], SMALL, 1536))


async def test_a_width_is_asked_for_or_refused_before_anything_is_bought(tmp_path: Path) -> None:
    """The server cuts, so that only so much travels; what it would refuse is told in a line."""
    async with running(tmp_path) as edge:
        here = Site(tmp_path, edge.upstream)
        out = here.path("out.npy")
        wish = (here.write("in.csv", some(5)), "--out", out, "--model")
        assert (await embed(here, edge.url, *wish, SMALL, "--dimensions", "64")).code == 0
        assert np.load(out).shape == (5, 64)
        here.bought()
        none = (*wish[:2], here.path("none.npy"), "--model")
        for model, width, told in ((SMALL, "2000", "less than or equal to 1536"), (ADA, "64", "does not support")):
            one_line(await embed(here, edge.url, *none, model, "--dimensions", width), told)
        assert (here.bought(), names(tmp_path, "none*")) == ([], [])


async def test_vectors_come_as_they_are_of_a_model_that_promises_nothing(tmp_path: Path) -> None:
    """Of a model that no catalog knows nobody says that its vectors have length 1: they are not refused for it."""
    async with site(tmp_path) as here:
        text = (tmp_path / "embedgate.toml").read_text() + f'[tenants.search]\napi_key = "{KEY}"\n'
        here.upstream.spoil(lambda rows: [(place, 2 * vector) for place, vector in rows])
        async with serving(tmp_path, text) as (url, *_):
            out = here.path("out.npy")
            wish = (here.write("in.csv", some(5)), "--out", out, "--model", "other", *HURRIED)
            said = await embed(here, url, *wish)
    assert said.code == 0, said
    np.testing.assert_array_equal(np.load(out), 2 * vectors(some(5), "other"))


# ── somebody else ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_that_is_no_embedgate_shows_its_model_by_one_text(tmp_path: Path) -> None:
    """Its vectors all the same; of input types it cannot be told, which is a line."""
    async with OpenAIEmulator(api_key=KEY) as upstream:
        here = Site(tmp_path, upstream)
        source, out = here.write("in.csv", some(5)), here.path("out.npy")
        wish = (source, "--out", out, "--model", SMALL, "--dimensions", "64")
        assert (await embed(here, upstream.base_url, *wish)).code == 0
        assert here.bought() == ["hello", *some(5)]
        assert np.load(out).shape == (5, 64)
        said = await embed(here, upstream.base_url, *wish, "--input-type", "query", "--force")
        one_line(said, "input_type cannot be told to a server that is no embedgate")
        assert np.load(out).shape == (5, 64)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        ("200 OK", b"<html>", "cannot be asked"),
        ("200 OK", b'{"embedgate": {"space": "with a blank"}}', "HTTP 200"),
        ("200 OK", b"[]", "HTTP 200"),
        ("500 Broken", b'{"error": []}', "HTTP 500"),
    ],
)
async def test_a_server_that_does_not_answer_as_it_should_is_a_line(
    tmp_path: Path, status: str, body: bytes, told: str
) -> None:
    """Whatever it says to whatever it is asked."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()

    here = Site(tmp_path, OpenAIEmulator())
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        wish = (here.write("in.csv", some(5)), "--out", here.path("out.npy"), "--model", SMALL)
        one_line(await embed(here, url, *wish), f"{url} cannot be asked: ", told)
