"""What every Provider promises, over every implementation in `adapters.py`."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from app import vectors
from app.errors import (
    BadCredential,
    BrokenOff,
    CallTimeout,
    InputRefused,
    MalformedReply,
    Misconfigured,
    ProviderError,
    Throttled,
    Transient,
    Unreachable,
)
from tests.contract.adapters import ADAPTERS, ALONE, PROXIED
from tests.contract.subject import Subject
from tests.emulators import faults, server
from tests.emulators.server import Damage, Emulator

TEXTS = ["the cat sat on the mat", "ein ganz anderer Satz", "три", "a much longer text " * 20]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each implementation in turn; of tests about whom it calls, each that calls somebody, or calls nobody between."""
    if "subject" in metafunc.fixturenames:
        wanted = metafunc.fixturenames
        names = [name for name in ADAPTERS if name not in ALONE or not {"emulator", "behind"} & set(wanted)]
        names = [name for name in names if name not in PROXIED or "emulator" not in wanted]
        metafunc.parametrize("subject", [ADAPTERS[name] for name in names], ids=names, indirect=True)


@pytest.fixture
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """An implementation and what it calls."""
    async with request.param() as made:
        yield made


@pytest.fixture
def emulator(subject: Subject) -> Emulator:
    """What the implementation calls."""
    assert subject.emulator is not None
    return subject.emulator


@pytest.fixture
def behind(subject: Subject) -> Emulator:
    """What the implementation calls, or what stands behind whom it calls."""
    assert subject.emulator is not None
    return subject.emulator


async def test_each_text_gets_one_valid_vector(subject: Subject) -> None:
    """Rows are float32, finite, not zero, as many as texts and as wide as the Space."""
    provider, space = subject.provider, subject.space
    reply = await provider.embed(TEXTS, space, timeout_s=30)
    assert reply.vectors.dtype == np.float32
    vectors.check(reply.vectors, len(TEXTS), space.dimensions, unit_norm=space.normalised)


async def test_row_i_answers_text_i(subject: Subject) -> None:
    """A text's vector follows the text when the order changes, and is the one that it gets alone."""
    provider, space = subject.provider, subject.space
    forward = (await provider.embed(TEXTS, space, timeout_s=30)).vectors
    backward = (await provider.embed(TEXTS[::-1], space, timeout_s=30)).vectors
    np.testing.assert_allclose(np.vecdot(forward, backward[::-1]), 1.0, atol=1e-2)
    for text, row in zip(TEXTS, forward, strict=True):
        alone = (await provider.embed([text], space, timeout_s=30)).vectors[0]
        assert alone @ row == pytest.approx(1.0, abs=1e-2)


async def test_different_texts_get_different_vectors(subject: Subject) -> None:
    """No two of the texts share a vector."""
    provider, space = subject.provider, subject.space
    found = (await provider.embed(TEXTS, space, timeout_s=30)).vectors
    assert (found @ found.T - np.eye(len(TEXTS)) < 0.99).all()


async def test_the_bill_grows_with_the_text(subject: Subject) -> None:
    """Tokens are counted over the whole call, or not at all."""
    provider, space = subject.provider, subject.space
    short = (await provider.embed(TEXTS[:1], space, timeout_s=30)).tokens_billed
    long = (await provider.embed(TEXTS, space, timeout_s=30)).tokens_billed
    if short is not None or long is not None:
        assert short is not None
        assert long is not None
        assert 0 < short < long


async def test_at_least_one_vector_may_be_asked_for(subject: Subject) -> None:
    """There is always a legal call."""
    provider = subject.provider
    assert provider.max_items >= 1


async def test_calls_side_by_side_do_not_mix(subject: Subject) -> None:
    """Concurrent calls each get what they get alone."""
    provider, space = subject.provider, subject.space
    alone = (await provider.embed(TEXTS, space, timeout_s=30)).vectors
    replies = await asyncio.gather(*(provider.embed([text], space, timeout_s=30) for text in TEXTS * 3))
    for reply, row in zip(replies, [*alone, *alone, *alone], strict=True):
        assert reply.vectors[0] @ row == pytest.approx(1.0, abs=1e-2)


