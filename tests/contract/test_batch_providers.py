"""What a vendor's own batches promise, one suite over all who have them, each before its stand-in over real HTTP."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson
import pytest

from app.domain import Space, Text
from app.errors import (
    BadCredential,
    BrokenOff,
    InputRefused,
    MalformedReply,
    Misconfigured,
    ProviderError,
    Throttled,
    Transient,
)
from app.job_ports import BatchAnswer, BatchProvider, BatchState
from app.providers import batch_provider
from app.providers.azure import Azure
from app.providers.dialect import Dialect, Target
from app.providers.gemini import Gemini
from app.providers.http import Endpoint
from app.providers.openai import OpenAI
from app.providers.voyage import Voyage
from tests.emulators import faults, server
from tests.emulators.faults import Wire
from tests.emulators.gemini import GeminiEmulator
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Bill, Damage
from tests.emulators.voyage import VoyageEmulator

TEXTS = [f"text {number}" for number in range(12)]
Vendor = OpenAIEmulator | GeminiEmulator | VoyageEmulator


@dataclass(frozen=True)
class Subject:
    """Whose batches are ordered, and at which stand-in."""

    provider: BatchProvider
    emulator: Vendor
    space: Space

    def vector(self, text: str) -> npt.NDArray[np.float32]:
        """The unit vector of a text."""
        found = self.emulator.vector(self.space.model, text, self.space.dimensions)
        return found / np.linalg.norm(found)


def connected(wire: type[Dialect], emulator: Vendor, model: str, key: str | None = None) -> BatchProvider:
    """The dialect's batches at its stand-in."""
    dialect = wire(Target(model, wire.models[model], frozenset({model})))
    headers = dialect.headers(key or emulator.api_key or "")
    made = batch_provider(dialect, lambda: Endpoint(emulator.base_url, headers, max_connections=4, read_timeout_s=10))
    assert made is not None
    return made


VENDORS: dict[str, tuple[type[Dialect], type[Vendor], Space]] = {
    "openai": (OpenAI, OpenAIEmulator, Space("text-embedding-3-small", 256)),
    "gemini": (Gemini, GeminiEmulator, Space("gemini-embedding-001", 768, input_type="document")),
    "gemini 2": (Gemini, GeminiEmulator, Space("gemini-embedding-2", 3072)),
    "voyage": (Voyage, VoyageEmulator, Space("voyage-4", 1024)),
}


@pytest.fixture(params=VENDORS)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """A vendor whose batches are over at the first look."""
    wire, emulator, space = VENDORS[request.param]
    async with emulator() as running:
        running.batches.steps = 0
        provider = connected(wire, running, space.model)
        yield Subject(provider, running, space)
        await provider.aclose()


async def over(subject: Subject, texts: Sequence[Text] = TEXTS) -> str:
    """A batch that has ended."""
    vendor_id = await subject.provider.submit("job-1", texts, subject.space)
    assert (await subject.provider.poll(vendor_id)).status != "running"
    return vendor_id


async def answers(subject: Subject, vendor_id: str, texts: Sequence[Text] = TEXTS) -> list[BatchAnswer]:
    """All of them, in the order in which they came."""
    return [answer async for answer in subject.provider.results(vendor_id, texts, subject.space)]


def check(subject: Subject, found: Sequence[BatchAnswer], errors: Mapping[int, type[ProviderError]]) -> None:
    """Each text has one answer: its own vector, or one of `errors`."""
    assert sorted(answer.place for answer in found) == list(range(len(TEXTS)))
    for place, answer, _ in found:
        if place in errors:
            assert type(answer) is errors[place]
        else:
            assert isinstance(answer, np.ndarray)
            np.testing.assert_allclose(answer, subject.vector(TEXTS[place]), atol=1e-6)


# ── the plain way ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_text_gets_its_own_vector_whatever_the_order(subject: Subject) -> None:
    """The vendor's order is any; every text is answered once, with its tokens, on the batches' bill alone."""
    vendor_id = await over(subject)
    found = await answers(subject, vendor_id)
    assert [answer.place for answer in found] != sorted(answer.place for answer in found)
    check(subject, found, {})
    counts = [subject.emulator.count(text) for text in TEXTS]
    told = subject.space.model != "gemini-embedding-001"
    assert sorted(answer.tokens or 0 for answer in found) == (sorted(counts) if told else [0] * len(TEXTS))
    assert subject.emulator.batch_bill == Bill(len(TEXTS), len(TEXTS), sum(counts))
    assert subject.emulator.bill == Bill()


