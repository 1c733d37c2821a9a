"""What the Gemini dialect asks for on the wire, what it never lets be cut in silence, and all that it understands."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import InputType, Space, Truncation
from app.errors import (
    BadCredential,
    CallTimeout,
    InputRefused,
    MalformedReply,
    ProviderError,
    QuotaExhausted,
    Throttled,
)
from app.providers.dialect import Ask, Target
from app.providers.gemini import Gemini
from app.providers.refusals import Answer
from app.providers.remote import RemoteProvider
from tests.emulators import faults
from tests.emulators.cases import Case
from tests.emulators.gemini import CASES, GeminiEmulator, envelope, item, over_quota
from tests.identity import identifying_vectors
from tests.remote import remote

OLD, NEW = "gemini-embedding-001", "gemini-embedding-2"
TEXTS = ["one", "two", "three"]


@pytest.fixture
async def emulator() -> AsyncIterator[GeminiEmulator]:
    """Gemini, on loopback."""
    async with GeminiEmulator() as running:
        yield running


@asynccontextmanager
async def at(emulator: GeminiEmulator, model: str, width: int | None = None) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the emulator."""
    provider = remote(Gemini, emulator.base_url, emulator.api_key, model)
    try:
        yield provider
    finally:
        await provider.aclose()


# ── every row of the sheet ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES, ids=[case.row for case in CASES])
async def test_every_row_is_answered_and_understood(emulator: GeminiEmulator, case: Case) -> None:
    """Over plain HTTP the stand-in says what the row says; to the dialect that answer means what the row means."""
    items: Any = (case.asks or {}).get("requests", [item("a")])
    if case.asks is None:
        emulator.inject(case.fault(), calls=1)
    url = f"{emulator.base_url}/models/{items[0]['model'].removeprefix('models/')}:batchEmbedContents"
    async with httpx.AsyncClient(trust_env=False, headers={"x-goog-api-key": str(emulator.api_key)}) as plain:
        answer = await plain.post(url, json={"requests": items})
    assert answer.status_code == case.status
    assert case.content in answer.content
    assert "retry-after" not in answer.headers
    if case.means is None:
        assert len(Gemini(Target(OLD)).read(bytearray(answer.content)).embeddings) == len(items)
        return
    emulator.inject(faults.status(answer.status_code, answer.content), calls=1)
    async with at(emulator, OLD) as provider:
        with pytest.raises(ProviderError) as failed:
            await provider.embed(TEXTS, Space(OLD, 3072), timeout_s=10)
    assert type(failed.value) is case.means
    assert str(emulator.api_key) not in repr(failed.value)
    if isinstance(failed.value, Throttled):
        assert failed.value.retry_after_s == case.wait_s
    if isinstance(failed.value, InputRefused):
        assert (failed.value.position, failed.value.too_long) == (case.position, case.too_long)


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("input_type", "task"),
    [(None, {}), ("query", {"taskType": "RETRIEVAL_QUERY"}), ("document", {"taskType": "RETRIEVAL_DOCUMENT"})],
)
async def test_the_older_model_is_told_the_task(
    emulator: GeminiEmulator, input_type: InputType | None, task: dict[str, str]
) -> None:
    """One request a text with nothing that is not needed; the key stands in its header and nowhere in the URL."""
    async with at(emulator, OLD) as provider:
        reply = await provider.embed(TEXTS, Space(OLD, 3072, input_type=input_type), timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, OLD, 3072))
    assert reply.tokens_billed is None
    (arrival,) = emulator.arrivals
    model = f"models/{OLD}"
    assert arrival.body == {
        "requests": [{"model": model, **task, "content": {"parts": [{"text": text}]}} for text in TEXTS]
    }
    assert arrival.path == f"/v1/{model}:batchEmbedContents"
    assert arrival.headers["x-goog-api-key"] == emulator.api_key
    assert "authorization" not in arrival.headers


@pytest.mark.parametrize(
    ("input_type", "front"), [("query", "task: search result | query: "), ("document", "title: none | text: ")]
)
async def test_the_newer_model_reads_the_task_in_the_text(
    emulator: GeminiEmulator, input_type: InputType, front: str
) -> None:
    """The prompt of the card stands in front of each text, no task type is named, and tokens are told."""
    prompt = dict(Gemini.models[NEW].prompts)[input_type]
    async with at(emulator, NEW) as provider:
        reply = await provider.embed(TEXTS, Space(NEW, 3072, input_type=input_type, prompt=prompt), timeout_s=10)
    sent = [front + text for text in TEXTS]
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(sent, NEW, 3072))
    assert emulator.arrivals[0].body["requests"][0].keys() == {"model", "content"}
    assert reply.tokens_billed == sum(map(emulator.count, sent))


