"""Hides how texts are bought in vendors' own batches: which ones, for whose money, and what came of it, booked once."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple

import msgspec
import numpy as np

from app import money
from app.domain import EmbeddingRequest, Space, Text, Vector
from app.engine.budget import bounds_of
from app.engine.gate import Gate
from app.engine.gateway import EngineParts, Gateway
from app.errors import MalformedReply, ProviderError
from app.job_ports import BatchLimits, BatchProvider, BatchState
from app.ports import End, Part, Purchase

_AT_ONCE = 256  # vectors that are kept before others have their turn
_LINE_BYTES = 512  # of a text in a vendor's file beside itself, about


class Vendor(NamedTuple):
    """A deployment's vendor's batches; `price` is in pico-USD per token, None: not known."""

    batches: BatchProvider
    price: int | None


class Wanted(NamedTuple):
    """A text that is to be bought: its key, as it will be sent, and for which user of the tenant."""

    key: bytes
    payload: Text
    tokens: int
    user: str


class Parcel(msgspec.Struct, frozen=True):
    """Texts of one Space that are ordered at once from the vendor of a `deployment`, and for whose money.

    `at_ms` is when that was decided; `price` as `Vendor` has it; `parts` are by user; `keys`, `texts`, `tokens` (our
    count) and `users` belong together.
    """

    deployment: str
    model: str
    space: Space
    at_ms: int
    price: int | None
    parts: tuple[Part, ...]
    keys: tuple[bytes, ...]
    texts: tuple[Text, ...]
    tokens: tuple[int, ...]
    users: tuple[str, ...]

    def without(self, place: int) -> "Parcel":
        """What is left when a text must not go."""
        parts = [_less(part, self.tokens[place]) if part.user == self.users[place] else part for part in self.parts]
        columns = {"keys": self.keys, "texts": self.texts, "tokens": self.tokens, "users": self.users}
        left = {name: column[:place] + column[place + 1 :] for name, column in columns.items()}
        return msgspec.structs.replace(self, parts=tuple(part for part in parts if part.texts), **left)


class Delivery(NamedTuple):
    """What came of a parcel: vectors by key; and what it cost, None: not known."""

    vectors: Mapping[bytes, Vector]
    nano_usd: int | None


class Wholesale:
    """Buys what `gateway` would have to, from `vendors`, by deployment. Whoever asks remembers what was ordered.

    What was ordered counts as spent, as much as is expected, until it is known what it cost: whatever happens to
    whoever ordered it, budgets know.
    """

    def __init__(
        self, gateway: Gateway, parts: EngineParts, vendors: Mapping[str, Vendor], *,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._gateway = gateway
        self._parts = parts
        self._vendors = vendors
        self._clock = clock
        self._troubles: dict[str, ProviderError] = {}

    async def aclose(self) -> None:
        """Gives back connections."""
        for vendor in self._vendors.values():
            await vendor.batches.aclose()

    def sells(self, model: str) -> bool:
        """Whether there are batches for this model; and so long there are, parcels made for them can be followed."""
        return self._gate(model) is not None

    def trouble(self, model: str) -> tuple[str, ProviderError] | None:
        """Where parcels of this model are ordered, and what went wrong there last; None: nothing that is known."""
        gate = self._gate(model)
        error = None if gate is None else self._troubles.get(gate.name)
        return None if gate is None or error is None else (gate.name, error)

    def _gate(self, model: str) -> Gate | None:
        """Of the deployments that have batches the one that the operator likes most."""
        route = self._gateway.routes.get(model)
        names = (each.name for each in route.deployments if each.name in self._vendors) if route else ()
        return next((self._parts.gates[name] for name in names), None)

    # ── before ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def missing(self, request: EmbeddingRequest) -> tuple[Space, list[Wanted]]:
        """What of a request would have to be bought. Raises what is wrong with it."""
        space, sized = await self._gateway.missing(request)
        user = request.spender.user
        return space, [Wanted(key, each.payload, each.tokens, user) for key, each in sized.items()]

    def pack(self, request: EmbeddingRequest, space: Space, wanted: Sequence[Wanted]) -> list[Parcel]:
        """Parcels as large as the vendor takes them, of what is wanted by requests like this one but for their users.

        Nothing where nobody sells the model.
        """
        gate = self._gate(request.model)
        if gate is None:
            return []
        vendor = self._vendors[gate.name]
        return [
            Parcel(
                gate.name, request.model, space, int(self._clock() * 1000), vendor.price, _parts(request, texts),
                *zip(*texts, strict=True),
            )
            for texts in _cut(wanted, vendor.batches.limits, gate)
        ]  # fmt: skip

    # ── the vendor ──────────────────────────────────────────────────────────────────────────────────────────────────

    def knows(self, parcel: Parcel) -> bool:
        """Whether its deployment is still there."""
        return parcel.deployment in self._vendors

    async def order(self, name: str, parcel: Parcel, request: EmbeddingRequest) -> str:
        """Orders it under a name that was never used for another; the vendor's id.

        `request` is one of those that want it, of whoever asks as that stands now: budgets change while jobs wait.
        What may have been ordered counts as if it were, also where its answer was lost. Raises ProviderErrors as
        `BatchProvider.submit` does, and what `Budgets.reserve` does.
        """
        gate = self._parts.gates[parcel.deployment]
        cost = 0 if parcel.price is None else money.cost_nano_usd(gate.expect(sum(parcel.tokens)), parcel.price)
        bounds = bounds_of(request) if cost else None
        if bounds is not None:
            await self._parts.budgets.reserve(bounds, cost, within_s=0.0)
        try:
            vendor_id = await self._batches(parcel).submit(name, parcel.texts, parcel.space)
            self._troubles.pop(parcel.deployment, None)
            self._book_order(name, parcel)
        except ProviderError as error:
            if error.may_cost:
                self._book_order(name, parcel)
            raise
        finally:
            if bounds is not None:
                self._parts.budgets.release(bounds, cost)
        self._tell("ordered", name, parcel)
        return vendor_id

    async def find(self, name: str, parcel: Parcel) -> str | None:
        """The vendor's id of what was ordered under this name, if it was. Raises ProviderErrors."""
        vendor_id = await self._batches(parcel).find(name)
        if vendor_id is not None:
            self._book_order(name, parcel)
        return vendor_id

    async def poll(self, vendor_id: str, parcel: Parcel) -> BatchState:
        """How it stands. Raises ProviderErrors."""
        state = await self._batches(parcel).poll(vendor_id)
        self._troubles.pop(parcel.deployment, None)
        return state

    async def cancel(self, vendor_id: str, parcel: Parcel) -> None:
        """Asks for it to end. Raises ProviderErrors."""
        await self._batches(parcel).cancel(vendor_id)

    async def receive(self, name: str, vendor_id: str, parcel: Parcel) -> Delivery:
        """What came of it, once it is over; kept in the cache and booked, however often it is asked for.

        Raises ProviderErrors; after a MalformedReply nothing of it is to be had, and what it cost stays unknown.
        """
        vectors: dict[bytes, Vector] = {}
        tokens, exact = 0, True
        gate = self._parts.gates[parcel.deployment]
        stream = self._batches(parcel).results(vendor_id, parcel.texts, parcel.space)
        async with aclosing(stream) as answers:
            async for place, answer, billed in answers:
                if isinstance(answer, ProviderError):
                    unsure = isinstance(answer, MalformedReply)
                    tokens += gate.expect(parcel.tokens[place]) if unsure else 0
                    exact = exact and not unsure
                    continue
                counted = parcel.tokens[place] if gate.counts_exactly or billed is None else billed
                vectors[parcel.keys[place]] = Vector(answer.astype(np.dtype("<f4"), copy=False).tobytes(), counted)
                tokens += gate.expect(counted) if billed is None else billed
                exact = exact and billed is not None
        await self._keep(parcel.space, vectors)
        self._book(name, parcel, tokens, ("billed" if exact else "estimated") if tokens else "failed")
        self._tell("received", name, parcel, vectors=len(vectors), tokens=tokens)
        nano_usd = None if parcel.price is None else money.cost_nano_usd(tokens, parcel.price)
        return Delivery(vectors, nano_usd)

    def nothing_came(self, name: str, parcel: Parcel, reason: str) -> None:
        """The vendor carried nothing of it out, and takes nothing for it."""
        self._book(name, parcel, 0, "failed")
        self._tell("failed", name, parcel, reason=reason)

    def troubled(self, name: str, parcel: Parcel, error: ProviderError) -> None:
        """Something did not go as it should; it will be tried again."""
        self._troubles[parcel.deployment] = error
        self._tell("troubled", name, parcel, reason=f"{type(error).__name__}: {error}")

    def _batches(self, parcel: Parcel) -> BatchProvider:
        return self._vendors[parcel.deployment].batches

    async def _keep(self, space: Space, vectors: Mapping[bytes, Vector]) -> None:
        entries = [*vectors.items()]
        for at in range(0, len(entries), _AT_ONCE):
            self._parts.cache.put_many(space, entries[at : at + _AT_ONCE])
            await asyncio.sleep(0)

    # ── money ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _book_order(self, name: str, parcel: Parcel) -> None:
        expected = self._parts.gates[parcel.deployment].expect(sum(parcel.tokens))
        self._book(name, parcel, expected, "unconfirmed")

    def _book(self, name: str, parcel: Parcel, tokens: int, how: End) -> None:
        """Of what is said about one name the ledger believes what is known over what is expected."""
        purchase = Purchase(
            name, parcel.at_ms, parcel.deployment, parcel.model, parcel.space.id, parcel.price, parcel.parts
        )
        self._parts.ledger.begin(purchase)
        self._parts.ledger.end(purchase, tokens, how)

    def _tell(self, event: str, name: str, parcel: Parcel, **more: str | int) -> None:
        self._parts.telemetry.vendor_batch(
            event, deployment=parcel.deployment, name=name, texts=len(parcel.texts), **more
        )  # fmt: skip


