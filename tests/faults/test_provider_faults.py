"""What a provider's failures are called, and that none of them leaks a secret, a connection or the caller's time."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest

from app import vectors
from app.domain import Space
from app.errors import (
    BadCredential,
    BrokenOff,
    CallTimeout,
    InputRefused,
    MalformedReply,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    Throttled,
    Transient,
    Unreachable,
)
from app.providers.http import Pool
from app.providers.openai import OpenAI
from app.providers.remote import RemoteProvider
from tests.emulators import faults
from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator
from tests.identity import identifying_vectors
from tests.remote import remote

MODEL = "text-embedding-3-small"
SPACE = Space(MODEL, 1536)
TEXTS = ["a canary text", "another one", "the last"]
KEY = "sk-emulator-key"


@pytest.fixture
async def emulator() -> AsyncIterator[OpenAIEmulator]:
    """OpenAI, on loopback."""
    async with OpenAIEmulator(api_key=KEY) as running:
        yield running


@pytest.fixture
async def provider(emulator: OpenAIEmulator) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the emulator."""
    made = remote(OpenAI, emulator.base_url, KEY, MODEL, max_in_flight=8)
    yield made
    await made.aclose()


async def failure(provider: RemoteProvider, *, timeout_s: float = 10) -> ProviderError:
    """The error of one call, checked: it is exactly a ProviderError and tells no secret."""
    with pytest.raises(ProviderError) as failed:
        await checked(provider, timeout_s)
    shown = f"{failed.value} {failed.value!r} {failed.value.__cause__}"
    assert "canary" not in shown
    assert KEY not in shown
    return failed.value


async def checked(provider: RemoteProvider, timeout_s: float) -> None:
    """One call as the dispatcher makes it."""
    reply = await provider.embed(TEXTS, SPACE, timeout_s=timeout_s)
    vectors.check(reply.vectors, len(TEXTS), SPACE.dimensions, unit_norm=True)


def envelope(message: str = "said a canary", kind: str = "invalid_request_error", code: str | None = None) -> bytes:
    """OpenAI's error body."""
    return faults.error_body(message, kind, code=code)


# ── statuses ────────────────────────────────────────────────────────────────────────────────────────────────────────


ERROR_BODIES = [
    envelope(),
    b"",
    b'{"error":"Unauthorized"}',
    b'{"message":"a canary","code":413,"type":"Validation"}',
    b'{"detail":[{"msg":"a canary"}]}',
    b"<html>a canary</html>",
    b"[" * 5000,
    b"null",
]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (301, Misconfigured),
        (307, Misconfigured),
        (400, InputRefused),
        (401, BadCredential),
        (402, QuotaExhausted),
        (403, BadCredential),
        (404, Misconfigured),
        (405, Misconfigured),
        (408, Transient),
        (409, Transient),
        (413, InputRefused),
        (418, MalformedReply),
        (422, InputRefused),
        (424, Transient),
        (429, Throttled),
        (500, Transient),
        (501, Misconfigured),
        (502, Transient),
        (503, Transient),
        (529, Transient),
    ],
)
async def test_a_status_says_who_must_act(
    provider: RemoteProvider, emulator: OpenAIEmulator, status: int, expected: type[ProviderError]
) -> None:
    """Each status has one meaning, whatever shape of body a server puts beside it; no redirect is followed."""
    for body in ERROR_BODIES:
        emulator.inject(faults.status(status, body, {"location": "/v1/embeddings"}), calls=1)
        assert type(await failure(provider)) is expected
    assert len(emulator.arrivals) == len(ERROR_BODIES)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (429, envelope(kind="insufficient_quota", code="insufficient_quota"), QuotaExhausted),
        (429, envelope(code="billing_hard_limit_reached"), QuotaExhausted),
        (400, envelope(code="billing_hard_limit_reached"), QuotaExhausted),
        (429, envelope("Request too large for m in organization o", "tokens", "rate_limit_exceeded"), InputRefused),
        (403, envelope("You are not allowed to generate embeddings from this model"), Misconfigured),
    ],
)
async def test_the_body_tells_apart_what_the_status_does_not(
    provider: RemoteProvider, emulator: OpenAIEmulator, status: int, body: bytes, expected: type[ProviderError]
) -> None:
    """An empty purse, a call that can never fit and a chat model are not mistaken for a full minute or a bad key."""
    emulator.inject(faults.status(status, body))
    assert type(await failure(provider)) is expected


