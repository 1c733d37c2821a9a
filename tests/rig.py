"""The whole engine over scripted deployments, for tests in virtual time; every vector it returns is checked."""

import asyncio
import io
import random
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from prometheus_client import generate_latest

from app.domain import (
    ANONYMOUS,
    Cause,
    Deployment,
    EmbeddingRequest,
    EmbeddingResult,
    InputType,
    Limits,
    Priority,
    Route,
    Space,
    Spender,
    Tenant,
    Text,
    Truncation,
)
from app.engine.breaker import CircuitBreaker
from app.engine.gate import Bell, Gate
from app.engine.gateway import EngineParts, Gateway
from app.engine.intake import Intake
from app.engine.workqueue import QueueBound
from app.errors import ProviderError
from app.ports import Bounds, Budgets, Cache, End, Ledger, Limiter, Purchase, Reply, Served, Shares
from app.storage.limiter import InProcessLimiter
from app.storage.memory import MemoryCache
from app.telemetry import Telemetry
from tests.identity import identifying_vector, identifying_vectors

MODEL = "model-a"
NOBODY = Spender()
WIDTH = 8
Twist = Callable[[Sequence[Text], Reply], Reply]


class Notebook:
    """A Ledger that only remembers: what is under way, what ended how, what was spared."""

    def __init__(self) -> None:
        self.under_way: dict[str, Purchase] = {}
        self.ended: list[tuple[Purchase, int, End]] = []
        self.hits = self.joined = self.tokens = self.nano_usd = 0

    def begin(self, purchase: Purchase) -> None:
        """See `ports.Ledger`."""
        assert purchase.id not in self.under_way
        self.under_way[purchase.id] = purchase

    def end(self, purchase: Purchase, tokens: int, how: End) -> None:
        """See `ports.Ledger`."""
        assert self.under_way.pop(purchase.id) == purchase
        self.ended.append((purchase, tokens, how))

    def spared(self, tenant: str, model: str, *, hits: int, joined: int, tokens: int, nano_usd: int | None) -> None:
        """See `ports.Ledger`."""
        assert tenant
        assert model
        self.hits += hits
        self.joined += joined
        self.tokens += tokens
        self.nano_usd += nano_usd or 0


class NoBudgets:
    """For tests in which nobody has one."""

    async def reserve(self, bounds: Bounds, nano_usd: int, *, within_s: float) -> None:
        """See `ports.Budgets`."""
        raise AssertionError((bounds, nano_usd, within_s))

    def release(self, bounds: Bounds, nano_usd: int) -> None:
        """See `ports.Budgets`."""
        raise AssertionError((bounds, nano_usd))


