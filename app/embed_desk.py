"""Hides how texts are embedded without a server: which model, how fast, or by a running embedgate instead."""

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from app.domain import ANONYMOUS, EmbeddingRequest, InputType, Priority
from app.engine.gate import Gate
from app.engine.intake import Plan
from app.errors import (
    BadCredential,
    ConfigurationError,
    EmbedgateError,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    Throttled,
    TryAgainLater,
)
from app.jobs.patience import Cooldown
from app.providers.cards import ModelCard
from app.providers.dialect import Target
from app.providers.embedgate import About
from app.providers.openai import OpenAI
from app.providers.refusals import Answer, retry_after_s
from app.runtime import Runtime
from app.settings import ModelSettings, RemoteDeployment, Settings, server_url
from app.storage.level import LevelDown
from app.tokens import TooManyTokens, count_many

_T = TypeVar("_T")

_PROBE_S = 60.0
_FOR_NOW: Final = frozenset({502, 503, 504})
_SERVER: Final = "server"
_CACHE_BYTES: Final = 8 * 2**20
_TO_MEND: Final = {"credential": "does not accept the key", "quota": "has no credit left"}
_WRONG: Final[Mapping[type[ProviderError], str]] = {
    BadCredential: _TO_MEND["credential"], QuotaExhausted: _TO_MEND["quota"],
    Misconfigured: "does not know the model or the path",
}  # fmt: skip


class Away(TryAgainLater):
    """A server cannot be asked for now; where it `throttles` its limit is reached. `retry_after_s` 0: it named none."""

    def __init__(self, message: str, retry_after_s: float = 0.0, *, throttles: bool = False) -> None:
        super().__init__(message, retry_after_s)
        self.throttles = throttles


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

    def asked(self, asking: Asking) -> "Desk":
        """The same for another wish. Raises ConfigurationError for what cannot be had."""
        return _desk(self.runtime, replace(asking, server=self.asking.server))

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

    async def too_long(self, texts: Sequence[str]) -> list[int]:
        """The places of those that are longer than the model takes; none where that is not known."""
        counter, space = self.runtime.menu.models[self.asking.model].counter, self.plan.space
        if space.truncation != "none":
            return []
        counts = [
            await count_many(counter, [space.prompt + text], most_each=space.max_input_tokens, most_total=sys.maxsize)
            for text in texts
        ]
        return [place for place, count in enumerate(counts) if isinstance(count, TooManyTokens)]

    def limited_s(self) -> float | None:
        """How long until the first is to be asked again of those who said that a limit is reached; None: nobody did."""
        cooling = [gate.rests_until for gate in self._gates() if gate.cooling]
        return max(1.0, min(cooling) - time.monotonic()) if cooling else None

    def unanswered(self) -> str:
        """Who of those that are asked has failed or kept silent since it last answered, for people; "" where nobody."""
        return ", ".join(self._called(gate) for gate in self._gates() if gate.breaker.is_unanswered)

    def complaint(self) -> str:
        """Why no provider is asked before somebody mends that; "" while one may be."""
        if full := self.runtime.stores.ledger.disk_full:
            return f"{self.runtime.settings.stores.data_dir}: {full}"
        gates = self._gates()
        found = [(gate, said) for gate in gates if (said := _TO_MEND.get(gate.breaker.state))]
        trouble = self.runtime.wholesale.trouble(self.asking.model)
        if trouble is not None and (words := _WRONG.get(type(trouble[1]))):
            return f"deployments.{trouble[0]} {words}"
        return "; ".join(f"{self._called(gate)} {said}" for gate, said in found) if len(found) == len(gates) else ""

    def _gates(self) -> Sequence[Gate]:
        return [self.runtime.gates[each.name] for each in self.plan.route.deployments]

    def _called(self, gate: Gate) -> str:
        return self.asking.server or f"deployments.{gate.name}"


def passing(settings: Settings) -> Settings:
    """The same with little memory to remember: of a dataset nearly everything passes by once."""
    memory_bytes = min(settings.cache.memory_bytes, _CACHE_BYTES)
    return settings.model_copy(update={"cache": settings.cache.model_copy(update={"memory_bytes": memory_bytes})})


@asynccontextmanager
async def desk(
    settings: Settings, asking: Asking, *, server: str = "", api_key: str = "",
    waiting: Callable[[str], None] | None = None,
) -> AsyncIterator[Desk]:  # fmt: skip
    """Everything that embeds, at the pace of `[embed]`; with a `server` it is asked, and nobody else.

    While the server is away it is waited for, as long as `[embed]` says, if somebody hears what is `waiting`. Raises
    Away after that, and ConfigurationError for what cannot be had, in a line.
    """
    if server:
        server = server_url(server)
        found = partial(offered, settings, asking.model, server, api_key)
        settings = await (found() if waiting is None else patiently(found, settings.embed.give_up_after_s, waiting))
    asking = replace(asking, server=server)
    _understood(settings, asking)
    try:
        async with Runtime(_quiet(_paced(settings)), serves=False) as runtime:
            yield _desk(runtime, asking)
    except LevelDown as error:
        raise ConfigurationError(f"the database cannot be reached: {error}") from error
    except EmbedgateError as error:
        raise ConfigurationError(str(error)) from error


