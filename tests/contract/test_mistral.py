"""Mistral's stand-in is one for the official client, and the dialect asks and understands it as the sheet has it."""

import contextlib
from collections.abc import AsyncIterator

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistralai.client import Mistral as Client
from mistralai.client.errors import HTTPValidationError, SDKError
from mistralai.client.models import EmbeddingResponse

from app.domain import Space
from app.errors import (
    BadCredential,
    InputRefused,
    MalformedReply,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    Throttled,
)
from app.ports import Stated
from app.providers.dialect import Target
from app.providers.mistral import Mistral
from app.providers.refusals import Answer
from app.providers.remote import RemoteProvider
from app.vectors import cut
from tests.contract.tried import answered, understood
from tests.emulators import faults
from tests.emulators.cases import Case
from tests.emulators.judge import Judge
from tests.emulators.mistral import CASES, MistralEmulator
from tests.identity import identifying_vector, identifying_vectors
from tests.remote import remote

EMBED, CODE = "mistral-embed", "codestral-embed"
SPACE = Space(EMBED, 1024)
TEXTS = ["one", "two", "three", "four"]


@pytest.fixture
async def emulator() -> AsyncIterator[MistralEmulator]:
    """Mistral, on loopback, with the limits that every account has."""
    async with MistralEmulator(judge=Judge(100_000, 100_000_000)) as running:
        yield running


@pytest.fixture
async def client(emulator: MistralEmulator) -> AsyncIterator[Client]:
    """The official client, which retries nothing unless it is told to."""
    async with Client(api_key=emulator.api_key, server_url=emulator.base_url.removesuffix("/v1")) as made:
        yield made


@pytest.fixture
async def provider(emulator: MistralEmulator) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the emulator."""
    made = remote(Mistral, emulator.base_url, emulator.api_key, EMBED)
    yield made
    await made.aclose()


# ── the official client ─────────────────────────────────────────────────────────────────────────────────────────────


def _vectors(found: EmbeddingResponse) -> np.ndarray:
    return np.array([item.embedding for item in found.data], dtype="<f4")


async def test_the_official_client_gets_each_texts_own_vector(client: Client) -> None:
    """`data[i]` is the vector of input i, alone or in company, and usage says what it cost."""
    found = await client.embeddings.create_async(model=EMBED, inputs=["hello world", "b"])
    assert [item.index for item in found.data] == [0, 1]
    np.testing.assert_array_equal(_vectors(found), identifying_vectors(["hello world", "b"], EMBED, 1024))
    assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == (EMBED, 3, 3)
    assert (found.usage.completion_tokens, found.usage.prompt_audio_seconds) == (0, None)
    alone = await client.embeddings.create_async(model=EMBED, inputs="b", encoding_format="float")
    np.testing.assert_array_equal(_vectors(alone)[0], _vectors(found)[1])


async def test_the_official_client_chooses_a_width(client: Client) -> None:
    """codestral-embed makes 1536 numbers unless it is asked for others, and all are heads of the widest."""
    full = identifying_vector("b", CODE, 3072).tobytes()
    for asked, vector in ((None, cut(full, 1536)), (7, cut(full, 7)), (3072, full)):
        found = await client.embeddings.create_async(model=CODE, inputs=["b"], output_dimension=asked)
        assert _vectors(found)[0].tobytes() == vector


@pytest.mark.parametrize(
    ("model", "inputs", "status", "said"),
    [
        (EMBED, ["a"] * 257, 400, '"code":"3210"'),
        (EMBED, ["word " * 6000] * 3, 400, "Too many tokens overall, split into more batches."),
        (EMBED, ["word " * 8193], 400, '"object":"error"'),
        ("mistral-foo", ["a"], 400, '"type":"invalid_model"'),
    ],
)
async def test_the_official_client_raises_what_is_refused(
    client: Client, model: str, inputs: list[str], status: int, said: str
) -> None:
    """Sizes and unknown models come to the client as its own error, with Mistral's body."""
    with pytest.raises(SDKError) as refused:
        await client.embeddings.create_async(model=model, inputs=inputs)
    assert refused.value.status_code == status
    assert said in refused.value.body


async def test_the_official_client_understands_the_validator(client: Client) -> None:
    """A width that the model does not make is a 422, whose parts the client can read."""
    with pytest.raises(HTTPValidationError) as refused:
        await client.embeddings.create_async(model=EMBED, inputs=["a"], output_dimension=5)
    assert [complaint.loc for complaint in refused.value.data.detail or []] == [["body", "output_dimension"]]


