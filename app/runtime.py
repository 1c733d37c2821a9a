"""The composition root: the one place where settings become nouns and ports meet their implementations."""

import asyncio
import random
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import BinaryIO, Self, assert_never

from app.domain import ANONYMOUS, Deployment, Route, Space, Tenant
from app.engine.breaker import CircuitBreaker
from app.engine.canary import Canary, Finding, Watch, probes
from app.engine.gate import Bell, Gate
from app.engine.gateway import EngineParts, Gateway
from app.engine.intake import Intake, space_for
from app.engine.workqueue import QueueBound
from app.errors import ConfigurationError
from app.ports import Limiter, Provider, TokenCounter
from app.providers.dialect import Dialect, Target
from app.providers.http import Endpoint
from app.providers.local import LocalModel, LocalModelFacts, default_model, read_model
from app.providers.remote import RemoteProvider
from app.settings import LocalDeployment, ModelFacts, RemoteDeployment, Settings, retirements
from app.storage.cache import MemoryCache
from app.storage.landmarks import FileLandmarks
from app.storage.limiter import InProcessLimiter
from app.telemetry import Reading, Telemetry
from app.tokens import Cl100k, Estimate, HuggingFaceCounter, LearnedRatio


@dataclass(frozen=True, slots=True)
class _Served:
    """One model name with all that serves it."""

    route: Route
    counter: TokenCounter


