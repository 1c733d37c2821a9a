"""The composition root: the one place where settings become nouns and ports meet their implementations."""

import asyncio
import random
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self, assert_never

from app.domain import ANONYMOUS, Deployment, Route, Space, Tenant
from app.engine.breaker import CircuitBreaker
from app.engine.gate import Bell, Gate
from app.engine.gateway import EngineParts, Gateway
from app.engine.intake import Intake
from app.engine.workqueue import QueueBound
from app.errors import ConfigurationError
from app.ports import Provider, TokenCounter
from app.providers.dialect import Target
from app.providers.http import Endpoint
from app.providers.local import LocalModel, LocalModelFacts, default_model, read_model
from app.providers.remote import RemoteProvider
from app.settings import LocalDeployment, RemoteDeployment, Settings
from app.storage.cache import MemoryCache
from app.storage.limiter import InProcessLimiter
from app.telemetry import Telemetry
from app.tokens import Cl100k, Estimate, HuggingFaceCounter, LearnedRatio


@dataclass(frozen=True, slots=True)
class _Served:
    """One model name with all that serves it."""

    route: Route
    counter: TokenCounter


class Runtime:
    """Everything that serves, built from `settings`; an async context manager that closes it in reverse.

    `draining` is set when no more requests should come.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.vocabulary = Cl100k()
        self.draining = False
        self.telemetry: Telemetry
        self.gateway: Gateway
        self._rng = random.Random()  # noqa: S311 — jitter
        self._stack = AsyncExitStack()
        self._models: dict[str, LocalModelFacts] = {}

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """Who may call, by API key, made when asked since keys are not to lie about; empty when none is configured."""
        return {
            key.get_secret_value(): tenant.tenant(name)
            for name, tenant in self.settings.tenants.items()
            for key in tenant.api_key
        }

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.telemetry = self._telemetry(stack)
            await asyncio.to_thread(self._read_models)
            await asyncio.to_thread(self.vocabulary.load)
            served = {name: self._served(name) for name in self.settings.models}
            gates = self._gates(served)
            for gate in gates.values():
                stack.push_async_callback(gate.provider.aclose)
            self.gateway = await stack.enter_async_context(self._engine(served, gates))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def why_not_ready(self) -> list[str]:
        """Reasons why this process should get no requests now; empty when it should."""
        return [*(["draining"] if self.draining else []), *self.gateway.why_not_ready()]

    # ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _telemetry(self, stack: AsyncExitStack) -> Telemetry:
        server = self.settings.server
        stream: BinaryIO = sys.stderr.buffer
        if server.log_file:
            try:
                stream = stack.enter_context(Path(server.log_file).expanduser().open("ab"))
            except OSError as error:
                raise ConfigurationError(f"server.log_file cannot be written: {error.strerror}") from error
        tenants = [*self.settings.tenants, *([] if self.settings.tenants else [ANONYMOUS.name])]
        telemetry = Telemetry(tenants=tenants, models=self.settings.models, stream=stream, log_sample=server.log_sample)
        stack.callback(telemetry.close)
        return telemetry

    def _read_models(self) -> None:
        """Opens the files of every local deployment: their facts make its Space."""
        for name, settings in self.settings.deployments.items():
            if isinstance(settings, LocalDeployment):
                path = settings.path
                self._models[name] = (
                    read_model(Path(path).expanduser(), settings.pooling or None) if path else default_model()
                )

    def _served(self, name: str) -> _Served:
        """The Route and the token counter of the model `name`."""
        model, facts = self.settings.models[name], self.settings.facts(name)
        deployments = tuple(self._deployment(each, facts.unit_norm) for each in model.deployments)
        local = self._models.get(model.deployments[0])
        if local is not None:
            self._check_one_space(name, [self._models[each] for each in model.deployments])
            cuts = facts.cuts_dimensions
            route = Route(name, local.space(name), deployments, cuts_dimensions=cuts, prompts=local.prompts)
            return _Served(route, HuggingFaceCounter(local.tokenizer))
        if facts.dimensions is None:
            raise ConfigurationError(f"models.{name}.dimensions: say how wide its vectors are")
        space = Space(
            facts.upstream,
            facts.dimensions,
            normalised=facts.unit_norm,
            max_input_tokens=facts.max_input_tokens or 8192,
        )
        remote = [each for each in map(self.settings.deployments.get, model.deployments) if each is not None]
        route = Route(
            name, space, deployments,
            cuts_dimensions=facts.cuts_dimensions, sizes=facts.sizes, prompts=facts.prompts,
            default_input_type=facts.default_input_type, long_input=model.truncation,
            overlap_tokens=model.overlap_tokens, spread=model.order == "spread", spill_s=model.spill_s,
            vendor_cuts=all(isinstance(each, RemoteDeployment) and each.wire.cuts for each in remote),
            on_outage=model.on_outage, created=facts.created, owned_by=facts.owned_by,
        )  # fmt: skip
        return _Served(route, self.vocabulary if facts.tokenizer == "cl100k_base" else Estimate())

    def _check_one_space(self, name: str, models: list[LocalModelFacts]) -> None:
        if len({model.space(name) for model in models}) > 1:
            raise ConfigurationError(f"models.{name}.deployments: these directories hold different models")

    def _deployment(self, name: str, unit_norm: bool) -> Deployment:
        settings = self.settings.deployments[name]
        deployment = Deployment(
            name,
            settings.model,
            limits=settings.limits(),
            attempts=settings.retry(),
            breaker=settings.breaker(),
            timeout_s=settings.timeout_s,
        )
        match settings:
            case RemoteDeployment():
                return replace(deployment, unit_norm=unit_norm, takes_token_ids=settings.understands_token_ids)
            case LocalDeployment():
                return replace(deployment, unit_norm=self._models[name].normalised)
            case _:
                assert_never(settings)

    def _gates(self, served: Mapping[str, _Served]) -> dict[str, Gate]:
        """A Gate per deployment that some model uses, shared by all models that do."""
        gates: dict[str, Gate] = {}
        widths: dict[str, int] = {}
        for name, model in served.items():
            width = model.route.space.dimensions
            for deployment in model.route.deployments:
                if widths.setdefault(deployment.name, width) != width:
                    raise ConfigurationError(
                        f"models.{name}.dimensions: its deployment {deployment.name} already serves vectors of "
                        f"{widths[deployment.name]} dimensions; give each width a deployment of its own"
                    )
                if deployment.name not in gates:
                    gates[deployment.name] = self._gate(deployment, model)
        return gates

    def _gate(self, deployment: Deployment, model: _Served) -> Gate:
        name, telemetry = deployment.name, self.telemetry
        breaker = CircuitBreaker(
            deployment.breaker,
            clock=time.monotonic,
            rng=self._rng,
            on_change=lambda state, reason: telemetry.breaker_changed(deployment=name, state=state, reason=reason),
        )
        ratio = None if model.counter.exact else LearnedRatio()
        return Gate(deployment, self._provider(name, model.route), breaker, ratio)

    def _provider(self, name: str, route: Route) -> Provider:
        settings = self.settings.deployments[name]
        match settings:
            case RemoteDeployment():
                return _remote(settings, route.space.dimensions)
            case LocalDeployment():
                return LocalModel(self._models[name])
            case _:
                assert_never(settings)

    def _engine(self, served: Mapping[str, _Served], gates: Mapping[str, Gate]) -> Gateway:
        settings = self.settings
        limits = {name: gate.deployment.limits for name, gate in gates.items()}
        cache = MemoryCache(settings.cache.memory_bytes)
        self.telemetry.watch(
            "embedgate_cache_bytes", "Memory of the vectors kept", (), lambda: [((), cache.stats().used_bytes)]
        )
        parts = EngineParts(
            cache=cache,
            limiter=InProcessLimiter(limits, clock=time.monotonic),
            gates=gates,
            telemetry=self.telemetry,
            secret=secrets.token_bytes(32),
            bulk_share=settings.queue.bulk_share,
        )
        intake = Intake(
            {name: model.route for name, model in served.items()},
            {name: model.counter for name, model in served.items()},
            self.vocabulary,
        )
        bound = QueueBound(settings.queue.max_items, settings.queue.max_tokens)
        return Gateway(intake, parts, bound, Bell(), clock=time.monotonic, rng=self._rng)


def _remote(settings: RemoteDeployment, width: int) -> RemoteProvider:
    """Who calls a remote deployment for vectors of this width."""
    wire, card, name = settings.wire, settings.card, settings.served_as or settings.model
    target = Target(
        name,
        dimensions=width if card is not None and width != card.dimensions else None,
        names=frozenset({name, settings.model}) if settings.is_vendors else frozenset(),
        options={"api_version": settings.api_version, "auth": settings.auth},
    )
    dialect = wire(target)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    most = settings.limits().max_in_flight
    endpoint = Endpoint(settings.base_url, {} if key is None else dialect.headers(key), max_connections=most)
    narrow = card is not None and card.normalised == "full width" and width != card.dimensions
    return RemoteProvider(
        dialect, endpoint, width=width, normalise=narrow or (card is not None and card.normalised == "never")
    )
