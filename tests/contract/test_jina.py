"""Jina: the stand-in answers as the sheet has it (there is no official client), and the dialect understands it."""

import contextlib
from collections.abc import AsyncIterator

import httpx
import numpy as np
import orjson
import pybase64
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import InputType, Space, Truncation
from app.errors import BadCredential, InputRefused, MalformedReply, ProviderError, QuotaExhausted, Throttled
from app.providers.dialect import Target
from app.providers.jina import Jina
from app.providers.refusals import Answer
from app.providers.remote import RemoteProvider
from app.vectors import check, cut
from tests.emulators import faults
from tests.emulators.cases import Case
from tests.emulators.jina import CASES, JinaEmulator
from tests.identity import identifying_vector, identifying_vectors
from tests.remote import remote

MODEL = "jina-embeddings-v5-text-small"
SPACE = Space(MODEL, 1024)
TEXTS = ["one", "two", "three", "four"]


@pytest.fixture
async def emulator() -> AsyncIterator[JinaEmulator]:
    """Jina, on loopback."""
    async with JinaEmulator() as running:
        yield running


@pytest.fixture
async def raw(emulator: JinaEmulator) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP with the right key."""
    key = {"authorization": f"Bearer {emulator.api_key}"}
    async with httpx.AsyncClient(base_url=emulator.base_url, headers=key, trust_env=False) as client:
        yield client


@pytest.fixture
async def provider(emulator: JinaEmulator) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the emulator."""
    made = remote(Jina, emulator.base_url, emulator.api_key, MODEL)
    yield made
    await made.aclose()


# ── the stand-in ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_answer_has_the_sheets_form(raw: httpx.AsyncClient) -> None:
    """Objects and strings are embedded in order, as numbers and without unit length unless that is asked."""
    asks = {"model": MODEL, "input": ["hello world", {"text": "b"}], "task": "retrieval.query"}
    said = (await raw.post("/embeddings", json=asks)).json()
    assert list(said) == ["model", "object", "usage", "data"]
    assert (said["model"], said["object"]) == (MODEL, "list")
    assert said["usage"] == {"total_tokens": 3, "prompt_tokens": 3}
    assert [(item["object"], item["index"]) for item in said["data"]] == [("embedding", 0), ("embedding", 1)]
    expected = identifying_vectors(["hello world", "b"], MODEL, 1024)
    np.testing.assert_allclose([item["embedding"] for item in said["data"]], expected * 3, rtol=1e-6)


async def test_base64_sizes_and_unit_length_are_for_the_asking(raw: httpx.AsyncClient) -> None:
    """Base64 holds float32, a smaller vector is the head of the large one, and `normalized` makes it a unit."""
    asks = {"model": MODEL, "input": "b", "embedding_type": "base64", "normalized": True, "dimensions": 256}
    (item,) = (await raw.post("/embeddings", json=asks)).json()["data"]
    assert pybase64.b64decode(item["embedding"]) == cut(identifying_vector("b", MODEL, 1024).tobytes(), 256)
    bits = (await raw.post("/embeddings", json={**asks, "embedding_type": "ubinary"})).json()["data"][0]["embedding"]
    assert bits == np.packbits(identifying_vector("b", MODEL, 1024)[:256] > 0).tolist()


@pytest.mark.parametrize(
    ("authorization", "code"),
    [("", "AUTH_MISSING_API_KEY"), ("Basic eA==", "AUTH_INVALID_FORMAT"), ("Bearer jina_x", "AUTH_INVALID_API_KEY")],
)
async def test_who_may_not_call_is_told_why(raw: httpx.AsyncClient, authorization: str, code: str) -> None:
    """No key, no bearer and a foreign key are three words of the sheet."""
    said = await raw.post("/embeddings", json={}, headers={"authorization": authorization})
    assert (said.status_code, said.json()["code"]) == (401, code)


