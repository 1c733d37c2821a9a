"""Hides what `[deployments.X]` may say, and what holds where it says nothing: the vendor's file knows."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, Tag

from app.domain import Attempts, BreakerPolicy, Limits
from app.providers import BATCHES, DIALECTS, SERVERS
from app.providers.cards import KNOWN_ON, ModelCard, Quota
from app.providers.dialect import Dialect
from app.settings.values import (
    ApiVersion,
    BaseUrl,
    FilePath,
    Jitter,
    Name,
    OptionalName,
    OptionalSecret,
    PerMinute,
    Seconds,
    Section,
    Spans,
)

BUILT_IN_MODEL = "all-MiniLM-L6-v2"
"""What a `local` deployment serves that names no directory."""

_ALONE: Mapping[str, Any] = {"failures_in_a_row": 20, "failure_ratio": 1.0, "ratio_min_calls": 20}
"""How patient the breaker of a deployment is that nobody stands in for: half of the answers are better than none."""

_PICO_USD = 1_000_000  # per token, for each USD per million tokens

_LIMITS, _ATTEMPTS, _BREAKER = Limits(), Attempts(), BreakerPolicy()


def _countable(usd: float) -> float:
    """Whole pico-USD per token only, so that what is booked is what was stated."""
    if round(usd * _PICO_USD) / _PICO_USD != usd:
        raise ValueError("must have at most 6 decimals")
    return usd


Usd: TypeAlias = Annotated[float, Field(ge=0, le=1_000_000), AfterValidator(_countable)]
"""A price per million tokens: up to a million with 6 decimals, so that a float still tells each from the next."""

if TYPE_CHECKING:
    DialectName: TypeAlias = str
    ServerName: TypeAlias = str
else:
    DialectName = Literal[(*DIALECTS, "local")]
    ServerName = Literal[("", *SERVERS)]


class _Deployment(Section):
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    tier: OptionalName = ""
    headroom: float = Field(default=1.0, gt=0, le=1)
    usd_per_million_tokens: Usd | None = None
    batch_usd_per_million_tokens: Usd | None = None
    judged_spans_s: Spans | None = None
    max_in_flight: int | None = Field(default=None, ge=1, le=1024)
    max_batch_items: int | None = Field(default=None, ge=1, le=2048)
    max_batch_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    max_batch_bytes: int = Field(default=_LIMITS.max_batch_bytes, ge=1024, le=100_000_000)
    min_batch_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    target_latency_ms: float = Field(default=0.0, ge=0, le=600_000)
    window_ms: float = Field(default=_LIMITS.window_s * 1000, ge=0, le=1000)
    timeout_s: Seconds = 30.0
    attempts: int = Field(default=_ATTEMPTS.most, ge=1, le=10)
    backoff_base_s: Seconds = _ATTEMPTS.backoff_base_s
    backoff_cap_s: Seconds = _ATTEMPTS.backoff_cap_s
    jitter: Jitter = "full"
    cooldown_s: float = Field(default=_ATTEMPTS.cooldown_s, gt=0, le=300)
    cooldown_cap_s: float = Field(default=_ATTEMPTS.cooldown_cap_s, gt=0, le=300)
    breaker_failures_in_a_row: int = Field(default=_BREAKER.failures_in_a_row, ge=1, le=1_000_000)
    breaker_failure_ratio: float = Field(default=_BREAKER.failure_ratio, gt=0, le=1)
    breaker_ratio_min_calls: int = Field(default=_BREAKER.ratio_min_calls, ge=1, le=100_000)
    breaker_ratio_window_s: Seconds = _BREAKER.ratio_window_s
    breaker_open_s: Seconds = _BREAKER.open_s
    breaker_open_cap_s: Seconds = _BREAKER.open_cap_s
    breaker_probe_lease_s: Seconds = _BREAKER.probe_lease_s
    breaker_stall_least_s: Seconds = _BREAKER.stall_least_s

    def _limits(self, *, usual: Limits, quota: Quota) -> Limits:
        """What the deployment takes: what the file says, else the account's tier, else what is `usual` there."""
        requests = quota.requests_per_minute if self.requests_per_minute is None else self.requests_per_minute
        tokens = quota.tokens_per_minute if self.tokens_per_minute is None else self.tokens_per_minute
        most_tokens = self.max_batch_tokens or usual.max_batch_tokens
        return replace(
            usual,
            requests_per_minute=_lowered(requests, self.headroom),
            tokens_per_minute=_lowered(tokens, self.headroom),
            max_in_flight=self.max_in_flight or min(usual.max_in_flight, quota.max_in_flight or usual.max_in_flight),
            max_batch_items=self.max_batch_items or usual.max_batch_items,
            max_batch_tokens=most_tokens,
            max_batch_bytes=self.max_batch_bytes,
            window_s=self.window_ms / 1000,
            judged_spans_s=self.judged_spans_s or usual.judged_spans_s,
            min_batch_tokens=self.min_batch_tokens or min(usual.min_batch_tokens, most_tokens),
            target_latency_s=self.target_latency_ms / 1000,
        )

    _known_from: ClassVar[str] = f"catalog of {KNOWN_ON}"

    @property
    def _card_prices(self) -> tuple[int | None, int | None]:
        """Known without being stated: the standard price and that in the vendor's batches."""
        raise NotImplementedError

    @property
    def price(self) -> int | None:
        """What a token costs in pico-USD: what the file says, else what is known; None: nothing is."""
        return _price(self.usd_per_million_tokens, self._card_prices[0])

    @property
    def batch_price(self) -> int | None:
        """The same in the vendor's own batches."""
        return _price(self.batch_usd_per_million_tokens, self._card_prices[1])

    @property
    def price_source(self) -> str:
        """Who says what a token costs: `configured`, `catalog of` its day, `local`; `unknown` where nobody does."""
        if self.usd_per_million_tokens is not None:
            return "configured"
        return "unknown" if self.price is None else self._known_from

    def retry(self) -> Attempts:
        """How often and how fast a text is tried again."""
        return Attempts(
            self.attempts,
            self.backoff_base_s,
            self.backoff_cap_s,
            None if self.jitter == "full" else self.jitter,
            self.cooldown_s,
            self.cooldown_cap_s,
        )

    def breaker(self, *, alone: bool) -> BreakerPolicy:
        """When the deployment is given a rest: later when it stands `alone`, unless the file says when."""
        policy = BreakerPolicy(**{f.name: getattr(self, f"breaker_{f.name}") for f in fields(BreakerPolicy)})
        patience = {key: value for key, value in _ALONE.items() if f"breaker_{key}" not in self.model_fields_set}
        return replace(policy, **patience) if alone else policy


