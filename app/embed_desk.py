"""Hides how texts are embedded without a server: which model, how fast, or by a running embedgate instead."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote

import httpx
import msgspec

from app.domain import ANONYMOUS, EmbeddingRequest, InputType, Priority
from app.engine.intake import Plan
from app.errors import BadCredential, ConfigurationError, EmbedgateError, Misconfigured, ProviderError, QuotaExhausted
from app.providers.cards import ModelCard
from app.providers.embedgate import About
from app.runtime import Runtime
from app.settings import ModelSettings, RemoteDeployment, Settings
from app.storage.level import LevelDown

_PROBE_S = 60.0
_FOR_NOW: Final = frozenset({429, 502, 503, 504})
_CACHE_BYTES: Final = 8 * 2**20
_TO_MEND: Final = {"credential": "does not accept the key", "quota": "has no credit left"}
_WRONG: Final[Mapping[type[ProviderError], str]] = {
    BadCredential: _TO_MEND["credential"], QuotaExhausted: _TO_MEND["quota"],
    Misconfigured: "does not know the model or the path",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asking:
    """What vectors are wanted; `model` "" is the first that is configured, `dimensions` 0 the model's own.

    An `input_type` that not everybody need be told (`insists` False) is forgotten where nobody can be.
    """

    model: str = ""
    dimensions: int = 0
    input_type: InputType | None = None
    server: str = ""
    insists: bool = True

    def request(self, texts: Sequence[str], *, deadline: float = 0.0) -> EmbeddingRequest:
        """For these texts, at the lowest priority."""
        tenant = replace(ANONYMOUS, cache_group=self.server)  # what a name means, each server says for itself
        return EmbeddingRequest(
            tenant, self.model, tuple(texts), deadline, Priority.BULK, dimensions=self.dimensions or None,
            input_type=self.input_type, cause="bulk",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Desk:
    """Where texts are embedded, and what will come of `asking`."""

    runtime: Runtime
    asking: Asking
    plan: Plan

    @property
    def dimensions(self) -> int:
        """How wide its vectors are."""
        return self.plan.width or self.plan.space.dimensions

    @property
    def in_batches(self) -> bool:
        """Whether `[embed]` wants the vendor's batches. Raises ConfigurationError: there are none."""
        if self.runtime.settings.embed.tier == "online":
            return False
        if self.asking.server:
            raise ConfigurationError("a server cannot be told to use the vendor's batches: let it do a job, see `jobs`")
        if not self.runtime.wholesale.sells(self.asking.model):
            model = self.asking.model
            raise ConfigurationError(f"the model {model} has no vendor's batches: only OpenAI, Gemini and Voyage have")
        return True

    def throttles(self) -> int:
        """How often a provider has said 429."""
        calls = [sample for each in self.runtime.telemetry.provider_seconds.collect() for sample in each.samples]
        return sum(
            int(sample.value)
            for sample in calls
            if sample.name.endswith("_count") and sample.labels["outcome"] == "Throttled"
        )

    def complaint(self) -> str:
        """Why no provider is asked before somebody mends that; "" while one may be."""
        if full := self.runtime.stores.ledger.disk_full:
            return f"{self.runtime.settings.stores.data_dir}: {full}"
        deployments, found = self.plan.route.deployments, []
        for deployment in deployments:
            for state, said in _TO_MEND.items():
                labels = {"deployment": deployment.name, "state": state}
                if self.runtime.telemetry.registry.get_sample_value("embedgate_breaker_state", labels):
                    found.append(f"{self.asking.server or f'deployments.{deployment.name}'} {said}")
        trouble = self.runtime.wholesale.trouble(self.asking.model)
        if trouble is not None and (words := _WRONG.get(type(trouble[1]))):
            return f"deployments.{trouble[0]} {words}"
        return "; ".join(found) if len(found) == len(deployments) else ""


def passing(settings: Settings) -> Settings:
    """The same with little memory to remember: of a dataset nearly everything passes by once."""
    memory_bytes = min(settings.cache.memory_bytes, _CACHE_BYTES)
    return settings.model_copy(update={"cache": settings.cache.model_copy(update={"memory_bytes": memory_bytes})})


@asynccontextmanager
async def desk(settings: Settings, asking: Asking, *, server: str = "", api_key: str = "") -> AsyncIterator[Desk]:
    """Everything that embeds, at the pace of `[embed]`; with a `server` it is asked, and nobody else.

    Raises ConfigurationError for what cannot be had, in a line.
    """
    if server:
        settings, asking = await _through(settings, asking, server, api_key)
    model = asking.model or next(iter(settings.models))
    if model not in settings.models:
        raise ConfigurationError(f"the model {model} is not configured; there is {', '.join(settings.models)}")
    asking = replace(asking, model=model, server=server)
    try:
        async with Runtime(_quiet(_paced(settings, model)), serves=False) as runtime:
            yield Desk(runtime, asking, runtime.gateway.plan(asking.request(["hello"])))
    except LevelDown as error:
        raise ConfigurationError(f"the database cannot be reached: {error}") from error
    except EmbedgateError as error:
        raise ConfigurationError(str(error)) from error


