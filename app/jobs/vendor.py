"""Hides how the texts of a shard are bought in the vendor's own batches, over hours, restarts and second thoughts."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from app.domain import EmbeddingRequest, Space, Vector
from app.engine.wholesale import Delivery, Parcel, Wanted, Wholesale
from app.errors import EmbedgateError, InputRefused, MalformedReply, ProviderError, TryAgainLater
from app.job import NO_WORK, Job, Order, Shard, Task, Work, parcel_blob
from app.job_ports import BatchState, Blobs
from app.jobs.reading import lines_of

PATIENCE: Final = 0.75
"""Which part of a job's window the vendor has; then the rest goes the ordinary way, while there is time."""

CALLED_OFF_S: Final = 900.0
"""For how long a vendor may take to end what was called off; OpenAI says that it may take ten minutes."""

_LOOK_LEAST_S, _LOOK_MOST_S, _LOOK_PART = 2.0, 60.0, 0.1  # later looks are further apart, as the batch is older
_MOST_TRIES = 50  # in which a vendor names a bad text, one each


class Lot(msgspec.Struct, frozen=True):
    """A parcel of a shard, by the number of its blob; `attempt` is part of the name under which it is ordered.

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
    """What a task notes: since when (Unix seconds) what is ordered."""

    since_s: float
    lots: tuple[Lot, ...]


_encode = msgspec.msgpack.Encoder().encode
_orders_of = msgspec.msgpack.Decoder(Orders).decode
_parcel_of = msgspec.msgpack.Decoder(Parcel).decode


class Asks(Protocol):
    """What a line says, see `embedding.Wire`."""

    def read(self, body: bytes, order: Order) -> tuple[EmbeddingRequest, Any]:
        """The request that a line's body is. Raises EmbedgateErrors."""


class Brought(NamedTuple):
    """All that the vendor was asked for, as far as it came: vectors by key, and what that took."""

    task: Task
    vectors: Mapping[bytes, Vector]
    work: Work


class Wait(NamedTuple):
    """Nothing to do for so long."""

    for_s: float