async def test_the_official_client_is_told_of_keys_and_limits(emulator: MistralEmulator) -> None:
    """A foreign key is a 401; the call too many is a 429 of the gateway, the tokens too many one with code 1300."""
    url = emulator.base_url.removesuffix("/v1")
    async with Client(api_key="foreign", server_url=url) as foreign:
        with pytest.raises(SDKError, match="Unauthorized") as refused:
            await foreign.embeddings.create_async(model=EMBED, inputs=["a"])
    assert refused.value.status_code == 401
    for judge, said in ((Judge(requests_per_minute=1), "Requests rate limit"), (Judge(tokens_per_minute=1), "1300")):
        judge.clock = lambda: 100.0
        emulator.judge = judge
        async with Client(api_key=emulator.api_key, server_url=url) as client:
            await client.embeddings.create_async(model=EMBED, inputs=["a"])
            with pytest.raises(SDKError, match=said) as refused:
                await client.embeddings.create_async(model=EMBED, inputs=["a"])
        assert (refused.value.status_code, refused.value.headers["retry-after"]) == (429, "60")


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
async def test_each_row_of_the_sheet_is_answered_and_understood(emulator: MistralEmulator, case: Case) -> None:
    """The emulator answers it word for word, and the dialect knows what is to be done."""
    await answered(case, Mistral, emulator, EMBED, {})
    if case.means is not None:
        await understood(case, Mistral, emulator, EMBED, {})


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_only_what_is_needed_is_asked(provider: RemoteProvider, emulator: MistralEmulator) -> None:
    """A call names model, texts and base64, and sends the key in its header and nowhere else."""
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    (arrival,) = emulator.arrivals
    assert arrival.body == {"model": EMBED, "input": TEXTS, "encoding_format": "base64"}
    assert arrival.headers["authorization"] == f"Bearer {emulator.api_key}"
    assert reply.tokens_billed == 4
    assert reply.stated == Stated(100_000, 100_000_000, 99_999, 99_999_996)


@pytest.mark.parametrize("width", [1, 256, 3072])
async def test_another_width_is_asked_for_in_mistrals_word(emulator: MistralEmulator, width: int) -> None:
    """A deployment that buys another width gets the vendor's own cut of the widest vector."""
    provider = remote(Mistral, emulator.base_url, emulator.api_key, CODE)
    reply = await provider.embed(TEXTS, Space(CODE, width), timeout_s=10)
    await provider.aclose()
    asked = emulator.arrivals[0].body
    assert asked == {"model": CODE, "input": TEXTS, "encoding_format": "base64", "output_dimension": width}
    expected = [np.frombuffer(cut(identifying_vector(text, CODE, 3072).tobytes(), width), "<f4") for text in TEXTS]
    np.testing.assert_allclose(reply.vectors, expected, rtol=1e-6)


# ── what is understood ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [faults.out_of_order, faults.no_index, faults.as_floats])
async def test_an_odd_but_true_reply_is_understood(
    provider: RemoteProvider, emulator: MistralEmulator, fault: faults.Fault
) -> None:
    """Another order, no index and numbers instead of base64 give the same vectors."""
    emulator.inject(fault)
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, EMBED, 1024))


async def test_vectors_of_another_length_become_units(provider: RemoteProvider, emulator: MistralEmulator) -> None:
    """Nobody promises unit vectors, so they are made."""
    emulator.spoil(lambda rows: [(place, vector * np.float32(3)) for place, vector in rows])
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    np.testing.assert_allclose(reply.vectors, identifying_vectors(TEXTS, EMBED, 1024), rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "named", "accepted"),
    [
        (EMBED, EMBED, True),
        (EMBED, f"{EMBED}-2312", True),
        (f"{EMBED}-2312", EMBED, True),
        (f"{EMBED}-2312", f"{EMBED}-2312", True),
        (EMBED, None, True),
        (EMBED, CODE, False),
        (EMBED, f"{EMBED}-large", False),
        (EMBED, 2312, False),
    ],
)
async def test_a_model_and_its_release_are_one(
    emulator: MistralEmulator, asked: str, named: object, accepted: bool
) -> None:
    """A reply may name the model with or without its release; another model's vectors are no answer."""
    emulator.inject(faults.altered(lambda reply: reply.update(model=named)))
    provider = remote(Mistral, emulator.base_url, emulator.api_key, asked)
    with contextlib.nullcontext() if accepted else pytest.raises(MalformedReply, match="another model"):
        await provider.embed(TEXTS, Space(asked, 1024), timeout_s=10)
    await provider.aclose()