async def test_a_huge_error_body_is_not_read(provider: RemoteProvider, emulator: OpenAIEmulator) -> None:
    """A megabyte of apology changes nothing about the status."""
    emulator.inject(faults.status(503, b" " * 2**20))
    assert type(await failure(provider)) is Transient


async def test_a_wrong_key_and_an_unknown_model_are_the_operators(emulator: OpenAIEmulator) -> None:
    """OpenAI's own answers to a bad key and to a model that does not exist are told apart."""
    for key, model, expected in [("sk-wrong", MODEL, BadCredential), (KEY, "no-such-model", Misconfigured)]:
        provider = remote(OpenAI, emulator.base_url, key, model)
        assert type(await failure(provider)) is expected
        await provider.aclose()


async def test_a_poisoned_text_refuses_its_batch(provider: RemoteProvider, emulator: OpenAIEmulator) -> None:
    """One bad text fails every call that holds it, as a refusal of content, and no other call."""
    emulator.poison.add(TEXTS[1])
    assert type(await failure(provider)) is InputRefused
    await provider.embed([TEXTS[0], TEXTS[2]], SPACE, timeout_s=10)
    emulator.heal()
    await provider.embed(TEXTS, SPACE, timeout_s=10)


# ── when to come back ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after-ms": "2812", "retry-after": "3"}, 2.812),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "1e9"}, 120),
        ({"retry-after": "86400"}, 120),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "garbage"}, None),
        ({"retry-after": "Thu, 99 Foo 2026 00:00:00 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 99999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 2026 00:00:00 +99999999999999"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "Fri, 01 Jan 2999 00:00:00 GMT"}, 120),
        ({"x-ratelimit-reset-tokens": "1m0.5s", "x-ratelimit-reset-requests": "100ms"}, 60.5),
        ({"x-ratelimit-reset-requests": "20ms"}, 0.02),
        ({"x-ratelimit-reset-tokens": "6m0s"}, 120),
        ({"x-ratelimit-reset-tokens": "6 minutes"}, None),
        ({"x-ratelimit-reset-tokens": "s"}, None),
        ({"retry-after": "1", "x-ratelimit-reset-tokens": "30s"}, 1),
    ],
)
async def test_a_throttle_says_when_to_come_back(
    provider: RemoteProvider, emulator: OpenAIEmulator, headers: dict[str, str], wait_s: float | None
) -> None:
    """Milliseconds before seconds before dates before bucket resets; within two minutes; garbage says nothing."""
    emulator.inject(faults.status(429, headers=headers))
    failed = await failure(provider)
    assert isinstance(failed, Throttled)
    assert failed.retry_after_s == (None if wait_s is None else pytest.approx(wait_s))


async def test_a_date_is_counted_from_now(provider: RemoteProvider, emulator: OpenAIEmulator) -> None:
    """An HTTP date half a minute ahead is half a minute's wait."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    emulator.inject(faults.status(429, headers={"retry-after": date}))
    failed = await failure(provider)
    assert isinstance(failed, Throttled)
    assert failed.retry_after_s == pytest.approx(28, abs=4)


async def test_the_bucket_that_is_full_names_the_wait(provider: RemoteProvider, emulator: OpenAIEmulator) -> None:
    """A throttle on requests waits for the requests to reset, however long the tokens take."""
    headers = {"x-ratelimit-reset-tokens": "50s", "x-ratelimit-reset-requests": "2s"}
    emulator.inject(faults.status(429, envelope(kind="requests", code="rate_limit_exceeded"), headers))
    failed = await failure(provider)
    assert isinstance(failed, Throttled)
    assert failed.retry_after_s == 2


async def test_a_real_limit_throttles() -> None:
    """OpenAI's own 429 for a full minute is understood, with its wait."""
    clock = 0.0
    async with OpenAIEmulator(api_key=KEY, judge=Judge(requests_per_minute=1, clock=lambda: clock)) as emulator:
        provider = remote(OpenAI, emulator.base_url, KEY, MODEL)
        await provider.embed(TEXTS, SPACE, timeout_s=10)
        clock = 20.0
        failed = await failure(provider)
        await provider.aclose()
    assert isinstance(failed, Throttled)
    assert failed.retry_after_s == 40