async def test_what_remains_stands_in_headers(raw: httpx.AsyncClient, emulator: JinaEmulator) -> None:
    """Every answer says how many requests and tokens are left, and the one too many is a 429."""
    emulator.judge.requests_per_minute, emulator.judge.tokens_per_minute = 1, 100
    first = await raw.post("/embeddings", json={"model": MODEL, "input": ["hello world"]})
    left = [first.headers[f"x-ratelimit-remaining-{kind}"] for kind in ("requests", "tokens")]
    assert left == ["0", "98"]
    second = await raw.post("/embeddings", json={"model": MODEL, "input": ["hello world"]})
    assert (second.status_code, second.headers["x-ratelimit-remaining-requests"]) == (429, "0")


# ── the sheet, row by row ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
async def test_a_row_of_the_sheet(
    provider: RemoteProvider, emulator: JinaEmulator, raw: httpx.AsyncClient, case: Case
) -> None:
    """A request brings what the row says, and the dialect makes of that answer what it means."""
    if case.asks is not None:
        said = await raw.post("/embeddings", json={"model": MODEL, "input": ["one"], **case.asks})
        assert said.status_code == case.status
        assert case.content in said.content
        emulator.inject(faults.status(said.status_code, said.content))
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


async def test_only_what_is_needed_is_asked(provider: RemoteProvider, emulator: JinaEmulator) -> None:
    """A call asks for base64 and unit length, forbids cutting, and sends the key in its header and nowhere else."""
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    (arrival,) = emulator.arrivals
    assert arrival.body == {
        "model": MODEL, "input": TEXTS, "embedding_type": "base64", "normalized": True, "truncate": False,
    }  # fmt: skip
    assert arrival.headers["authorization"] == f"Bearer {emulator.api_key}"


@pytest.mark.parametrize("model", Jina.models)
@pytest.mark.parametrize("input_type", ["query", "document", None])
async def test_every_model_takes_its_own_words(
    emulator: JinaEmulator, model: str, input_type: InputType | None
) -> None:
    """Each model that tells input types apart is told the type in its family's words; no type, no task."""
    card = Jina.models[model]
    if input_type not in dict(card.prompts):
        input_type = None
    provider = remote(Jina, emulator.base_url, emulator.api_key, model)
    reply = await provider.embed(TEXTS, Space(model, card.dimensions, input_type=input_type), timeout_s=10)
    await provider.aclose()
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, model, card.dimensions))
    family = "nl2code" if "code" in model else "retrieval"
    words = {"query": f"{family}.query", "document": f"{family}.passage", None: None}
    assert emulator.arrivals[0].body.get("task") == words[input_type]


@pytest.mark.parametrize(("truncation", "word"), [("none", False), ("mean", False), ("end", True)])
async def test_a_text_is_cut_only_on_request(
    provider: RemoteProvider, emulator: JinaEmulator, truncation: Truncation, word: bool
) -> None:
    """Every call says whether a long text may lose its end."""
    await provider.embed(TEXTS, Space(MODEL, 1024, truncation=truncation), timeout_s=10)
    assert emulator.arrivals[0].body["truncate"] is word


async def test_another_width_is_asked_for(emulator: JinaEmulator) -> None:
    """A deployment that buys a smaller width says so, and gets the cut of the large vector."""
    provider = remote(Jina, emulator.base_url, emulator.api_key, MODEL)
    reply = await provider.embed(TEXTS, Space(MODEL, 128), timeout_s=10)
    await provider.aclose()
    assert emulator.arrivals[0].body["dimensions"] == 128
    expected = [cut(identifying_vector(text, MODEL, 1024).tobytes(), 128) for text in TEXTS]
    assert [row.tobytes() for row in reply.vectors] == expected


# ── what is understood ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [faults.out_of_order, faults.no_index, faults.as_floats])
async def test_an_odd_but_true_reply_is_understood(
    provider: RemoteProvider, emulator: JinaEmulator, fault: faults.Fault
) -> None:
    """Another order, no index and numbers instead of base64 give the same vectors, and the bill is Jina's."""
    emulator.inject(fault)
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, MODEL, 1024))
    assert reply.tokens_billed == 4


