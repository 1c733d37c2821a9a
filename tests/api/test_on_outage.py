"""Another model answers on outage only whom the operator and the caller allow it, and says so."""

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, InternalServerError

from app.runtime import Runtime
from tests.api.conftest import serving
from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vectors

SMALL, LARGE, ADA = "text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"
ALLOW = {"x-embedgate-allow-degraded": "true"}

CONFIGURATION = """
[server]
log_file = "{folder}/log.jsonl"
deadline_s = 5
[stores]
data_dir = "{folder}"
[deployments.first]
dialect = "openai"
base_url = "{first}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
[deployments.other]
dialect = "openai"
base_url = "{other}"
api_key = "sk-emulator-key"
model = "text-embedding-3-large"
[models.text-embedding-3-small]
deployments = ["first"]
on_outage = "text-embedding-3-large"
[models.text-embedding-3-large]
deployments = ["other"]
[tenants.all]
api_key = "all"
[tenants.only-small]
api_key = "only-small"
models = ["text-embedding-3-small"]
"""


@dataclass
class Pair:
    """A service with two models, and who stands behind each."""

    url: str
    first: OpenAIEmulator
    other: OpenAIEmulator
    runtime: Runtime
    http: httpx.AsyncClient
    log: Path

    async def ask(
        self, *texts: str, headers: Mapping[str, str] | None = None, key: str = "all", dimensions: int | None = None
    ) -> httpx.Response:
        """One request to the first model."""
        body: dict[str, Any] = {"model": SMALL, "input": list(texts), "encoding_format": "base64"}
        if dimensions:
            body["dimensions"] = dimensions
        return await self.http.post(
            "/v1/embeddings", json=body, headers={"authorization": f"Bearer {key}", **(headers or {})}
        )


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[Pair]:
    """The service."""
    async with OpenAIEmulator() as first, OpenAIEmulator() as other:
        text = CONFIGURATION.format(folder=folder, first=first.base_url, other=other.base_url)
        async with serving(folder, text) as (url, _, runtime, http):
            yield Pair(url, first, other, runtime, http, folder / "log.jsonl")


def vectors(answer: httpx.Response) -> np.ndarray:
    """The vectors of an answer."""
    return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer.json()["data"]])


async def test_who_allows_it_is_answered_by_the_other_model_and_told_so(tmp_path: Path) -> None:
    """From the first failure on: vectors, name and space are the other model's, all of one kind, none mixed in."""
    async with pair(tmp_path) as service:
        before = await service.ask("kept before")
        service.first.inject(faults.status(500))
        for at in range(12):
            answer = await service.ask("kept before", f"t{at}", headers=ALLOW)
            assert answer.status_code == 200
            assert answer.json()["model"] == LARGE
            assert answer.headers["x-embedgate-degraded"] == LARGE
            assert answer.headers["x-embedgate-deployment"] == "other"
            assert answer.headers["x-embedgate-space"] != before.headers["x-embedgate-space"]
            np.testing.assert_array_equal(vectors(answer), identifying_vectors(["kept before", f"t{at}"], LARGE, 3072))
        samples = {
            (sample.labels["model"], sample.labels["by"]): sample.value
            for metric in service.runtime.telemetry.degraded.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }
        assert samples == {(SMALL, LARGE): 12}


async def test_without_the_header_an_outage_is_an_outage(tmp_path: Path) -> None:
    """The caller gets an error, cached texts still answer, and the other model is not asked."""
    async with pair(tmp_path) as service:
        await service.ask("kept before")
        service.first.inject(faults.status(500))
        for at in range(8):
            answer = await service.ask(f"t{at}", headers={"x-embedgate-deadline-ms": "400"})
            assert answer.status_code in (502, 503, 504)
        kept = await service.ask("kept before")
        assert (kept.status_code, kept.json()["model"]) == (200, SMALL)
        assert not service.other.arrivals


async def test_the_first_models_cache_stays_clean(tmp_path: Path) -> None:
    """What was answered on outage is not what the model answers when it is back."""
    async with pair(tmp_path) as service:
        service.first.inject(faults.status(500))
        degraded = await service.ask("a", "b", headers=ALLOW)
        assert degraded.json()["model"] == LARGE
        service.first.heal()
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="all", max_retries=5) as client:
            healed = await client.embeddings.create(model=SMALL, input=["a", "b"])
        assert healed.model == SMALL
        found = np.array([item.embedding for item in healed.data], "<f4")
        np.testing.assert_array_equal(found, identifying_vectors(["a", "b"], SMALL, 1536))


async def test_a_smaller_size_is_the_other_models_own(tmp_path: Path) -> None:
    """`dimensions` holds for whoever answers."""
    async with pair(tmp_path) as service:
        service.first.inject(faults.status(500))
        answer = await service.ask("a", dimensions=256, headers=ALLOW)
        assert vectors(answer).shape == (1, 256)
        head = identifying_vectors(["a"], LARGE, 3072)[0, :256].astype(np.float64)
        np.testing.assert_allclose(vectors(answer)[0], head / np.linalg.norm(head), atol=1e-6)


async def test_a_key_that_may_not_use_the_other_model_is_not_answered_by_it(tmp_path: Path) -> None:
    """Allowing it oneself is no right to it."""
    async with pair(tmp_path) as service:
        service.first.inject(faults.status(500))
        answer = await service.ask("a", key="only-small", headers=ALLOW)
        assert answer.status_code == 502
        assert not service.other.arrivals


async def test_both_out_is_an_outage(tmp_path: Path) -> None:
    """When the other model is out as well, the caller gets the error."""
    async with pair(tmp_path) as service:
        service.first.inject(faults.status(500))
        service.other.inject(faults.status(500))
        assert (await service.ask("a", headers=ALLOW)).status_code == 502


async def test_what_the_other_model_refuses_is_still_an_outage(tmp_path: Path) -> None:
    """The caller's request was right for the model that it named: nobody tells it to change it."""
    async with pair(tmp_path) as service:
        service.other.poison.add("a")
        assert (await service.ask("accepted", headers=ALLOW)).status_code == 200
        service.first.inject(faults.status(500))
        for text in ("b", "a"):
            answer = await service.ask(text, headers=ALLOW)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_error")


@pytest.mark.parametrize("value", ["yes", "", "TRUE", "2"])
async def test_the_header_is_true_or_false(tmp_path: Path, value: str) -> None:
    """Anything else is a clear 400."""
    async with pair(tmp_path) as service:
        answer = await service.ask("a", headers={"x-embedgate-allow-degraded": value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "x-embedgate-allow-degraded"
        assert (await service.ask("a", headers={"x-embedgate-allow-degraded": "false"})).status_code == 200


async def test_the_official_client_asks_for_it_by_an_extra_header(tmp_path: Path) -> None:
    """`extra_headers` is all it takes; without it the client raises."""
    async with pair(tmp_path) as service:
        service.first.inject(faults.status(500))
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="all", max_retries=0) as client:
            answer = await client.embeddings.create(model=SMALL, input="a", extra_headers=ALLOW)
            assert answer.model == LARGE
            with pytest.raises(InternalServerError):
                await client.embeddings.create(model=SMALL, input="b")