# ── replies that are none ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fault",
    [
        faults.short,
        faults.surplus,
        faults.duplicate_index,
        faults.negative_index,
        faults.index_beyond,
        faults.some_index,
        faults.zeros,
        faults.not_a_number,
        faults.narrower,
        faults.wider,
        faults.odd_base64,
        *(
            faults.component(text)
            for text in ("NaN", "Infinity", "-Infinity", "1e400", "1e39", "null", '"0.5"', "true", "[0.5]", "{}")
        ),
        *(
            faults.body(content)
            for content in (
                b"",
                b"null",
                b"[]",
                b"{}",
                b'{"data":null}',
                b'{"data":[]}',
                b'{"data":[1,2,3]}',
                b'{"data":[{},{},{}]}',
                b'{"data":[{"embedding":null},{"embedding":null},{"embedding":null}]}',
                b"[" * 100_000,
                b"\xff\xfe",
                b"<html>a canary</html>",
                b'{"error":{"message":"a canary"}}',
            )
        ),
        faults.altered(lambda reply: reply["data"][0].update(index="0")),
        faults.altered(lambda reply: reply["data"][0].update(index=2**63)),
        faults.gzip_bomb,
        faults.endless_body,
    ],
)
async def test_a_reply_that_is_not_what_was_asked_is_malformed(
    provider: RemoteProvider, emulator: OpenAIEmulator, fault: faults.Fault
) -> None:
    """Wrong counts, indices, widths, values and bodies are all refused, before or by the check of values."""
    emulator.inject(fault, calls=1)
    assert type(await failure(provider)) is MalformedReply
    await provider.embed(TEXTS, SPACE, timeout_s=10)


# ── the wire ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [faults.reset, faults.half_body])
async def test_a_broken_connection_may_have_cost_something(
    provider: RemoteProvider, emulator: OpenAIEmulator, fault: faults.Fault
) -> None:
    """A reset and a body cut in half are worth another try, but the provider may have counted the call."""
    emulator.inject(fault, calls=1)
    failed = await failure(provider)
    assert type(failed) is BrokenOff
    assert (failed.counted, failed.may_cost) == (True, True)
    await provider.embed(TEXTS, SPACE, timeout_s=10)


async def test_a_closed_port_costs_nothing() -> None:
    """Where nobody listens no call was made, so nothing was counted."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    provider = remote(OpenAI, f"http://127.0.0.1:{port}/v1", KEY, MODEL)
    failed = await failure(provider)
    await provider.aclose()
    assert type(failed) is Unreachable
    assert not failed.counted


async def test_what_speaks_no_http_is_malformed() -> None:
    """Another kind of server on the port is not mistaken for a provider."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"220 smtp.example ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    provider = remote(OpenAI, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", KEY, MODEL)
    assert type(await failure(provider)) is MalformedReply
    await provider.aclose()
    server.close()


@pytest.mark.parametrize("fault", [faults.hang, faults.stalled_body, faults.slow_body(pieces=1000, pause_s=0.01)])
async def test_the_time_out_is_for_the_whole_call(
    provider: RemoteProvider, emulator: OpenAIEmulator, fault: faults.Fault
) -> None:
    """Silence before the head, silence in the body and a trickle all end when the attempt's time is over."""
    await provider.embed(TEXTS, SPACE, timeout_s=10)
    emulator.inject(fault, calls=1)
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert type(await failure(provider, timeout_s=0.1)) is CallTimeout
    assert loop.time() - started < 2
    await provider.embed(TEXTS, SPACE, timeout_s=10)


async def test_a_thousand_cancellations_leak_nothing(provider: RemoteProvider, emulator: OpenAIEmulator) -> None:
    """Calls cancelled at every point, in a crowd, give back their connections: the next hundred all succeed."""
    chance = random.Random(7)
    before = asyncio.all_tasks()

    async def leave_early() -> None:
        call = asyncio.create_task(provider.embed(TEXTS, SPACE, timeout_s=10))
        for _ in range(chance.randrange(60)):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    for _ in range(1000 // 20):
        await asyncio.gather(*(leave_early() for _ in range(20)))
    replies = await asyncio.gather(*(provider.embed(TEXTS, SPACE, timeout_s=30) for _ in range(100)))
    for reply in replies:
        np.testing.assert_array_equal(reply.vectors, identifying_vectors(TEXTS, MODEL, 1536))
    assert provider._endpoint.pool() == Pool(busy=0, idle=emulator.connections, waiting=0)
    assert emulator.connections <= 8
    assert asyncio.all_tasks() <= before
