"""The stand-in for Gemini is one: Google's own client works against it, and it refuses what Google refuses."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from google import genai
from google.genai import errors, types

from tests.emulators import faults
from tests.emulators.gemini import GeminiEmulator, envelope, item
from tests.emulators.judge import Judge
from tests.identity import identifying_vector, identifying_vectors

OLD, NEW = "gemini-embedding-001", "gemini-embedding-2"
TEXTS = ["one", "two", "three"]
STRINGS: list[Any] = list(TEXTS)
"""The same for Google's client, whose lists are of many kinds."""
Client = genai.client.AsyncClient

pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")


@pytest.fixture
async def emulator() -> AsyncIterator[GeminiEmulator]:
    """Gemini, on loopback."""
    async with GeminiEmulator() as running:
        yield running


@pytest.fixture(params=[None, "v1beta"], ids=["v1", "v1beta"])
async def client(request: pytest.FixtureRequest, emulator: GeminiEmulator) -> AsyncIterator[Client]:
    """The official client in both versions of the API; it retries nothing by itself."""
    with official(emulator, emulator.api_key, request.param) as made:
        async with made.aio as talking:
            yield talking


@contextmanager
def official(emulator: GeminiEmulator, key: str | None, version: str | None = None) -> Iterator[genai.Client]:
    """Google's client at the emulator; without a `version` it takes its own."""
    where = types.HttpOptions(base_url=emulator.base_url.removesuffix(emulator.prefix), api_version=version)
    with genai.Client(api_key=key, http_options=where) as made:
        yield made


def values(found: types.EmbedContentResponse) -> np.ndarray[Any, Any]:
    """The vectors that the client got."""
    return np.array([embedding.values for embedding in found.embeddings or []], dtype="<f4")


async def test_the_official_client_gets_each_texts_own_vector(client: Client) -> None:
    """One vector per text in order, and no count of tokens from the older model."""
    found = await client.models.embed_content(model=OLD, contents=STRINGS)
    np.testing.assert_array_equal(values(found), identifying_vectors(TEXTS, OLD, 3072))
    assert found.usage_metadata is None


async def test_the_newer_model_makes_one_vector_of_a_list_of_strings(client: Client) -> None:
    """The client puts a list of strings into one content, whose parts share a vector; contents get one each."""
    found = await client.models.embed_content(model=NEW, contents=STRINGS[:2])
    np.testing.assert_array_equal(values(found), identifying_vectors(["onetwo"], NEW, 3072))
    contents: list[Any] = [types.Content(parts=[types.Part(text=text)]) for text in TEXTS]
    found = await client.models.embed_content(model=NEW, contents=contents)
    np.testing.assert_array_equal(values(found), identifying_vectors(TEXTS, NEW, 3072))
    assert found.usage_metadata is not None
    assert found.usage_metadata.prompt_token_count == 3


async def test_only_the_newer_model_brings_small_vectors_to_unit_length(client: Client) -> None:
    """Both give the head of the full vector; the older one as it is."""
    config = types.EmbedContentConfig(output_dimensionality=256)
    for model in (OLD, NEW):
        (found,) = values(await client.models.embed_content(model=model, contents="one", config=config))
        head = identifying_vector("one", model, 3072)[:256]
        np.testing.assert_allclose(found, head if model == OLD else head / np.linalg.norm(head), rtol=1e-5)


async def test_task_types_and_titles_reach_the_stand_in(client: Client, emulator: GeminiEmulator) -> None:
    """What the client makes of its configuration is legal."""
    config = types.EmbedContentConfig(task_type="RETRIEVAL_DOCUMENT", title="t")
    await client.models.embed_content(model=OLD, contents="a", config=config)
    (sent,) = emulator.arrivals[0].body["requests"]
    assert (sent["taskType"], sent["title"]) == ("RETRIEVAL_DOCUMENT", "t")


async def test_what_is_too_long_is_cut_without_a_word(client: Client) -> None:
    """A long text gets the vector of its head, and only the count of tokens tells."""
    long = "word" + " word" * 2999
    found = await client.models.embed_content(model=OLD, contents=long)
    cut = identifying_vectors(["word" + " word" * 2047], OLD, 3072)
    np.testing.assert_array_equal(values(found), cut)
    assert (await client.models.count_tokens(model=OLD, contents=long)).total_tokens == 3000


