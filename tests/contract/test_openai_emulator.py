"""The stand-in for OpenAI is one: the official client works against it, and it refuses what OpenAI refuses."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import openai
import pytest

from app.providers.openai import OpenAI
from app.vectors import cut
from tests.contract.tried import answered, understood
from tests.emulators import faults
from tests.emulators.cases import Case
from tests.emulators.judge import Judge
from tests.emulators.openai import CASES, OpenAIEmulator
from tests.emulators.server import Bill
from tests.identity import identifying_vector

SMALL = "text-embedding-3-small"


@pytest.fixture
async def emulator() -> AsyncIterator[OpenAIEmulator]:
    """OpenAI, on loopback."""
    async with OpenAIEmulator() as running:
        yield running


@pytest.fixture
async def client(emulator: OpenAIEmulator) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, which retries nothing."""
    async with openai.AsyncOpenAI(api_key=emulator.api_key, base_url=emulator.base_url, max_retries=0) as made:
        yield made


async def test_the_official_client_gets_each_texts_own_vector(client: openai.AsyncOpenAI) -> None:
    """By default, as floats, as token ids and shortened, `data[i]` is the vector of input i and usage is tiktoken's."""
    for encoding in (openai.omit, "float"):
        found = await client.embeddings.create(model=SMALL, input=["hello world", "b"], encoding_format=encoding)
        assert [item.index for item in found.data] == [0, 1]
        expected = [identifying_vector(text, SMALL, 1536) for text in ("hello world", "b")]
        np.testing.assert_array_equal(np.array([item.embedding for item in found.data], dtype="<f4"), expected)
        assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == (SMALL, 3, 3)
    by_ids = await client.embeddings.create(model=SMALL, input=[15339, 1917])
    assert by_ids.data[0].embedding == pytest.approx(found.data[0].embedding)
    short = await client.embeddings.create(model=SMALL, input="hello world", dimensions=256)
    head = np.frombuffer(cut(identifying_vector("hello world", SMALL, 1536).tobytes(), 256), "<f4")
    np.testing.assert_array_equal(np.array(short.data[0].embedding, dtype="<f4"), head)


async def test_the_blocking_client_works_too(emulator: OpenAIEmulator) -> None:
    """The synchronous client gets vectors, models and typed errors."""

    def talk() -> tuple[int, list[str], str | None]:
        with openai.OpenAI(api_key=emulator.api_key, base_url=emulator.base_url, max_retries=0) as client:
            found = client.embeddings.create(model="text-embedding-3-large", input="")
            models = [model.id for model in client.models.list()]
            with pytest.raises(openai.NotFoundError) as refused:
                client.embeddings.create(model="foo", input="a")
            return len(found.data[0].embedding), models, refused.value.code

    width, models, code = await asyncio.to_thread(talk)
    assert (width, code) == (3072, "model_not_found")
    assert models == ["text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"]


async def test_models_are_told_one_by_one(client: openai.AsyncOpenAI) -> None:
    """A known model is described, an unknown one is not found."""
    assert (await client.models.retrieve("text-embedding-ada-002")).owned_by == "openai-internal"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("foo")


LONG = "word " * 8610


@pytest.mark.parametrize(
    ("body", "status", "message", "code"),
    [
        ({"input": ["a", ""]}, 400, "'$.input' is invalid.", None),
        ({"input": []}, 400, "'$.input' is invalid.", None),
        ({"input": 5}, 400, "'$.input' is invalid.", None),
        ({"input": ["a", 1]}, 400, "'$.input' is invalid.", None),
        ({"input": [[1], []]}, 400, "'$.input' is invalid.", None),
        ({"input": ["a"] * 2049}, 400, "'$.input' is invalid.", None),
        ({"input": LONG}, 400, "Invalid 'input': maximum context length is 8192 tokens.", None),
        ({"input": ["a", LONG]}, 400, "Invalid 'input[1]': maximum input length is 8192 tokens.", None),
        (
            {"input": ["word " * 8000] * 40},
            400,
            "Requested 320040 tokens, max 300000 tokens per request",
            "max_tokens_per_request",
        ),
        ({"model": "text-embedding-ada-002", "dimensions": 5}, 400, "This model does not support specifying", None),
        ({"dimensions": 1537}, 400, "Invalid value for 'dimensions' = 1537. Must be less than or equal to 1536.", None),
        ({"dimensions": 0}, 400, "Invalid value for 'dimensions' = 0.", None),
        ({"encoding_format": "int8"}, 400, "Invalid value for 'encoding_format'.", None),
        ({"extra": 1}, 400, "Unrecognized request argument supplied: extra", None),
        ({"model": None}, 400, "you must provide a model parameter", None),
        ({"model": "foo"}, 404, "The model `foo` does not exist or you do not have access to it.", "model_not_found"),
        ({"model": "gpt-4o"}, 403, "You are not allowed to generate embeddings from this model", None),
    ],
)
async def test_what_openai_refuses_is_refused_in_its_words(
    client: openai.AsyncOpenAI, emulator: OpenAIEmulator, body: dict[str, object], status: int, message: str, code: str
) -> None:
    """Each illegal body gets OpenAI's status, message and code, and costs nothing."""
    with pytest.raises(openai.APIStatusError) as refused:
        await client.post("/embeddings", body={"model": SMALL, "input": "a", **body}, cast_to=object)
    assert refused.value.status_code == status
    assert message in refused.value.message
    assert refused.value.code == code
    assert emulator.bill == Bill()


