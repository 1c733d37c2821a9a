"""The stand-ins for vendors' batches are ones: the vendors' own clients order, watch and cancel batches there."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import orjson
import pytest
from google import genai
from google.genai import errors, types

from tests.emulators.gemini import GeminiEmulator
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Bill
from tests.emulators.voyage import VoyageEmulator
from tests.identity import identifying_vector, identifying_vectors

SMALL, VOYAGE, GEMINI = "text-embedding-3-small", "voyage-4", "gemini-embedding-001"
TEXTS = ["one", "two", "three"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:batches.create_embeddings"),
]


def lines(*bodies: dict[str, Any], **common: str) -> bytes:
    """An input file; the lines are called r-0, r-1 and so on."""
    return b"\n".join(
        orjson.dumps({"custom_id": f"r-{place}", **common, "body": body}) for place, body in enumerate(bodies)
    )


def openai_lines(*texts: str, **fields: object) -> bytes:
    """An input file of OpenAI's."""
    bodies = [{"model": SMALL, "input": text, **fields} for text in texts]
    return lines(*bodies, method="POST", url="/v1/embeddings")


async def read(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of an output file by their names."""
    assert file_id is not None
    content = (await client.files.content(file_id)).content
    return {line["custom_id"]: line for line in map(orjson.loads, content.splitlines())}


# ── OpenAI ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


async def ordered(client: openai.AsyncOpenAI, content: bytes) -> openai.types.Batch:
    """A batch of this input file."""
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.purpose, file.bytes, file.filename) == ("batch", len(content), "in.jsonl")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"k": "v"}
    )


async def test_openais_client_gets_each_lines_own_vector(client: openai.AsyncOpenAI, emulator: OpenAIEmulator) -> None:
    """A batch goes from validating over in progress to completed; good and bad lines come in a file each."""
    emulator.poison.add("three")
    batch = await ordered(client, openai_lines(*TEXTS, ""))
    seen = [batch.status]
    while batch.status in ("validating", "in_progress"):
        batch = await client.batches.retrieve(batch.id)
        seen.append(batch.status)
    assert seen == ["validating", "in_progress", "completed"]
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (4, 3, 1)
    good, bad = await read(client, batch.output_file_id), await read(client, batch.error_file_id)
    for place in (0, 1):
        body = good[f"r-{place}"]["response"]["body"]
        assert body["usage"] == {"prompt_tokens": 1, "total_tokens": 1}
        found = np.array(body["data"][0]["embedding"], "<f4")
        np.testing.assert_array_equal(found, identifying_vector(TEXTS[place], SMALL, 1536))
    assert bad.keys() == {"r-2"}
    assert bad["r-2"]["response"]["status_code"] == 400
    assert (emulator.batch_bill, emulator.bill) == (Bill(3, 3, 2), Bill())


async def test_openais_client_lists_and_cancels(client: openai.AsyncOpenAI, emulator: OpenAIEmulator) -> None:
    """Batches are listed the newest first over several pages; a cancelled one answers each line."""
    made = [await ordered(client, openai_lines("one")) for _ in range(3)]
    listed = [batch async for batch in await client.batches.list(limit=2)]
    assert [batch.id for batch in listed] == [batch.id for batch in reversed(made)]
    assert listed[0].metadata == {"k": "v"}
    assert (await client.batches.cancel(made[0].id)).status == "cancelling"
    batch = await client.batches.retrieve(made[0].id)
    assert (batch.status, batch.output_file_id) == ("cancelled", None)
    (line,) = (await read(client, batch.error_file_id)).values()
    assert line["error"]["code"] == "batch_cancelled"
    assert [file.id async for file in await client.files.list(purpose="batch")] == [
        batch.input_file_id for batch in reversed(made)
    ]
    await client.files.delete(made[0].input_file_id)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(made[0].input_file_id)


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (openai_lines("one") + b"\nno json", "invalid_json_line", 2),
        (openai_lines("one") + b"\n" + openai_lines("one"), "duplicate_custom_id", 2),
        (lines({"model": SMALL, "input": "a"}, method="POST", url="/v1/completions"), "url_mismatch", 1),
    ],
)
async def test_a_bad_file_fails_its_batch(
    client: openai.AsyncOpenAI, emulator: OpenAIEmulator, content: bytes, code: str, line: int | None
) -> None:
    """After it was accepted, with the line that is wrong."""
    emulator.batches.steps = 0
    batch = await client.batches.retrieve((await ordered(client, content)).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, line)


async def test_openai_refuses_and_lets_expire(client: openai.AsyncOpenAI, emulator: OpenAIEmulator) -> None:
    """A full queue refuses a batch or fails it, an unknown file is not found, and what expires keeps what was done."""
    emulator.batches.steps = 0
    emulator.batches.lapses_after = 1
    batch = await client.batches.retrieve((await ordered(client, openai_lines(*TEXTS))).id)
    assert batch.status == "expired"
    assert (await read(client, batch.output_file_id)).keys() == {"r-0"}
    left = await read(client, batch.error_file_id)
    assert {key: line["error"]["code"] for key, line in left.items()} == dict.fromkeys(("r-1", "r-2"), "batch_expired")
    emulator.batches.queue_full = True
    batch = await client.batches.retrieve((await ordered(client, openai_lines(*TEXTS))).id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].code == "token_limit_exceeded"
    emulator.batches.most_open = 0
    with pytest.raises(openai.RateLimitError):
        await ordered(client, openai_lines("one"))
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(input_file_id="file-x", endpoint="/v1/embeddings", completion_window="24h")


# ── Voyage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_openais_client_orders_at_voyage() -> None:
    """What all lines share is in `request_params`; the end of the twelve hours fails lines and no batch."""
    async with (
        VoyageEmulator() as emulator,
        openai.AsyncOpenAI(api_key=emulator.api_key, base_url=emulator.base_url, max_retries=0) as client,
    ):
        emulator.batches.steps = 0
        emulator.batches.lapses_after = 2
        content = lines({"input": ["one", "two"]}, {"input": [""]}, {"input": ["three"]})
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        params = {"model": VOYAGE, "input_type": "document", "output_dimension": 2048}
        with pytest.raises(openai.BadRequestError):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/embeddings",
            completion_window="12h",  # type: ignore[arg-type]  # Voyage's own
            metadata={"k": "v"},
            extra_body={"request_params": params},
        )
        batch = await client.batches.retrieve(batch.id)
        assert (batch.status, batch.metadata) == ("completed", {"k": "v"})
        body = (await read(client, batch.output_file_id))["r-0"]["response"]["body"]
        found = np.array([item["embedding"] for item in body["data"]], "<f4")
        np.testing.assert_array_equal(found, identifying_vectors(["one", "two"], VOYAGE, 2048))
        bad = await read(client, batch.error_file_id)
        assert "empty strings" in bad["r-1"]["response"]["message"]
        assert bad["r-2"]["error"]["code"] == "batch_expired"
        assert emulator.batch_bill.items == 2
        assert [each.id async for each in await client.batches.list()] == [batch.id]


# ── Gemini ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def google() -> AsyncIterator[tuple[genai.client.AsyncClient, GeminiEmulator]]:
    """Google's own client and Gemini."""
    async with GeminiEmulator() as running:
        where = types.HttpOptions(base_url=running.base_url.removesuffix(running.prefix))
        with genai.Client(api_key=running.api_key, http_options=where) as made:
            async with made.aio as talking:
                yield talking, running


async def test_googles_client_embeds_inline(google: tuple[genai.client.AsyncClient, GeminiEmulator]) -> None:
    """`batches.create_embeddings` with contents: pending, running, and then an answer for each in their order."""
    client, emulator = google
    contents: list[Any] = list(TEXTS)
    source = types.EmbeddingsBatchJobSource(
        inlined_requests=types.EmbedContentBatch(
            contents=contents, config=types.EmbedContentConfig(task_type="CLUSTERING", output_dimensionality=128)
        )
    )
    job = await client.batches.create_embeddings(model=GEMINI, src=source, config={"display_name": "d"})
    states = [job.state]
    assert job.name is not None
    for _ in range(2):
        job = await client.batches.get(name=str(job.name))
        states.append(job.state)
    assert states == [
        types.JobState.JOB_STATE_PENDING,
        types.JobState.JOB_STATE_RUNNING,
        types.JobState.JOB_STATE_SUCCEEDED,
    ]
    assert job.display_name == "d"
    assert job.dest is not None
    assert job.dest.inlined_embed_content_responses is not None
    found = [each.response.embedding.values for each in job.dest.inlined_embed_content_responses if each.response]  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.array(found, "<f4"), identifying_vectors(TEXTS, GEMINI, 3072)[:, :128])
    assert emulator.batch_bill.items == 3