async def test_the_blocking_client_works_too(emulator: GeminiEmulator) -> None:
    """The synchronous client gets vectors and counts."""

    def talk() -> tuple[np.ndarray[Any, Any], int | None]:
        with official(emulator, emulator.api_key) as client:
            found = client.models.embed_content(model=OLD, contents="one")
            return values(found), client.models.count_tokens(model=OLD, contents="hello world").total_tokens

    vectors, tokens = await asyncio.to_thread(talk)
    np.testing.assert_array_equal(vectors, identifying_vectors(["one"], OLD, 3072))
    assert tokens == 2


@pytest.mark.parametrize(
    ("model", "texts", "code", "status", "message"),
    [
        (OLD, ["a"] * 101, 400, "INVALID_ARGUMENT", "at most 100 requests can be in one batch"),
        (OLD, ["a", ""], 400, "INVALID_ARGUMENT", "EmbedContentRequest.content contains an empty Part."),
        ("foo", ["a"], 404, "NOT_FOUND", "models/foo is not found for API version v1"),
    ],
)
async def test_the_official_client_understands_refusals(
    client: Client, model: str, texts: list[Any], code: int, status: str, message: str
) -> None:
    """What cannot be served is Google's ClientError with Google's words."""
    with pytest.raises(errors.ClientError, match=message) as refused:
        await client.models.embed_content(model=model, contents=texts)
    assert (refused.value.code, refused.value.status) == (code, status)


async def test_a_wrong_key_is_a_bad_argument(emulator: GeminiEmulator) -> None:
    """Google answers 400 to a key that it does not know, with the reason in the details."""
    with official(emulator, "wrong") as made:
        async with made.aio as client:
            with pytest.raises(errors.ClientError, match="API_KEY_INVALID") as refused:
                await client.models.embed_content(model=OLD, contents="a")
    assert (refused.value.code, refused.value.message) == (400, "API key not valid. Please pass a valid API key.")


@pytest.mark.parametrize(
    ("key_in_url", "headers", "status"),
    [(True, {}, 200), (False, {}, 403), (False, {"authorization": "Bearer ya29.wrong"}, 401)],
)
async def test_other_ways_to_bring_a_key(
    emulator: GeminiEmulator, key_in_url: bool, headers: dict[str, str], status: int
) -> None:
    """The URL may carry it; none at all and a foreign token are told apart from a wrong one."""
    url = f"{emulator.base_url}/models/{OLD}:batchEmbedContents"
    url += f"?key={emulator.api_key}" if key_in_url else ""
    async with httpx.AsyncClient(trust_env=False) as plain:
        answer = await plain.post(url, json={"requests": [item("a")]}, headers=headers)
    assert answer.status_code == status


async def test_every_text_counts_as_a_request(client: Client, emulator: GeminiEmulator) -> None:
    """The quota of requests is one of texts; the refusal says when to come back, and no header does."""
    emulator.judge = Judge(requests_per_minute=100, clock=lambda: 0.0)
    await client.models.embed_content(model=OLD, contents=STRINGS * 20)
    with pytest.raises(errors.ClientError, match=r"limit: 100\\nPlease retry in 60\.0+s") as refused:
        await client.models.embed_content(model=OLD, contents=STRINGS * 20)
    assert (refused.value.code, refused.value.status) == (429, "RESOURCE_EXHAUSTED")
    assert "retryDelay': '60s'" in str(refused.value)
    assert refused.value.response is not None
    assert not [name for name in refused.value.response.headers if name.lower().startswith(("retry", "x-ratelimit"))]


@pytest.mark.parametrize("listed", [False, True])
async def test_a_servers_failure_is_understood(client: Client, emulator: GeminiEmulator, listed: bool) -> None:
    """Also when the error comes in a list."""
    body = envelope(503, "UNAVAILABLE", "The model is overloaded.")
    emulator.inject(faults.status(503, orjson.dumps([body] if listed else body)))
    with pytest.raises(errors.ServerError, match="overloaded") as failed:
        await client.models.embed_content(model=OLD, contents="a")
    assert (failed.value.code, failed.value.status) == (503, "UNAVAILABLE")