async def test_no_time_is_a_time_out(subject: Subject) -> None:
    """A call that may take no time at all ends as CallTimeout and the next one succeeds."""
    provider, space = subject.provider, subject.space
    with pytest.raises(CallTimeout):
        await provider.embed(TEXTS, space, timeout_s=0)
    await provider.embed(TEXTS, space, timeout_s=30)


async def test_a_cancelled_call_leaves_a_working_provider(subject: Subject) -> None:
    """Calls cancelled at many points leave no task behind, and the next call succeeds."""
    provider, space = subject.provider, subject.space
    await provider.embed(["warm"], space, timeout_s=30)
    before = asyncio.all_tasks()
    for turns in range(20):
        call = asyncio.create_task(provider.embed(TEXTS, space, timeout_s=30))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await provider.embed(TEXTS, space, timeout_s=30)
    async with asyncio.timeout(5):  # a provider that is a whole gateway has something to write afterwards
        while not asyncio.all_tasks() <= before:  # noqa: ASYNC110 — there is no event for it
            await asyncio.sleep(0.01)


# ── those who call somebody ─────────────────────────────────────────────────────────────────────────────────────────


async def checked(subject: Subject, timeout_s: float) -> None:
    """One call as the dispatcher makes it."""
    reply = await subject.provider.embed(TEXTS, subject.space, timeout_s=timeout_s)
    vectors.check(reply.vectors, len(TEXTS), subject.space.dimensions, unit_norm=subject.space.normalised)


async def failure(subject: Subject, timeout_s: float = 10) -> ProviderError:
    """The error of one such call; it tells neither text nor key."""
    with pytest.raises(ProviderError) as failed:
        await checked(subject, timeout_s)
    shown = f"{failed.value} {failed.value!r} {failed.value.__cause__}"
    assert not any(text in shown for text in TEXTS)
    if subject.emulator is not None and subject.emulator.api_key:
        assert subject.emulator.api_key not in shown
    return failed.value


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, InputRefused),
        (401, BadCredential),
        (404, Misconfigured),
        (413, InputRefused),
        (429, Throttled),
        (500, Transient),
        (502, Transient),
        (503, Transient),
        (504, Transient),
        (529, Transient),
    ],
)
async def test_a_status_has_one_meaning(
    subject: Subject, emulator: Emulator, status: int, expected: type[ProviderError]
) -> None:
    """Whoever fails, and whatever stands beside the status, the same is to be done; then the next call succeeds."""
    for body in (b"", b"<html>sorry</html>", b"null", b'"no"', b"{}", b'{"error":"no"}', b'[{"error":{}}]', b"[" * 999):
        emulator.inject(faults.status(status, body), calls=1)
        assert type(await failure(subject)) is expected
    await subject.provider.embed(TEXTS, subject.space, timeout_s=10)


async def test_a_throttle_says_when_to_come_back(subject: Subject, emulator: Emulator) -> None:
    """`Retry-After` is understood everywhere."""
    emulator.inject(faults.status(429, b"{}", {"retry-after": "7"}))
    failed = await failure(subject)
    assert isinstance(failed, Throttled)
    assert failed.retry_after_s == 7


async def test_the_vendors_own_limit_is_understood(subject: Subject, emulator: Emulator) -> None:
    """A call beyond the vendor's limit is a throttle in the vendor's own words."""
    emulator.judge.requests_per_minute = len(TEXTS)
    for _ in range(len(TEXTS)):
        try:
            await subject.provider.embed(TEXTS, subject.space, timeout_s=10)
        except Throttled:
            break
    assert isinstance(await failure(subject), Throttled)


async def test_a_foreign_key_is_the_operators(subject: Subject, behind: Emulator) -> None:
    """The server's own answer to a key that it does not know, whatever its status."""
    assert subject.stranger is not None
    behind.api_key = behind.api_key or "who has none by itself stands behind who has"
    assert type(await failure(replace(subject, provider=subject.stranger))) is BadCredential
    assert not behind.bill.requests


