"""What the OpenAI dialect asks for on the wire, and which truthful answers it understands."""

from collections.abc import AsyncIterator

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Space, Text
from app.errors import ConfigurationError, MalformedReply, ProviderError, Throttled, Transient
from app.ports import Stated
from app.providers.dialect import Target
from app.providers.openai import OpenAI
from app.providers.refusals import Answer
from app.providers.remote import RemoteProvider
from app.vectors import cut
from tests.emulators import faults
from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vector, identifying_vectors
from tests.remote import remote

MODEL = "text-embedding-3-small"
SPACE = Space(MODEL, 1536)
TEXTS = ["one", "two", "three", "four"]


@pytest.fixture
async def emulator() -> AsyncIterator[OpenAIEmulator]:
    """OpenAI, on loopback."""
    async with OpenAIEmulator() as running:
        yield running


@pytest.fixture
async def provider(emulator: OpenAIEmulator) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the emulator."""
    made = remote(OpenAI, emulator.base_url, emulator.api_key, MODEL)
    yield made
    await made.aclose()


async def test_only_what_is_needed_is_asked(provider: RemoteProvider, emulator: OpenAIEmulator) -> None:
    """A call names model, texts and base64, and sends the key in its header and nowhere else."""
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    (arrival,) = emulator.arrivals
    assert arrival.body == {"model": MODEL, "encoding_format": "base64", "input": TEXTS}
    assert arrival.headers["authorization"] == f"Bearer {emulator.api_key}"
    assert arrival.headers["accept-encoding"] == "identity"
    assert int(arrival.headers["content-length"]) > 0


async def test_no_key_sends_no_key() -> None:
    """A server without authentication sees no Authorization header."""
    async with OpenAIEmulator(api_key=None) as emulator:
        provider = remote(OpenAI, emulator.base_url, None, MODEL)
        await provider.embed(TEXTS, SPACE, timeout_s=10)
        await provider.aclose()
        assert "authorization" not in emulator.arrivals[0].headers


async def test_the_environment_and_cookies_change_nothing(
    emulator: OpenAIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies of the environment are not used, and what a provider asks to be remembered is not told back."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    provider = remote(OpenAI, emulator.base_url, emulator.api_key, MODEL)
    emulator.inject(faults.status(500, headers={"set-cookie": "session=1; path=/"}), calls=1)
    with pytest.raises(Transient):
        await provider.embed(TEXTS, SPACE, timeout_s=10)
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    await provider.aclose()
    assert [arrival.headers.get("cookie") for arrival in emulator.arrivals] == [None, None]


def test_a_key_that_no_header_can_carry_is_refused_at_once() -> None:
    """A key with a line break stops the boot, and the message does not hold it."""
    with pytest.raises(ConfigurationError) as refused:
        remote(OpenAI, "http://127.0.0.1:1/v1", "sk-secret\n", MODEL)
    assert "sk-secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("texts", "sent"),
    [([""], ""), (["one"], "one"), ([(3923, 374)], [[3923, 374]]), ([(3923,), (374,)], [[3923], [374]])],
)
async def test_a_lone_text_travels_alone(
    provider: RemoteProvider, emulator: OpenAIEmulator, texts: list[Text], sent: object
) -> None:
    """One string travels without a list, since OpenAI refuses "" in a list; token ids always travel as arrays."""
    await provider.embed(texts, SPACE, timeout_s=10)
    assert emulator.arrivals[0].body["input"] == sent


async def test_token_ids_get_the_vector_of_their_text(provider: RemoteProvider) -> None:
    """Ids of the provider's vocabulary and the text they stand for are one and the same."""
    reply = await provider.embed([(15339, 1917)], SPACE, timeout_s=10)  # "hello world"
    np.testing.assert_array_equal(reply.vectors[0], identifying_vector("hello world", MODEL, 1536))
    assert reply.tokens_billed == 2


async def test_a_mixed_batch_is_our_bug(provider: RemoteProvider) -> None:
    """Strings and token ids have no common JSON, so a batch of both never leaves."""
    with pytest.raises(RuntimeError, match="bug"):
        await provider.embed(["one", (2,)], SPACE, timeout_s=10)


async def test_dimensions_are_asked_for(emulator: OpenAIEmulator) -> None:
    """A deployment that buys a smaller width says so, and gets the vendor's own cut."""
    provider = remote(OpenAI, emulator.base_url, emulator.api_key, MODEL)
    reply = await provider.embed(TEXTS, Space(MODEL, 256), timeout_s=10)
    await provider.aclose()
    assert emulator.arrivals[0].body["dimensions"] == 256
    expected = [cut(identifying_vector(text, MODEL, 1536).tobytes(), 256) for text in TEXTS]
    assert [row.tobytes() for row in reply.vectors] == expected


@pytest.mark.parametrize(
    "fault", [faults.out_of_order, faults.no_index, faults.as_floats, faults.slow_body(pieces=50, pause_s=0.0)]
)
async def test_an_odd_but_true_reply_is_understood(
    provider: RemoteProvider, emulator: OpenAIEmulator, fault: faults.Fault
) -> None:
    """Another order, no index at all, floats instead of base64 and many small pieces give the same vectors."""
    emulator.inject(fault)
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, MODEL, 1536))


