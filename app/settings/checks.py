"""Hides what makes settings contradict each other, although each value is fine by itself."""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from app.providers.cards import ModelCard
from app.settings.catalog import CATALOG
from app.settings.deployments import DeploymentSettings, LocalDeployment, RemoteDeployment
from app.settings.grammar import VOCABULARIES, ModelFacts, ModelSettings, ServerSettings, Settings
from app.settings.places import KeyPath
from app.settings.wording import guess

Problems: TypeAlias = Iterator[tuple[KeyPath, str]]
"""Where to mend, and why."""

_TOKENIZER: Final = "set tokenizer to the path of its tokenizer.json"


def contradictions(settings: Settings) -> Problems:
    """Everything for which these settings cannot be served."""
    yield from _ports(settings.server)
    yield from _keys(settings)
    yield from _stores(settings)
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
        yield from _outage(settings, name, model)
    for name, tenant in settings.tenants.items():
        for listed in tenant.models:
            if listed != "*" and listed not in settings.models:
                yield ("tenants", name, "models"), f"there is no model '{listed}'{guess(listed, settings.models)}"


def _ports(server: ServerSettings) -> Problems:
    if server.admin_port and server.admin_port == server.port:
        yield ("server", "admin_port"), "is server.port already; name another one, or 0 to have all routes on one port"


def _keys(settings: Settings) -> Problems:
    server = settings.server
    if not (server.loopback or settings.tenants or server.admin_key):
        text = f"'{server.host}' can be reached from other machines, so callers need keys: add a section such as "
        text += "[tenants.search] with an api_key, or set server.admin_key and make keys at run time, "
        yield ("server", "host"), text + "or listen on 127.0.0.1"
    owners = {server.admin_key.get_secret_value(): "server.admin_key"} if server.admin_key else {}
    for name, tenant in settings.tenants.items():
        for key in tenant.api_key:
            owner = owners.setdefault(key.get_secret_value(), f"tenants.{name}")
            if owner != f"tenants.{name}":
                yield ("tenants", name, "api_key"), f"is also the key of {owner}; every key names one owner"


def _stores(settings: Settings) -> Problems:
    """What several processes share they must be able to read: the same secret makes the same keys."""
    stores, secret = settings.stores, settings.server.secret
    for each in secret:
        if len(each.get_secret_value()) < 16 or len(set(each.get_secret_value())) < 6:
            yield ("server", "secret"), "needs at least 16 characters that nobody can guess; try openssl rand -hex 32"
    for name in ("redis_url", "cache_redis_url", "database_url"):
        if getattr(stores, name) is not None and not secret:
            text = (
                f'is required by stores.{name}, for example "env:EMBEDGATE_SECRET" with what openssl rand -hex 32 says'
            )
            yield ("server", "secret"), text
            break
    if settings.cache.compression == "zstd" and find_spec("zstandard") is None:
        yield ("cache", "compression"), "'zstd' needs the package zstandard: install embedgate[zstd]"


def _deployment(path: KeyPath, deployment: RemoteDeployment | LocalDeployment) -> Problems:
    for cap, base in (("backoff", "backoff_base"), ("cooldown", "cooldown"), ("breaker_open", "breaker_open")):
        least = getattr(deployment, f"{base}_s")
        if getattr(deployment, f"{cap}_cap_s") < least:
            yield (*path, f"{cap}_cap_s"), f"must be at least {base}_s, which is {least:g}"
    limits = deployment.limits()
    if limits.min_batch_tokens > limits.max_batch_tokens:
        text = f"must be at most max_batch_tokens, which is {limits.max_batch_tokens}"
        yield (*path, "min_batch_tokens"), text
    yield from _tier(path, deployment)
    if isinstance(deployment, RemoteDeployment):
        yield from _remote(path, deployment)
    elif deployment.pooling and not deployment.path:
        yield (*path, "pooling"), "needs a path, since the pooling of the built-in model is known"


def _tier(path: KeyPath, deployment: RemoteDeployment | LocalDeployment) -> Problems:
    terms = deployment.terms if isinstance(deployment, RemoteDeployment) else None
    tiers = terms.tiers if terms is not None else {}
    if not deployment.tier or deployment.tier in tiers:
        return
    text = f"none is known for '{deployment.model}': state requests_per_minute and tokens_per_minute instead"
    if tiers:
        text = f"unknown tier '{deployment.tier}'" + (
            guess(deployment.tier, tiers) or f"; it may be {', '.join(tiers)}"
        )
    yield (*path, "tier"), text


def _remote(path: KeyPath, deployment: RemoteDeployment) -> Problems:
    wire = deployment.wire
    for key, dialect in (("server", "openai"), ("api_version", "azure"), ("auth", "azure")):
        if getattr(deployment, key) and deployment.dialect != dialect:
            yield (*path, key), f"belongs to deployments of the dialect '{dialect}'"
    if not deployment.base_url:
        asks = f"server '{deployment.server}'" if deployment.server else f"dialect '{deployment.dialect}'"
        yield (*path, "base_url"), f"is required by the {asks}"
    at_vendors = deployment.is_vendors or not wire.base_url
    if at_vendors and wire.needs_key and not deployment.api_key:
        who = urlsplit(deployment.base_url).hostname or f"the dialect '{deployment.dialect}'"
        yield (*path, "api_key"), f'is required by {who}, for example "env:{deployment.dialect.upper()}_API_KEY"'


