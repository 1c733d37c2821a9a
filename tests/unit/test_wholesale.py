"""What is ordered from a vendor's own batches and how it is booked, over the real engine; in virtual time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import pytest

from app.domain import ANONYMOUS, Basket, EmbeddingRequest, Space, Spender, Text, Truncation
from app.engine.wholesale import Parcel, Vendor, Wanted, Wholesale
from app.errors import BrokenOff, InputRefused, InvalidRequest, MalformedReply, ProviderError, Throttled, Transient
from app.job_ports import BatchAnswer, BatchLimits, BatchState
from tests.identity import identifying_vector
from tests.rig import MODEL, WIDTH, Notebook, Rig, ScriptedProvider, engine

pytestmark = pytest.mark.looptime

PRICE = 3_000
"""Pico-USD that a token costs in batches, so that one costs three nano-USD."""


ROOMY = BatchLimits(1000, 10**9, 10**9)


@dataclass
class Batches:
    """A vendor that carries everything out at once; `refuses` raises at orders, `spoils` says what becomes of texts."""

    limits: BatchLimits = ROOMY
    refuses: ProviderError | None = None
    spoils: dict[str, ProviderError] = field(default_factory=dict)
    silent: bool = False
    torn: bool = False
    orders: dict[str, Sequence[Text]] = field(default_factory=dict)

    async def submit(self, name: str, texts: Sequence[Text], space: Space) -> str:
        """See `BatchProvider`."""
        del space
        if self.refuses is not None:
            raise self.refuses
        assert name not in self.orders
        self.orders[name] = texts
        return f"id of {name}"

    async def find(self, name: str) -> str | None:
        """See `BatchProvider`."""
        return f"id of {name}" if name in self.orders else None

    async def poll(self, vendor_id: str) -> BatchState:
        """See `BatchProvider`."""
        del vendor_id
        return BatchState("done")

    async def results(self, vendor_id: str, texts: Sequence[Text], space: Space) -> AsyncGenerator[BatchAnswer, None]:
        """See `BatchProvider`; the last text first."""
        assert self.orders[vendor_id.removeprefix("id of ")] == texts
        for place, text in reversed([*enumerate(texts)]):
            said = str(text)
            answer = self.spoils.get(said) or identifying_vector(said, space.model, space.dimensions)
            yield BatchAnswer(place, answer, None if self.silent else len(said.split()))
        if self.torn:
            raise MalformedReply("two answers to one text")

    async def cancel(self, vendor_id: str) -> None:
        """See `BatchProvider`."""

    async def aclose(self) -> None:
        """See `BatchProvider`."""


@dataclass
class Counter:
    """The engine, who orders for it, and what is booked of that."""

    rig: Rig
    wholesale: Wholesale
    batches: Batches
    book: Notebook

    async def missing(self, *texts: Text, user: str = "", truncation: Truncation | None = None) -> list[Wanted]:
        """What is to be bought."""
        _, wanted = await self.wholesale.missing(asked(*texts, user=user, truncation=truncation))
        return wanted

    async def parcel(self, *texts: Text) -> Parcel:
        """The only one that these make."""
        request = asked(*texts)
        space, wanted = await self.wholesale.missing(request)
        (parcel,) = self.wholesale.pack(request, space, wanted)
        return parcel

    @property
    def entries(self) -> list[tuple[str, int, str]]:
        """What was said of each order in the end: its name, tokens, and how it ended."""
        return [(purchase.id, tokens, how) for purchase, tokens, how in self.book.ended]


def asked(*texts: Text, user: str = "", truncation: Truncation | None = None) -> EmbeddingRequest:
    """A line of a job."""
    deadline = asyncio.get_running_loop().time() + 30
    spender = Spender(user=user)
    return EmbeddingRequest(ANONYMOUS, MODEL, texts, deadline, truncation=truncation, spender=spender, cause="bulk")


@asynccontextmanager
async def counter(batches: Batches | None = None, price: int | None = PRICE, **options: Any) -> AsyncIterator[Counter]:
    """The engine, whose only deployment's vendor has batches."""
    vendor, book = batches or Batches(), Notebook()
    async with engine(ScriptedProvider(), **options) as rig:
        parts = replace(rig.gateway._parts, ledger=book)
        yield Counter(rig, Wholesale(rig.gateway, parts, {"d0": Vendor(vendor, price)}), vendor, book)


def texts_of(parcels: Sequence[Parcel]) -> list[list[str]]:
    """What is in them."""
    return [[str(text) for text in parcel.texts] for parcel in parcels]