async def test_googles_client_embeds_a_file(
    google: tuple[genai.client.AsyncClient, GeminiEmulator], tmp_path: Any
) -> None:
    """An upload in pieces, a batch of that file, its list, and the file of answers by key."""
    client, emulator = google
    emulator.batches.steps = 0
    emulator.poison.add("three")
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join(
            orjson.dumps(
                {"key": text, "request": {"content": {"parts": [{"text": text}]}, "output_dimensionality": 768}}
            )
            for text in TEXTS
        )
    )
    file = await client.files.upload(file=tmp_path / "in.jsonl", config={"mime_type": "application/jsonl"})
    job = await client.batches.create_embeddings(
        model=GEMINI, src={"file_name": file.name}, config={"display_name": "f"}
    )
    job = await client.batches.get(name=str(job.name))
    assert [each.display_name async for each in await client.batches.list(config={"page_size": 10})] == ["f"]
    assert job.dest is not None
    content = await client.files.download(file=str(job.dest.file_name))
    answers = {line["key"]: line for line in map(orjson.loads, content.splitlines())}
    np.testing.assert_array_equal(
        np.array([answers[text]["response"]["embedding"]["values"] for text in TEXTS[:2]], "<f4"),
        identifying_vectors(TEXTS[:2], GEMINI, 3072)[:, :768],
    )
    assert answers["three"]["error"]["code"] == 3


async def test_googles_client_cancels_and_is_refused(google: tuple[genai.client.AsyncClient, GeminiEmulator]) -> None:
    """A cancelled batch says so; a full queue refuses with a bare 429."""
    client, emulator = google
    inline: Any = {"inlined_requests": {"contents": ["one"]}}
    job = await client.batches.create_embeddings(model=GEMINI, src=inline)
    await client.batches.cancel(name=str(job.name))
    assert (await client.batches.get(name=str(job.name))).state == types.JobState.JOB_STATE_CANCELLED
    emulator.batches.most_open = 0
    with pytest.raises(errors.ClientError) as refused:
        await client.batches.create_embeddings(model=GEMINI, src=inline)
    assert refused.value.code == 429