async def test_one_bad_text_refuses_its_call(subject: Subject, behind: Emulator) -> None:
    """The server's own refusal of a text; without that text the call succeeds."""
    behind.poison.add(TEXTS[1])
    assert type(await failure(subject)) is InputRefused
    await subject.provider.embed([TEXTS[0], *TEXTS[2:]], subject.space, timeout_s=10)


@pytest.mark.parametrize(
    "damage",
    [
        server.one_short,
        server.one_too_many,
        server.narrower,
        server.wider,
        server.not_a_number,
        server.infinite,
        server.zeros,
    ],
    ids=["short", "surplus", "narrower", "wider", "nan", "infinite", "zeros"],
)
async def test_what_was_not_asked_for_is_malformed(subject: Subject, emulator: Emulator, damage: Damage) -> None:
    """Too few or too many vectors, other widths and what is no direction are refused; then the next call succeeds."""
    emulator.spoil(damage, calls=1)
    assert type(await failure(subject)) is MalformedReply
    await subject.provider.embed(TEXTS, subject.space, timeout_s=10)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b"<html>", b'{"error":{"message":"no"}}', b'{"data":[1]}'],
)
async def test_a_body_that_is_no_answer_is_malformed(subject: Subject, emulator: Emulator, content: bytes) -> None:
    """A 200 with anything else in it is no answer."""
    emulator.inject(faults.body(content), calls=1)
    assert type(await failure(subject)) is MalformedReply


@pytest.mark.parametrize("fault", [faults.gzip_bomb, faults.endless_body], ids=["gzip bomb", "endless"])
async def test_a_flood_is_cut_off(subject: Subject, emulator: Emulator, fault: faults.Fault) -> None:
    """A reply that would not fit any honest answer is not read to its end."""
    emulator.inject(fault, calls=1)
    assert type(await failure(subject)) is MalformedReply


@pytest.mark.parametrize("fault", [faults.reset, faults.half_body], ids=["reset", "half a body"])
async def test_a_broken_connection_is_worth_another_try(
    subject: Subject, emulator: Emulator, fault: faults.Fault
) -> None:
    """It may have cost something."""
    emulator.inject(fault, calls=1)
    failed = await failure(subject)
    assert type(failed) is BrokenOff
    assert (failed.counted, failed.may_cost) == (True, True)
    await subject.provider.embed(TEXTS, subject.space, timeout_s=10)


@pytest.mark.parametrize("fault", [faults.hang, faults.stalled_body], ids=["hang", "stalled"])
async def test_the_deadline_is_for_the_whole_call(subject: Subject, emulator: Emulator, fault: faults.Fault) -> None:
    """Silence ends when the call's time is over."""
    await subject.provider.embed(TEXTS, subject.space, timeout_s=10)
    emulator.inject(fault, calls=1)
    assert type(await failure(subject, timeout_s=0.1)) is CallTimeout
    await subject.provider.embed(TEXTS, subject.space, timeout_s=10)


async def test_a_failure_behind_is_worth_another_try(subject: Subject, behind: Emulator) -> None:
    """A 500 of the vendor is transient, through however many servers; then the next call succeeds."""
    behind.inject(faults.status(500))
    assert type(await failure(subject)) is Transient
    behind.heal()
    await subject.provider.embed([f"{text} again" for text in TEXTS], subject.space, timeout_s=10)


async def test_each_call_is_paid_once(subject: Subject, behind: Emulator) -> None:
    """Nobody on the way asks twice."""
    await subject.provider.embed(TEXTS, subject.space, timeout_s=10)
    assert (behind.bill.requests, behind.bill.items) == (1, len(TEXTS))


async def test_where_nobody_listens_nothing_was_counted(subject: Subject, emulator: Emulator) -> None:
    """A closed port costs nothing."""
    await emulator.__aexit__()
    failed = await failure(subject)
    assert type(failed) is Unreachable
    assert not failed.counted