# ── what is to be bought ────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_kept_or_in_flight_is_not_missing() -> None:
    """And what is said twice is missing once."""
    async with counter() as at:
        await at.rig.ask("kept")
        flight = asyncio.create_task(at.rig.ask("in flight"))
        await asyncio.sleep(0.01)
        assert at.rig.provider.in_flight == 1
        wanted = await at.missing("kept", "in flight", "new", "new", "and more")
        assert [(each.payload, each.tokens) for each in wanted] == [("new", 1), ("and more", 2)]
        await flight
        assert await at.missing("kept", "in flight") == []


async def test_of_a_long_text_its_windows_are_missing() -> None:
    """Those that nobody has; they make its vector without anything that is bought again."""
    long = " ".join(f"w{number}" for number in range(23))
    async with counter(max_input_tokens=10, long_input="mean", overlap_tokens=0) as at:
        wanted = await at.missing(long, "short")
        said = [str(each.payload).split() for each in wanted]
        assert [words[0] for words in said] == ["w0", "w10", "w20", "short"]
        assert [each.tokens for each in wanted] == [10, 10, 3, 1]
        parcel = await at.parcel(long, "short")
        vendor_id = await at.wholesale.order("n", parcel, asked(long))
        delivery = await at.wholesale.receive("n", vendor_id, parcel)
        result = await at.rig.gateway.embed(asked(long, "short"), Basket({**delivery.vectors}))
        assert (len(result.vectors), result.tokens) == (2, 24)
        assert at.rig.provider.calls == []
        assert await at.missing(long) == []


async def test_what_is_wrong_with_a_request_is_raised() -> None:
    """As the online door would."""
    async with counter(max_input_tokens=3) as at:
        with pytest.raises(InvalidRequest):
            await at.missing("one two three four")
        assert [each.payload for each in await at.missing("one two three four", truncation="end")] == ["one two three"]


# ── parcels ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (BatchLimits(2, 10**9, 10**9), [["a a", "b b b"], ["c", "d"], ["e"]]),
        (BatchLimits(9, 10**9, 5), [["a a", "b b b"], ["c", "d", "e"]]),
        (BatchLimits(9, 10**9, 2), [["a a"], ["b b b"], ["c", "d"], ["e"]]),
        (BatchLimits(9, 10**9, 0), [["a a", "b b b", "c", "d", "e"]]),
        (BatchLimits(9, 1200, 10**9), [["a a", "b b b"], ["c", "d"], ["e"]]),
        (BatchLimits(9, 1, 10**9), [["a a"], ["b b b"], ["c"], ["d"], ["e"]]),
    ],
    ids=["texts", "tokens", "a text too large", "tokens not known", "bytes", "no room"],
)
async def test_parcels_are_as_large_as_the_vendor_takes_them(limits: BatchLimits, expected: list[list[str]]) -> None:
    """In the order in which texts are wanted; one that is too large alone goes alone, and will be refused."""
    async with counter(Batches(limits)) as at:
        request = asked("a a", "b b b", "c", "d", "e")
        space, wanted = await at.wholesale.missing(request)
        parcels = at.wholesale.pack(request, space, wanted)
        assert texts_of(parcels) == expected
        assert [key for parcel in parcels for key in parcel.keys] == [each.key for each in wanted]
        assert [tokens for parcel in parcels for tokens in parcel.tokens] == [2, 3, 1, 1, 1]
        assert {(parcel.deployment, parcel.price, parcel.space) for parcel in parcels} == {("d0", PRICE, space)}
        for parcel in parcels:
            assert sum(part.texts for part in parcel.parts) == len(parcel.texts)
            assert sum(part.tokens for part in parcel.parts) == sum(parcel.tokens)


async def test_a_parcel_is_split_over_its_users_and_written_down_as_it_is() -> None:
    """Each pays for what it asked for; who takes a text out takes it off whoever asked for it."""
    async with counter() as at:
        wanted = [
            *await at.missing("a a", "b", user="ada"),
            *await at.missing("c c c", user="bob"),
            *await at.missing((7, 8)),
        ]
        request = asked("a a")
        (parcel,) = at.wholesale.pack(request, (await at.wholesale.missing(request))[0], wanted)
        assert [(part.user, part.texts, part.tokens) for part in parcel.parts] == [
            ("ada", 2, 3),
            ("bob", 1, 3),
            ("", 1, 2),
        ]
        less = parcel.without(0).without(1)
        assert [(part.user, part.texts, part.tokens) for part in less.parts] == [("ada", 1, 1), ("", 1, 2)]
        assert [len(column) for column in (less.keys, less.texts, less.tokens, less.users)] == [2] * 4
        for each in (parcel, less):
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(each), type=Parcel) == each