async def patiently(
    ask: Callable[[], Awaitable[_T]], patience_s: float, waiting: Callable[[str], None] = lambda why: None
) -> _T:
    """What it brings once whoever is asked is there again. Raises Away after so long; `waiting` hears why it waits."""
    until_s, cooldown = time.monotonic() + patience_s, Cooldown(random.Random())  # noqa: S311 — jitter
    while True:
        try:
            return await ask()
        except Away as away:
            now = time.monotonic()
            if now >= until_s:
                raise
            cooldown.refused(now, away.retry_after_s)
            waiting(str(away))
            await asyncio.sleep(min(cooldown.left_s(now), until_s - now))


def _desk(runtime: Runtime, asking: Asking) -> Desk:
    """For this wish; ConfigurationError for what cannot be had."""
    asking = _understood(runtime.settings, asking)
    try:
        return Desk(runtime, asking, runtime.gateway.plan(asking.request(["hello"])))
    except EmbedgateError as error:
        raise ConfigurationError(str(error)) from error


def known(settings: Settings, model: str) -> str:
    """The name of a model that there is, "" means the first. Raises ConfigurationError."""
    if model and model not in settings.models:
        raise ConfigurationError(f"the model {model} is not configured; there is {', '.join(settings.models)}")
    return model or next(iter(settings.models))


def _understood(settings: Settings, asking: Asking) -> Asking:
    """With the name of a model that there is, and no input type where nobody can be told one, or ConfigurationError."""
    model = known(settings, asking.model)
    if asking.input_type and asking.server and settings.deployments[_SERVER].dialect != "embedgate":
        if asking.insists:
            why = "it is as the model there has it configured"
            raise ConfigurationError(f"input_type cannot be told to a server that is no embedgate: {why}")
        asking = replace(asking, input_type=None)
    return replace(asking, model=model)


def _paced(settings: Settings) -> Settings:
    """All deployments as fast as `[embed]` allows."""
    wanted, deployments = settings.embed, dict(settings.deployments)
    for name in deployments:
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


async def offered(settings: Settings, model: str, server: str, api_key: str, *, buys: bool = True) -> Settings:
    """The configuration with one model and one deployment, which is the server.

    An embedgate tells of its model, elsewhere one text shows it, if it may be bought. Raises ConfigurationError for
    what cannot be had, and Away while that is not known.
    """
    if not model:
        raise ConfigurationError("name the model that the server shall embed with")
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigurationError("the API key has characters that HTTP cannot carry")
    server = server_url(server)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx.AsyncClient(base_url=f"{server}/v1/", headers=headers, timeout=_PROBE_S) as client:
            answer = _heard(await client.get(f"models/{quote(model, safe='')}"))
            about = _about(answer)
            if about is None and not buys:
                raise ValueError(f"it does not tell what that costs ({_complaint(answer)})")
            width = await _tried(client, model) if about is None else None
    except httpx.TransportError as error:
        raise Away(f"{server} cannot be asked: {str(error) or type(error).__name__}") from error
    except Away as away:
        raise Away(f"{server} cannot be asked: {away}", away.retry_after_s, throttles=away.throttles) from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ConfigurationError(f"{server} cannot be asked: {str(error) or type(error).__name__}") from error
    deployment = _deployment(about, f"{server}/v1", api_key or "none", model)
    served = {"deployments": [_SERVER], "dimensions": width, "canary_interval_s": 0}
    route = {"deployments": {_SERVER: deployment}, "models": {model: ModelSettings.model_validate(served)}}
    return settings.model_copy(update={**route, "tenants": {}})


def _deployment(about: About | None, base_url: str, api_key: str, model: str) -> RemoteDeployment:
    """The server; where it has told of the model, this is the one in its own spaces, and else that of the name."""
    at = {"base_url": base_url, "api_key": api_key}
    if about is None:
        return RemoteDeployment.model_validate({"dialect": "openai", **at, "model": model})
    named = {"model": about.identity, "served_as": model, "told": about.card}
    return _Told.model_validate({"dialect": "embedgate", **at, **named})


def _about(answer: httpx.Response) -> About | None:
    """What an embedgate tells of a model; None: it is none, or does not."""
    try:
        return _models.decode(answer.content).embedgate if answer.is_success else None
    except msgspec.DecodeError:
        return None


async def _tried(client: httpx.AsyncClient, model: str) -> int:
    """How wide the vector of one text is. Raises Away, and ValueError with what the server says instead."""
    answer = _heard(await client.post("embeddings", json={"model": model, "input": "hello"}))
    if not (width := _width(answer.json())):
        raise ValueError(_complaint(answer))
    return width


def _heard(answer: httpx.Response) -> httpx.Response:
    """The same, unless it says that it is none for now: then it raises Away."""
    told = Answer(answer.status_code, answer.headers, bytearray(answer.content))
    refusal = None if answer.is_success else OpenAI(Target("")).refusal(told)
    if isinstance(refusal, Throttled):
        raise Away(_complaint(answer), refusal.retry_after_s or 0.0, throttles=True)
    if answer.status_code in _FOR_NOW:
        raise Away(_complaint(answer), retry_after_s(answer.headers) or 0.0)
    return answer


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
