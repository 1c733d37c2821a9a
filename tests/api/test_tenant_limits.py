"""A tenant over its limits is told so in OpenAI's words, in a way that the official client understands."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest

from app.storage.limiter import InProcessLimiter
from tests.api.conftest import ADA, ADA_KEY, KEY, SMALL, Edge, running

FIVE = "five tokens are in here"


@asynccontextmanager
async def limiting(folder: Path, limits: str) -> AsyncIterator[Edge]:
    """A service whose tenant `search` has `limits`."""
    tenants = f'[tenants.search]\napi_key = "{KEY}"\n{limits}\n[tenants.archive]\napi_key = "{ADA_KEY}"\n'
    async with running(folder, tenants=tenants) as edge:
        yield edge


def client(edge: Edge) -> openai.AsyncOpenAI:
    """The official client as it comes, with its own two retries."""
    return openai.AsyncOpenAI(api_key=KEY, base_url=f"{edge.url}/v1")


async def ask(edge: Edge, *texts: str) -> httpx.Response:
    """One request of `search`."""
    return await edge.post({"model": SMALL, "input": list(texts)})


def fault(answer: httpx.Response) -> tuple[str, str, str]:
    """Type, code and message of a 429 in the one envelope, whose param is null."""
    assert answer.status_code == 429
    said = answer.json()
    assert list(said) == ["error"]
    assert sorted(said["error"]) == ["code", "message", "param", "type"]
    assert said["error"]["param"] is None
    return said["error"]["type"], said["error"]["code"], said["error"]["message"]


def wait_s(answer: httpx.Response) -> float:
    """How long both headers say to wait; another try is worth it."""
    wait_ms = int(answer.headers["retry-after-ms"])
    assert int(answer.headers["retry-after"]) == -(-wait_ms // 1000)
    assert "x-should-retry" not in answer.headers
    return wait_ms / 1000


async def test_over_its_tokens_per_minute(tmp_path: Path) -> None:
    """E32: the limit, the wish and the wait; nothing is sent, other tenants and what is kept pass."""
    async with limiting(tmp_path, "tokens_per_minute = 8") as edge:
        assert (await ask(edge, FIVE)).status_code == 200
        answer = await ask(edge, "four tokens in here")
        kind, code, message = fault(answer)
        assert (kind, code) == ("tokens", "rate_limit_exceeded")
        head, tail = "Rate limit reached for tokens. Limit 8/min, requested 4. Please try again in ", "s."
        assert message.startswith(head)
        assert message.endswith(tail)
        assert 55.0 < float(message.removeprefix(head).removesuffix(tail)) < 62.0
        assert 55.0 < wait_s(answer) <= 60.0
        assert (await ask(edge, FIVE)).headers["x-embedgate-cache"] == "hit=1,miss=0"
        others = await edge.post({"model": ADA, "input": FIVE}, authorization=f"Bearer {ADA_KEY}")
        assert others.status_code == 200
        assert edge.answers(429, "rate_limit_exceeded") == 1


async def test_over_its_requests_per_minute(tmp_path: Path) -> None:
    """E32 for requests, of which a list of texts is one."""
    async with limiting(tmp_path, "requests_per_minute = 2") as edge:
        assert [(await ask(edge, f"a{n}", f"b{n}")).status_code for n in range(2)] == [200, 200]
        answer = await ask(edge, "c")
        kind, code, message = fault(answer)
        assert (kind, code) == ("requests", "rate_limit_exceeded")
        assert message.startswith("Rate limit reached for requests. Limit 2/min, requested 1. Please try again in ")
        assert wait_s(answer) > 55.0


async def test_a_request_for_more_than_the_whole_limit(tmp_path: Path) -> None:
    """E33: it can never pass, so no wait is named and the official client asks only once."""
    async with limiting(tmp_path, "tokens_per_minute = 8") as edge:
        answer = await ask(edge, FIVE, "and five are in here")
        message = "Request too large. Limit 8 tokens/min, requested 10."
        assert fault(answer) == ("tokens", "rate_limit_exceeded", message)
        assert answer.headers["x-should-retry"] == "false"
        assert not {"retry-after", "retry-after-ms"} & set(answer.headers)
        async with client(edge) as made:
            with pytest.raises(openai.RateLimitError) as caught:
                await made.embeddings.create(model=SMALL, input=[FIVE, "and five are in here"])
        assert caught.value.code == "rate_limit_exceeded"
        assert edge.answers(429, "rate_limit_exceeded") == 2


async def test_too_many_requests_at_once(tmp_path: Path) -> None:
    """E35: of two at one moment one is refused, and passes after the other."""
    async with limiting(tmp_path, "max_in_flight = 1") as edge:
        edge.upstream.latency_s = 0.3
        good, bad = sorted(await asyncio.gather(ask(edge, "one"), ask(edge, "two")), key=lambda it: it.status_code)
        assert good.status_code == 200
        assert fault(bad) == ("requests", "concurrency_limit_exceeded", "Too many concurrent requests. Limit 1.")
        assert 1.0 <= wait_s(bad) <= 1.2
        assert (await ask(edge, "one", "two")).status_code == 200


async def test_the_official_client_waits_and_succeeds(tmp_path: Path) -> None:
    """It is told to wait, does so by itself, and is let in: here when the minute is nearly over."""
    async with limiting(tmp_path, "tokens_per_minute = 8") as edge, client(edge) as made:
        await made.embeddings.create(model=SMALL, input=FIVE)
        limiter, loop = edge.runtime.gateway._parts.limiter, asyncio.get_running_loop()
        assert isinstance(limiter, InProcessLimiter)
        limiter._clock = lambda: loop.time() + 59.5
        found = await made.embeddings.create(model=SMALL, input="four tokens in here")
        assert len(found.data) == 1
        assert edge.answers(429, "rate_limit_exceeded") == 1