def refusal(status: int, said: object, headers: dict[str, str] | None = None) -> ProviderError:
    """What the dialect makes of an answer."""
    return Mistral(Target(EMBED)).refusal(Answer(status, headers or {}, bytearray(orjson.dumps(said))))


@pytest.mark.parametrize(
    ("detail", "expected", "position"),
    [
        ([{"loc": ["body", "input", 3]}], InputRefused, 3),
        ([{"loc": ["body", "input", "str"]}, {"loc": ["body", "input", "list[str]", 1]}], InputRefused, 1),
        ([{"loc": ["body", "input", True]}], InputRefused, None),
        ([{"loc": ["body"]}, {"loc": "body"}, {"loc": ["body", 7]}, 7], InputRefused, None),
        ([{"loc": ["body", "input", 1]}, {"loc": ["body", "model"]}], Misconfigured, None),
        ({"loc": ["body", "model"]}, InputRefused, None),
        (None, InputRefused, None),
    ],
)
def test_a_validator_says_whose_fault_it_is(
    detail: object, expected: type[ProviderError], position: int | None
) -> None:
    """Only a place within the input names a text, and no text is to blame for another field."""
    failed = refusal(422, {"detail": detail})
    assert type(failed) is expected
    assert getattr(failed, "position", None) == position


@pytest.mark.parametrize(
    ("status", "said", "headers", "expected"),
    [
        (403, {"message": "Inactive subscription or usage limit reached"}, {}, QuotaExhausted),
        (429, {"message": "Monthly tokens limit exceeded"}, {}, QuotaExhausted),
        (429, {}, {"x-ratelimit-remaining-tokens-month": "0"}, QuotaExhausted),
        (429, {}, {"x-ratelimitbysize-remaining-month": "12"}, Throttled),
        (429, {}, {"x-ratelimit-remaining-tokens-minute": "0"}, Throttled),
        (401, {"message": ["month"]}, {}, BadCredential),
        (400, {"message": "which month"}, {}, InputRefused),
    ],
)
def test_what_waiting_does_not_mend_is_told_apart(
    status: int, said: object, headers: dict[str, str], expected: type[ProviderError]
) -> None:
    """A month or a plan that is used up is no throttle and no bad key."""
    assert type(refusal(status, said, headers)) is expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["loc", "code", "message", "error", "detail"]), inner, max_size=4)
    ),
    max_leaves=8,
)
SECRET = "a key or a text"


@given(status=st.integers(300, 599), said=JSON)
def test_no_refusal_raises_or_tells_what_it_says(status: int, said: object) -> None:
    """Whatever stands in an error's body, it becomes an error of ours that repeats none of it."""
    for body in (said, {"message": said, "type": said, "code": said, "detail": said}):
        assert str(refusal(status, body)).startswith(f"HTTP {status}")
    told = refusal(status, {"message": SECRET, "detail": [{"loc": ["body", "input"], "input": SECRET}]})
    assert SECRET not in f"{told!r}"


@given(data=JSON, usage=JSON)
def test_no_reply_raises_what_is_foreign(data: object, usage: object) -> None:
    """Whatever stands in a reply, reading it ends well or with ValueErrors, of which msgspec's are some."""
    for said in (data, [{"index": data, "embedding": data}]):
        with contextlib.suppress(ValueError):
            Mistral(Target(EMBED)).read(bytearray(orjson.dumps({"data": said, "usage": usage, "model": usage})))


def test_what_is_known_before_the_first_call() -> None:
    """Calls stay well below 16,384 tokens but hold the longest text, and prices are the sheet's."""
    assert Mistral.max_batch_items == 256
    assert all(card.max_input_tokens <= Mistral.max_batch_tokens < 16_384 for card in Mistral.models.values())
    prices = {name: (card.price, card.batch_price) for name, card in Mistral.models.items() if name in (EMBED, CODE)}
    assert prices == {EMBED: (100_000, 50_000), CODE: (150_000, 75_000)}
    assert not Mistral.models[EMBED].offers(512)
    assert Mistral.models[CODE].offers(3072)
    assert not Mistral.models[CODE].offers(3073)
