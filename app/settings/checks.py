"""Hides what makes settings contradict each other, although each value is fine by itself."""

from collections.abc import Iterator
from typing import TypeAlias

from app.settings.catalog import CATALOG
from app.settings.grammar import OPENAI_HOST, LocalDeployment, ModelSettings, OpenAIDeployment, Settings
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


def _deployment(path: KeyPath, deployment: OpenAIDeployment | LocalDeployment) -> Problems:
    if deployment.backoff_cap_s < deployment.backoff_base_s:
        yield (*path, "backoff_cap_s"), f"must be at least backoff_base_s, which is {deployment.backoff_base_s:g}"
    if deployment.breaker_open_cap_s < deployment.breaker_open_s:
        yield (*path, "breaker_open_cap_s"), f"must be at least breaker_open_s, which is {deployment.breaker_open_s:g}"
    if isinstance(deployment, OpenAIDeployment) and deployment.is_openai and not deployment.api_key:
        yield (*path, "api_key"), f'is required by {OPENAI_HOST}, for example "env:OPENAI_API_KEY"'
    if isinstance(deployment, LocalDeployment) and deployment.pooling and not deployment.path:
        yield (*path, "pooling"), "needs a path, since the pooling of the built-in model is known"


def _one_space(settings: Settings, name: str, model: ModelSettings) -> Problems:
    """Vectors of one model must be comparable: that is what a fallback may never break."""
    first, *others = ((listed, settings.deployments[listed]) for listed in model.deployments)
    for other in others:
        pair = " and ".join(f"'{listed}' ({one.dialect}, {one.model})" for listed, one in (first, other))
        if first[1].dialect != other[1].dialect:
            text = f"{pair} do not make comparable vectors; give each its own model"
        elif first[1].model != other[1].model and not model.same_space:
            text = f"{pair} serve different models, whose vectors cannot be compared; give each its own model, or set "
            text += "same_space = true if you know that both names mean the same one"
        else:
            continue
        yield ("models", name, "deployments"), text


def _model(settings: Settings, name: str, model: ModelSettings) -> Problems:
    path = ("models", name)
    served = settings.deployments[model.deployments[0]]
    if isinstance(served, LocalDeployment):
        if name in CATALOG:
            yield path, "is the name of an OpenAI model, which a local deployment must not answer for; choose another"
        for key in ("dimensions", "max_input_tokens", "tokenizer"):
            if getattr(model, key) is not None:
                yield (*path, key), "must be left off: the files of the local model say it"
        return
    known = CATALOG.get(served.model)
    if known is None:
        if model.dimensions is None:
            yield path, f"dimensions is required, since '{served.model}' is not in the catalog"
        return
    asked = model.dimensions or known.dimensions
    if asked > known.dimensions or (asked < known.dimensions and not known.cuts_dimensions):
        limit = "at most" if known.cuts_dimensions else "exactly"
        yield (*path, "dimensions"), f"'{served.model}' has {limit} {known.dimensions}, not {asked}"
    if model.cuts_dimensions and not known.cuts_dimensions:
        yield (*path, "cuts_dimensions"), f"vectors of '{served.model}' cannot be cut"
    if (model.max_input_tokens or 0) > known.max_input_tokens:
        yield (*path, "max_input_tokens"), f"'{served.model}' takes at most {known.max_input_tokens}"
