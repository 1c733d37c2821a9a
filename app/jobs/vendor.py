"""Hides how texts are bought in the vendor's own batches, over hours, restarts and second thoughts."""

import time
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from app.domain import EmbeddingRequest, Space, Vector
from app.engine.wholesale import Delivery, Parcel, Wanted, Wholesale
from app.errors import EmbedgateError, InputRefused, MalformedReply, ProviderError, TryAgainLater
from app.job import Work
from app.job_ports import BatchState, Blobs

CALLED_OFF_S: Final = 900.0
"""For how long a vendor may take to end what was called off; OpenAI says that it may take ten minutes."""

_LOOK_LEAST_S, _LOOK_MOST_S, _LOOK_PART = 2.0, 60.0, 0.1  # later looks are further apart, as the batch is older
_MOST_TRIES = 50  # in which a vendor names a bad text, one each


class TakenOver(Exception):
    """Somebody else sees to this errand now."""


class Errand(Protocol):
    """Texts that are to be bought together, and what is noted of that."""

    @property
    def name(self) -> str:
        """No other one has it."""

    @property
    def folder(self) -> str:
        """Of its blobs."""

    @property
    def fence(self) -> int:
        """Earlier holders, who may not know that they are, had smaller ones."""

    @property
    def until_s(self) -> float:
        """So long the vendor has time (Unix seconds); what it has not done then goes the ordinary way."""

    @property
    def note(self) -> bytes:
        """What was noted last; nothing in the beginning."""

    def requests(self) -> AsyncIterator[EmbeddingRequest]:
        """What asks for the texts, for one tenant, as that stands now. What is wrong with one is not told here."""

    async def buyer(self) -> EmbeddingRequest | None:
        """One that asks as the tenant stands now, for whatever texts; None: nobody may ask any more."""

    async def noted(self, words: bytes) -> None:
        """From now on its `note`, whatever happens. Raises TakenOver."""


class Lot(msgspec.Struct, frozen=True):
    """A parcel of an errand, by the number of its blob; `attempt` is part of the name under which it is ordered.

    `vendor_id` "": it is not known to be ordered; `unheard`: it may be, the answer was lost. `over`: nothing is waited
    for any more; `came`: there may be something to be had.
    """

    number: int
    fence: int
    attempt: int = 0
    vendor_id: str = ""
    unheard: bool = False
    over: bool = False
    came: bool = False


class Orders(msgspec.Struct, frozen=True):
    """What is noted of an errand: since when (Unix seconds) what is ordered."""

    since_s: float
    lots: tuple[Lot, ...]


def ordered_since_s(note: bytes) -> float | None:
    """Since when something is ordered (Unix seconds), as is noted; None: nothing was."""
    return _orders_of(note).since_s if note else None


_encode = msgspec.msgpack.Encoder().encode
_orders_of = msgspec.msgpack.Decoder(Orders).decode
_parcel_of = msgspec.msgpack.Decoder(Parcel).decode


class Brought(NamedTuple):
    """All that the vendor was asked for, as far as it came: vectors by key; and what that took."""

    vectors: MutableMapping[bytes, Vector]
    work: Work


class Wait(NamedTuple):
    """Nothing to do for so long."""

    for_s: float