def _cut(wanted: Iterable[Wanted], limits: BatchLimits, gate: Gate) -> Iterable[list[Wanted]]:
    """In the order given; each within the limits."""
    part: list[Wanted] = []
    tokens = size_bytes = 0
    for each in wanted:
        weight, bulk = gate.weigh(each.tokens), _LINE_BYTES + 8 * len(each.payload)
        full = len(part) >= limits.texts or (limits.tokens and tokens + weight > limits.tokens)
        if part and (full or size_bytes + bulk > limits.bytes):
            yield part
            part, tokens, size_bytes = [], 0, 0
        part.append(each)
        tokens, size_bytes = tokens + weight, size_bytes + bulk
    if part:
        yield part


def _less(part: Part, tokens: int) -> Part:
    return msgspec.structs.replace(part, texts=part.texts - 1, tokens=part.tokens - tokens)


def _parts(request: EmbeddingRequest, texts: Sequence[Wanted]) -> tuple[Part, ...]:
    """Who pays for what."""
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for each in texts:
        counts[each.user][0] += 1
        counts[each.user][1] += each.tokens
    tenant, spender = request.tenant.name, request.spender
    return tuple(
        Part(tenant, spender.project, spender.key, user, request.cause, number, tokens)
        for user, (number, tokens) in counts.items()
    )