async def test_a_batch_tells_how_it_stands(subject: Subject) -> None:
    """First it runs, and has no results yet; then it is done, with counts, as often as one looks."""
    subject.emulator.batches.steps = 2
    subject.emulator.poison.add(TEXTS[0])
    vendor_id = await subject.provider.submit("job-1", TEXTS, subject.space)
    assert (await subject.provider.poll(vendor_id)).status == "running"
    with pytest.raises(Transient, match="not over"):
        await answers(subject, vendor_id)
    for _ in range(2):
        assert await subject.provider.poll(vendor_id) == BatchState("done", completed=11, failed=1)
    assert len(await answers(subject, vendor_id)) == 12


async def test_a_bad_text_fails_alone(subject: Subject) -> None:
    """Its neighbours have their vectors."""
    subject.emulator.poison.add(TEXTS[3])
    check(subject, await answers(subject, await over(subject)), {3: InputRefused})


async def test_the_same_text_twice_is_answered_twice(subject: Subject) -> None:
    """Each place has an answer of its own."""
    texts = ["again", "again"]
    found = await answers(subject, await over(subject, texts), texts)
    assert sorted(answer.place for answer in found) == [0, 1]
    for _, answer, _ in found:
        assert isinstance(answer, np.ndarray)
        np.testing.assert_allclose(answer, subject.vector("again"), atol=1e-6)