@pytest.mark.parametrize("model", [OLD, NEW])
async def test_small_vectors_come_at_unit_length(emulator: GeminiEmulator, model: str) -> None:
    """A smaller width is asked for, and is the unit head of the full vector, whoever makes it so."""
    async with at(emulator, model, width=256) as provider:
        reply = await provider.embed(TEXTS, Space(model, 256), timeout_s=10)
    assert [each["outputDimensionality"] for each in emulator.arrivals[0].body["requests"]] == [256] * 3
    heads = identifying_vectors(TEXTS, model, 3072)[:, :256]
    np.testing.assert_allclose(reply.vectors, heads / np.linalg.norm(heads, axis=1, keepdims=True), rtol=1e-5)


# ── never a silent cut ──────────────────────────────────────────────────────────────────────────────────────────────


LONG = "word " * 3000


@pytest.mark.parametrize("truncation", ["none", "mean"])
async def test_a_text_that_would_be_cut_is_refused(emulator: GeminiEmulator, truncation: Truncation) -> None:
    """The first of them is named, and none of its company is embedded."""
    space = Space(OLD, 3072, max_input_tokens=2048, truncation=truncation)
    async with at(emulator, OLD) as provider:
        with pytest.raises(InputRefused) as refused:
            await provider.embed(["a", LONG, "b", LONG], space, timeout_s=10)
    assert (refused.value.position, refused.value.too_long) == (1, True)
    assert not emulator.arrivals


async def test_who_asked_for_a_cut_gets_it(emulator: GeminiEmulator) -> None:
    """With "end", the vector is that of the head that fits."""
    async with at(emulator, OLD) as provider:
        space = Space(OLD, 3072, max_input_tokens=2048, truncation="end")
        reply = await provider.embed(["word" + " word" * 2999], space, timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(["word" + " word" * 2047], OLD, 3072))


async def test_the_longest_legal_text_passes(emulator: GeminiEmulator) -> None:
    """2,048 tokens are not too long, however many bytes they are; and the prompt counts."""
    text = "word" + " word" * 2047
    space = Space(OLD, 3072, max_input_tokens=2048)
    async with at(emulator, OLD) as provider:
        reply = await provider.embed([text], space, timeout_s=10)
        with pytest.raises(InputRefused):
            await provider.embed([text], Space(OLD, 3072, max_input_tokens=2048, prompt="a "), timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors([text], OLD, 3072))


def counting(heard: list[Ask], answer: bytes = b'{"totalTokens":1}') -> Callable[[Ask], Awaitable[Answer]]:
    """A vendor who is asked for counts, all of which are the same."""

    async def post(ask: Ask) -> Answer:
        heard.append(ask)
        return Answer(200, {}, bytearray(answer))

    return post


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("x" * 100, False),
        ("word " * 60, False),
        ("word " * 70, True),
        ("a\nc\ng\nt\n" * 13, True),
        ("1" * 101, True),
        ("room 1 " * 40, True),
        ("\U00012345" * 26, True),
        ("word" * 10_000, True),
    ],
)
async def test_only_what_could_be_too_long_is_counted(text: str, counted: bool) -> None:
    """A hundred tokens fit: what has no more bytes fits surely, prose of clearly fewer words too, nothing else."""
    heard: list[Ask] = []
    await Gemini(Target(OLD)).check([text], Space(OLD, 3072, max_input_tokens=100), counting(heard))
    asked = Ask(f"models/{OLD}:countTokens", {"contents": [{"parts": [{"text": text}]}]})
    assert heard == ([asked] if counted else [])


async def test_doubtful_texts_are_counted_side_by_side() -> None:
    """No count waits for another."""
    all_asked = asyncio.Barrier(3)

    async def post(_: Ask) -> Answer:
        await all_asked.wait()
        return Answer(200, {}, bytearray(b'{"totalTokens":2048}'))

    async with asyncio.timeout(5):
        await Gemini(Target(OLD)).check([LONG] * 3, Space(OLD, 3072, max_input_tokens=2048), post)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"totalTokens":"9"}', b'{"totalTokens":null}', b"[" * 9999])
