"""Cohere: the official client takes the stand-in for it, and the dialect says and understands what the sheet has."""

import contextlib
import time
from collections.abc import AsyncIterator

import cohere
import httpx
import numpy as np
import orjson
import pybase64
import pytest
from cohere.core.api_error import ApiError
from hypothesis import given
from hypothesis import strategies as st

from app.domain import InputType, Space, Truncation
from app.errors import InputRefused, MalformedReply, ProviderError, QuotaExhausted, Throttled
from app.providers.cohere import Cohere
from app.providers.dialect import Target
from app.providers.refusals import Answer
from app.providers.remote import RemoteProvider
from app.vectors import cut
from tests.emulators import faults
from tests.emulators.cases import Case
from tests.emulators.cohere import CASES, CohereEmulator
from tests.identity import identifying_vector, identifying_vectors
from tests.remote import remote

MODEL = "embed-v4.0"
SPACE = Space(MODEL, 1536)
TEXTS = ["one", "two", "three", "four"]
HONEST = {
    "model": MODEL, "texts": ["one", "two"], "input_type": "search_document", "embedding_types": ["float"],
    "truncate": "NONE",
}  # fmt: skip


@pytest.fixture
async def emulator() -> AsyncIterator[CohereEmulator]:
    """Cohere, on loopback."""
    async with CohereEmulator() as running:
        yield running


@pytest.fixture
async def client(emulator: CohereEmulator) -> AsyncIterator[cohere.AsyncClientV2]:
    """The official client, which retries nothing."""
    origin = emulator.base_url.removesuffix("/v2")
    async with cohere.AsyncClientV2(api_key=emulator.api_key, base_url=origin, max_retries=0) as made:
        yield made


@pytest.fixture
async def provider(emulator: CohereEmulator) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the emulator."""
    made = remote(Cohere, emulator.base_url, emulator.api_key, MODEL)
    yield made
    await made.aclose()


# ── the official client ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_official_client_gets_each_texts_own_vector(client: cohere.AsyncClientV2) -> None:
    """In every type and in another size the vectors are the texts' own, by position, and the bill is the tokens'."""
    found = await client.embed(
        model=MODEL, input_type="search_query", texts=["hello world", "b"], embedding_types=["float", "base64", "int8"]
    )
    expected = identifying_vectors(["hello world", "b"], MODEL, 1536) * np.float32(CohereEmulator.length)
    np.testing.assert_array_equal(np.array(found.embeddings.float_, dtype="<f4"), expected)
    by_bytes = [np.frombuffer(pybase64.b64decode(text), "<f4") for text in found.embeddings.base64 or []]
    np.testing.assert_array_equal(by_bytes, expected)
    assert np.abs(np.array(found.embeddings.int8) / 100 - expected).max() <= 0.005001
    assert found.texts == ["hello world", "b"]
    assert found.meta is not None
    assert found.meta.billed_units is not None
    assert found.meta.billed_units.input_tokens == 3
    small = await client.embed(model=MODEL, input_type="clustering", texts=["b"], output_dimension=256)
    head = np.frombuffer(cut(identifying_vector("b", MODEL, 1536).tobytes(), 256), "<f4")
    np.testing.assert_allclose(np.array(small.embeddings.float_)[0], head * 3, rtol=1e-6)


@pytest.mark.parametrize(("truncate", "read"), [("END", "alpha"), ("START", " omega")])
async def test_the_official_client_has_long_texts_cut(client: cohere.AsyncClientV2, truncate: str, read: str) -> None:
    """Of a long text its end or its start is lost, as the client says, and a warning tells it."""
    found = await client.embed(
        model=MODEL, input_type="search_document", texts=["alpha omega"], max_tokens=1, truncate=truncate
    )  # fmt: skip
    expected = identifying_vector(read, MODEL, 1536) * np.float32(CohereEmulator.length)
    np.testing.assert_array_equal(np.array(found.embeddings.float_, dtype="<f4")[0], expected)
    assert found.meta is not None
    assert found.meta.warnings == ["a text was cut"]


@pytest.mark.parametrize(
    ("asks", "raised", "message"),
    [
        ({"texts": ["a"] * 97}, cohere.BadRequestError, "total number of texts must be at most 96 - received 97"),
        ({"texts": ["a", ""]}, cohere.BadRequestError, "the empty string at index 1"),
        ({"input_type": "query"}, cohere.BadRequestError, "valid input_type must be provided"),
        ({"output_dimension": 7}, cohere.BadRequestError, "output_dimension must be one of"),
        ({"texts": ["a b c"], "max_tokens": 1, "truncate": "NONE"}, cohere.BadRequestError, "too many tokens"),
        ({"model": "xyz"}, cohere.NotFoundError, "model 'xyz' not found"),
        ({"texts": [1]}, cohere.UnprocessableEntityError, "unprocessable"),
    ],
)
async def test_the_official_client_raises_its_own_errors(
    client: cohere.AsyncClientV2, asks: dict[str, object], raised: type[ApiError], message: str
) -> None:
    """What the stand-in refuses arrives as the client's error for it, with the message."""
    with pytest.raises(raised) as refused:
        await client.embed(**{**HONEST, **asks})  # type: ignore[arg-type]  # on purpose
    assert message in refused.value.body["message"]