def _paced(settings: Settings, model: str) -> Settings:
    """The deployments of this model as fast as `[embed]` allows."""
    wanted, deployments = settings.embed, dict(settings.deployments)
    for name in settings.models[model].deployments:
        changes: dict[str, Any] = {
            "attempts": wanted.attempts, "backoff_base_s": wanted.backoff_base_s,
            "backoff_cap_s": wanted.backoff_cap_s,
        }  # fmt: skip
        quota = wanted.tokens_per_minute or deployments[name].limits().tokens_per_minute
        if quota and (wanted.tokens_per_minute or wanted.safety_buffer):
            changes |= {"tokens_per_minute": max(1, int(quota * (1 - wanted.safety_buffer))), "headroom": 1.0}
        changes |= {"max_batch_items": wanted.batch} if wanted.batch else {}
        changes |= {"max_in_flight": wanted.pool} if wanted.pool else {}
        deployments[name] = deployments[name].model_copy(update=changes)
    bulk = settings.bulk.model_copy(update={"min_request_tokens": wanted.min_request_tokens})
    return settings.model_copy(update={"deployments": deployments, "bulk": bulk})


def _quiet(settings: Settings) -> Settings:
    """Its log is not for who looks at the terminal."""
    server = settings.server
    silent = server.model_copy(update={"log_file": server.log_file or os.devnull})
    return settings.model_copy(update={"server": silent})


# ── by a server ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Told(RemoteDeployment):
    """A server that has told of its model."""

    told: ModelCard

    @property
    def card(self) -> ModelCard:
        """As the server has it."""
        return self.told

    terms = card


class _Model(msgspec.Struct):
    embedgate: About | None = None


_models = msgspec.json.Decoder(_Model)


async def _through(settings: Settings, asking: Asking, server: str, api_key: str) -> tuple[Settings, Asking]:
    """A route of one deployment, which is the server, and what can be asked of it.

    An embedgate tells of its model, elsewhere one text shows it.
    """
    if not asking.model:
        raise ConfigurationError("name the model that the server shall embed with")
    base_url = f"{server.rstrip('/').removesuffix('/v1')}/v1"
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx.AsyncClient(headers=headers, timeout=_PROBE_S) as client:
            about = await _about(client, base_url, asking.model)
            width = await _tried(client, base_url, asking) if about is None else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ConfigurationError(f"{server} cannot be asked: {error or type(error).__name__}") from error
    if about is None and not asking.insists:
        asking = replace(asking, input_type=None)
    if about is None and asking.input_type is not None:
        why = "it is as the model there has it configured"
        raise ConfigurationError(f"input_type cannot be told to a server that is no embedgate: {why}")
    deployment = _deployment(about, base_url, api_key or "none", asking.model)
    served = {"deployments": ["server"], "dimensions": width, "canary_interval_s": 0}
    route = {"deployments": {"server": deployment}, "models": {asking.model: ModelSettings.model_validate(served)}}
    return settings.model_copy(update={**route, "tenants": {}}), asking


def _deployment(about: About | None, base_url: str, api_key: str, model: str) -> RemoteDeployment:
    """The server; where it has told of the model, this is the one in its own spaces, and else that of the name."""
    at = {"base_url": base_url, "api_key": api_key}
    if about is None:
        return RemoteDeployment.model_validate({"dialect": "openai", **at, "model": model})
    named = {"model": about.identity, "served_as": model, "told": about.card}
    return _Told.model_validate({"dialect": "embedgate", **at, **named})


async def _about(client: httpx.AsyncClient, base_url: str, model: str) -> About | None:
    """What an embedgate tells of the model; None: nobody does. Raises ValueError where it cannot for now."""
    answer = await client.get(f"{base_url}/models/{quote(model, safe='')}")
    if answer.status_code in _FOR_NOW:
        raise ValueError(_complaint(answer))
    try:
        return _models.decode(answer.content).embedgate if answer.is_success else None
    except msgspec.DecodeError:
        return None


async def _tried(client: httpx.AsyncClient, base_url: str, asking: Asking) -> int:
    """How wide the vector of one text is. Raises ValueError with what the server says instead."""
    body: dict[str, Any] = {"model": asking.model, "input": "hello"}
    body |= {"dimensions": asking.dimensions} if asking.dimensions else {}
    answer = await client.post(f"{base_url}/embeddings", json=body)
    if not (width := _width(answer.json())):
        raise ValueError(_complaint(answer))
    return width


def _complaint(answer: httpx.Response) -> str:
    """What an error body says, or at least its status."""
    try:
        said = str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        said = ""
    return said or f"HTTP {answer.status_code}"


def _width(found: Any) -> int:
    """Of the one vector in a body; 0 where there is none."""
    try:
        return len(found["data"][0]["embedding"])
    except (LookupError, TypeError):
        return 0