def _one_space(settings: Settings, name: str, model: ModelSettings) -> Problems:
    """Vectors of one model must be comparable: that is what a fallback may never break."""
    first, *others = ((listed, settings.deployments[listed]) for listed in model.deployments)
    for other in others:
        pair = " and ".join(f"'{listed}' ({one.dialect}, {one.model})" for listed, one in (first, other))
        if "local" in {first[1].dialect, other[1].dialect} and first[1].dialect != other[1].dialect:
            text = f"{pair} do not make comparable vectors, since one runs on this machine; give each its own model"
        elif not model.same_space and not _alike(first[1], other[1]):
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
    path, facts = ("models", name), settings.facts(name)
    served = [settings.deployments[listed] for listed in model.deployments]
    remote = [each for each in served if isinstance(each, RemoteDeployment)]
    if len(remote) == len(served):
        yield from _remote_model(path, model, facts, remote)
    elif not remote:
        yield from _local_model(path, model)
    if model.long_input == "mean":
        if not facts.counts_exactly:
            yield (*path, "long_input"), f"'mean' cuts windows in the model's own vocabulary: {_TOKENIZER}"
        if facts.max_input_tokens is not None and 2 * model.overlap_tokens >= facts.max_input_tokens:
            text = f"must be less than half of max_input_tokens, which is {facts.max_input_tokens}"
            yield (*path, "overlap_tokens"), text


def _local_model(path: KeyPath, model: ModelSettings) -> Problems:
    if any(path[1] == known for _, known in CATALOG):
        yield path, "is the name of a vendor's model, which a local deployment must not answer for; choose another"
    for key in ("dimensions", "max_input_tokens", "tokenizer", "query_prompt", "document_prompt", "input_type"):
        if getattr(model, key) is not None:
            yield (*path, key), "must be left off: the files of the local model say it"


def _remote_model(
    path: KeyPath, model: ModelSettings, facts: ModelFacts, served: Sequence[RemoteDeployment]
) -> Problems:
    if facts.dimensions is None:
        yield path, f"dimensions is required, since '{facts.upstream}' is not in the catalog"
    for upstream, card in {each.model: each.card for each in served if each.card is not None}.items():
        yield from _beyond(path, model, facts, upstream, card)
    if model.tokenizer is not None and not _is_tokenizer(model.tokenizer):
        known = 'it may be "cl100k_base", "estimate" or the path of a tokenizer.json'
        shown = "".join(c for c in model.tokenizer[:80] if c.isprintable())
        text = f"there is no file '{shown}' that can be read" + (guess(shown, VOCABULARIES) or f"; {known}")
        yield (*path, "tokenizer"), text
    silent = [each.server or each.dialect for each in served if each.wire.cuts_silently]
    if silent and model.long_input != "truncate":
        if not facts.counts_exactly:
            text = f"'{silent[0]}' cuts long texts without a word, and an estimate cannot prevent it; "
            text += 'set the path of its tokenizer.json, or long_input = "truncate" if that is what you want'
            yield (*path, "tokenizer"), text
        elif model.max_input_tokens is None:
            yield (*path, "max_input_tokens"), f"is required, since '{silent[0]}' cuts longer texts without a word"
    cut = facts.counts_exactly or all(each.wire.cuts for each in served)
    if model.long_input == "truncate" and not cut:
        yield (*path, "long_input"), f"'{facts.upstream}' is not cut by its vendor, and here only exactly: {_TOKENIZER}"
    for kind in ("query_prompt", "document_prompt"):
        if getattr(model, kind) and any(each.card is None and each.wire.own_words for each in served):
            yield (
                (*path, kind),
                f"must be left off: the dialect '{served[0].dialect}' has its own words for input types",
            )
    if model.input_type is not None and model.input_type not in dict(facts.prompts):
        text = f"'{facts.upstream}' tells no input types apart; set {model.input_type}_prompt to what stands in front"
        yield (*path, "input_type"), text


def _beyond(path: KeyPath, model: ModelSettings, facts: ModelFacts, upstream: str, card: ModelCard) -> Problems:
    """What is asked of a known model that it does not have."""
    if facts.dimensions is not None and not card.offers(facts.dimensions):
        limit = "exactly" if not card.sizes else "at most" if isinstance(card.sizes, range) else "one of"
        sizes = max(card.sizes) if isinstance(card.sizes, range) and card.sizes else card.sizes or card.dimensions
        offered = ", ".join(map(str, sizes)) if isinstance(sizes, Sequence) else sizes
        yield (*path, "dimensions"), f"'{upstream}' has {limit} {offered}, not {facts.dimensions}"
    if model.cuts_dimensions and not card.matryoshka:
        yield (*path, "cuts_dimensions"), f"vectors of '{upstream}' cannot be cut"
    if (facts.max_input_tokens or 0) > card.max_input_tokens:
        yield (*path, "max_input_tokens"), f"'{upstream}' takes at most {card.max_input_tokens}"
    for kind, known in card.prompts:
        if dict(facts.prompts)[kind] != known:
            yield (*path, f"{kind}_prompt"), f"must be left off: '{upstream}' has words of its own for it"


def _is_tokenizer(name: str) -> bool:
    if name in VOCABULARIES:
        return True
    try:
        file = Path(name).expanduser()
        return file.is_file() and os.access(file, os.R_OK)
    except (OSError, ValueError, RuntimeError):
        return False


def _outage(settings: Settings, name: str, model: ModelSettings) -> Problems:
    path, other = ("models", name, "on_outage"), settings.models.get(model.on_outage)
    if not model.on_outage:
        return
    if other is None:
        yield path, f"there is no model '{model.on_outage}'{guess(model.on_outage, settings.models)}"
    elif other is model:
        yield path, "names the model itself; another one has to stand in"
    elif other.on_outage:
        yield path, f"'{model.on_outage}' has an on_outage of its own, and only one step is ever taken"
