"""The dialect of another embedgate, against one: what is asked reaches it, what it refuses is understood."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from app.domain import Space
from app.errors import InputRefused, Misconfigured, ProviderError, QuotaExhausted, Throttled
from app.providers.cards import ModelCard
from app.providers.dialect import Target
from app.providers.embedgate import About, Embedgate
from app.providers.http import Endpoint
from app.providers.remote import RemoteProvider
from tests.api.conftest import KEY, SMALL, Edge, running, serving
from tests.identity import identifying_vectors

MODELS = """
[models.mine]
deployments = ["main"]
query_prompt = "query: "
[tenants.search]
api_key = "key-of-search"
[tenants.small]
api_key = "key-of-small"
tokens_per_minute = 10
[tenants.poor]
api_key = "key-of-poor"
budget_usd_per_day = 0.00000008
"""
OUTER = """
[deployments.inner]
dialect = "embedgate"
base_url = "{url}/v1"
api_key = "key-of-search"
model = "mine"
[models.ours]
deployments = ["inner"]
dimensions = 1536
"""


@asynccontextmanager
async def provider(edge: Edge, model: str = "mine", key: str = KEY) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at a running service."""
    dialect = Embedgate(Target(model, ModelCard(dimensions=1536, max_input_tokens=8192)))
    made = RemoteProvider(dialect, Endpoint(f"{edge.url}/v1", dialect.headers(key), max_connections=4))
    try:
        yield made
    finally:
        await made.aclose()


async def test_input_types_and_widths_reach_it(tmp_path: Path) -> None:
    """What stands in front of a query is the other's to know; a smaller vector is cut there."""
    async with running(tmp_path, tenants=MODELS) as edge, provider(edge) as asked:
        query = await asked.embed(["a", "b"], Space("mine", 1536, input_type="query"), timeout_s=10)
        np.testing.assert_array_equal(query.vectors, identifying_vectors(["query: a", "query: b"], SMALL, 1536))
        narrow = await asked.embed(["a"], Space("mine", 64, input_type="document"), timeout_s=10)
        assert narrow.vectors.shape == (1, 64)
        [full] = identifying_vectors(["a"], SMALL, 1536)
        np.testing.assert_allclose(narrow.vectors[0], full[:64] / np.linalg.norm(full[:64]), atol=1e-6)


async def twice(asked: RemoteProvider, texts: list[str], space: Space) -> None:
    """So that who may have little has had it."""
    await asked.embed(texts, space, timeout_s=10)
    await asked.embed([f"{text} again" for text in texts], space, timeout_s=10)


@pytest.mark.parametrize(
    ("how", "texts", "dimensions", "means"),
    [
        ({}, ["short", "word " * 9000], 1536, InputRefused),
        ({}, ["a"], 2000, Misconfigured),
        ({"model": "nobody"}, ["a"], 1536, Misconfigured),
        ({"key": "key-of-small"}, ["one two three four five six seven eight"], 1536, Throttled),
        ({"key": "key-of-poor"}, ["more words than there is money for"], 1536, QuotaExhausted),
    ],
    ids=["too long", "too wide", "unknown", "over its rate", "no money"],
)
async def test_its_refusals_mean_what_they_mean_there(
    tmp_path: Path, how: dict[str, Any], texts: list[str], dimensions: int, means: type[ProviderError]
) -> None:
    """A text at fault, a deployment at fault, a wait with its time, an end of the money."""
    async with running(tmp_path, tenants=MODELS) as edge, provider(edge, **how) as asked:
        with pytest.raises(ProviderError) as failed:
            await twice(asked, texts, Space("mine", dimensions))
    error = failed.value
    assert type(error) is means
    if isinstance(error, InputRefused):
        assert error.too_long
    if isinstance(error, Throttled):
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 60


async def test_one_embedgate_may_stand_before_another(tmp_path: Path) -> None:
    """As a configuration names it: by the dialect, and how wide the model is; callers' input types go through."""
    (tmp_path / "outer").mkdir()
    async with (
        running(tmp_path, tenants=MODELS) as edge,
        serving(tmp_path / "outer", OUTER.format(url=edge.url)) as (_, _, _, http),
    ):
        for kind, text in (("query", "query: a"), ("document", "a"), (None, "a")):
            answer = await http.post("/v1/embeddings", json={"model": "ours", "input": "a", "input_type": kind})
            [found] = [item["embedding"] for item in answer.json()["data"]]
            np.testing.assert_array_equal(np.array(found, "<f4"), identifying_vectors([text], SMALL, 1536)[0])


async def test_what_a_model_is_said_to_be_is_what_it_is(tmp_path: Path) -> None:
    """The spaces are those of answers; who takes longer texts than the model is not kept from them by counting."""
    cutting = MODELS.replace("query: ", 'query: "\nlong_input = "truncate').replace("[models.mine]", "[models.cut]")
    async with running(tmp_path, tenants=MODELS + cutting.partition("[tenants")[0]) as edge:
        mine, cut = [await about(edge.http, name) for name in ("mine", "cut")]
        for kind in (None, "query", "document"):
            answer = await edge.post({"model": "mine", "input": "a", "input_type": kind})
            assert answer.headers["x-embedgate-space"] == (mine.input_types["query"] if kind == "query" else mine.space)
    assert set(mine.input_types) == {"query"}
    assert mine.identity != cut.identity
    assert (mine.card.tokenizer, cut.card.tokenizer) == ("cl100k_base", "estimate")
    assert (mine.card.dimensions, mine.card.offers(64), mine.card.offers(2000), mine.card.price) == (
        1536, True, False, 20_000,
    )  # fmt: skip


async def about(http: httpx.AsyncClient, model: str) -> About:
    """What is told of a model."""
    answer = await http.get(f"/v1/models/{model}", headers={"authorization": f"Bearer {KEY}"})
    return msgspec.convert(answer.json()["embedgate"], About)