def _price(stated_usd: float | None, known: int | None) -> int | None:
    return known if stated_usd is None else round(stated_usd * _PICO_USD)


def _lowered(per_minute: int, headroom: float) -> int:
    """A limit with headroom; a small one never becomes 0, which is unlimited."""
    return max(1, int(per_minute * headroom)) if per_minute else 0


def _wire(dialect: str, server: str) -> type[Dialect]:
    return SERVERS[server] if server else DIALECTS[dialect]


def _usual_base_url(known: Mapping[str, str]) -> str:
    """Where a deployment calls that does not say it: at the vendor's, if that is one place."""
    return _wire(known["dialect"], known["server"]).base_url if {"dialect", "server"} <= known.keys() else ""


class RemoteDeployment(_Deployment):
    """`[deployments.X]` of every dialect but `local`: what is not set here, the vendor's file knows."""

    dialect: DialectName
    server: ServerName = ""
    base_url: BaseUrl = Field(default_factory=_usual_base_url)
    api_key: OptionalSecret = None
    model: Name
    served_as: OptionalName = ""
    api_version: ApiVersion = ""
    auth: Literal["", "api-key", "bearer"] = ""
    takes_token_ids: bool | None = None
    proxy_from_environment: bool = False
    connect_timeout_s: Seconds = 5.0
    read_timeout_s: Seconds | None = None

    @property
    def wire(self) -> type[Dialect]:
        """What is spoken there."""
        return _wire(self.dialect, self.server)

    @property
    def card(self) -> ModelCard | None:
        """What the vendor publishes about the model; None: nothing that is known."""
        return self.wire.models.get(self.model)

    @property
    def terms(self) -> ModelCard | None:
        """What is published about the model as it is bought there: price, tiers, shutdown."""
        return self.wire.terms(self.model)

    @property
    def is_vendors(self) -> bool:
        """Whether the vendor itself answers, so that what it publishes holds."""
        return self.wire.base_url != "" and urlsplit(self.base_url).hostname == urlsplit(self.wire.base_url).hostname

    @property
    def has_batches(self) -> bool:
        """Whether the vendor's own batches can be ordered there: at the vendor, or where their price is stated."""
        return self.wire in BATCHES and (self.is_vendors or self.batch_usd_per_million_tokens is not None)

    @property
    def understands_token_ids(self) -> bool:
        """Whether token arrays go there as they are: a vendor's own host is known to read them, nobody else is."""
        if self.takes_token_ids is not None:
            return self.takes_token_ids
        return self.wire.takes_token_ids and (self.is_vendors or not self.wire.base_url)

    @property
    def quota(self) -> Quota:
        """What the account's tier allows; nothing when no tier is named."""
        return self.terms.tiers.get(self.tier, Quota()) if self.terms is not None else Quota()

    @property
    def _card_prices(self) -> tuple[int | None, int | None]:
        return (None, None) if self.terms is None else (self.terms.price, self.terms.batch_price)

    def limits(self) -> Limits:
        """What the deployment takes."""
        wire, card = self.wire, self.card
        usual = Limits(
            max_batch_items=(card and card.max_batch_items) or wire.max_batch_items,
            max_batch_tokens=(card and card.max_batch_tokens) or wire.max_batch_tokens,
            judged_spans_s=wire.judged_spans_s,
            counts_texts=wire.counts_texts,
        )
        return self._limits(usual=usual, quota=self.quota)


class LocalDeployment(_Deployment):
    """`[deployments.X]` of dialect `local`: a model's directory on this machine, or the built-in model."""

    dialect: Literal["local"]
    device: Literal["auto", "cpu", "cuda", "coreml"] = "auto"
    path: FilePath = ""
    pooling: Literal["", "mean", "cls", "max", "last", "mean_sqrt_len"] = ""
    breaker_stall_least_s: Seconds = 30.0  # long texts after short ones are slow, not dead

    def limits(self) -> Limits:
        """What the deployment takes: one call runs, one is ready to; its device says how many texts go into a call."""
        return self._limits(usual=Limits(max_in_flight=2, max_batch_tokens=8192), quota=Quota())

    _known_from: ClassVar[str] = "local"

    @property
    def _card_prices(self) -> tuple[int | None, int | None]:
        return 0, 0  # but for electricity

    @property
    def model(self) -> str:
        """The model's name: that of its directory."""
        return Path(self.path).expanduser().resolve().name if self.path else BUILT_IN_MODEL


def _kind(given: object) -> str:
    dialect = given.get("dialect") if isinstance(given, dict) else getattr(given, "dialect", None)
    return "local" if dialect == "local" else "remote"


DeploymentSettings: TypeAlias = Annotated[
    Annotated[RemoteDeployment, Tag("remote")] | Annotated[LocalDeployment, Tag("local")], Discriminator(_kind)
]