async def test_the_official_client_knows_a_wrong_key_and_a_spent_minute(
    client: cohere.AsyncClientV2, emulator: CohereEmulator
) -> None:
    """Each text counts as a request, the refusal names the time of the next, and a foreign key is unauthorised."""
    emulator.judge.requests_per_minute = 3
    await client.embed(model=MODEL, input_type="search_query", texts=["a", "b"])
    with pytest.raises(cohere.TooManyRequestsError) as refused:
        await client.embed(model=MODEL, input_type="search_query", texts=["a", "b"])
    assert refused.value.headers is not None
    assert 0 < int(refused.value.headers["x-ratelimit-reset"]) - time.time() <= 61
    emulator.api_key = "another-key"
    with pytest.raises(cohere.UnauthorizedError) as unknown:
        await client.embed(model=MODEL, input_type="search_query", texts=["a"])
    assert unknown.value.body["message"] == "invalid api token"


@pytest.mark.parametrize("case", [case for case in CASES if case.asks is None], ids=lambda case: case.row)
async def test_the_official_client_takes_what_is_injected(
    client: cohere.AsyncClientV2, emulator: CohereEmulator, case: Case
) -> None:
    """The answers that no request provokes are such that the client reads status and message from them."""
    emulator.inject(case.fault())
    with pytest.raises(ApiError) as refused:
        await client.embed(model=MODEL, input_type="search_query", texts=["a"])
    assert refused.value.status_code == case.status
    if not isinstance(case.body, str):
        assert refused.value.body == case.body


# ── the sheet, row by row ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
async def test_a_row_of_the_sheet(provider: RemoteProvider, emulator: CohereEmulator, case: Case) -> None:
    """A request brings what the row says, and the dialect makes of that answer what it means."""
    if case.asks is not None:
        key = {"authorization": f"Bearer {emulator.api_key}"}
        async with httpx.AsyncClient(base_url=emulator.base_url, headers=key, trust_env=False) as raw:
            said = await raw.post("/embed", json={**HONEST, **case.asks})
        assert said.status_code == case.status
        assert case.content in said.content
        assert case.headers.items() <= dict(said.headers).items()
        emulator.inject(faults.status(said.status_code, said.content, case.headers))
    else:
        emulator.inject(case.fault())
    if case.means is None:
        return
    with pytest.raises(ProviderError) as failed:
        await provider.embed(TEXTS, SPACE, timeout_s=10)
    assert type(failed.value) is case.means
    assert str(emulator.api_key) not in repr(failed.value)
    if isinstance(failed.value, Throttled):
        assert failed.value.retry_after_s == case.wait_s
    if isinstance(failed.value, InputRefused):
        assert (failed.value.position, failed.value.too_long) == (case.position, case.too_long)


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_only_what_is_needed_is_asked(provider: RemoteProvider, emulator: CohereEmulator) -> None:
    """A call names what Cohere demands, forbids cutting, and sends the key in its header and nowhere else."""
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    (arrival,) = emulator.arrivals
    assert arrival.body == {**HONEST, "texts": TEXTS}
    assert arrival.headers["authorization"] == f"Bearer {emulator.api_key}"


