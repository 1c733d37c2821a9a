"""The one door of the engine: look up, queue what is missing, await it, restore the order."""

import asyncio
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import msgspec

from app import money
from app.domain import Basket, EmbeddingRequest, EmbeddingResult, Priority, Route, Space, Text, Vector
from app.engine.batcher import Batcher, CrashLog
from app.engine.budget import Budget
from app.engine.dispatcher import Dispatcher
from app.engine.door import Door
from app.engine.gate import LEAST_WAIT_S, Bell, Gate
from app.engine.intake import Intake, Plan, Sized
from app.engine.need import Need, parts_of, put, result_of
from app.engine.sharing import share
from app.engine.shelf import Shelf
from app.engine.workitem import Answer, WorkItem
from app.engine.workqueue import QueueBound, WorkQueue
from app.errors import (
    DeadlineExceeded,
    EmbedgateError,
    InvalidRequest,
    ProviderUnavailable,
    RejectedInput,
    UpstreamFailed,
)
from app.ports import Budgets, Cache, Ledger, Limiter, Shares
from app.telemetry import Telemetry

GRACE_S = 5.0
"""How long calls in flight may go on after the last request has ended."""

_LOOK_S = 0.25
"""How often a waiting request that another model may answer looks whether its own is out."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What the engine works with; `gates` are by deployment name.

    `bulk_min_tokens` are worth a call for bulk texts. `secret` keys the cache; what is kept under `older_secrets` is
    found, too. `several_tenants` share the quotas; `shares` is how other replicas hear whom this one served.
    """

    cache: Cache
    limiter: Limiter
    ledger: Ledger
    budgets: Budgets
    gates: Mapping[str, Gate]
    telemetry: Telemetry
    secret: bytes
    older_secrets: Sequence[bytes] = ()
    bulk_share: float = 0.05
    bulk_min_tokens: int = 0
    several_tenants: Callable[[], bool] = lambda: False
    shares: Shares | None = None