async def test_what_is_no_unit_is_not_what_was_asked(provider: RemoteProvider, emulator: JinaEmulator) -> None:
    """Vectors of another length than one, asked for as units, do not pass the check that every reply gets."""
    emulator.spoil(lambda rows: [(place, vector * np.float32(3)) for place, vector in rows])
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    with pytest.raises(MalformedReply, match="unit length"):
        check(reply.vectors, len(TEXTS), 1024, unit_norm=Jina.models[MODEL].normalised == "always")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"code": "AUTHZ_INSUFFICIENT_BALANCE"}, QuotaExhausted),
        ({"detail": "AUTHZ_INSUFFICIENT_BALANCE: Insufficient account balance."}, QuotaExhausted),
        ({"message": "Insufficient account balance."}, QuotaExhausted),
        ({"code": 7, "detail": [{"code": "AUTHZ_INSUFFICIENT_BALANCE"}]}, BadCredential),
        ({"code": "AUTHZ_FORBIDDEN"}, BadCredential),
        ({}, BadCredential),
    ],
)
def test_a_machine_word_counts_wherever_it_stands(body: object, expected: type[ProviderError]) -> None:
    """Nobody is sure where Jina writes it; a 403 without one is about the key."""
    assert type(refusal(403, orjson.dumps(body))) is expected


@pytest.mark.parametrize(
    ("detail", "position"),
    [
        ([{"loc": ["body", "input", 3], "msg": "no"}], 3),
        ([{"loc": ["body", "input", 3, "text"]}, {"loc": ["body", "input", 1]}], 3),
        ([{"loc": ["body", "input"]}], None),
        ([{"loc": ["body", "task", 3]}], None),
        ([{"loc": ["body", "input", -1]}], None),
        ([{"loc": ["body", "input", True]}], None),
        ([{"loc": "body"}], None),
        ([7], None),
        ([], None),
        ("input 3", None),
    ],
)
def test_a_validation_error_says_which_text(detail: object, position: int | None) -> None:
    """Only what names a place of the input names a text."""
    failed = refusal(422, orjson.dumps({"detail": detail}))
    assert isinstance(failed, InputRefused)
    assert failed.position == position


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["loc", "code"]), inner, max_size=3),
    max_leaves=8,
)
SECRET = "jina-key or a text"


@given(status=st.integers(300, 599), code=JSON, detail=JSON, tail=st.binary(max_size=4))
def test_no_refusal_raises_or_tells_what_it_says(status: int, code: object, detail: object, tail: bytes) -> None:
    """Whatever stands in an error's body, it becomes an error of ours that repeats none of it."""
    failed = refusal(status, orjson.dumps({"code": code, "message": detail, "detail": detail}) + tail)
    assert str(failed).startswith(f"HTTP {status}")
    assert str(refusal(status, orjson.dumps({"message": SECRET, "detail": SECRET}))) == str(refusal(status, b"{}"))


@given(data=JSON, usage=JSON)
def test_no_reply_raises_what_is_foreign(data: object, usage: object) -> None:
    """Whatever stands in a reply, reading it ends well or with ValueErrors, of which msgspec's are some."""
    items = [{"index": data, "embedding": data}]
    for said in (data, items):
        with contextlib.suppress(ValueError):
            Jina(Target(MODEL)).read(bytearray(orjson.dumps({"data": said, "usage": usage, "model": usage})))


def refusal(status: int, body: bytes) -> ProviderError:
    """What the dialect makes of an answer."""
    return Jina(Target(MODEL)).refusal(Answer(status, {}, bytearray(body)))


def test_the_cards_hold_what_the_sheet_says() -> None:
    """No price is promised, and a tier says how many calls may be under way."""
    assert all(card.price is None for card in Jina.models.values())
    tiers = Jina.models[MODEL].tiers
    assert {name: quota.max_in_flight for name, quota in tiers.items()} == {"free": 5, "1": 50, "2": 500}
    assert (tiers["2"].requests_per_minute, tiers["2"].tokens_per_minute) == (5_000, 100_000_000)