@pytest.mark.parametrize(
    ("input_type", "word"), [(None, "search_document"), ("document", "search_document"), ("query", "search_query")]
)
async def test_an_input_type_is_cohere_s_word(
    provider: RemoteProvider, emulator: CohereEmulator, input_type: InputType | None, word: str
) -> None:
    """Cohere takes no text without a type; one that has none is a document."""
    await provider.embed(TEXTS, Space(MODEL, 1536, input_type=input_type), timeout_s=10)
    assert emulator.arrivals[0].body["input_type"] == word


@pytest.mark.parametrize(("truncation", "word"), [("none", "NONE"), ("mean", "NONE"), ("end", "END")])
async def test_nothing_is_cut_unasked(
    provider: RemoteProvider, emulator: CohereEmulator, truncation: Truncation, word: str
) -> None:
    """Cohere would cut by itself, so every call says whether it may."""
    await provider.embed(TEXTS, Space(MODEL, 1536, truncation=truncation), timeout_s=10)
    assert emulator.arrivals[0].body["truncate"] == word


async def test_another_width_is_asked_for(emulator: CohereEmulator) -> None:
    """A deployment that buys a smaller width says so, and gets Cohere's own vector of it, brought to unit length."""
    provider = remote(Cohere, emulator.base_url, emulator.api_key, MODEL)
    reply = await provider.embed(TEXTS, Space(MODEL, 256), timeout_s=10)
    await provider.aclose()
    assert emulator.arrivals[0].body["output_dimension"] == 256
    expected = [np.frombuffer(cut(identifying_vector(text, MODEL, 1536).tobytes(), 256), "<f4") for text in TEXTS]
    np.testing.assert_allclose(reply.vectors, expected, rtol=1e-5)


# ── what is understood ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_vectors_come_back_at_unit_length(provider: RemoteProvider) -> None:
    """Cohere promises no length; what we hand on has one, and the bill is Cohere's."""
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    np.testing.assert_allclose(reply.vectors, identifying_vectors(TEXTS, MODEL, 1536), rtol=1e-5)
    assert reply.tokens_billed == 4


async def test_a_long_text_may_come_back_with_every_character_escaped(
    provider: RemoteProvider, emulator: CohereEmulator
) -> None:
    """The reply repeats the texts, and JSON may spend twelve bytes on one character of them."""
    text = "😀" * 40_000
    emulator.constant = True  # counting its tokens in earnest takes a second
    reply = await provider.embed([text], SPACE, timeout_s=10)
    assert reply.vectors.shape == (1, 1536)


@pytest.mark.parametrize("kind", ["int8", "uint8", "binary", "ubinary", "base64"])
async def test_another_type_is_never_taken_for_vectors(
    provider: RemoteProvider, emulator: CohereEmulator, kind: str
) -> None:
    """Only what stands under `float` is a vector, though others may have the right length."""
    emulator.inject(faults.altered(lambda said: said["embeddings"].update({kind: said["embeddings"].pop("float")})))
    with pytest.raises(MalformedReply):
        await provider.embed(TEXTS, SPACE, timeout_s=10)


async def test_types_that_nobody_asked_for_do_no_harm(provider: RemoteProvider, emulator: CohereEmulator) -> None:
    """Beside `float` there may be more, and nothing else of the reply is needed."""

    def add(said: dict[str, object]) -> None:
        floats = said["embeddings"]["float"]  # type: ignore[index]  # our own reply
        said.clear()
        said.update(embeddings={"int8": [[1]], "float": floats})

    emulator.inject(faults.altered(add))
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    np.testing.assert_allclose(reply.vectors, identifying_vectors(TEXTS, MODEL, 1536), rtol=1e-5)
    assert reply.tokens_billed is None