async def test_base64_may_have_escaped_slashes(provider: RemoteProvider, emulator: OpenAIEmulator) -> None:
    r"""Some servers write / as \/, which is the same JSON string."""

    async def escaped(wire: faults.Wire, content: bytes) -> None:
        await wire.answer(200, content.replace(b"/", b"\\/"), {})

    emulator.inject(escaped)
    reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
    np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, MODEL, 1536))


async def test_floats_make_calls_small_and_base64_makes_them_large(
    provider: RemoteProvider, emulator: OpenAIEmulator
) -> None:
    """A deployment is asked for few vectors until it has answered base64, and again after it answered floats."""
    at_first = provider.max_items
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    with_base64 = provider.max_items
    emulator.inject(faults.as_floats, calls=1)
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    assert (at_first, with_base64, provider.max_items) == (256, 2048, 256)


@pytest.mark.parametrize(
    ("named", "any_name", "accepted"),
    [
        (MODEL, False, True),
        (None, False, True),
        (f"{MODEL}-2024-01-25", False, True),
        (f"{MODEL}-20240125", False, True),
        (f"{MODEL}-large", False, False),
        ("text-embedding-3-large", False, False),
        (7, False, False),
        ([], False, False),
        ({"id": MODEL}, False, False),
        ("/models/bge-m3", True, True),
    ],
)
async def test_a_reply_of_another_model_is_no_answer(
    emulator: OpenAIEmulator, named: object, any_name: bool, accepted: bool
) -> None:
    """The reply names the model that was asked, a dated release of it or none; else only where aliases are allowed."""
    emulator.inject(faults.altered(lambda reply: reply.update(model=named)))
    provider = remote(OpenAI, emulator.base_url, emulator.api_key, MODEL, any_name=any_name)
    try:
        if accepted:
            await provider.embed(TEXTS, SPACE, timeout_s=10)
        else:
            with pytest.raises(MalformedReply, match="another model"):
                await provider.embed(TEXTS, SPACE, timeout_s=10)
    finally:
        await provider.aclose()


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 4, "total_tokens": 4}, 4),
        ({"total_tokens": 5}, 5),
        ({"prompt_tokens": -1}, None),
        ({"prompt_tokens": "4"}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": 4.0}, None),
        ({"prompt_tokens": 10**9}, None),
        ({}, None),
        (None, None),
        ([4], None),
    ],
)
async def test_a_count_of_tokens_is_believed_only_if_it_may_be_true(
    provider: RemoteProvider, emulator: OpenAIEmulator, usage: object, tokens: int | None
) -> None:
    """A count that is missing, no integer, negative or larger than the request does not spoil the vectors."""
    emulator.inject(faults.altered(lambda reply: reply.update(usage=usage)))
    assert (await provider.embed(TEXTS, SPACE, timeout_s=10)).tokens_billed == tokens


async def test_the_largest_call_is_understood() -> None:
    """2,048 texts of a megabyte and a half go out and come back in order."""
    async with OpenAIEmulator(constant=True) as emulator:
        provider = remote(OpenAI, emulator.base_url, emulator.api_key, MODEL)
        texts = [f"{number} " + "word " * 150 for number in range(2048)]
        reply = await provider.embed(texts, SPACE, timeout_s=30)
        await provider.aclose()
    assert reply.vectors.shape == (2048, 1536)
    assert (reply.vectors == identifying_vector("", MODEL, 1536)).all()


async def test_the_accounts_limits_are_told() -> None:
    """What the headers of an answer say of the account's quotas comes with the reply."""
    async with OpenAIEmulator(judge=Judge(3000, 1_000_000)) as emulator:
        provider = remote(OpenAI, emulator.base_url, emulator.api_key, MODEL)
        reply = await provider.embed(TEXTS, SPACE, timeout_s=10)
        await provider.aclose()
    assert reply.stated == Stated(3000, 1_000_000, 2999, 999_996)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.just("Invalid 'input[3]'"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["error", "message", "type", "code"]), inner)
    ),
    max_leaves=9,
)
_nested = st.just(b'{"error":{"message":' + b"[" * 900 + b"]" * 900 + b"}}")
_waits = (
    st.text(max_size=9) | st.floats().map(str) | st.sampled_from(["6m0s", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
)


@given(st.integers(300, 599), _json.map(orjson.dumps) | _nested | st.binary(max_size=40), _waits)
def test_whatever_stands_in_an_error_it_has_a_meaning(status: int, body: bytes, wait: str) -> None:
    """No body and no header makes a refusal raise, and no wait is longer than two minutes or shorter than none."""
    headers = dict.fromkeys(("retry-after", "retry-after-ms", "x-ratelimit-reset-tokens"), wait)
    refusal = OpenAI(Target(MODEL)).refusal(Answer(status, headers, bytearray(body)))
    assert isinstance(refusal, ProviderError)
    if isinstance(refusal, Throttled) and refusal.retry_after_s is not None:
        assert 0 <= refusal.retry_after_s <= 120