class Gateway:
    """Answers `EmbeddingRequest`s; an async context manager that owns every task of the engine.

    Raises only `errors.EmbedgateError`s. A caller that is cancelled gives up its own wait and nothing else.
    """

    def __init__(
        self,
        intake: Intake,
        parts: EngineParts,
        bound: QueueBound,
        bell: Bell,
        *,
        clock: Callable[[], float] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._intake = intake
        self._parts = parts
        self._bound = bound
        self._bell = bell
        self._clock = clock or asyncio.get_running_loop().time
        self._rng = rng or random.Random()  # noqa: S311 — back-off jitter
        self._crashes = CrashLog(parts.telemetry, clock=self._clock)
        self._batchers: dict[tuple[str, ...], Batcher] = {}
        self._shelf = Shelf(parts.cache, parts.secret, parts.older_secrets)
        self._door = Door(parts.limiter)
        self._budget = Budget(parts.budgets, clock=self._clock)
        self._tasks = asyncio.TaskGroup()
        self._loops: list[asyncio.Task[None]] = []
        self._watch()

    @property
    def routes(self) -> Mapping[str, Route]:
        """What callers may ask for, by model name."""
        return self._intake.routes

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        if self._parts.shares is not None:
            sharing = share(self._parts.shares, self._batchers, self._crashes)
            self._loops.append(self._tasks.create_task(sharing, name="shares"))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stops taking batches; calls in flight have `GRACE_S` to land, since they have been paid for."""
        for loop in self._loops:
            loop.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await self._tasks.__aexit__(None, None, None)

    def why_not_ready(self) -> list[str]:
        """Reasons why this process should get no requests now; empty when it should."""
        complaint = self._crashes.complaint()
        return [complaint] if complaint else []

    # ── the life of one request ─────────────────────────────────────────────────────────────────────────────────────

    async def embed(self, request: EmbeddingRequest, basket: Basket | None = None) -> EmbeddingResult:
        """One vector per text, in order, before the deadline; or an `EmbedgateError` for the whole request.

        When every deployment is out and the caller allows it, all of them come from the model that the operator named
        for this case, and the result says so. What is in the `basket`, by the keys that `missing` told, is as good as
        kept; with an error what came is in there, too.
        """
        try:
            return await self._embed(request, basket)
        except (ProviderUnavailable, UpstreamFailed) as outage:
            instead = self._instead(request)
            if instead is None:
                raise
            try:
                result = await self._embed(instead, None)
            except EmbedgateError:  # the caller asked for a model that is out, not for what the other would not take
                raise outage from None
        self._parts.telemetry.answer_degraded(model=request.model, by=instead.model)
        return msgspec.structs.replace(result, model=instead.model)

    def plan(self, request: EmbeddingRequest) -> Plan:
        """Who would serve it, in which Space, and how wide. Raises what is wrong with it, but for its texts."""
        return self._intake.plan(request)

    async def missing(self, request: EmbeddingRequest) -> tuple[Space, Mapping[bytes, Sized]]:
        """What `embed` would have to buy, by key, and in which Space. Raises what is wrong with the request itself.

        What is bought for somebody else at this moment is not.
        """
        plan, keys, texts, found = await self._look(request, {})
        if None not in found:
            return plan.space, {}
        need = await self._need(plan, keys, texts, found, {})
        missing = {key: part.sized for key, part in need.parts.items() if key not in need.have}
        batcher = self._batchers.get(_place(plan.route, plan.space))
        if batcher is not None:
            missing = {key: sized for key, sized in missing.items() if batcher.find(key) is None}
        return plan.space, missing

    async def _embed(self, request: EmbeddingRequest, basket: Basket | None) -> EmbeddingResult:
        bought = basket.vectors if basket is not None else {}
        plan, keys, texts, found = await self._look(request, bought)
        if None in found:
            return await self._buy(plan, keys, await self._need(plan, keys, texts, found, bought), basket)
        hits = [vector for vector in found if vector is not None]
        self._intake.check_total(plan, sum(vector.tokens for vector in hits))
        answered = result_of(plan, hits, cache_hits=len(hits))
        paid = [bought[key].tokens for key in keys if key in bought] if bought else ()
        self._tell_spared(plan, len(hits) - len(paid), 0, answered.tokens - sum(paid))
        return answered

    async def _look(
        self, request: EmbeddingRequest, bought: Mapping[bytes, Vector]
    ) -> tuple[Plan, Sequence[bytes], Sequence[Text], Sequence[Vector | None]]:  # fmt: skip
        """What is wanted, the keys of its texts, the texts as the route takes them, and what of them is there."""
        plan = self._intake.plan(request)
        texts = self._intake.texts(plan)
        patient = request.priority is Priority.BULK
        keys, found = await self._shelf.find(plan.space, request.tenant.cache_group, texts, patient=patient)
        if bought:
            found = [vector or bought.get(key) for key, vector in zip(keys, found, strict=True)]
        return plan, keys, texts, found

    def _instead(self, request: EmbeddingRequest) -> EmbeddingRequest | None:
        """The same wish to the model that stands in on outage, if caller and operator both want it."""
        route = self.routes[request.model]
        if not (request.allow_degraded and route.on_outage):
            return None
        return msgspec.structs.replace(request, model=route.on_outage, allow_degraded=False)

    async def _need(
        self, plan: Plan, keys: Sequence[bytes], texts: Sequence[Text], found: Sequence[Vector | None],
        bought: Mapping[bytes, Vector],
    ) -> Need:  # fmt: skip
        """What the cache does not have, ready to be sent. Counting may take a while, so it is asked again after it."""
        have = {key: vector for key, vector in zip(keys, found, strict=True) if vector is not None}
        known_tokens = sum(vector.tokens for vector in found if vector is not None)
        missing = {key: text for key, text, vector in zip(keys, texts, found, strict=True) if vector is None}
        sized, took_long = await self._intake.measure(plan, list(missing.values()), known_tokens)
        measured = dict(zip(missing, sized, strict=True))
        self._intake.check_total(plan, known_tokens + sum(measured[key].tokens for key in keys if key in measured))
        windows = {
            key: self._shelf.keys(plan.space, plan.request.tenant.cache_group, [each.payload for each in sized.windows])
            for key, sized in measured.items()
            if sized.windows
        }
        need = Need(have, len(found) - found.count(None), measured, windows, parts_of(measured, windows))
        if took_long or windows:
            patient = plan.request.priority is Priority.BULK
            again = await self._parts.cache.get_many(plan.space, [*need.parts], patient=patient)
            have |= {key: vector for key, vector in zip(need.parts, again, strict=True) if vector is not None}
            have |= {key: bought[key] for key in need.parts if key in bought}
        return need

    async def _buy(
        self, plan: Plan, keys: Sequence[bytes], need: Need, basket: Basket | None
    ) -> EmbeddingResult:  # fmt: skip
        """Gets what is needed.

        Until the table of texts in flight holds every missing one nothing is awaited, so that no text is bought twice
        at one moment.
        """
        have, parts = need.have, need.parts
        owners = {key: keys.index(part.of) for key, part in parts.items()}
        answers, new = await self._bring(plan, {key: part.sized for key, part in parts.items()}, owners, have, basket)
        have |= {key: Vector(answer.data, answer.tokens) for key, answer in answers.items()}
        if joined_windows := need.join_windows(unit=plan.space.normalised):
            have |= joined_windows
            self._parts.cache.put_many(plan.space, joined_windows.items())
        merged = [have[key] for key in keys]
        joined = len(keys) - need.hits - len({parts[key].of for key in new})
        bought = [answers[key] for key in new]
        answered = result_of(plan, merged, cache_hits=need.hits, joined=joined, answers=answers.values(), bought=bought)
        bought_before = basket.vectors if basket is not None else {}
        paid = [bought_before[key].tokens for key in keys if key in bought_before] if bought_before else ()
        spared_tokens = answered.tokens - sum(answer.tokens for answer in bought) - sum(paid)
        self._tell_spared(plan, max(0, need.hits - len(paid)), joined, max(0, spared_tokens))
        return answered

    def _tell_spared(self, plan: Plan, hits: int, joined: int, tokens: int) -> None:
        """What the caller got without a purchase of its own, at the price of whoever serves first."""
        if not (hits or joined):
            return
        price = plan.route.deployments[0].price
        nano_usd = None if price is None else money.cost_nano_usd(tokens, price)
        tenant, model = plan.request.tenant.name, plan.route.model
        self._parts.ledger.spared(tenant, model, hits=hits, joined=joined, tokens=tokens, nano_usd=nano_usd)

    async def _bring(
        self, plan: Plan, parts: Mapping[bytes, Sized], owners: Mapping[bytes, int], have: dict[bytes, Vector],
        basket: Basket | None,
    ) -> tuple[dict[bytes, Answer], Collection[bytes]]:  # fmt: skip
        """What of `parts` is not in `have`, if the tenant may buy it; and which of it this request bought."""
        request, tokens = plan.request, [sized.tokens for key, sized in parts.items() if key not in have]
        gates = [self._parts.gates[deployment.name] for deployment in plan.route.deployments]
        grant = await self._door.enter(request.tenant, sum(tokens))
        bought: list[WorkItem] | None = None
        try:
            others_had_a_turn = await self._budget.enter(request, gates, tokens) or grant is not None
            late = [key for key in parts if key not in have] if others_had_a_turn else []
            recalled = self._parts.cache.recall(late)
            have |= {key: vector for key, vector in zip(late, recalled, strict=True) if vector is not None}
            batcher = self._batcher(plan.route, plan.space)
            items, new = self._queue(batcher, plan, {key: part for key, part in parts.items() if key not in have})
            bought = [items[key] for key in new]
            try:
                return await self._arrival(batcher, plan, items, owners, each=bool(basket and basket.each)), new
            except EmbedgateError:
                if basket is not None:
                    came = {key: items[key].future.result() for key in new if _came(items[key].future)}
                    put(basket, plan.route, came, len({owners[key] for key in came}))
                raise
        finally:
            self._budget.leave(request)
            await self._door.leave(grant, bought)

    def _queue(
        self, batcher: Batcher, plan: Plan, measured: Mapping[bytes, Sized]
    ) -> tuple[dict[bytes, WorkItem], Collection[bytes]]:
        """A WorkItem for every text: the one in flight, else a new one; and which are new. All or nothing."""
        request = plan.request
        self._refuse_hopeless(batcher, plan)
        now, loop = self._clock(), asyncio.get_running_loop()
        joined = {key: item for key in measured if (item := batcher.find(key)) is not None}
        new = {
            key: WorkItem(key, sized.payload, sized.tokens, sized.size_bytes, loop.create_future(), [request], now)
            for key, sized in measured.items()
            if key not in joined
        }
        if new:
            batcher.submit(request, list(new.values()))
        for item in joined.values():
            batcher.join(item, request)
        return joined | new, new.keys()

    async def _arrival(
        self, batcher: Batcher, plan: Plan, items: Mapping[bytes, WorkItem], owners: Mapping[bytes, int], *, each: bool
    ) -> dict[bytes, Answer]:
        """Waits for every item, or for the first that fails, or for the deadline; `owners` are places in the input.

        Of `each` see `Basket`.
        """
        request = plan.request
        futures = [item.future for item in items.values()]
        try:
            while futures and (left_s := request.deadline - self._clock()) >= LEAST_WAIT_S:
                if plan.may_degrade and batcher.dispatcher.outage_s() is not None:
                    break
                patience_s = min(left_s, _LOOK_S) if plan.may_degrade else left_s
                waiting = [future for future in futures if not future.done()] or futures
                await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_EXCEPTION)
                if _is_over(futures, each=each):
                    break
        finally:
            batcher.leave(request, items.values())
        for key, item in items.items():
            if item.future.done() and (error := item.future.exception()) is not None:
                raise RejectedInput(owners[key]) if isinstance(error, RejectedInput) else error
        if not all(future.done() for future in futures):
            outage_s = batcher.dispatcher.outage_s()
            raise ProviderUnavailable(outage_s) if outage_s is not None else DeadlineExceeded
        return {key: item.future.result() for key, item in items.items()}

    def _refuse_hopeless(self, batcher: Batcher, plan: Plan) -> None:
        """Refuses at once what would only wait for a provider that cannot be asked before its deadline."""
        outage_s, now, deadline = batcher.dispatcher.outage_s(), self._clock(), plan.request.deadline
        if outage_s is not None and (plan.may_degrade or now + outage_s >= deadline):
            raise ProviderUnavailable(outage_s)
        if deadline <= now:
            raise DeadlineExceeded

    # ── spaces ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _batcher(self, route: Route, space: Space) -> Batcher:
        """The batcher of `space` at the route's deployments, started at its first text.

        There are a few per route: input types, truncation. Two names for one space share it only if they also name the
        same deployments in the same order: who pays is the operator's choice.
        """
        place = _place(route, space)
        batcher = self._batchers.get(place)
        if batcher is None:
            parts, bell, clock = self._parts, self._bell, self._clock
            telemetry = parts.telemetry
            gates = [parts.gates[deployment.name] for deployment in route.deployments]
            queue = WorkQueue(self._bound, telemetry, clock=clock, bulk_share=parts.bulk_share, ring=bell.ring)
            dispatcher = Dispatcher(
                space, gates, parts.limiter, parts.ledger, self._budget, bell, telemetry,
                clock=clock, rng=self._rng, route=route,
                several_tenants=parts.several_tenants, bulk_min_tokens=parts.bulk_min_tokens,
            )  # fmt: skip
            batcher = Batcher(
                space, queue, dispatcher, parts.cache, bell, self._crashes, telemetry, tasks=self._tasks, clock=clock
            )
            self._batchers[place] = batcher
            self._loops.append(self._tasks.create_task(batcher.run(), name=f"batcher {space.model}"))
        return batcher

    def _watch(self) -> None:
        """What is read at each scrape."""
        telemetry, bound, gates = self._parts.telemetry, self._bound, self._parts.gates
        by_priority = [(priority, (priority.name.lower(),)) for priority in Priority]
        states = ("closed", "open", "half_open", "credential", "quota")
        telemetry.watch(
            "embedgate_queue_items", "Texts waiting", ("priority",),
            lambda: [(labels, bound.items[priority]) for priority, labels in by_priority],
        )  # fmt: skip
        telemetry.watch(
            "embedgate_queue_tokens", "Tokens waiting", ("priority",),
            lambda: [(labels, bound.tokens[priority]) for priority, labels in by_priority],
        )  # fmt: skip
        telemetry.watch(
            "embedgate_in_flight", "Calls in flight", ("deployment",),
            lambda: [((gate.name,), gate.in_flight) for gate in gates.values()],
        )  # fmt: skip
        telemetry.watch(
            "embedgate_breaker_state", "1 for the state that a deployment is in", ("deployment", "state"),
            lambda: [((g.name, state), float(g.breaker.state == state)) for g in gates.values() for state in states],
        )  # fmt: skip


def _place(route: Route, space: Space) -> tuple[str, ...]:
    return (space.id, *(deployment.name for deployment in route.deployments))


def _is_over(futures: Sequence[asyncio.Future[Answer]], *, each: bool) -> bool:
    """Whether all are there, or one has failed; if `each` is wanted, for another reason than its text."""
    errors = [future.exception() for future in futures if future.done()]
    bearable = (RejectedInput, InvalidRequest) if each else ()
    return len(errors) == len(futures) or any(error is not None and not isinstance(error, bearable) for error in errors)


def _came(future: asyncio.Future[Answer]) -> bool:
    return future.done() and future.exception() is None
