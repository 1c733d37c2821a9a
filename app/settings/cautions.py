"""Hides what can be served but deserves a look: models that their vendor shuts down, and risks that were chosen."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date

from app.domain import NO_BOUND
from app.settings.deployments import DeploymentSettings, RemoteDeployment
from app.settings.grammar import ModelSettings, ServerSettings, Settings
from app.settings.places import dotted

_NEAR_DAYS = 90


@dataclass(frozen=True, slots=True)
class Retirement:
    """The end of a deployment's model at its vendor, in so many `days`; 0 on the day, fewer after it."""

    deployment: str
    model: str
    shutdown: date
    days: int

    @property
    def near(self) -> bool:
        """Whether somebody should act now."""
        return self.days <= _NEAR_DAYS

    def __str__(self) -> str:
        what = f"has been shut down by its vendor since {self.shutdown}"
        if self.days > 0:
            count = f"{self.days} day{'s' * (self.days > 1)}"
            what = f"will be shut down by its vendor in {count}, on {self.shutdown}"
        return f"'{self.model}' {what}; move to another model"


def retirements(settings: Settings, today: date) -> list[Retirement]:
    """Of every deployment that a model uses and whose vendor has named a day."""
    used = {listed: settings.deployments[listed] for model in settings.models.values() for listed in model.deployments}
    terms = {name: each.terms for name, each in used.items() if isinstance(each, RemoteDeployment)}
    return [
        Retirement(name, used[name].model, card.shutdown, (card.shutdown - today).days)
        for name, card in terms.items()
        if card is not None and card.shutdown is not None
    ]


def cautions(settings: Settings, today: date) -> Iterator[str]:
    """One line for each: the key, and what may happen."""
    for retirement in retirements(settings, today):
        if retirement.near:
            yield f"{dotted(('deployments', retirement.deployment, 'model'))}: {retirement}"
    yield from _open_to_operators(settings.server)
    if settings.stores.database_url is not None and not settings.bulk.blobs:
        text = "files lie in the data_dir of whoever took them; name a folder or a bucket that all replicas share"
        yield f"{dotted(('bulk', 'blobs'))}: {text}"
    remote = [each for each in settings.deployments.values() if isinstance(each, RemoteDeployment)]
    for name, tenant in settings.tenants.items():
        if tenant.bulk_tier == "vendor_batch" and not any(each.has_batches for each in remote):
            text = "no deployment's vendor takes batches, so they go the ordinary way at the ordinary price"
            yield f"{dotted(('tenants', name, 'bulk_tier'))}: {text}"
    for name, deployment in settings.deployments.items():
        yield from _quotas(name, deployment)
    for name, model in settings.models.items():
        yield from _never_degraded(settings, name, model)
        yield from _beyond_budgets(settings, name, model)


def _open_to_operators(server: ServerSettings) -> Iterator[str]:
    if server.admin_port and not (server.loopback or server.admin_key):
        yield "server.admin_port: whoever can connect is an operator until a key is made for one; set server.admin_key"


def _quotas(name: str, deployment: DeploymentSettings) -> Iterator[str]:
    if not isinstance(deployment, RemoteDeployment):
        return
    for limit in ("requests_per_minute", "tokens_per_minute"):
        allowed = getattr(deployment.quota, limit)
        if getattr(deployment, limit) == 0 and allowed:
            key = dotted(("deployments", name, limit))
            yield f"{key}: 0 is unlimited, although the tier '{deployment.tier}' allows {allowed}"
    limits = deployment.limits()
    tiers = deployment.terms.tiers if deployment.terms is not None else {}
    if deployment.is_vendors and tiers and not (limits.requests_per_minute or limits.tokens_per_minute):
        key = dotted(("deployments", name, "tier"))
        yield f"{key}: no limits are set, so only 429s will slow it down; set the account's tier: {', '.join(tiers)}"


def _beyond_budgets(settings: Settings, name: str, model: ModelSettings) -> Iterator[str]:
    """What a tenant buys at a price that nobody knows is in no budget."""
    nouns = (entry.tenant(tenant) for tenant, entry in settings.tenants.items())
    bounded = [noun.name for noun in nouns if noun.allowance != NO_BOUND and noun.may_use(name)]
    for deployment in model.deployments if bounded else ():
        if settings.deployments[deployment].price is None:
            key = dotted(("deployments", deployment, "usd_per_million_tokens"))
            yield f"{key}: the price is not known, so the budget of {', '.join(bounded)} does not bound what it costs"


def _never_degraded(settings: Settings, name: str, model: ModelSettings) -> Iterator[str]:
    for tenant, entry in settings.tenants.items():
        noun = entry.tenant(tenant)
        if model.on_outage and noun.may_use(name) and not noun.may_use(model.on_outage):
            key = dotted(("tenants", tenant, "models"))
            yield f"{key}: without '{model.on_outage}', it is never answered by the on_outage of '{name}'"