@dataclass(frozen=True, slots=True)
class VendorPath:
    """The way of tasks `embed` through the vendor's batches, look by look; nobody has to wait in between.

    `note` says whether the task is still held. Whoever looks next goes on where the last one was: what is noted is
    never ordered twice. `clock` is Unix seconds.
    """

    blobs: Blobs
    asks: Asks
    wholesale: Wholesale
    note: Callable[[Task, bytes], Awaitable[Task | None]]
    clock: Callable[[], float] = time.time

    async def look(self, task: Task) -> Brought | Wait | None:
        """One step; None: somebody else holds the task. Raises OSError, and TryAgainLater or BudgetExhausted."""
        fresh = not task.note
        if fresh:
            noted = await self._pack(task)
            if noted is None:
                return None
            task = noted
        orders = _orders_of(task.note)
        try:
            for place, lot in enumerate(orders.lots):
                moved = lot if lot.over else await self._move(task, lot, fresh=fresh)
                lots = (*orders.lots[:place], moved, *orders.lots[place + 1 :])
                orders = msgspec.structs.replace(orders, lots=lots)
        finally:
            noted = await self._noted(task, orders)
        if noted is None:
            return None
        if all(lot.over for lot in orders.lots):
            return await self._brought(noted, orders)
        return Wait(self._until_next_look_s(orders))

    def _until_next_look_s(self, orders: Orders) -> float:
        age_s = self.clock() - orders.since_s
        return min(_LOOK_MOST_S, max(_LOOK_LEAST_S, _LOOK_PART * age_s))

    async def _noted(self, task: Task, orders: Orders) -> Task | None:
        words = _encode(orders)
        return task if words == task.note else await self.note(task, words)

    # ── what is to be ordered ───────────────────────────────────────────────────────────────────────────────────────

    async def _pack(self, task: Task) -> Task | None:
        """Writes down what of the shard has to be bought, before anything of it is ordered."""
        lots = []
        for number, parcel in enumerate(await self._parcels(task)):
            lots.append(Lot(number, task.fence))
            await self._keep(task.job, task.number, lots[-1], parcel)
        return await self.note(task, _encode(Orders(self.clock(), tuple(lots))))

    async def _parcels(self, task: Task) -> Sequence[Parcel]:
        """Of what is wrong with a line its own turn tells."""
        job, shard = task.job, _shard(task)
        wanted: dict[Space, dict[bytes, Wanted]] = {}
        request: EmbeddingRequest | None = None
        async for line in lines_of(self.blobs, job.order.input_file_id, shard, skip=task.done_lines):
            try:
                request, _ = self.asks.read(bytes(line.body), job.order)
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

    async def _move(self, task: Task, lot: Lot, *, fresh: bool) -> Lot:
        """The lot as it stands now, one step further; what the vendor does not do now it may do the next time."""
        job, parcel = task.job, await self._parcel(task.job, task.number, lot)
        if not self.wholesale.knows(parcel):
            return _over(lot)
        late_s = self.clock() - _patient_until_s(job)
        try:
            if not lot.vendor_id:
                return await self._order(task, lot, parcel, fresh=fresh, late=late_s > 0)
            state = await self.wholesale.poll(lot.vendor_id, parcel)
            if state.status == "running" and late_s > 0:
                await self.wholesale.cancel(lot.vendor_id, parcel)
                return lot if late_s < CALLED_OFF_S else _over(lot)
            return self._judged(job, task.number, lot, parcel, state)
        except ProviderError as error:
            self.wholesale.troubled(_name(job, task.number, lot), parcel, error)
            return lot if late_s < CALLED_OFF_S else _over(lot)

    def _judged(self, job: Job, number: int, lot: Lot, parcel: Parcel, state: BatchState) -> Lot:
        if state.status == "running":
            return lot
        if state.status == "failed":
            self.wholesale.nothing_came(_name(job, number, lot), parcel, state.reason)
            again = msgspec.structs.replace(lot, attempt=lot.attempt + 1, vendor_id="")
            return again if state.crowded else _over(lot)
        return msgspec.structs.replace(lot, over=True, came=True)

    async def _order(self, task: Task, lot: Lot, parcel: Parcel, *, fresh: bool, late: bool) -> Lot:
        """Orders it unless it was ordered: whoever did may have died before it could be noted."""
        job, number = task.job, task.number
        found = None if fresh else await self.wholesale.find(_name(job, number, lot), parcel)
        if found is not None:
            return msgspec.structs.replace(lot, vendor_id=found, unheard=False)
        if lot.unheard:  # it is known to be none, and so is its name in the books
            self.wholesale.nothing_came(_name(job, number, lot), parcel, "not found")
            return msgspec.structs.replace(lot, attempt=lot.attempt + 1, unheard=False)
        request = None if late else await self._request(task)
        if request is None:
            return _over(lot)
        for _ in range(_MOST_TRIES):
            try:
                vendor_id = await self.wholesale.order(_name(job, number, lot), parcel, request)
                return msgspec.structs.replace(lot, vendor_id=vendor_id)
            except InputRefused as refused:
                if refused.position is None or len(parcel.texts) == 1:
                    self.wholesale.troubled(_name(job, number, lot), parcel, refused)
                    return _over(lot)
                parcel = parcel.without(refused.position)
                await self._keep(job, number, lot, parcel)
            except ProviderError as error:
                if not error.may_cost:
                    raise
                self.wholesale.troubled(_name(job, number, lot), parcel, error)
                return msgspec.structs.replace(lot, unheard=True)
        return lot

    async def _request(self, task: Task) -> EmbeddingRequest | None:
        """One of the shard, of whoever asks as that stands now; None: nobody may any more."""
        async for line in lines_of(self.blobs, task.job.order.input_file_id, _shard(task), skip=task.done_lines):
            try:
                return self.asks.read(bytes(line.body), task.job.order)[0]
            except TryAgainLater:
                raise
            except EmbedgateError:
                continue
        return None

    async def _keep(self, job: Job, number: int, lot: Lot, parcel: Parcel) -> None:
        async with self.blobs.writing(_blob(job, number, lot)) as writer:
            await writer.write(_encode(parcel))

    async def _parcel(self, job: Job, number: int, lot: Lot) -> Parcel:
        return _parcel_of(b"".join([data async for data in self.blobs.reading(_blob(job, number, lot))]))

    # ── what came ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _brought(self, task: Task, orders: Orders) -> Brought | Wait:
        vectors: dict[bytes, Vector] = {}
        costs: list[int | None] = []
        for lot in orders.lots:
            if not lot.came:
                continue
            try:
                delivery = await self._delivery(task.job, task.number, lot)
            except ProviderError:
                if self.clock() - _patient_until_s(task.job) < CALLED_OFF_S:
                    return Wait(self._until_next_look_s(orders))
                continue
            if delivery is not None:
                vectors |= delivery.vectors
                costs.append(delivery.nano_usd)
        cost = None if None in costs else sum(each or 0 for each in costs)
        work = NO_WORK if task.done_lines else Work(0, -len(vectors), float(len(costs)), cost)
        return Brought(task, vectors, work)

    async def _delivery(self, job: Job, number: int, lot: Lot) -> Delivery | None:
        """What came of a lot; None where nothing of it can be believed. Raises ProviderErrors that may pass."""
        parcel, name = await self._parcel(job, number, lot), _name(job, number, lot)
        try:
            return await self.wholesale.receive(name, lot.vendor_id, parcel)
        except MalformedReply as spoilt:
            self.wholesale.troubled(name, parcel, spoilt)
            return None

    # ── a job that is over before its time ──────────────────────────────────────────────────────────────────────────

    async def call_off(self, tasks: Sequence[Task], since_s: float) -> bool:
        """Ends what is ordered for tasks that nobody holds any more, and books what came of it.

        False: not all of it is over yet. After `CALLED_OFF_S` since `since_s` nothing is waited for.
        """
        open_lots = [
            (task, lot)
            for task in tasks
            if task.note and task.done_lines < _shard(task).lines
            for lot in _orders_of(task.note).lots
            if lot.came or not lot.over
        ]
        standing = [await self._called_off(task, lot) for task, lot in open_lots]
        patient = self.clock() - since_s < CALLED_OFF_S
        if "running" in standing and patient:
            return False
        for (task, _), found in zip(open_lots, standing, strict=True):
            if isinstance(found, Lot):
                try:
                    await self._delivery(task.job, task.number, found)
                except ProviderError:
                    if patient:
                        return False
        return True

    async def _called_off(self, task: Task, lot: Lot) -> Lot | Literal["running", "nothing"]:
        """How it stands; of the lot itself there is something to be had."""
        job, number = task.job, task.number
        try:
            parcel = await self._parcel(job, number, lot)
        except FileNotFoundError:
            return "nothing"
        if not self.wholesale.knows(parcel):
            return "nothing"
        try:
            vendor_id = lot.vendor_id or await self.wholesale.find(_name(job, number, lot), parcel)
            if vendor_id is None:
                if lot.unheard:
                    self.wholesale.nothing_came(_name(job, number, lot), parcel, "not found")
                return "nothing"
            found = msgspec.structs.replace(lot, vendor_id=vendor_id)
            state = await self.wholesale.poll(vendor_id, parcel)
            if state.status == "running":
                await self.wholesale.cancel(vendor_id, parcel)
                return "running"
            return judged if (judged := self._judged(job, number, found, parcel, state)).came else "nothing"
        except ProviderError as error:
            self.wholesale.troubled(_name(job, number, lot), parcel, error)
            return "running"


def _over(lot: Lot) -> Lot:
    return msgspec.structs.replace(lot, over=True)


def _shard(task: Task) -> Shard:
    assert task.shard is not None  # noqa: S101 — a task of its kind has one
    return task.shard


def _patient_until_s(job: Job) -> float:
    """When the vendor has had its part of the window (Unix seconds)."""
    return (job.created_at_ms + PATIENCE * (job.expires_at_ms - job.created_at_ms)) / 1000


def _name(job: Job, number: int, lot: Lot) -> str:
    """What the vendor keeps with it: no other parcel ever has this name."""
    return f"{job.id}-{number}-{lot.fence}-{lot.number}-{lot.attempt}"


def _blob(job: Job, number: int, lot: Lot) -> str:
    return parcel_blob(job.id, number, lot.fence, lot.number)
