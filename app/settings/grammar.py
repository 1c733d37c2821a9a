"""Hides the grammar of `embedgate.toml`: which names there are, what they may hold, what they are by default."""

import ipaddress
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic.fields import FieldInfo

from app.domain import Attempts, BreakerPolicy, InputType, Limits, Priority, Tenant, Truncation
from app.providers import DIALECTS, SERVERS
from app.providers.cards import ModelCard, Quota
from app.providers.dialect import Dialect
from app.settings.values import (
    ApiVersion,
    BaseUrl,
    Host,
    Jitter,
    Name,
    Names,
    OptionalName,
    OptionalSecret,
    PerMinute,
    Seconds,
    Secrets,
    Spans,
    Spill,
)

BUILT_IN_MODEL = "all-MiniLM-L6-v2"
"""What a `local` deployment serves that names no directory."""

VOCABULARIES: Final = ("cl100k_base", "estimate")
"""What a model may name as its `tokenizer` that is no file."""

_LIMITS, _ATTEMPTS, _BREAKER = Limits(), Attempts(), BreakerPolicy()

if TYPE_CHECKING:
    DialectName: TypeAlias = str
    ServerName: TypeAlias = str
else:
    DialectName = Literal[(*DIALECTS, "local")]
    ServerName = Literal[("", *SERVERS)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


# ── sections ────────────────────────────────────────────────────────────────────────────────────────────────────────


class ServerSettings(_Section):
    """`[server]`; port 0 lets the system choose, log_file "" is the standard error stream."""

    host: Host = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    deadline_s: Seconds = 30.0
    log_sample: float = Field(default=1.0, ge=0, le=1)
    log_file: str = ""
    admin_key: OptionalSecret = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class QueueSettings(_Section):
    """`[queue]`; `bulk_share` is what the bulk priority keeps under load."""

    max_items: int = Field(default=100_000, ge=1, le=10_000_000)
    max_tokens: int = Field(default=20_000_000, ge=1, le=10**10)
    bulk_share: float = Field(default=0.05, ge=0.05, le=0.5)


class CacheSettings(_Section):
    """`[cache]`; 0 bytes keep nothing."""

    memory_bytes: int = Field(default=2**28, ge=0, le=2**40)


class StoresSettings(_Section):
    """`[stores]`; `data_dir` keeps what must outlive the process."""

    data_dir: str = Field(default="~/.local/share/embedgate", min_length=1)


class _Deployment(_Section):
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    tier: OptionalName = ""
    headroom: float = Field(default=1.0, gt=0, le=1)
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

    def breaker(self) -> BreakerPolicy:
        """When the deployment is left alone."""
        return BreakerPolicy(**{f.name: getattr(self, f"breaker_{f.name}") for f in fields(BreakerPolicy)})


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
    def understands_token_ids(self) -> bool:
        """Whether token arrays go there as they are: a vendor's own host is known to read them, nobody else is."""
        if self.takes_token_ids is not None:
            return self.takes_token_ids
        return self.wire.takes_token_ids and (self.is_vendors or not self.wire.base_url)

    @property
    def quota(self) -> Quota:
        """What the account's tier allows; nothing when no tier is named."""
        return self.terms.tiers.get(self.tier, Quota()) if self.terms is not None else Quota()

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
    path: str = ""
    pooling: Literal["", "mean", "cls", "max", "last", "mean_sqrt_len"] = ""
    breaker_stall_least_s: Seconds = 30.0  # long texts after short ones are slow, not dead

    def limits(self) -> Limits:
        """What the deployment takes: one call runs, one is ready to; its device says how many texts go into a call."""
        return self._limits(usual=Limits(max_in_flight=2, max_batch_tokens=8192), quota=Quota())

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


class ModelSettings(_Section):
    """`[models.X]`: what is not set here is known from the catalog or the local model's files, see `ModelFacts`."""

    deployments: Names
    dimensions: int | None = Field(default=None, ge=1, le=65536)
    max_input_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    tokenizer: str | None = None
    cuts_dimensions: bool | None = None
    token_ids: Literal["cl100k_base"] = "cl100k_base"  # noqa: S105
    query_prompt: str | None = None
    document_prompt: str | None = None
    input_type: InputType | None = None
    long_input: Literal["error", "truncate", "mean"] = "error"
    overlap_tokens: int = Field(default=64, ge=0, le=100_000)
    same_space: bool = False
    order: Literal["listed", "spread"] = "listed"
    spill: Spill = "wait"
    on_outage: OptionalName = ""
    canary_interval_s: float = Field(default=3600.0, ge=0, le=31_536_000)
    canary_cosine: float = Field(default=0.999, gt=0, le=1)

    @property
    def truncation(self) -> Truncation:
        """What becomes of long texts."""
        ways: dict[str, Truncation] = {"error": "none", "truncate": "end", "mean": "mean"}
        return ways[self.long_input]

    @property
    def spill_s(self) -> float:
        """The longest wait for quota that is waited; longer ones go to the next deployment."""
        if isinstance(self.spill, str):
            return math.inf if self.spill == "wait" else 0.0
        return self.spill / 1000


class TenantSettings(_Section):
    """`[tenants.X]`: one team, its keys, its share."""

    api_key: Secrets
    weight: float = Field(default=1.0, gt=0, le=1000)
    priority: Literal["interactive", "default", "bulk"] = "default"
    models: Names = ("*",)

    def tenant(self, name: str) -> Tenant:
        """The noun, under its name."""
        return Tenant(name, self.weight, Priority[self.priority.upper()], frozenset(self.models))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before its deployments are asked; None: the local model's own files say it."""

    upstream: str
    dimensions: int | None
    max_input_tokens: int | None
    tokenizer: str | None
    cuts_dimensions: bool
    unit_norm: bool
    sizes: Sequence[int] = ()
    prompts: tuple[tuple[InputType, str], ...] = ()
    default_input_type: InputType | None = None
    created: int = 0
    owned_by: str = "embedgate"

    @property
    def counts_exactly(self) -> bool:
        """Whether a text's tokens are counted in the model's own vocabulary; a local model always brings it."""
        return self.tokenizer != "estimate"


_OWN_WORDS: Final[tuple[tuple[InputType, str], ...]] = (("query", ""), ("document", ""))


def _sizes(card: ModelCard, most: int | None) -> Sequence[int]:
    """The widths that callers may ask for: the vendor's, but none above what the operator says."""
    if most is None:
        return card.sizes
    if isinstance(card.sizes, range):
        return range(card.sizes.start, min(card.sizes.stop, most + 1))
    return tuple(size for size in card.sizes if size <= most)


class Settings(_Section):
    """All of the configuration, validated; `load` makes it."""

    server: ServerSettings = ServerSettings()
    queue: QueueSettings = QueueSettings()
    cache: CacheSettings = CacheSettings()
    stores: StoresSettings = StoresSettings()
    deployments: Annotated[dict[Name, DeploymentSettings], Field(min_length=1)]
    models: Annotated[dict[Name, ModelSettings], Field(min_length=1)]
    tenants: dict[Name, TenantSettings] = {}

    def facts(self, name: str) -> ModelFacts:
        """What the configuration, then the catalog, knows of the model `name`."""
        model, first = self.models[name], self.deployments[self.models[name].deployments[0]]
        remote = isinstance(first, RemoteDeployment)
        card = first.card if isinstance(first, RemoteDeployment) else None
        stated: tuple[tuple[InputType, str | None], ...]
        stated = (("query", model.query_prompt), ("document", model.document_prompt))
        own = (
            card.prompts if card else _OWN_WORDS if isinstance(first, RemoteDeployment) and first.wire.own_words else ()
        )
        prompts = dict(own) | {kind: text for kind, text in stated if text is not None}
        return ModelFacts(
            upstream=first.model,
            dimensions=model.dimensions or (card.dimensions if card else None),
            max_input_tokens=model.max_input_tokens or (card.max_input_tokens if card else 8192 if remote else None),
            tokenizer=model.tokenizer or (card.tokenizer if card else "estimate" if remote else None),
            cuts_dimensions=bool(card and card.matryoshka) if model.cuts_dimensions is None else model.cuts_dimensions,
            unit_norm=card is not None,
            sizes=_sizes(card, model.dimensions) if card else (),
            prompts=tuple(prompts.items()),
            default_input_type=model.input_type or (card.default_input_type if card else None),
            created=card.created if card else 0,
            owned_by=(card.owned_by if card else "") or "embedgate",
        )


# ── every name ──────────────────────────────────────────────────────────────────────────────────────────────────────

FIELDS: Final[Mapping[str, Mapping[str, FieldInfo]]] = MappingProxyType(
    {
        "server": ServerSettings.model_fields,
        "queue": QueueSettings.model_fields,
        "cache": CacheSettings.model_fields,
        "stores": StoresSettings.model_fields,
        "deployments": RemoteDeployment.model_fields | LocalDeployment.model_fields,
        "models": ModelSettings.model_fields,
        "tenants": TenantSettings.model_fields,
    }
)
"""The keys of each section, whatever the dialect."""

NAMED: Final = ("deployments", "models", "tenants")
"""Sections of tables whose names the operator chooses."""
