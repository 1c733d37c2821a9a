"""Azure's stand-in is one for the official client, and the dialect speaks to it by both paths and both kinds of key."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Space
from app.errors import BadCredential, MalformedReply, ProviderError, Throttled
from app.providers.azure import Azure
from app.providers.cards import Quota
from app.providers.dialect import Target
from app.providers.openai import OpenAI
from app.providers.refusals import Answer
from tests.contract.tried import answered, understood
from tests.emulators.azure import CASES, AzureEmulator, DatedAzureEmulator
from tests.emulators.cases import Case
from tests.emulators.judge import Judge
from tests.identity import identifying_vectors
from tests.remote import remote

SMALL = "text-embedding-3-small"
TEXTS = ["one", "two", "three"]
VERSION = "2024-10-21"
DATED = {"api_version": VERSION}


@pytest.fixture
async def emulator() -> AsyncIterator[AzureEmulator]:
    """Azure, on loopback, with a deployment that is not called like its model."""
    async with AzureEmulator(deployments={"team-embed": SMALL, SMALL: SMALL}) as running:
        yield running


# ── the official client ─────────────────────────────────────────────────────────────────────────────────────────────


def _vectors(found: openai.types.CreateEmbeddingResponse) -> list[list[float]]:
    return [item.embedding for item in found.data]


async def test_the_client_for_azure_asks_the_deployment(emulator: AzureEmulator) -> None:
    """By the dated path, with a key or a token, a deployment answers its model's vectors under the model's name."""
    endpoint = emulator.base_url.removesuffix("/openai/v1")
    for key, token in ((emulator.api_key, None), (None, emulator.api_key)):
        async with openai.AsyncAzureOpenAI(
            azure_endpoint=endpoint, api_version=VERSION, api_key=key, azure_ad_token=token, max_retries=0
        ) as client:
            found = await client.embeddings.create(model=SMALL, input=TEXTS)
            short = await client.embeddings.create(model=SMALL, input=TEXTS, dimensions=64, encoding_format="float")
        np.testing.assert_array_equal(np.array(_vectors(found), "<f4"), identifying_vectors(TEXTS, SMALL, 1536))
        assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == (SMALL, 3, 3)
        assert [len(vector) for vector in _vectors(short)] == [64, 64, 64]
    paths = {arrival.path for arrival in emulator.arrivals}
    assert paths == {f"/openai/deployments/{SMALL}/embeddings?api-version={VERSION}"}


async def test_the_plain_client_asks_by_the_v1_path(emulator: AzureEmulator) -> None:
    """The blocking plain client, whose base URL ends in /openai/v1, names the deployment as its model."""

    def talk() -> openai.types.CreateEmbeddingResponse:
        with openai.OpenAI(base_url=f"{emulator.base_url}/", api_key=emulator.api_key, max_retries=0) as client:
            return client.embeddings.create(model="team-embed", input=TEXTS)

    found = await asyncio.to_thread(talk)
    assert found.model == SMALL
    np.testing.assert_array_equal(np.array(_vectors(found), "<f4"), identifying_vectors(TEXTS, SMALL, 1536))


@pytest.mark.parametrize(
    ("key", "model", "texts", "raised", "code"),
    [
        ("another", SMALL, TEXTS, openai.AuthenticationError, "401"),
        (None, "nobody", TEXTS, openai.NotFoundError, "DeploymentNotFound"),
        (None, SMALL, ["a", ""], openai.BadRequestError, None),
        (None, SMALL, ["word"] * 2049, openai.BadRequestError, None),
    ],
)
async def test_the_client_raises_its_own_errors(
    emulator: AzureEmulator, key: str, model: str, texts: list[str], raised: type[openai.APIStatusError], code: str
) -> None:
    """A wrong key, an unknown deployment and illegal texts are what the client expects of Azure."""
    async with openai.AsyncAzureOpenAI(
        azure_endpoint=emulator.base_url.removesuffix("/openai/v1"), api_version=VERSION,
        api_key=key or emulator.api_key, max_retries=0,
    ) as client:  # fmt: skip
        with pytest.raises(raised) as refused:
            await client.embeddings.create(model=model, input=texts)
    assert refused.value.code == code


async def test_the_client_is_told_when_to_come_back() -> None:
    """Over the limit the answer names the wait in both headers and in its words."""
    judge = Judge(requests_per_minute=1, clock=lambda: 100.0)
    async with (
        AzureEmulator(judge=judge) as emulator,
        openai.AsyncOpenAI(base_url=emulator.base_url, api_key=emulator.api_key, max_retries=0) as client,
    ):
        await client.embeddings.create(model=SMALL, input="a")
        with pytest.raises(openai.RateLimitError, match=r"call rate limit .* Please retry after 60 seconds") as refused:
            await client.embeddings.create(model=SMALL, input="a")
    assert refused.value.response.headers["retry-after-ms"] == "60000"


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
async def test_each_row_of_the_sheet_is_answered_and_understood(case: Case) -> None:
    """The emulator answers it word for word, and the dialect knows what is to be done."""
    for trial in (answered, understood):
        async with AzureEmulator(judge=Judge(6000, 1_000_000)) as emulator:
            await trial(case, Azure, emulator, SMALL, {})


# ── the dialect ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "options", "path"),
    [
        (AzureEmulator, {}, "/openai/v1/embeddings"),
        (AzureEmulator, {"api_version": "preview"}, "/openai/v1/embeddings?api-version=preview"),
        (DatedAzureEmulator, DATED, f"/openai/deployments/team-embed/embeddings?api-version={VERSION}"),
    ],
)
@pytest.mark.parametrize("auth", ["", "api-key", "bearer"])
async def test_both_paths_take_both_kinds_of_key(
    kind: type[AzureEmulator], options: dict[str, str], path: str, auth: str
) -> None:
    """The deployment stands in the path or in the body, the key in the one header that was chosen."""
    async with kind(deployments={"team-embed": SMALL}) as emulator:
        provider = remote(
            Azure, emulator.base_url, emulator.api_key, "team-embed", any_name=True, options={**options, "auth": auth}
        )
        reply = await provider.embed(TEXTS, Space(SMALL, 1536), timeout_s=10)
        await provider.aclose()
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, SMALL, 1536))
    (arrival,) = emulator.arrivals
    assert arrival.body == {"model": "team-embed", "encoding_format": "base64", "input": TEXTS}
    keys = {name: arrival.headers.get(name) for name in ("api-key", "authorization")}
    bearer = {"api-key": None, "authorization": f"Bearer {emulator.api_key}"}
    assert keys == (bearer if auth == "bearer" else {"api-key": emulator.api_key, "authorization": None})
    assert reply.tokens_billed == 3
    assert arrival.path == path


async def test_a_wrong_token_does_not_show(emulator: AzureEmulator) -> None:
    """A token that is not accepted is the operator's, and stands in no message."""
    provider = remote(Azure, emulator.base_url, "secret-token", SMALL, options={"auth": "bearer"})
    with pytest.raises(BadCredential) as refused:
        await provider.embed(TEXTS, Space(SMALL, 1536), timeout_s=10)
    await provider.aclose()
    assert "secret-token" not in f"{refused.value!r}"


