"""What every Provider promises, over every implementation: add an adapter to `ADAPTERS` and it is held to it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias

import numpy as np
import pytest

from app import vectors
from app.domain import Space
from app.errors import CallTimeout
from app.ports import Provider
from app.providers.openai import OpenAIProvider
from tests.emulators.openai import OpenAIEmulator

Subject: TypeAlias = tuple[Provider, Space]
TEXTS = ["the cat sat on the mat", "ein ganz anderer Satz", "три", "a much longer text " * 20]


@asynccontextmanager
async def openai_provider() -> AsyncIterator[Subject]:
    """The OpenAI dialect against the emulator."""
    async with OpenAIEmulator() as emulator:
        provider = OpenAIProvider(emulator.base_url, emulator.api_key, "text-embedding-3-small", max_in_flight=4)
        try:
            yield provider, Space("text-embedding-3-small", 1536)
        finally:
            await provider.aclose()


ADAPTERS: list[Callable[[], AbstractAsyncContextManager[Subject]]] = [openai_provider]


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.__name__)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """Each implementation in turn."""
    async with request.param() as made:
        yield made


async def test_each_text_gets_one_valid_vector(subject: Subject) -> None:
    """Rows are float32, finite, not zero, as many as texts and as wide as the Space."""
    provider, space = subject
    reply = await provider.embed(TEXTS, space, timeout_s=30)
    assert reply.vectors.dtype == np.float32
    vectors.check(reply.vectors, len(TEXTS), space.dimensions, unit_norm=space.normalised)


async def test_row_i_answers_text_i(subject: Subject) -> None:
    """A text's vector follows the text when the order changes, and is the one that it gets alone."""
    provider, space = subject
    forward = (await provider.embed(TEXTS, space, timeout_s=30)).vectors
    backward = (await provider.embed(TEXTS[::-1], space, timeout_s=30)).vectors
    np.testing.assert_allclose(np.vecdot(forward, backward[::-1]), 1.0, atol=1e-2)
    for text, row in zip(TEXTS, forward, strict=True):
        alone = (await provider.embed([text], space, timeout_s=30)).vectors[0]
        assert alone @ row == pytest.approx(1.0, abs=1e-2)


async def test_different_texts_get_different_vectors(subject: Subject) -> None:
    """No two of the texts share a vector."""
    provider, space = subject
    found = (await provider.embed(TEXTS, space, timeout_s=30)).vectors
    assert (found @ found.T - np.eye(len(TEXTS)) < 0.99).all()


async def test_a_lone_empty_text_is_answered(subject: Subject) -> None:
    """An empty text that travels alone gets a vector."""
    provider, space = subject
    reply = await provider.embed([""], space, timeout_s=30)
    vectors.check(reply.vectors, 1, space.dimensions, unit_norm=space.normalised)


async def test_the_bill_grows_with_the_text(subject: Subject) -> None:
    """Tokens are counted over the whole call, or not at all."""
    provider, space = subject
    short = (await provider.embed(TEXTS[:1], space, timeout_s=30)).tokens_billed
    long = (await provider.embed(TEXTS, space, timeout_s=30)).tokens_billed
    if short is not None or long is not None:
        assert short is not None
        assert long is not None
        assert 0 < short < long


async def test_at_least_one_vector_may_be_asked_for(subject: Subject) -> None:
    """There is always a legal call."""
    provider, _ = subject
    assert provider.max_items >= 1


async def test_calls_side_by_side_do_not_mix(subject: Subject) -> None:
    """Concurrent calls each get what they get alone."""
    provider, space = subject
    alone = (await provider.embed(TEXTS, space, timeout_s=30)).vectors
    replies = await asyncio.gather(*(provider.embed([text], space, timeout_s=30) for text in TEXTS * 3))
    for reply, row in zip(replies, [*alone, *alone, *alone], strict=True):
        assert reply.vectors[0] @ row == pytest.approx(1.0, abs=1e-2)


async def test_no_time_is_a_time_out(subject: Subject) -> None:
    """A call that may take no time at all ends as CallTimeout and the next one succeeds."""
    provider, space = subject
    with pytest.raises(CallTimeout):
        await provider.embed(TEXTS, space, timeout_s=0)
    await provider.embed(TEXTS, space, timeout_s=30)


async def test_a_cancelled_call_leaves_a_working_provider(subject: Subject) -> None:
    """Calls cancelled at many points leave no task behind, and the next call succeeds."""
    provider, space = subject
    before = asyncio.all_tasks()
    for turns in range(20):
        call = asyncio.create_task(provider.embed(TEXTS, space, timeout_s=30))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await provider.embed(TEXTS, space, timeout_s=30)
    assert asyncio.all_tasks() <= before
