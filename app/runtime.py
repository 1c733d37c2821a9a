"""The composition root: the one place where settings become nouns and ports meet their implementations."""

import asyncio
import random
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self, assert_never

from app.alerts import Alerts
from app.directory import Directory
from app.domain import ANONYMOUS, Deployment, Route, Tenant
from app.engine.breaker import CircuitBreaker
from app.engine.canary import Canary, Finding, Watch, probes
from app.engine.gate import Bell, Gate
from app.engine.gateway import EngineParts, Gateway
from app.engine.intake import Intake, space_for
from app.engine.wholesale import Vendor, Wholesale
from app.engine.workqueue import QueueBound
from app.errors import ConfigurationError
from app.ports import Limiter, Provider
from app.providers import batch_provider
from app.providers.dialect import Dialect, Target
from app.providers.http import Endpoint, OnOpened
from app.providers.local import LocalModel
from app.providers.remote import RemoteProvider
from app.serving import Menu, Served
from app.settings import LocalDeployment, RemoteDeployment, Settings, retirements
from app.stores import Stores
from app.telemetry import Reading, Telemetry
from app.tokens import LearnedRatio

_BATCH_CALLS, _BATCH_SILENCE_S = 4, 60.0  # at one moment about a vendor's own batches, and before a download is over


class Runtime:
    """Everything that serves, built from `settings`; an async context manager that closes it in reverse.

    `serves`: as a server, not a tool beside one. `draining` is set when no more requests should come. `today` is asked
    for how long models will still be there.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        serves: bool = True,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        self.settings = settings
        self._serves = serves
        self._today = today
        self.draining = False
        self.menu: Menu
        self.telemetry: Telemetry
        self.stores: Stores
        self.directory: Directory
        self.gates: Mapping[str, Gate]
        self.gateway: Gateway
        self.wholesale: Wholesale
        self.canary: Canary
        self._rng = random.Random()  # noqa: S311 — jitter
        self._stack = AsyncExitStack()
        self._endpoints: dict[str, Endpoint] = {}

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """Configured tenants, by API key, made when asked since keys are not to lie about; empty when there is none."""
        return {
            key.get_secret_value(): tenant.tenant(name)
            for name, tenant in self.settings.tenants.items()
            for key in tenant.api_key
        }

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.menu = await asyncio.to_thread(Menu, self.settings)
            self.telemetry = self._telemetry(stack)
            self.stores = await stack.enter_async_context(Stores(self.settings, self.telemetry, serves=self._serves))
            gates = self.gates = self._gates()
            for gate in gates.values():
                stack.push_async_callback(gate.provider.aclose)
            bell = Bell()
            limits = {name: gate.deployment.limits for name, gate in gates.items()}
            limits |= {tenant.account: tenant.limits for tenant in self.tenants.values() if tenant.limits}
            limiter = await self.stores.limiter(limits, stack)
            self.directory = await stack.enter_async_context(self._directory(limiter))
            await stack.enter_async_context(self._alerts())
            parts = self._parts(gates, limiter)
            self.gateway = await stack.enter_async_context(self._engine(parts, bell))
            self.wholesale = Wholesale(self.gateway, parts, self._vendors(gates))
            stack.push_async_callback(self.wholesale.aclose)
            self.canary = self._canary(gates, limiter, bell)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def why_not_ready(self) -> list[str]:
        """Reasons why this process should get no requests now; empty when it should."""
        complaint = self.stores.complaint()
        own = [*(["draining"] if self.draining else []), *([complaint] if complaint else [])]
        own += [] if self.settings.tenants or self.directory.loaded else ["the keys cannot be read yet"]
        return own + self.gateway.why_not_ready()

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

    def _directory(self, limiter: Limiter) -> Directory:
        """Who knows the tenants made at run time."""
        telemetry, stores = self.telemetry, self.stores
        configured = {tenant.name: tenant for tenant in self.tenants.values()}
        directory = Directory(
            stores.directory, stores.secret, telemetry, configured=configured, on_limits=limiter.allow
        )  # fmt: skip
        telemetry.watch(
            "embedgate_directory_age_seconds", "Since it was last known which keys and tenants there are", (),
            lambda: [((), directory.age_s)],
        )  # fmt: skip
        telemetry.watch("embedgate_directory_tenants", "Tenants made at run time", (), lambda: [((), directory.size)])
        return directory

    def _alerts(self) -> Alerts:
        """Who tells of budgets, once it is entered."""
        stores = self.stores
        alerts = Alerts(
            stores.alerts, stores.secret, self.telemetry, terms=self.directory.terms, ready=lambda: stores.prepared
        )
        stores.ledger.watchers.append(alerts)
        stores.budgets.on_exhausted = alerts.exhausted
        return alerts

    def _gates(self) -> dict[str, Gate]:
        """A Gate per deployment that some model uses, shared by all models that do."""
        gates: dict[str, Gate] = {}
        for model in self.menu.models.values():
            for deployment in model.route.deployments:
                if deployment.name not in gates:
                    gates[deployment.name] = self._gate(deployment, model)
        return gates

    def _gate(self, deployment: Deployment, model: Served) -> Gate:
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
                return LocalModel(self.menu.local[name], device=settings.device, max_items=settings.max_batch_items)
            case _:
                assert_never(settings)

    def _remote(self, name: str, settings: RemoteDeployment) -> RemoteProvider:
        """Who calls a remote deployment."""
        dialect, telemetry = _dialect(settings), self.telemetry
        endpoint = self._endpoints[name] = _endpoint(
            settings, dialect, settings.limits().max_in_flight, settings.read_timeout_s,
            on_opened=lambda wait_s: telemetry.connection_opened(deployment=name, wait_s=wait_s),
        )  # fmt: skip
        return RemoteProvider(dialect, endpoint)

    def _vendors(self, gates: Mapping[str, Gate]) -> dict[str, Vendor]:
        """Whose own batches can be had, by deployment: of the vendor itself, and of others whose price is stated."""
        vendors = {}
        for name in gates:
            settings = self.settings.deployments[name]
            if isinstance(settings, RemoteDeployment) and settings.has_batches:
                connect = partial(_endpoint, settings, (dialect := _dialect(settings)), _BATCH_CALLS, _BATCH_SILENCE_S)
                if (batches := batch_provider(dialect, connect)) is not None:
                    vendors[name] = Vendor(batches, settings.batch_price)
        return vendors

    def _connections(self) -> Reading:
        """How many connections every remote deployment has in each state."""
        for name, endpoint in self._endpoints.items():
            for state, count in endpoint.pool()._asdict().items():
                yield (name, state), count

    def _parts(self, gates: Mapping[str, Gate], limiter: Limiter) -> EngineParts:
        settings = self.settings
        return EngineParts(
            cache=self.stores.cache,
            limiter=limiter,
            ledger=self.stores.ledger,
            budgets=self.stores.budgets,
            gates=gates,
            telemetry=self.telemetry,
            secret=self.stores.secret.derive("cache keys"),
            older_secrets=self.stores.secret.derive_older("cache keys"),
            bulk_share=settings.queue.bulk_share,
            bulk_min_tokens=settings.bulk.min_request_tokens,
            several_tenants=lambda: len(settings.tenants) + self.directory.size > 1,
            shares=self.stores.shares,
        )

    def _engine(self, parts: EngineParts, bell: Bell) -> Gateway:
        self.telemetry.watch(
            "embedgate_pool_connections", "Connections to providers by state, and calls that are waiting for one",
            ("deployment", "state"), self._connections,
        )  # fmt: skip
        queue = self.settings.queue
        intake = Intake(
            {name: model.route for name, model in self.menu.models.items()},
            {name: model.counter for name, model in self.menu.models.items()},
            self.menu.vocabulary,
        )
        bound = QueueBound(queue.max_items, queue.max_tokens)
        return Gateway(intake, parts, bound, bell, clock=time.monotonic, rng=self._rng)

    def _canary(self, gates: Mapping[str, Gate], limiter: Limiter, bell: Bell) -> Canary:
        """Who watches the models, once it is entered."""
        watches = []
        for name, model in self.menu.models.items():
            settings, space = self.settings.models[name], space_for(model.route)
            of_model = [gates[deployment.name] for deployment in model.route.deployments]
            most = min(gate.deployment.limits.max_batch_tokens for gate in of_model)
            texts, tokens = probes(model.counter, space.max_input_tokens, most)
            interval_s, cosine = settings.canary_interval_s, settings.canary_cosine
            watches.append(Watch(name, space, of_model, texts, tokens, interval_s, cosine))
        stores, clock = self.stores, time.monotonic
        return Canary(watches, stores.landmarks, limiter, stores.ledger, bell, self.telemetry, clock=clock)


def _endpoint(
    settings: RemoteDeployment, dialect: Dialect, max_connections: int, read_timeout_s: float | None,
    on_opened: OnOpened = lambda wait_s: None,
) -> Endpoint:  # fmt: skip
    """The connections to a remote deployment."""
    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Endpoint(
        settings.base_url,
        {} if key is None else dialect.headers(key),
        max_connections=max_connections,
        connect_timeout_s=settings.connect_timeout_s,
        read_timeout_s=read_timeout_s,
        proxy_from_environment=settings.proxy_from_environment,
        on_opened=on_opened,
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