@dataclass(frozen=True, slots=True)
class VendorPath:
    """The way of errands through the vendor's batches, look by look; nobody has to wait in between.

    Whoever looks next goes on where the last one was: what is noted is never ordered twice. `clock` is Unix seconds.
    """

    blobs: Blobs
    wholesale: Wholesale
    clock: Callable[[], float] = time.time

    async def look(self, errand: Errand) -> Wait | None:
        """One step; None: all that was ordered is over. Raises TakenOver, OSError, TryAgainLater, BudgetExhausted."""
        fresh = not errand.note
        if fresh:
            await self._pack(errand)
        orders = _orders_of(errand.note)
        try:
            for place, lot in enumerate(orders.lots):
                moved = lot if lot.over else await self._move(errand, lot, fresh=fresh)
                lots = (*orders.lots[:place], moved, *orders.lots[place + 1 :])
                orders = msgspec.structs.replace(orders, lots=lots)
        finally:
            words = _encode(orders)
            if words != errand.note:
                await errand.noted(words)
        return None if all(lot.over for lot in orders.lots) else self._until_next_look(orders)

    def _until_next_look(self, orders: Orders) -> Wait:
        age_s = self.clock() - orders.since_s
        return Wait(min(_LOOK_MOST_S, max(_LOOK_LEAST_S, _LOOK_PART * age_s)))

    # ── what is to be ordered ───────────────────────────────────────────────────────────────────────────────────────

    async def _pack(self, errand: Errand) -> None:
        """Writes down what has to be bought, before anything of it is ordered."""
        lots = []
        for number, parcel in enumerate(await self._parcels(errand)):
            lots.append(Lot(number, errand.fence))
            await self._keep(errand, lots[-1], parcel)
        await errand.noted(_encode(Orders(self.clock(), tuple(lots))))

    async def _parcels(self, errand: Errand) -> Sequence[Parcel]:
        """Of what is wrong with a request its own turn tells."""
        wanted: dict[Space, dict[bytes, Wanted]] = {}
        request: EmbeddingRequest | None = None
        async for request in errand.requests():
            try:
                space, texts = await self.wholesale.missing(request)
            except TryAgainLater:
                raise
            except EmbedgateError:
                continue
            of_space = wanted.setdefault(space, {})
            for text in texts:
                of_space.setdefault(text.key, text)
        if request is None:
            return ()
        return [
            each for space, texts in wanted.items() for each in self.wholesale.pack(request, space, [*texts.values()])
        ]

    # ── one lot ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _move(self, errand: Errand, lot: Lot, *, fresh: bool) -> Lot:
        """The lot as it stands now, one step further; what the vendor does not do now it may do the next time."""
        parcel = await self._parcel(errand, lot)
        if not self.wholesale.knows(parcel):
            return _over(lot)
        late_s = self.clock() - errand.until_s
        try:
            if not lot.vendor_id:
                return await self._order(errand, lot, parcel, fresh=fresh, late=late_s > 0)
            state = await self.wholesale.poll(lot.vendor_id, parcel)
            if state.status == "running" and late_s > 0:
                await self.wholesale.cancel(lot.vendor_id, parcel)
                return lot if late_s < CALLED_OFF_S else _over(lot)
            return self._judged(errand, lot, parcel, state)
        except ProviderError as error:
            self.wholesale.troubled(_name(errand, lot), parcel, error)
            return lot if late_s < CALLED_OFF_S else _over(lot)

    def _judged(self, errand: Errand, lot: Lot, parcel: Parcel, state: BatchState) -> Lot:
        if state.status == "running":
            return lot
        if state.status == "failed":
            self.wholesale.nothing_came(_name(errand, lot), parcel, state.reason)
            again = msgspec.structs.replace(lot, attempt=lot.attempt + 1, vendor_id="")
            return again if state.crowded else _over(lot)
        return msgspec.structs.replace(lot, over=True, came=True)

    async def _order(self, errand: Errand, lot: Lot, parcel: Parcel, *, fresh: bool, late: bool) -> Lot:
        """Orders it unless it was ordered: whoever did may have died before it could be noted."""
        found = None if fresh else await self.wholesale.find(_name(errand, lot), parcel)
        if found is not None:
            return msgspec.structs.replace(lot, vendor_id=found, unheard=False)
        if lot.unheard:  # it is known to be none, and so is its name in the books
            self.wholesale.nothing_came(_name(errand, lot), parcel, "not found")
            return msgspec.structs.replace(lot, attempt=lot.attempt + 1, unheard=False)
        request = None if late else await errand.buyer()
        if request is None:
            return _over(lot)
        for _ in range(_MOST_TRIES):
            try:
                vendor_id = await self.wholesale.order(_name(errand, lot), parcel, request)
                return msgspec.structs.replace(lot, vendor_id=vendor_id)
            except InputRefused as refused:
                if refused.position is None or len(parcel.texts) == 1:
                    self.wholesale.troubled(_name(errand, lot), parcel, refused)
                    return _over(lot)
                parcel = parcel.without(refused.position)
                await self._keep(errand, lot, parcel)
            except ProviderError as error:
                if not error.may_cost:
                    raise
                self.wholesale.troubled(_name(errand, lot), parcel, error)
                return msgspec.structs.replace(lot, unheard=True)
        return lot

    async def _keep(self, errand: Errand, lot: Lot, parcel: Parcel) -> None:
        async with self.blobs.writing(_blob(errand, lot)) as writer:
            await writer.write(_encode(parcel))

    async def _parcel(self, errand: Errand, lot: Lot) -> Parcel:
        return _parcel_of(b"".join([data async for data in self.blobs.reading(_blob(errand, lot))]))

    # ── what came ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def bring(self, errand: Errand) -> Brought | Wait:
        """What came of an errand that is over; as often as that is wanted. Raises OSError."""
        vectors: dict[bytes, Vector] = {}
        costs: list[int | None] = []
        orders = _orders_of(errand.note)
        for lot in orders.lots:
            if not lot.came:
                continue
            try:
                delivery = await self._delivery(errand, lot)
            except ProviderError:
                if self.clock() - errand.until_s < CALLED_OFF_S:
                    return self._until_next_look(orders)
                continue
            if delivery is not None:
                vectors |= delivery.vectors
                costs.append(delivery.nano_usd)
        cost = None if None in costs else sum(each or 0 for each in costs)
        return Brought(vectors, Work(0, -len(vectors), float(len(costs)), cost))

    async def _delivery(self, errand: Errand, lot: Lot) -> Delivery | None:
        """What came of a lot; None where nothing of it can be believed. Raises ProviderErrors that may pass."""
        parcel, name = await self._parcel(errand, lot), _name(errand, lot)
        try:
            return await self.wholesale.receive(name, lot.vendor_id, parcel)
        except MalformedReply as spoilt:
            self.wholesale.troubled(name, parcel, spoilt)
            return None

    # ── what nobody waits for any more ──────────────────────────────────────────────────────────────────────────────

    async def call_off(self, errands: Sequence[Errand], since_s: float) -> bool:
        """Ends what is ordered for errands that nobody runs any more, and books what came of it.

        False: not all of it is over yet. After `CALLED_OFF_S` since `since_s` nothing is waited for.
        """
        open_lots = _open(errands)
        standing = [await self._called_off(errand, lot) for errand, lot in open_lots]
        patient = self.clock() - since_s < CALLED_OFF_S
        if "running" in standing and patient:
            return False
        for (errand, _), found in zip(open_lots, standing, strict=True):
            if isinstance(found, Lot):
                try:
                    await self._delivery(errand, found)
                except ProviderError:
                    if patient:
                        return False
        return True

    async def out_of_reach(self, errands: Sequence[Errand]) -> set[str]:
        """Deployments that these errands may have something under way at, and that are not there any more."""
        parcels = [await self._parcel(errand, lot) for errand, lot in _open(errands) if not lot.over]
        return {parcel.deployment for parcel in parcels if not self.wholesale.knows(parcel)}

    async def _called_off(self, errand: Errand, lot: Lot) -> Lot | Literal["running", "nothing"]:
        """How it stands; of the lot itself there is something to be had."""
        try:
            parcel = await self._parcel(errand, lot)
        except FileNotFoundError:
            return "nothing"
        if not self.wholesale.knows(parcel):
            return "nothing"
        try:
            vendor_id = lot.vendor_id or await self.wholesale.find(_name(errand, lot), parcel)
            if vendor_id is None:
                if lot.unheard:
                    self.wholesale.nothing_came(_name(errand, lot), parcel, "not found")
                return "nothing"
            found = msgspec.structs.replace(lot, vendor_id=vendor_id)
            state = await self.wholesale.poll(vendor_id, parcel)
            if state.status == "running":
                await self.wholesale.cancel(vendor_id, parcel)
                return "running"
            return judged if (judged := self._judged(errand, found, parcel, state)).came else "nothing"
        except ProviderError as error:
            self.wholesale.troubled(_name(errand, lot), parcel, error)
            return "running"


def _open(errands: Sequence[Errand]) -> list[tuple[Errand, Lot]]:
    """What may be under way, or be had."""
    noted = [(errand, lot) for errand in errands if errand.note for lot in _orders_of(errand.note).lots]
    return [(errand, lot) for errand, lot in noted if lot.came or not lot.over]


def _over(lot: Lot) -> Lot:
    return msgspec.structs.replace(lot, over=True)


def _name(errand: Errand, lot: Lot) -> str:
    """What the vendor keeps with it: no other parcel ever has this name."""
    return f"{errand.name}-{lot.fence}-{lot.number}-{lot.attempt}"


def _blob(errand: Errand, lot: Lot) -> str:
    return f"{errand.folder}/parcel-{lot.fence}-{lot.number}"
