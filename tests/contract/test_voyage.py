"""Voyage's stand-in is one for the official client, and the dialect asks and understands it as the sheet has it."""

import contextlib
from collections.abc import AsyncIterator

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from voyageai import error
from voyageai.client_async import AsyncClient
from voyageai.object import EmbeddingsObject

from app.domain import InputType, Space, Truncation
from app.errors import InputRefused, Misconfigured, ProviderError, Throttled
from app.providers.cards import Quota
from app.providers.dialect import Target
from app.providers.refusals import Answer
from app.providers.remote import RemoteProvider
from app.providers.voyage import Voyage
from app.vectors import cut
from tests.contract.tried import answered, understood
from tests.emulators import faults
from tests.emulators.cases import Case
from tests.emulators.judge import Judge
from tests.emulators.server import vocabulary
from tests.emulators.voyage import CASES, MODELS, PROMPTS, VoyageEmulator
from tests.identity import identifying_vector
from tests.remote import remote

MODEL = "voyage-4-large"
SPACE = Space(MODEL, 1024)
TEXTS = ["one", "two", "three", "four"]
LONG = "word " * 32_000 + "word"
NO_PAYMENT_METHOD = {"detail": "You have not yet added your payment method in the billing page and will have …"}


def expected(texts: list[str], width: int = 1024) -> list[bytes]:
    """What Voyage answers for texts, as bytes: heads of its widest vectors."""
    full = [identifying_vector(text, MODEL, 2048).tobytes() for text in texts]
    return full if width == 2048 else [cut(vector, width) for vector in full]


@pytest.fixture
async def emulator() -> AsyncIterator[VoyageEmulator]:
    """Voyage, on loopback."""
    async with VoyageEmulator() as running:
        yield running


@pytest.fixture
def client(emulator: VoyageEmulator) -> AsyncClient:
    """The official client, which retries nothing."""
    return AsyncClient(api_key=emulator.api_key, base_url=emulator.base_url, max_retries=0)


@pytest.fixture
async def provider(emulator: VoyageEmulator) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the emulator."""
    made = remote(Voyage, emulator.base_url, emulator.api_key, MODEL)
    yield made
    await made.aclose()


# ── the official client ─────────────────────────────────────────────────────────────────────────────────────────────


def _bytes(found: EmbeddingsObject) -> list[bytes]:
    return [row.tobytes() for row in np.array(found.embeddings, dtype="<f4")]


@pytest.mark.parametrize(("width", "answered_width"), [(None, 1024), (256, 256), (2048, 2048)])
async def test_the_official_client_gets_each_texts_own_vector(
    client: AsyncClient, width: int | None, answered_width: int
) -> None:
    """In order, of the width that was asked for, and with what they cost."""
    found = await client.embed(["hello world", "b"], model=MODEL, output_dimension=width)
    assert _bytes(found) == expected(["hello world", "b"], answered_width)
    assert found.total_tokens == 3


async def test_the_official_client_pays_for_the_vendors_prompts(client: AsyncClient, emulator: VoyageEmulator) -> None:
    """An input type adds the tokens of its prompt to every text, and the client sends the word alone."""
    for input_type in ("query", "document"):
        found = await client.embed(["one", "two"], model=MODEL, input_type=input_type)
        prompt_tokens = len(vocabulary().encode_ordinary(PROMPTS[input_type]))
        assert found.total_tokens == 2 * (1 + prompt_tokens)
    assert [arrival.body["input_type"] for arrival in emulator.arrivals] == ["query", "document"]


async def test_the_official_client_cuts_unless_it_is_told_not_to(client: AsyncClient) -> None:
    """By default a long text loses its end and is billed as it was read; without truncation it is refused."""
    found = await client.embed([LONG], model=MODEL)
    assert _bytes(found) == expected(["word " * 31_999 + "word"])
    assert found.total_tokens == 32_000
    with pytest.raises(error.InvalidRequestError, match="example at index 1 in your batch has too many tokens"):
        await client.embed(["b", LONG], model=MODEL, truncation=False)


@pytest.mark.parametrize(
    ("texts", "model", "width", "said"),
    [
        (["a", ""], MODEL, None, "Input cannot contain empty strings or empty lists"),
        ([], MODEL, None, "Input cannot contain empty strings or empty lists"),
        (["a"] * 1001, MODEL, None, "argument 'input'"),
        (["a"], "voyage-foo", None, "Model voyage-foo is not supported"),
        (["a"], MODEL, 300, "argument 'output_dimension'"),
        (["a"], "voyage-law-2", 256, "argument 'output_dimension'"),
    ],
)
async def test_the_official_client_raises_what_is_refused(
    client: AsyncClient, texts: list[str], model: str, width: int | None, said: str
) -> None:
    """What Voyage refuses comes to the client as its own error, with Voyage's words."""
    with pytest.raises(error.InvalidRequestError, match=said) as refused:
        await client.embed(texts, model=model, output_dimension=width)
    assert refused.value.http_status == 400