class Runtime:
    """Everything that serves, built from `settings`; an async context manager that closes it in reverse.

    `draining` is set when no more requests should come. `today` is asked for how long models will still be there.
    """

    def __init__(self, settings: Settings, *, today: Callable[[], date] = lambda: datetime.now(UTC).date()) -> None:
        self.settings = settings
        self._today = today
        self.vocabulary = Cl100k()
        self.draining = False
        self.telemetry: Telemetry
        self.gateway: Gateway
        self.canary: Canary
        self._rng = random.Random()  # noqa: S311 — jitter
        self._stack = AsyncExitStack()
        self._models: dict[str, LocalModelFacts] = {}
        self._endpoints: dict[str, Endpoint] = {}

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
            bell = Bell()
            limiter = InProcessLimiter(
                {name: gate.deployment.limits for name, gate in gates.items()}, clock=time.monotonic
            )  # fmt: skip
            self.gateway = await stack.enter_async_context(self._engine(served, gates, limiter, bell))
            self.canary = self._canary(served, gates, limiter, bell)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def why_not_ready(self) -> list[str]:
        """Reasons why this process should get no requests now; empty when it should."""
        return [*(["draining"] if self.draining else []), *self.gateway.why_not_ready()]

    async def probe(self, *, accept: bool = False) -> list[Finding]:
        """What every deployment of every model answers to a few texts now; see `Canary.probe`."""
        return await self.canary.probe(accept=accept)

    def tell_retirements(self) -> None:
        """Logs which models their vendors are about to shut down."""
        for each in retirements(self.settings, self._today()):
            if each.near:
                day = each.shutdown.isoformat()
                self.telemetry.model_retires(deployment=each.deployment, model=each.model, shutdown=day, days=each.days)

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
        telemetry.watch(
            "embedgate_model_shutdown_days",
            "Days until the vendor shuts the deployment's model down; fewer than 0 after it",
            ("deployment", "model"),
            lambda: [((each.deployment, each.model), each.days) for each in retirements(self.settings, self._today())],
        )
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
            self._check_local(name, [self._models[each] for each in model.deployments])
            space, prompts = local.space(name), local.prompts
        else:
            space, prompts = _remote_space(name, facts), facts.prompts
        remote = [each for each in map(self.settings.deployments.get, model.deployments) if each is not None]
        route = Route(
            name, space, deployments,
            cuts_dimensions=facts.cuts_dimensions, sizes=facts.sizes, prompts=prompts,
            default_input_type=facts.default_input_type, long_input=model.truncation,
            overlap_tokens=model.overlap_tokens, spread=model.order == "spread", spill_s=model.spill_s,
            vendor_cuts=all(isinstance(each, RemoteDeployment) and each.wire.cuts for each in remote),
            always_cuts=not facts.counts_exactly
            and any(isinstance(each, RemoteDeployment) and each.wire.cuts_silently for each in remote),
            on_outage=model.on_outage, created=facts.created, owned_by=facts.owned_by,
        )  # fmt: skip
        return _Served(route, HuggingFaceCounter(local.tokenizer) if local else self._counter(facts.tokenizer))

    def _counter(self, tokenizer: str | None) -> TokenCounter:
        """Who counts for a model whose tokenizer is the vocabulary of callers, an estimate, or a file."""
        match tokenizer:
            case "cl100k_base":
                return self.vocabulary
            case None | "estimate":
                return Estimate()
            case path:
                return HuggingFaceCounter(Path(path).expanduser())

    def _check_local(self, name: str, models: list[LocalModelFacts]) -> None:
        """What only the models' files can tell to be wrong."""
        if len({model.space(name) for model in models}) > 1:
            raise ConfigurationError(f"models.{name}.deployments: these directories hold different models")
        settings, most = self.settings.models[name], models[0].max_input_tokens
        if settings.truncation == "mean" and 2 * settings.overlap_tokens >= most:
            raise ConfigurationError(f"models.{name}.overlap_tokens: must be less than half of the {most} that fit")

    def _deployment(self, name: str, unit_norm: bool) -> Deployment:
        settings = self.settings.deployments[name]
        deployment = Deployment(
            name,
            settings.model,
            limits=settings.limits(),
            attempts=settings.retry(),
            breaker=self.settings.breaker(name),
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
        for model in served.values():
            for deployment in model.route.deployments:
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
                return self._remote(name, settings)
            case LocalDeployment():
                return LocalModel(self._models[name], device=settings.device, max_items=settings.max_batch_items)
            case _:
                assert_never(settings)

    def _remote(self, name: str, settings: RemoteDeployment) -> RemoteProvider:
        """Who calls a remote deployment."""
        dialect, telemetry = _dialect(settings), self.telemetry
        key = settings.api_key.get_secret_value() if settings.api_key else None
        endpoint = self._endpoints[name] = Endpoint(
            settings.base_url,
            {} if key is None else dialect.headers(key),
            max_connections=settings.limits().max_in_flight,
            connect_timeout_s=settings.connect_timeout_s,
            read_timeout_s=settings.read_timeout_s,
            proxy_from_environment=settings.proxy_from_environment,
            on_opened=lambda wait_s: telemetry.connection_opened(deployment=name, wait_s=wait_s),
        )
        return RemoteProvider(dialect, endpoint)

    def _connections(self) -> Reading:
        """How many connections every remote deployment has in each state."""
        for name, endpoint in self._endpoints.items():
            for state, count in endpoint.pool()._asdict().items():
                yield (name, state), count

    def _engine(
        self, served: Mapping[str, _Served], gates: Mapping[str, Gate], limiter: Limiter, bell: Bell
    ) -> Gateway:  # fmt: skip
        settings = self.settings
        cache = MemoryCache(settings.cache.memory_bytes)
        self.telemetry.watch(
            "embedgate_cache_bytes", "Memory of the vectors kept", (), lambda: [((), cache.stats().used_bytes)]
        )
        self.telemetry.watch(
            "embedgate_pool_connections", "Connections to providers by state, and calls that are waiting for one",
            ("deployment", "state"), self._connections,
        )  # fmt: skip
        parts = EngineParts(
            cache=cache,
            limiter=limiter,
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
        return Gateway(intake, parts, bound, bell, clock=time.monotonic, rng=self._rng)

    def _data_dir(self) -> Path:
        try:
            return Path(self.settings.stores.data_dir).expanduser()
        except RuntimeError as error:  # a user without a home
            raise ConfigurationError("stores.data_dir: has no home directory to lie in, name another one") from error

    def _canary(
        self, served: Mapping[str, _Served], gates: Mapping[str, Gate], limiter: Limiter, bell: Bell
    ) -> Canary:  # fmt: skip
        """Who watches the models, once it is entered."""
        watches = []
        for name, model in served.items():
            settings, space = self.settings.models[name], space_for(model.route)
            of_model = [gates[deployment.name] for deployment in model.route.deployments]
            most = min(gate.deployment.limits.max_batch_tokens for gate in of_model)
            texts, tokens = probes(model.counter, space.max_input_tokens, most)
            interval_s, cosine = settings.canary_interval_s, settings.canary_cosine
            watches.append(Watch(name, space, of_model, texts, tokens, interval_s, cosine))
        landmarks = FileLandmarks(self._data_dir() / "landmarks")
        return Canary(watches, landmarks, limiter, bell, self.telemetry, clock=time.monotonic)


def _remote_space(name: str, facts: ModelFacts) -> Space:
    """Where the vectors of a model that is called over the network may be compared."""
    if facts.dimensions is None:
        raise ConfigurationError(f"models.{name}.dimensions: say how wide its vectors are")
    return Space(
        facts.upstream,
        facts.dimensions,
        normalised=facts.unit_norm,
        max_input_tokens=facts.max_input_tokens or 8192,
    )


def _dialect(settings: RemoteDeployment) -> Dialect:
    """What is spoken with a remote deployment."""
    name = settings.served_as or settings.model
    target = Target(
        name,
        card=settings.card,
        names=frozenset({name, settings.model}) if settings.is_vendors else frozenset(),
        options={"api_version": settings.api_version, "auth": settings.auth},
    )
    return settings.wire(target)