async def test_nobody_sells_what_has_no_batches() -> None:
    """Neither is anything packed."""
    async with engine(ScriptedProvider()) as rig:
        wholesale = Wholesale(rig.gateway, rig.gateway._parts, {})
        space, wanted = await wholesale.missing(asked("a"))
        assert not wholesale.sells(MODEL)
        assert not wholesale.sells("another")
        assert wholesale.pack(asked("a"), space, wanted) == []


# ── money ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_order_is_booked_as_expected_and_then_as_it_was() -> None:
    """However often it is found and received: it is one entry, and what is known counts."""
    async with counter() as at:
        parcel = await at.parcel("a a", "b")
        vendor_id = await at.wholesale.order("n", parcel, asked("a a"))
        assert await at.wholesale.find("n", parcel) == vendor_id
        first = await at.wholesale.receive("n", vendor_id, parcel)
        assert await at.wholesale.receive("n", vendor_id, parcel) == first
        assert at.entries == [("n", 3, "unconfirmed")] * 2 + [("n", 3, "billed")] * 2
        (said,) = {(each.price, each.deployment, each.parts) for each, _, _ in at.book.ended}
        assert said == (PRICE, "d0", parcel.parts)
        assert first.nano_usd == 9
        for key, text in zip(parcel.keys, parcel.texts, strict=True):
            assert first.vectors[key].data == identifying_vector(str(text), MODEL, WIDTH).tobytes()
        await at.rig.ask("a a", "b")
        assert at.rig.provider.calls == []


async def test_what_names_no_tokens_is_estimated() -> None:
    """As many as are expected; where no price is known nobody knows what it cost."""
    for price, cost in ((PRICE, 9), (None, None)):
        async with counter(Batches(silent=True), price) as at:
            parcel = await at.parcel("a a", "b")
            delivery = await at.wholesale.receive("n", await at.wholesale.order("n", parcel, asked("a")), parcel)
            assert at.entries[-1] == ("n", 3, "estimated")
            assert delivery.nano_usd == cost


async def test_only_what_was_carried_out_costs() -> None:
    """A refused text and one that the vendor did not get to are free; a spoilt answer may be on the bill."""
    refused, late, spoilt = InputRefused("no", position=0), Transient("the batch is expired"), MalformedReply("zeros")
    for errors, entry in (
        ({"b": refused, "c c": late}, ("n", 3, "billed")),
        ({"b": refused, "c c": spoilt}, ("n", 5, "estimated")),
        ({"a a a": refused, "b": late, "c c": late}, ("n", 0, "failed")),
    ):
        async with counter(Batches(spoils=errors)) as at:
            parcel = await at.parcel("a a a", "b", "c c")
            delivery = await at.wholesale.receive("n", await at.wholesale.order("n", parcel, asked("a")), parcel)
            assert at.entries[-1] == entry
            assert len(delivery.vectors) == 3 - len(errors)


async def test_of_a_torn_delivery_nothing_is_kept() -> None:
    """What it cost is still only expected."""
    async with counter(Batches(torn=True)) as at:
        parcel = await at.parcel("a a", "b")
        vendor_id = await at.wholesale.order("n", parcel, asked("a a"))
        with pytest.raises(MalformedReply):
            await at.wholesale.receive("n", vendor_id, parcel)
        assert at.entries == [("n", 3, "unconfirmed")]
        assert len(await at.missing("a a", "b")) == 2


@pytest.mark.parametrize(
    ("error", "entries"),
    [(BrokenOff("lost"), [("n", 3, "unconfirmed")]), (Throttled("full"), []), (InputRefused("no", position=1), [])],
    ids=["unheard", "throttled", "refused"],
)
async def test_what_may_have_been_ordered_is_booked(error: ProviderError, entries: list[tuple[str, int, str]]) -> None:
    """Until it is known whether it was; what surely was not is not."""
    async with counter(Batches(refuses=error)) as at:
        parcel = await at.parcel("a a", "b")
        with pytest.raises(type(error)):
            await at.wholesale.order("n", parcel, asked("a a"))
        assert at.entries == entries
        at.wholesale.nothing_came("n", parcel, "not found")
        assert at.entries == [*entries, ("n", 0, "failed")]


async def test_vectors_are_what_was_sent() -> None:
    """The rows that the engine keeps are those of the vendor, float32."""
    async with counter() as at:
        parcel = await at.parcel("a")
        delivery = await at.wholesale.receive("n", await at.wholesale.order("n", parcel, asked("a")), parcel)
        ((vector),) = delivery.vectors.values()
        assert np.frombuffer(vector.data, "<f4").shape == (WIDTH,)
        assert vector.tokens == 1