class Words:
    """A TokenCounter and TokenVocabulary whose figures tests can foresee: a token is a word."""

    exact = True
    size = 1000

    def count(self, text: str) -> int:
        """One per word."""
        return len(text.split())

    def cut(self, text: str, max_tokens: int) -> str:
        """The first words."""
        head = re.match(rf"(?:\s*\S+){{0,{max_tokens}}}", text)
        assert head is not None
        return head[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Say w7 for id 7."""
        return " ".join(f"w{number}" for number in ids)

    def first_invalid(self, ids: Sequence[int]) -> int | None:
        """Where the first id outside 0..999 stands."""
        return next((at for at, number in enumerate(ids) if not 0 <= number < self.size), None)


@dataclass
class ScriptedProvider:
    """A deployment that answers identifying vectors after `latency_s`; `script` holds what the next calls do instead.

    A step is an error to raise, a twist of the honest reply, a latency in seconds, or None for an honest call.
    `poison` texts are refused.
    """

    model: str = MODEL
    width: int = WIDTH
    latency_s: float = 0.05
    max_items: int = 2048
    bills: Callable[[Sequence[Text]], int | None] = lambda texts: sum(len(str(text).split()) for text in texts)
    script: deque[ProviderError | Twist | float | None] = field(default_factory=deque)
    always: ProviderError | Twist | float | None = None
    poison: frozenset[str] = frozenset()
    refusal: ProviderError | None = None
    calls: list[tuple[float, list[Text]]] = field(default_factory=list)
    timeouts_s: list[float] = field(default_factory=list)
    billed: int = 0
    in_flight: int = 0
    most_in_flight: int = 0

    async def embed(self, texts: Sequence[Text], space: Space, *, timeout_s: float) -> Reply:
        """One call, as scripted."""
        assert len({type(text) for text in texts}) == 1
        self.calls.append((asyncio.get_running_loop().time(), list(texts)))
        self.timeouts_s.append(timeout_s)
        step = self.script.popleft() if self.script else self.always
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(step if isinstance(step, int | float) else self.latency_s)
        finally:
            self.in_flight -= 1
        if isinstance(step, ProviderError):
            raise step
        if self.refusal is not None and self.poison.intersection(text for text in texts if isinstance(text, str)):
            raise self.refusal
        honest = Reply(
            identifying_vectors([space.prompt + t if isinstance(t, str) else t for t in texts], self.model, self.width),
            self.bills(texts),
        )
        reply = step(texts, honest) if callable(step) else honest
        self.billed += reply.tokens_billed or 0
        return reply

    async def aclose(self) -> None:
        """Nothing is held."""

    @property
    def texts(self) -> list[Text]:
        """Every text that was ever sent here, in order."""
        return [text for _, texts in self.calls for text in texts]


def bend(change: Callable[[np.ndarray], np.ndarray]) -> Twist:
    """A twist that changes the vectors of an honest reply."""
    return lambda texts, reply: replace(reply, vectors=change(reply.vectors.copy()))


@dataclass
class Rig:
    """A running engine and what is needed to drive and inspect it."""

    gateway: Gateway
    providers: dict[str, ScriptedProvider]
    gates: dict[str, Gate]
    bound: QueueBound
    telemetry: Telemetry
    log: io.BytesIO

    async def ask(
        self,
        *texts: Text,
        tenant: Tenant = ANONYMOUS,
        priority: Priority = Priority.DEFAULT,
        within_s: float = 30.0,
        dimensions: int | None = None,
        model: str = MODEL,
        input_type: InputType | None = None,
        truncation: Truncation | None = None,
        spender: Spender = NOBODY,
        cause: Cause = "miss",
    ) -> EmbeddingResult:
        """Embeds `texts` and proves that each got its own vector, in order."""
        deadline = asyncio.get_running_loop().time() + within_s
        request = EmbeddingRequest(
            tenant, model, texts, deadline, priority, dimensions, input_type, truncation, spender=spender, cause=cause
        )
        result = await self.gateway.embed(request)
        assert len(result.vectors) == len(texts)
        if dimensions is None and truncation in (None, "none"):
            for text, data in zip(texts, result.vectors, strict=True):
                said = text if isinstance(text, str) else Words().decode(text)
                expected = identifying_vector(result.space.prompt + said, MODEL, WIDTH)
                assert np.frombuffer(data, "<f4").tobytes() == expected.tobytes()
        return result

    @property
    def provider(self) -> ScriptedProvider:
        """The only, or first, deployment."""
        return next(iter(self.providers.values()))

    def metrics(self) -> str:
        """What Prometheus would scrape."""
        return generate_latest(self.telemetry.registry).decode()

    def leftovers(self) -> dict[str, int]:
        """What must be zero when nobody waits: counters, slots, tasks and table entries."""
        batchers = list(self.gateway._batchers.values())
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        return {
            "waiting items": sum(self.bound.items),
            "waiting tokens": sum(self.bound.tokens),
            "slots": sum(gate.in_flight for gate in self.gates.values()),
            "calls": sum(provider.in_flight for provider in self.providers.values()),
            "table": sum(len(batcher) for batcher in batchers),
            "queued": sum(len(batcher.queue) for batcher in batchers),
            "tasks": len(tasks) - len(batchers),
        }


class Noticeboard:
    """How replicas in one process hear each other; with `torn` nobody is told and nothing heard."""

    def __init__(self) -> None:
        self.notices: list[tuple[Seat, dict[str, Served]]] = []
        self.seats = 0
        self.torn = False

    def seat(self) -> "Seat":
        """The place of one more replica, that hears what is said from now on."""
        self.seats += 1
        return Seat(self, len(self.notices))


class Seat:
    """See `ports.Shares`."""

    def __init__(self, board: Noticeboard, read_upto: int) -> None:
        self._board = board
        self._read_upto = read_upto

    @property
    def replicas(self) -> int:
        """See `ports.Shares`."""
        return self._board.seats

    async def exchange(self, own: dict[str, Served]) -> list[dict[str, Served]] | None:
        """See `ports.Shares`."""
        board = self._board
        if board.torn:
            return None
        heard = [news for author, news in board.notices[self._read_upto :] if author is not self]
        if own:
            board.notices.append((self, own))
        self._read_upto = len(board.notices)
        return heard


@asynccontextmanager
async def engine(
    *providers: ScriptedProvider,
    deployment: Deployment | None = None,
    limits: Limits | None = None,
    bound: QueueBound | None = None,
    cache: Cache | None = None,
    limiter: Limiter | None = None,
    ledger: Ledger | None = None,
    budgets: Budgets | None = None,
    shares: Shares | None = None,
    several_tenants: bool = False,
    bulk_min_tokens: int = 0,
    cuts_dimensions: bool = False,
    max_input_tokens: int = 100,
    prompts: tuple[tuple[InputType, str], ...] = (),
    each: Sequence[Limits] = (),
    **route_fields: Any,
) -> AsyncIterator[Rig]:
    """An engine whose model `model-a` is served by deployments d0, d1, …, one per provider, in order.

    `each` has the limits of each deployment, where they differ; `route_fields` are further fields of the Route.
    """
    loop = asyncio.get_running_loop()
    base = deployment or Deployment("", MODEL, limits=limits or Limits(max_in_flight=4))
    deployments = tuple(
        replace(base, name=f"d{at}", limits=each[at] if each else base.limits) for at in range(len(providers))
    )
    space = Space(MODEL, WIDTH, max_input_tokens=max_input_tokens)
    route = Route(MODEL, space, deployments, cuts_dimensions=cuts_dimensions, prompts=prompts, **route_fields)
    log = io.BytesIO()
    telemetry = Telemetry(tenants=["anonymous"], models=[MODEL], stream=log)
    bell, rng = Bell(), random.Random(7)
    gates = {
        named.name: Gate(
            named, provider,
            CircuitBreaker(
                named.breaker, clock=loop.time, rng=rng,
                on_change=lambda state, reason, name=named.name: telemetry.breaker_changed(  # type: ignore[misc]
                    deployment=name, state=state, reason=reason
                ),
            ),
            None,
        )
        for named, provider in zip(deployments, providers, strict=True)
    }  # fmt: skip
    parts = EngineParts(
        cache=cache or MemoryCache(1 << 20),
        limiter=limiter or InProcessLimiter({named.name: named.limits for named in deployments}, clock=loop.time),
        ledger=ledger or Notebook(),
        budgets=budgets or NoBudgets(),
        gates=gates,
        telemetry=telemetry,
        secret=b"rig",
        several_tenants=lambda: several_tenants,
        bulk_min_tokens=bulk_min_tokens,
        shares=shares,
    )
    billed_before = sum(each.billed for each in providers)
    intake = Intake({MODEL: route}, {MODEL: Words()}, Words())
    waiting = bound or QueueBound()
    async with Gateway(intake, parts, waiting, bell, rng=rng) as gateway:
        yield Rig(
            gateway,
            {named.name: p for named, p in zip(deployments, providers, strict=True)},
            gates,
            waiting,
            telemetry,
            log,
        )
    telemetry.close()
    if isinstance(parts.ledger, Notebook):
        assert not parts.ledger.under_way
        booked = sum(tokens for _, tokens, how in parts.ledger.ended if how == "billed")
        assert booked == sum(each.billed for each in providers) - billed_before