def test_a_deployment_serves_openais_own_model_on_azures_terms() -> None:
    """The cards are the very same, so that vectors are one Space; prices, tiers and shutdown dates are Azure's."""
    for name, card in OpenAI.models.items():
        assert Azure.models[name] is card
    terms = Azure.terms(SMALL)
    assert terms is not None
    assert (terms.price, terms.batch_price, str(terms.shutdown)) == (22_000, None, "2028-02-09")
    assert (terms.tiers["1"], terms.tiers["6"]) == (Quota(6_000, 1_000_000), Quota(90_000, 15_000_000))
    assert terms.tiers["datazone-4"] == Quota(7_000, 7_000_000)
    assert OpenAI.terms(SMALL) is OpenAI.models[SMALL]
    assert Azure.terms("unknown") is None


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["error", "message", "code"]), inner),
    max_leaves=9,
)


@given(st.sampled_from([400, 401, 403, 404, 422, 429, 500]), _json, st.text(max_size=12))
def test_whatever_stands_in_an_error_it_has_a_meaning(status: int, said: object, wait: str) -> None:
    """No body and no header makes a refusal raise, and no wait is longer than two minutes or shorter than none."""
    answer = Answer(status, {"retry-after": wait, "retry-after-ms": wait}, bytearray(orjson.dumps(said)))
    refusal = Azure(Target(SMALL)).refusal(answer)
    assert isinstance(refusal, ProviderError)
    assert not isinstance(refusal, MalformedReply)
    if isinstance(refusal, Throttled) and refusal.retry_after_s is not None:
        assert 0 <= refusal.retry_after_s <= 120
