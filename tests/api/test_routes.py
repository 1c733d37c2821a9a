"""What an operator can say about a model, through the whole service and the official client."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI

from app.tokens import Cl100k
from tests.api.conftest import serving
from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vector

MODEL = "text-embedding-3-small"


def deployment(name: str, base_url: str, more: str = "") -> str:
    """A deployment of the model."""
    return (
        f'[deployments.{name}]\ndialect = "openai"\nbase_url = "{base_url}"\napi_key = "sk-emulator-key"\n'
        f'model = "{MODEL}"\n{more}\n'
    )


def configuration(folder: Path, *parts: str) -> str:
    """The whole of it."""
    return f'[server]\nlog_file = "{folder}/log.jsonl"\n' + "".join(parts)


async def test_a_text_of_any_length_gets_the_mean_of_its_windows(tmp_path: Path) -> None:
    """30,000 tokens are four windows of at most 8,192 that overlap; usage is what was bought; again it is free."""
    text = " ".join(f"word{number}" for number in range(9_000))
    counted = Cl100k().count(text)
    model = f'[models.{MODEL}]\ndeployments = ["only"]\nlong_input = "mean"\noverlap_tokens = 100\n'
    async with OpenAIEmulator() as upstream:
        parts = deployment("only", upstream.base_url), model
        async with (
            serving(tmp_path, configuration(tmp_path, *parts)) as (url, *_),
            AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        ):
            answer = await client.embeddings.create(model=MODEL, input=["short", text])
            again = await client.embeddings.create(model=MODEL, input=text)
        windows = [sent for arrival in upstream.arrivals for sent in arrival.body["input"] if sent != "short"]
    counts = [Cl100k().count(window) for window in windows]
    assert len(windows) == -(-counted // 8_092)
    assert max(counts) <= 8_192
    assert answer.usage.total_tokens == sum(counts) + 1
    weighed = np.array(counts, np.float64) @ np.stack([identifying_vector(w, MODEL, 1536) for w in windows])
    np.testing.assert_allclose(answer.data[1].embedding, weighed / np.linalg.norm(weighed), atol=1e-6)
    np.testing.assert_allclose(answer.data[0].embedding, identifying_vector("short", MODEL, 1536), atol=1e-7)
    assert again.data[0].embedding == answer.data[1].embedding


async def test_two_keys_give_twice_the_quota_and_no_429(tmp_path: Path) -> None:
    """With `order = "spread"` thirty texts go at once through two keys of fifteen requests a minute, and break none."""
    judges = [Judge(requests_per_minute=15) for _ in range(2)]
    async with OpenAIEmulator(judge=judges[0]) as one, OpenAIEmulator(judge=judges[1]) as other:
        quota = "requests_per_minute = 15\nmax_batch_items = 1\n"
        parts = (
            deployment("one", one.base_url, quota),
            deployment("other", other.base_url, quota),
            f'[models.{MODEL}]\ndeployments = ["one", "other"]\norder = "spread"\n',
        )
        started = time.monotonic()
        async with (
            serving(tmp_path, configuration(tmp_path, *parts)) as (url, *_),
            AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        ):
            await client.embeddings.create(model=MODEL, input=[f"text {at}" for at in range(30)])
        assert time.monotonic() - started < 5
        assert Counter(len(each.arrivals) for each in (one, other)) == {15: 2}
        assert [judge.refusals for judge in judges] == [0, 0]


async def test_what_the_first_deployments_quota_does_not_hold_spills(tmp_path: Path) -> None:
    """With `spill = "now"` the dearer deployment takes what the cheap one may not, and only that."""
    async with OpenAIEmulator(judge=Judge(requests_per_minute=5)) as cheap, OpenAIEmulator() as dear:
        parts = (
            deployment("cheap", cheap.base_url, "requests_per_minute = 5\nmax_batch_items = 1\n"),
            deployment("dear", dear.base_url, "max_batch_items = 1\n"),
            f'[models.{MODEL}]\ndeployments = ["cheap", "dear"]\nspill = "now"\n',
        )
        async with (
            serving(tmp_path, configuration(tmp_path, *parts)) as (url, *_),
            AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        ):
            for at in range(12):
                await client.embeddings.create(model=MODEL, input=f"text {at}")
        assert (len(cheap.arrivals), len(dear.arrivals)) == (5, 7)
        assert cheap.judge.refusals == 0