async def test_the_official_client_is_told_of_keys_and_limits(emulator: VoyageEmulator) -> None:
    """A foreign key and a call too many are the client's own errors, and a server's trouble is too."""
    foreign = AsyncClient(api_key="pa-foreign", base_url=emulator.base_url, max_retries=0)
    with pytest.raises(error.AuthenticationError):
        await foreign.embed(["a"], model=MODEL)
    emulator.judge = Judge(requests_per_minute=1, clock=lambda: 100.0)
    client = AsyncClient(api_key=emulator.api_key, base_url=emulator.base_url, max_retries=0)
    await client.embed(["a"], model=MODEL)
    with pytest.raises(error.RateLimitError) as refused:
        await client.embed(["a"], model=MODEL)
    assert not [name for name in refused.value.headers if "ratelimit" in name.lower() or "retry" in name.lower()]
    emulator.judge = Judge()
    for status, raised in ((422, error.MalformedRequestError), (500, error.ServerError), (503, error.VoyageError)):
        emulator.inject(faults.status(status, b'{"detail":"Sorry"}'), calls=1)
        with pytest.raises(raised):
            await client.embed(["a"], model=MODEL)


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
async def test_each_row_of_the_sheet_is_answered_and_understood(emulator: VoyageEmulator, case: Case) -> None:
    """The emulator answers it word for word, and the dialect knows what is to be done."""
    await answered(case, Voyage, emulator, MODEL, {})
    if case.means is not None:
        await understood(case, Voyage, emulator, MODEL, {})


def test_the_cards_hold_what_the_sheet_says() -> None:
    """Models, widths and lengths are those of the stand-in, a default call fits into each, and money is exact."""
    assert Voyage.models.keys() == MODELS.keys()
    for name, model in MODELS.items():
        card = Voyage.models[name]
        assert (card.dimensions, card.max_input_tokens) == (model.dimensions, model.context)
        assert (*card.sizes,) == (model.sizes if len(model.sizes) > 1 else ())
        assert (Voyage.max_batch_items, Voyage.max_batch_tokens) <= (128, model.most_tokens)
        assert dict(card.prompts) == {kind: prompt for kind, prompt in PROMPTS.items() if kind}
    lite = Voyage.models["voyage-4-lite"]
    assert (lite.price, lite.batch_price) == (20_000, 13_400)
    assert dict(lite.tiers) == {
        "free": Quota(3, 10_000),
        "1": Quota(2_000, 16_000_000),
        "2": Quota(4_000, 32_000_000),
        "3": Quota(6_000, 48_000_000),
    }


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_only_what_is_needed_is_asked(provider: RemoteProvider, emulator: VoyageEmulator) -> None:
    """A call forbids cutting, asks for base64, and sends the key in its header and nowhere else."""
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    (arrival,) = emulator.arrivals
    assert arrival.body == {"model": MODEL, "input": TEXTS, "truncation": False, "encoding_format": "base64"}
    assert arrival.headers["authorization"] == f"Bearer {emulator.api_key}"
    assert [row.tobytes() for row in reply.vectors] == expected(TEXTS)
    assert reply.tokens_billed == 4


@pytest.mark.parametrize("input_type", ["query", "document"])
async def test_the_vendor_writes_its_prompts_itself(
    provider: RemoteProvider, emulator: VoyageEmulator, input_type: InputType
) -> None:
    """The input type travels as a word; the prompt that the Space names is billed but not sent, and believed."""
    prompt = dict(Voyage.models[MODEL].prompts)[input_type]
    reply = await provider.embed(TEXTS, Space(MODEL, 1024, input_type=input_type, prompt=prompt), timeout_s=10)
    assert (emulator.arrivals[0].body["input_type"], emulator.arrivals[0].body["input"]) == (input_type, TEXTS)
    assert reply.tokens_billed == 4 * (1 + len(vocabulary().encode_ordinary(prompt)))