async def test_a_count_that_is_none_is_malformed(content: bytes) -> None:
    """Who cannot be understood has not said that a text fits."""
    with pytest.raises(MalformedReply):
        await Gemini(Target(OLD)).check([LONG], Space(OLD, 3072, max_input_tokens=2048), counting([], content))


async def test_counts_that_fail_are_one_failure() -> None:
    """Of several errors side by side the caller sees one, of its own class."""

    async def post(_: Ask) -> Answer:
        raise CallTimeout("no time")

    with pytest.raises(CallTimeout):
        await Gemini(Target(OLD)).check([LONG, LONG], Space(OLD, 3072, max_input_tokens=2048), post)


# ── what is understood ──────────────────────────────────────────────────────────────────────────────────────────────


def refused(status: int, said: object) -> ProviderError:
    """What the dialect makes of an error body."""
    return Gemini(Target(OLD)).refusal(Answer(status, {}, bytearray(orjson.dumps(said))))


@pytest.mark.parametrize(
    ("delay", "words", "wait_s"),
    [
        ("0.5s", "", 0.5),
        ("", "Please retry in 659.2ms.", 0.6592),
        ("soon", "Please retry in 1m3.5s.", 63.5),
        ("1" * 60_000, "Please retry in " + "1" * 60_000, None),
        ("86400s", "", 120.0),
        ("", "Please retry later.", None),
    ],
)
def test_when_to_come_back_is_read_from_either_place(delay: str, words: str, wait_s: float | None) -> None:
    """A delay that cannot be read gives way to the text, no delay is longer than ours may be, and none takes long."""
    error = refused(429, over_quota(100, delay, words))
    assert isinstance(error, Throttled)
    assert error.retry_after_s == (wait_s if wait_s is None else pytest.approx(wait_s))


@pytest.mark.parametrize(
    ("message", "details"),
    [("API key expired. Please renew the API key.", []), ("No.", [None, {"reason": "API_KEY_INVALID"}])],
)
def test_a_bad_key_is_told_by_its_reason_or_its_words(message: str, details: list[Any]) -> None:
    """Either is enough, since details may be absent and words may change."""
    assert type(refused(400, envelope(400, "INVALID_ARGUMENT", message, *details))) is BadCredential


def test_only_a_limit_of_nothing_is_for_good() -> None:
    """A limit of nothing is for good, alone or with words behind it; one of ten is not."""
    for text, meaning in (("limit: 0", QuotaExhausted), ("limit: 0, x", QuotaExhausted), ("limit: 10", Throttled)):
        assert type(refused(429, envelope(429, "RESOURCE_EXHAUSTED", f"metric, {text}"))) is meaning


@pytest.mark.parametrize("usage", [None, "4", [], {}, {"promptTokenCount": "4"}, {"promptTokenCount": 10**9}])
async def test_a_count_of_tokens_that_cannot_be_true_is_none(emulator: GeminiEmulator, usage: object) -> None:
    """The vectors stand all the same."""
    emulator.inject(faults.altered(lambda reply: reply.update(usageMetadata=usage, metadata={"new": 1})))
    async with at(emulator, NEW) as provider:
        reply = await provider.embed(TEXTS, Space(NEW, 3072), timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, NEW, 3072))
    assert reply.tokens_billed is None


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def nearly(names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the right names and anything behind them."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names.split(), SCRAPS))


VIOLATIONS = st.lists(SCRAPS | nearly("quotaId quotaValue"), max_size=2)
DETAILS = st.lists(
    SCRAPS | nearly("@type reason retryDelay") | st.fixed_dictionaries({"violations": VIOLATIONS}), max_size=3
)
ERRORS = st.builds(
    lambda error, details: {"error": {**error, "details": details}}, nearly("code message status"), DETAILS | SCRAPS
)


@given(st.integers(300, 599), ERRORS | SCRAPS | st.lists(ERRORS, max_size=2))
def test_no_error_body_is_beyond_us(status: int, said: object) -> None:
    """Whatever stands where, a refusal is a ProviderError."""
    assert isinstance(refused(status, said), ProviderError)


@given(st.binary(max_size=50) | st.builds(orjson.dumps, nearly("embeddings usageMetadata") | SCRAPS))
def test_no_reply_is_beyond_us(content: bytes) -> None:
    """What is no list of embeddings is told by the errors that mean so, and by no other."""
    try:
        said = Gemini(Target(OLD)).read(bytearray(content))
    except (msgspec.MsgspecError, ValueError):
        return
    assert len(said.embeddings) == len(said.places)
