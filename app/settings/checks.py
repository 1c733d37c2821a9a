"""Hides what makes settings contradict each other, although each value is fine by itself."""

from collections.abc import Iterator
from typing import TypeAlias
from urllib.parse import urlsplit

from app.settings.catalog import CATALOG
from app.settings.grammar import DeploymentSettings, LocalDeployment, ModelSettings, RemoteDeployment, Settings
from app.settings.places import KeyPath
from app.settings.wording import guess

Problems: TypeAlias = Iterator[tuple[KeyPath, str]]
"""Where to mend, and why."""


def contradictions(settings: Settings) -> Problems:
    """Everything for which these settings cannot be served."""
    yield from _keys(settings)
    for name, deployment in settings.deployments.items():
        yield from _deployment(("deployments", name), deployment)
    for name, model in settings.models.items():
        unknown = [listed for listed in model.deployments if listed not in settings.deployments]
        for listed in unknown:
            text = f"there is no deployment '{listed}'{guess(listed, settings.deployments)}"
            yield ("models", name, "deployments"), text
        if not unknown:
            yield from _one_space(settings, name, model)
            yield from _model(settings, name, model)
    for name, tenant in settings.tenants.items():
        for listed in tenant.models:
            if listed != "*" and listed not in settings.models:
                yield ("tenants", name, "models"), f"there is no model '{listed}'{guess(listed, settings.models)}"


def _keys(settings: Settings) -> Problems:
    server = settings.server
    if not server.loopback and not settings.tenants:
        text = f"'{server.host}' can be reached from other machines, so callers need keys: add a section such as "
        yield ("server", "host"), text + "[tenants.search] with an api_key, or listen on 127.0.0.1"
    owners = {server.admin_key.get_secret_value(): "server.admin_key"} if server.admin_key else {}
    for name, tenant in settings.tenants.items():
        for key in tenant.api_key:
            owner = owners.setdefault(key.get_secret_value(), f"tenants.{name}")
            if owner != f"tenants.{name}":
                yield ("tenants", name, "api_key"), f"is also the key of {owner}; every key names one owner"


def _deployment(path: KeyPath, deployment: RemoteDeployment | LocalDeployment) -> Problems:
    if deployment.backoff_cap_s < deployment.backoff_base_s:
        yield (*path, "backoff_cap_s"), f"must be at least backoff_base_s, which is {deployment.backoff_base_s:g}"
    if deployment.breaker_open_cap_s < deployment.breaker_open_s:
        yield (*path, "breaker_open_cap_s"), f"must be at least breaker_open_s, which is {deployment.breaker_open_s:g}"
    if isinstance(deployment, RemoteDeployment):
        yield from _remote(path, deployment)
    if isinstance(deployment, LocalDeployment) and deployment.pooling and not deployment.path:
        yield (*path, "pooling"), "needs a path, since the pooling of the built-in model is known"


def _remote(path: KeyPath, deployment: RemoteDeployment) -> Problems:
    if not deployment.base_url:
        yield (*path, "base_url"), f"is required by the dialect '{deployment.dialect}'"
    if deployment.is_vendors and deployment.wire.needs_key and not deployment.api_key:
        example = f"env:{deployment.dialect.upper()}_API_KEY"
        yield (*path, "api_key"), f'is required by {urlsplit(deployment.base_url).hostname}, for example "{example}"'
    for key, dialect in (("server", "openai"), ("api_version", "azure"), ("auth", "azure")):
        if getattr(deployment, key) and deployment.dialect != dialect:
            yield (*path, key), f"belongs to deployments of the dialect '{dialect}'"
    if deployment.tier and deployment.tier not in (tiers := deployment.card.tiers if deployment.card else {}):
        known = f"it may be {', '.join(tiers)}" if tiers else "none are published for this model: state the limits"
        yield (*path, "tier"), f"unknown tier '{deployment.tier}'; {known}"


def _one_space(settings: Settings, name: str, model: ModelSettings) -> Problems:
    """Vectors of one model must be comparable: that is what a fallback may never break."""
    first, *others = ((listed, settings.deployments[listed]) for listed in model.deployments)
    for other in others:
        pair = " and ".join(f"'{listed}' ({one.dialect}, {one.model})" for listed, one in (first, other))
        if not _alike(first[1], other[1]) and not (model.same_space and first[1].dialect != "local"):
            text = f"{pair} serve different models, whose vectors cannot be compared; give each its own model, or set "
            text += "same_space = true if you know that both names mean the same one"
        else:
            continue
        yield ("models", name, "deployments"), text


def _alike(one: DeploymentSettings, other: DeploymentSettings) -> bool:
    """Whether two deployments surely serve the same model: the name is the same and so is who knows it."""
    if isinstance(one, RemoteDeployment) and isinstance(other, RemoteDeployment):
        known = one.card is not None and one.card is other.card
        return one.model == other.model and (known or one.dialect == other.dialect)
    return one.dialect == other.dialect and one.model == other.model


def _model(settings: Settings, name: str, model: ModelSettings) -> Problems:
    path = ("models", name)
    served = settings.deployments[model.deployments[0]]
    if isinstance(served, LocalDeployment):
        if any(name == known for _, known in CATALOG):
            yield path, "is the name of a vendor's model, which a local deployment must not answer for; choose another"
        for key in ("dimensions", "max_input_tokens", "tokenizer"):
            if getattr(model, key) is not None:
                yield (*path, key), "must be left off: the files of the local model say it"
        return
    card = served.card
    if card is None:
        if model.dimensions is None:
            yield path, f"dimensions is required, since '{served.model}' is not in the catalog"
        return
    asked = model.dimensions or card.dimensions
    if not card.offers(asked):
        limit = "exactly" if not card.sizes else "at most" if isinstance(card.sizes, range) else "one of"
        offered = max(card.sizes) if isinstance(card.sizes, range) and card.sizes else card.sizes or card.dimensions
        yield (*path, "dimensions"), f"'{served.model}' has {limit} {offered}, not {asked}"
    if model.cuts_dimensions and not card.matryoshka:
        yield (*path, "cuts_dimensions"), f"vectors of '{served.model}' cannot be cut"
    if (model.max_input_tokens or 0) > card.max_input_tokens:
        yield (*path, "max_input_tokens"), f"'{served.model}' takes at most {card.max_input_tokens}"