async def test_answers_come_before_the_file_has_ended(subject: Subject) -> None:
    """The output is never whole in memory: what has come is given on while the rest is still to be sent."""
    go_on = asyncio.Event()

    async def in_halves(wire: Wire, content: bytes) -> None:
        await wire.start(200, {}, len(content))
        await wire.write(content[: len(content) // 2])
        await go_on.wait()
        await wire.write(content[len(content) // 2 :], last=True)

    vendor_id = await over(subject)
    subject.emulator.batches.inject("content", in_halves)
    async with aclosing(subject.provider.results(vendor_id, TEXTS, subject.space)) as streamed:
        found = [await anext(streamed)]
        go_on.set()
        found += [answer async for answer in streamed]
    check(subject, found, {})


# ── what is lost on the way ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [faults.reset, faults.half_body])
async def test_a_batch_whose_answer_was_lost_is_found(subject: Subject, fault: faults.Fault) -> None:
    """After a broken creation the vendor's list tells that there is one, among many others, and it is the only one."""
    subject.emulator.batches.inject("create", fault)
    with pytest.raises(BrokenOff) as lost:
        await subject.provider.submit("job-1", TEXTS, subject.space)
    assert lost.value.may_cost
    await subject.provider.submit("job-2", TEXTS, subject.space)
    desk = subject.emulator.batches
    ours, other = desk.batches.values()
    for _ in range(250):
        desk.order(other.ordered, other.source, other.model)
    found = await subject.provider.find("job-1")
    assert found == ours.id
    await subject.provider.poll(found)
    check(subject, await answers(subject, found), {})


async def test_an_upload_that_broke_orders_nothing(subject: Subject) -> None:
    """Without an answer to the upload there is no batch to be found, and the next try makes the only one."""
    subject.emulator.batches.inject("upload", faults.reset)
    with pytest.raises(BrokenOff):
        await subject.provider.submit("job-1", TEXTS, subject.space)
    assert await subject.provider.find("job-1") is None
    vendor_id = await subject.provider.submit("job-1", TEXTS, subject.space)
    assert await subject.provider.find("job-1") == vendor_id
    assert [*subject.emulator.batches.batches] == [vendor_id]


@pytest.mark.parametrize("body", [b"<html></html>", b"[]", b'{"data": 1, "operations": 1}'])
async def test_a_list_that_is_none_is_not_an_empty_one(subject: Subject, body: bytes) -> None:
    """Nothing is submitted twice because somebody answered nonsense to the search."""
    subject.emulator.batches.inject("list", faults.body(body))
    with pytest.raises(MalformedReply):
        await subject.provider.find("job-1")


async def test_a_broken_stream_may_be_read_again(subject: Subject) -> None:
    """Half of an output raises; the next try has all of it."""
    vendor_id = await over(subject)
    subject.emulator.batches.inject("content", faults.half_body)
    with pytest.raises(BrokenOff):
        await answers(subject, vendor_id)
    check(subject, await answers(subject, vendor_id), {})


# ── a vendor that lies ──────────────────────────────────────────────────────────────────────────────────────────────

LAST = len(TEXTS) - 1


@pytest.mark.parametrize(
    "damage", ["not_a_number", "infinite", "zeros", "narrower", "wider", "one_short", "one_too_many"]
)
async def test_what_is_not_as_asked_is_no_answer(subject: Subject, damage: str) -> None:
    """A vector that is none, of another width, or missing fails its text alone; what nobody asked for is nothing."""
    done: Damage = getattr(server, damage)
    subject.emulator.batches.damage = done
    expected = {} if damage == "one_too_many" else {LAST: MalformedReply}
    check(subject, await answers(subject, await over(subject)), expected)


async def test_two_answers_to_one_text_are_none(subject: Subject) -> None:
    """Nobody can tell which one is right, so nothing of that batch is believed."""
    subject.emulator.batches.damage = server.one_place_twice
    vendor_id = await over(subject)
    with pytest.raises(MalformedReply, match="two answers"):
        await answers(subject, vendor_id)


async def test_answers_to_other_texts_are_none(subject: Subject) -> None:
    """What belongs to another batch, or to another Space, never becomes a vector of this one."""
    vendor_id = await over(subject, TEXTS[::-1])
    check(subject, await answers(subject, vendor_id), dict.fromkeys(range(12), MalformedReply))
    foreign = Space(subject.space.model, subject.space.dimensions, input_type="query")
    found = [answer async for answer in subject.provider.results(vendor_id, TEXTS[::-1], foreign)]
    assert {type(answer.answer) for answer in found} == {MalformedReply}


async def test_lines_that_are_none_answer_nobody(subject: Subject) -> None:
    """Whatever an output holds, each text has one answer, an error of ours."""
    vendor_id = await over(subject)
    junk = b'\n\nnull\n{"custom_id": 1, "key": []}\n{"custom_id": "a", "key": "a"}\n' + b"[" * 5000 + b"\n\xff\n{"
    subject.emulator.batches.inject("content", faults.body(junk))
    check(subject, await answers(subject, vendor_id), dict.fromkeys(range(12), MalformedReply))


async def test_an_endless_line_is_not_read(subject: Subject) -> None:
    """A gigabyte without a line's end is left long before its own."""
    vendor_id = await over(subject)
    subject.emulator.batches.inject("content", faults.endless_body)
    with pytest.raises(MalformedReply, match="more than"):
        await answers(subject, vendor_id)


@pytest.mark.parametrize("name", ["../other", "batches/../other", "", "a b"])
async def test_an_id_that_leads_elsewhere_is_none(subject: Subject, name: str) -> None:
    """What the vendor calls a batch or a file stands in URLs, so it is one of its plain names."""
    said = orjson.dumps({"id": name, "name": name, "file": {"name": name}})
    for operation in ("create", "upload"):
        subject.emulator.batches.inject(operation, faults.body(said))
        with pytest.raises(MalformedReply):
            await subject.provider.submit("job-1", TEXTS, subject.space)
    with pytest.raises(MalformedReply):
        await subject.provider.poll(name)


async def test_another_batch_than_asked_for_is_none(subject: Subject) -> None:
    """A poll that tells of another one is malformed, and so is a state that nobody knows."""
    ours = await over(subject)
    other = await over(subject)
    for change in (
        lambda said: said.update(id=other, name=other),
        lambda said: said.update(status="lost", metadata={"state": "LOST"}),
    ):
        subject.emulator.batches.inject("poll", faults.altered(change))
        with pytest.raises(MalformedReply):
            await subject.provider.poll(ours)


async def test_redirects_are_not_followed(subject: Subject) -> None:
    """Neither when asking nor when fetching the output."""
    vendor_id = await over(subject)
    for operation in ("poll", "content"):
        elsewhere = faults.status(302, b"", {"location": f"{subject.emulator.base_url}/elsewhere"})
        subject.emulator.batches.inject(operation, elsewhere)
        with pytest.raises(Misconfigured):
            await answers(subject, vendor_id)


# ── what a vendor refuses or does not finish ────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_throttles(subject: Subject) -> None:
    """What was refused was not ordered, and may be ordered later under its name."""
    subject.emulator.batches.most_open = 0
    with pytest.raises(Throttled):
        await subject.provider.submit("job-1", TEXTS, subject.space)
    assert await subject.provider.find("job-1") is None
    subject.emulator.batches.most_open = 1
    check(subject, await answers(subject, await over(subject)), {})


async def test_a_batch_that_failed_for_want_of_room_says_so(subject: Subject) -> None:
    """It is worth another try, and has no answers."""
    subject.emulator.batches.queue_full = True
    vendor_id = await over(subject)
    state = await subject.provider.poll(vendor_id)
    assert (state.status, state.crowded) == ("failed", True)
    assert state.reason in {"token_limit_exceeded", "8"}
    check(subject, await answers(subject, vendor_id), dict.fromkeys(range(12), Transient))


async def test_what_expires_keeps_what_was_done(subject: Subject) -> None:
    """The first texts have vectors, the others may be tried again."""
    subject.emulator.batches.lapses_after = 5
    vendor_id = await over(subject)
    expected = "done" if isinstance(subject.emulator, VoyageEmulator) else "expired"
    assert (await subject.provider.poll(vendor_id)).status == expected
    check(subject, await answers(subject, vendor_id), dict.fromkeys(range(5, 12), Transient))


async def test_a_batch_may_be_cancelled(subject: Subject) -> None:
    """It runs until it has ended and keeps what was done; to cancel what is over changes nothing."""
    subject.emulator.batches.steps = 9
    vendor_id = await subject.provider.submit("job-1", TEXTS, subject.space)
    await subject.provider.poll(vendor_id)
    subject.emulator.batches.lapses_after = 2
    await subject.provider.cancel(vendor_id)
    for _ in range(2):
        assert (await subject.provider.poll(vendor_id)).status == "cancelled"
        await subject.provider.cancel(vendor_id)
    check(subject, await answers(subject, vendor_id), dict.fromkeys(range(2, 12), Transient))


async def test_a_strangers_key_is_no_use(subject: Subject) -> None:
    """Nothing is ordered or told, and the key is not in the error."""
    wire = type(subject.provider.dialect)  # type: ignore[attr-defined]
    stranger = connected(wire, subject.emulator, subject.space.model, "another-key")
    for call in (stranger.submit("job-1", TEXTS, subject.space), stranger.find("job-1")):
        with pytest.raises(BadCredential) as refused:
            await call
        assert "another-key" not in repr(refused.value)
    await stranger.aclose()


async def test_what_does_not_fit_is_not_sent(subject: Subject) -> None:
    """Nothing, and more texts than a batch may hold, are refused here."""
    for texts in ([], ["a"] * (subject.provider.limits.texts + 1)):
        with pytest.raises(InputRefused):
            await subject.provider.submit("job-1", texts, subject.space)
    assert not subject.emulator.batches.files


# ── what only one of them does ──────────────────────────────────────────────────────────────────────────────────────


async def test_gemini_does_not_cut_silently_in_batches_either() -> None:
    """A text that Google would cut keeps the batch from being ordered, and is named."""
    async with GeminiEmulator() as emulator:
        space = Space("gemini-embedding-001", 768, max_input_tokens=2048)
        provider = connected(Gemini, emulator, space.model)
        with pytest.raises(InputRefused) as refused:
            await provider.submit("job-1", [*["a"] * 150, "word " * 2500], space)
        await provider.aclose()
        assert (refused.value.position, refused.value.too_long) == (150, True)
        assert not emulator.batches.files


async def test_openai_takes_token_ids_in_batches_too() -> None:
    """A text of ids gets the vector of what they stand for."""
    async with OpenAIEmulator() as emulator:
        emulator.batches.steps = 0
        space = Space("text-embedding-3-small", 1536)
        subject = Subject(connected(OpenAI, emulator, space.model), emulator, space)
        texts: list[Text] = [(15339, 1917), "b"]
        found = await answers(subject, await over(subject, texts), texts)
        vectors = {place: vector for place, vector, _ in found}
        np.testing.assert_allclose(vectors[0], subject.vector("hello world"), atol=1e-6)  # type: ignore[arg-type]
        await subject.provider.aclose()


def test_azure_has_no_batches_of_embeddings() -> None:
    """So no connection is made for them."""
    assert batch_provider(Azure(Target("text-embedding-3-small")), pytest.fail) is None
