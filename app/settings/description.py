"""Hides how settings are shown to their operator: in their own grammar, as they are in force, every key masked."""

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, SecretStr

from app.providers.cards import ModelCard
from app.settings.catalog import usd_per_million
from app.settings.deployments import DeploymentSettings, RemoteDeployment
from app.settings.grammar import ModelSettings, Settings, TenantSettings
from app.settings.places import dotted

# Shown as they are served, whether the file, the catalog or nobody yet says them.
_FACTS = ("dimensions", "max_input_tokens", "tokenizer", "cuts_dimensions")
_LIMITS = (
    "requests_per_minute", "tokens_per_minute", "judged_spans_s", "max_in_flight", "max_batch_items",
    "max_batch_tokens", "min_batch_tokens",
)  # fmt: skip


def describe(settings: Settings) -> str:
    """What is in force, defaults and catalog included, as the `embedgate.toml` that says the same; keys are `***`."""
    blocks = [
        _table((section,), getattr(settings, section))
        for section in ("server", "queue", "cache", "stores", "ledger", "bulk")
    ]
    blocks += [_deployment(settings, name, entry) for name, entry in settings.deployments.items()]
    blocks += [_model(settings, name, entry) for name, entry in settings.models.items()]
    blocks += [_tenant(name, entry) for name, entry in settings.tenants.items()]
    return "\n\n".join("\n".join(block) for block in blocks)


def _deployment(settings: Settings, name: str, deployment: DeploymentSettings) -> list[str]:
    limits, breaker = deployment.limits(), settings.breaker(name)
    known: dict[str, object] = {field: getattr(limits, field) for field in _LIMITS} | {"headroom": 1.0}
    known |= {f"breaker_{field.name}": getattr(breaker, field.name) for field in fields(breaker)}
    comments = []
    if deployment.headroom < 1:
        comments.append(f"# headroom: {deployment.headroom:g}, which is taken off the quotas below")
    comments.append(f"# price: {_price(deployment)}")
    if isinstance(deployment, RemoteDeployment):
        known["takes_token_ids"] = deployment.understands_token_ids
        comments += [f"# {line}" for line in _shutdown(deployment.terms)]
    return _table(("deployments", name), deployment.model_copy(update=known), *comments)


def _price(deployment: DeploymentSettings) -> str:
    price, batch_price = deployment.price, deployment.batch_price
    if price is None:
        return "unknown, so tokens are counted without money; set usd_per_million_tokens"
    batch = f", {_usd(batch_price)} in the vendor's batches" if batch_price else ""
    return f"{_usd(price)} USD per million tokens{batch} ({deployment.price_source})"


def _usd(pico_usd_per_token: int) -> str:
    return f"{usd_per_million(pico_usd_per_token):.15g}"


def _shutdown(terms: ModelCard | None) -> Iterator[str]:
    if terms is not None and terms.shutdown is not None:
        yield f"shut down by the vendor on {terms.shutdown}"


def _model(settings: Settings, name: str, model: ModelSettings) -> list[str]:
    facts = settings.facts(name)
    known: dict[str, object] = {field: getattr(facts, field) for field in _FACTS}
    known["input_type"] = facts.default_input_type
    known |= {f"{kind}_prompt": text for kind, text in facts.prompts}
    comments = []
    if model.dimensions is None and facts.dimensions and max(facts.sizes, default=0) > facts.dimensions:
        known["dimensions"] = None  # stating them would keep callers from the wider vectors
        comments.append(f"# vectors are {facts.dimensions} wide; callers may ask for up to {max(facts.sizes)}")
    return _table(("models", name), model.model_copy(update=known), *comments)


def _tenant(name: str, tenant: TenantSettings) -> list[str]:
    """A query may hold what opens a webhook."""
    url, mark, _ = tenant.webhook_url.partition("?")
    return _table(("tenants", name), tenant.model_copy(update={"webhook_url": f"{url}?***" if mark else url}))


def _table(path: tuple[str, ...], section: BaseModel, *comments: str) -> list[str]:
    return [f"[{dotted(path)}]", *comments, *_lines(section)]


def _lines(section: BaseModel) -> Iterator[str]:
    for key, value in section:
        yield f"# {key}: not set" if value is None else f"{key} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps("***" if isinstance(value, SecretStr) else value, ensure_ascii=False)