async def test_the_older_wording_is_still_spoken() -> None:
    """By a switch, a text that is too long is refused as OpenAI did before 2026."""
    async with (
        OpenAIEmulator(older_wording=True) as emulator,
        openai.AsyncOpenAI(api_key=emulator.api_key, base_url=emulator.base_url) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens, however you requeste"):
            await client.embeddings.create(model=SMALL, input=LONG)


async def test_a_wrong_key_is_refused_and_masked(emulator: OpenAIEmulator) -> None:
    """A foreign key gets 401 with its ends only."""
    async with openai.AsyncOpenAI(api_key="sk-somebody-else", base_url=emulator.base_url) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.embeddings.create(model=SMALL, input="a")
    assert refused.value.code == "invalid_api_key"
    assert "sk-so***else" in refused.value.message


async def test_a_fault_lasts_as_many_calls_as_it_was_given(
    client: openai.AsyncOpenAI, emulator: OpenAIEmulator
) -> None:
    """Faults come in the order in which they were injected, and the truth after them; only answers are billed."""
    emulator.inject(faults.status(500), calls=1)
    emulator.inject(faults.status(503), calls=2)
    statuses = []
    for _ in range(3):
        with pytest.raises(openai.InternalServerError) as failed:
            await client.embeddings.create(model=SMALL, input="a")
        statuses.append(failed.value.status_code)
    await client.embeddings.create(model=SMALL, input="a")
    assert statuses == [500, 503, 503]
    assert emulator.bill == Bill(requests=1, items=1, tokens=1)


async def test_a_minute_is_judged_strictly() -> None:
    """In any sixty seconds no more is admitted than the limit; the wait that is told is exactly long enough."""
    now = 100.0
    judge = Judge(requests_per_minute=0, tokens_per_minute=10, clock=lambda: now)
    async with (
        OpenAIEmulator(judge=judge) as emulator,
        openai.AsyncOpenAI(api_key=emulator.api_key, base_url=emulator.base_url, max_retries=0) as client,
    ):
        first = await client.embeddings.with_raw_response.create(model=SMALL, input="word word word word word word")
        assert first.headers["x-ratelimit-remaining-tokens"] == "4"
        assert first.headers["x-ratelimit-reset-tokens"] == "60.000s"
        now = 120.0
        await client.embeddings.create(model=SMALL, input="word word word word")
        with pytest.raises(openai.RateLimitError, match="Limit 10, Used 10, Requested 3") as refused:
            await client.embeddings.create(model=SMALL, input="word word word")
        assert refused.value.response.headers["retry-after-ms"] == "40000"
        assert refused.value.type == "tokens"
        now = 159.9
        with pytest.raises(openai.RateLimitError):
            await client.embeddings.create(model=SMALL, input="word word word")
        now = 160.0
        await client.embeddings.create(model=SMALL, input="word word word")
        with pytest.raises(openai.RateLimitError, match="Request too large for"):
            await client.embeddings.create(model=SMALL, input="word " * 11)
    assert (judge.refusals, emulator.bill.tokens) == (3, 13)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
async def test_each_row_of_the_sheet_is_answered_and_understood(case: Case) -> None:
    """The emulator answers it word for word, and the dialect knows what is to be done."""
    for trial in (answered, understood):
        async with OpenAIEmulator(judge=Judge(3000, 1_000_000)) as emulator:
            await trial(case, OpenAI, emulator, SMALL, {})