@pytest.mark.parametrize("truncation", ["none", "mean"])
async def test_a_text_is_never_cut_unasked(provider: RemoteProvider, truncation: Truncation) -> None:
    """A long text is refused, and which one it was is known."""
    with pytest.raises(InputRefused) as refused:
        await provider.embed(["one", LONG], Space(MODEL, 1024, truncation=truncation), timeout_s=10)
    assert (refused.value.position, refused.value.too_long) == (1, True)


async def test_a_text_is_cut_on_request(provider: RemoteProvider) -> None:
    """Where the caller wants that, a long text loses its end."""
    reply = await provider.embed(["one", LONG], Space(MODEL, 1024, truncation="end"), timeout_s=10)
    assert [row.tobytes() for row in reply.vectors] == expected(["one", "word " * 31_999 + "word"])


@pytest.mark.parametrize("width", [256, 2048])
async def test_another_width_is_asked_for_in_voyages_word(emulator: VoyageEmulator, width: int) -> None:
    """A deployment that buys another width says so in `output_dimension`."""
    provider = remote(Voyage, emulator.base_url, emulator.api_key, MODEL)
    reply = await provider.embed(TEXTS, Space(MODEL, width), timeout_s=10)
    await provider.aclose()
    assert emulator.arrivals[0].body["output_dimension"] == width
    assert [row.tobytes() for row in reply.vectors] == expected(TEXTS, width)


# ── what is understood ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [faults.out_of_order, faults.no_index, faults.as_floats])
async def test_an_odd_but_true_reply_is_understood(
    provider: RemoteProvider, emulator: VoyageEmulator, fault: faults.Fault
) -> None:
    """Another order, no index and numbers instead of base64 give the same vectors."""
    emulator.inject(fault)
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    assert [row.tobytes() for row in reply.vectors] == expected(TEXTS)


def refusal(status: int, said: object, headers: dict[str, str] | None = None) -> ProviderError:
    """What the dialect makes of an answer."""
    return Voyage(Target(MODEL)).refusal(Answer(status, headers or {}, bytearray(orjson.dumps(said))))


@pytest.mark.parametrize(
    ("said", "headers", "wait_s"),
    [
        (NO_PAYMENT_METHOD, {}, 20.0),
        (NO_PAYMENT_METHOD, {"retry-after": "3"}, 3.0),
        ({"detail": "Rate limit reached."}, {}, None),
        ({"detail": ["payment method"]}, {}, None),
    ],
)
def test_an_account_without_payment_method_is_slow(said: object, headers: dict[str, str], wait_s: float | None) -> None:
    """Three requests a minute are one every 20 s, unless a header knows better; other throttles do not say."""
    failed = refusal(429, said, headers)
    assert isinstance(failed, Throttled)
    assert failed.retry_after_s == wait_s


@pytest.mark.parametrize(
    ("detail", "blamed"),
    [
        ("… In particular, Error for argument 'input': Value error, …", InputRefused),
        ("… In particular, Error for argument 'input_type': Input should be 'query' or 'document'", Misconfigured),
        ("Value '3' supplied for argument 'output_dimension' is not valid", Misconfigured),
        ("Model voyage-foo is not supported. Supported models are ['voyage-4']", Misconfigured),
        ("Your text says: Model x is not supported", InputRefused),
        ({"argument 'model'": 1}, InputRefused),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_no_text_is_blamed_for_what_the_operator_wrote(
    status: int, detail: object, blamed: type[ProviderError]
) -> None:
    """An argument that is not the input, or an unknown model, is a matter of settings."""
    assert type(refusal(status, {"detail": detail})) is blamed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["detail", "index"]), inner),
    max_leaves=8,
)
SECRET = "a key or a text"


@given(status=st.integers(300, 599), said=JSON)
def test_no_refusal_raises_or_tells_what_it_says(status: int, said: object) -> None:
    """Whatever stands in an error's body, it becomes an error of ours that repeats none of it."""
    for body in (said, {"detail": said}):
        assert str(refusal(status, body)).startswith(f"HTTP {status}")
    for words in (SECRET, f"Model {SECRET} is not supported", f"{SECRET}: argument 'model'"):
        assert SECRET not in f"{refusal(status, {'detail': words})!r}"


@given(data=JSON, usage=JSON)
def test_no_reply_raises_what_is_foreign(data: object, usage: object) -> None:
    """Whatever stands in a reply, reading it ends well or with ValueErrors, of which msgspec's are some."""
    for said in (data, [{"index": data, "embedding": data}]):
        with contextlib.suppress(ValueError):
            Voyage(Target(MODEL)).read(bytearray(orjson.dumps({"data": said, "usage": usage, "model": usage})))