@pytest.mark.parametrize("meta", [None, 1, [], {}, {"billed_units": 1}, {"billed_units": {"input_tokens": "4"}}])
async def test_a_bill_that_is_none_spoils_nothing(
    provider: RemoteProvider, emulator: CohereEmulator, meta: object
) -> None:
    """Without a count that may be true the vectors are as good."""
    emulator.inject(faults.altered(lambda said: said.update(meta=meta)))
    assert (await provider.embed(TEXTS, SPACE, timeout_s=10)).tokens_billed is None


async def test_a_reset_is_waited_for(provider: RemoteProvider, emulator: CohereEmulator) -> None:
    """The Unix time in `x-ratelimit-reset` becomes seconds from now."""
    emulator.judge.requests_per_minute = 7  # each of the four texts counts
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    with pytest.raises(Throttled) as failed:
        await provider.embed(TEXTS, SPACE, timeout_s=10)
    assert failed.value.retry_after_s is not None
    assert 0 < failed.value.retry_after_s <= 61


@pytest.mark.parametrize("reset", ["", "soon", "946684800", "-1", "1e9", "9" * 40, "٣"])
def test_a_reset_that_says_nothing_is_none(reset: str) -> None:
    """What is past, no number or absurd names no time to come back."""
    failed = refusal(429, b"{}", {"x-ratelimit-reset": reset})
    assert isinstance(failed, Throttled)
    assert failed.retry_after_s is None


@pytest.mark.parametrize("when", ["/ month", "per month", "Monthly"])
def test_a_month_is_no_minute(when: str) -> None:
    """The calls of a trial key's month do not come back by waiting."""
    body = orjson.dumps({"message": f"You are using a Trial key, which is limited to 1000 API calls {when}."})
    assert type(refusal(429, body)) is QuotaExhausted


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


SECRET = "co-key or a text"


@given(status=st.integers(300, 599), message=JSON, tail=st.binary(max_size=4))
def test_no_refusal_raises_or_tells_what_it_says(status: int, message: object, tail: bytes) -> None:
    """Whatever stands in an error's body, it becomes an error of ours that repeats none of it."""
    failed = refusal(status, orjson.dumps({"id": message, "message": message}) + tail)
    assert str(failed).startswith(f"HTTP {status}")
    assert str(refusal(status, orjson.dumps({"message": SECRET}))) == str(refusal(status, b"{}"))


@given(embeddings=JSON, meta=JSON)
def test_no_reply_raises_what_is_foreign(embeddings: object, meta: object) -> None:
    """Whatever stands in a reply, reading it ends well or with ValueErrors, of which msgspec's are some."""
    for body in ({"embeddings": embeddings, "meta": meta}, {"embeddings": {"float": embeddings}, "meta": meta}):
        with contextlib.suppress(ValueError):
            Cohere(Target(MODEL)).read(bytearray(orjson.dumps(body)))


def refusal(status: int, body: bytes, headers: dict[str, str] | None = None) -> ProviderError:
    """What the dialect makes of an answer."""
    return Cohere(Target(MODEL)).refusal(Answer(status, headers or {}, bytearray(body)))


def test_the_cards_hold_what_the_sheet_says() -> None:
    """Prices, widths and quotas of the models, and how Cohere counts."""
    cards = Cohere.models
    assert {name: card.price for name, card in cards.items() if card.max_input_tokens == 128_000} == {
        "embed-v5.0-pro": 120_000, "embed-v5.0-fast": 80_000, "embed-v4.0": 120_000,
    }  # fmt: skip
    assert {card.price for card in cards.values() if card.max_input_tokens == 512} == {100_000}
    assert all(card.normalised == "never" and card.default_input_type == "document" for card in cards.values())
    assert {quota.requests_per_minute for card in cards.values() for quota in card.tiers.values()} == {2_000}
    assert (Cohere.max_batch_items, Cohere.counts_texts, Cohere.cuts) == (96, True, True)
