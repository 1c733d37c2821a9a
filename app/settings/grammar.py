"""Hides the grammar of `embedgate.toml`: which names there are, what they may hold, what they are by default."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo
from pydantic.fields import FieldInfo

from app.domain import Attempts, BreakerPolicy, Limits, Priority, Tenant
from app.settings.catalog import CATALOG

OPENAI_HOST = "api.openai.com"
BUILT_IN_MODEL = "all-MiniLM-L6-v2"
"""What a `local` deployment serves that names no directory."""

_LIMITS, _ATTEMPTS, _BREAKER = Limits(), Attempts(), BreakerPolicy()

# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _secret(value: object, info: ValidationInfo) -> object:
    """What `env:NAME` and `file:/path` stand for; the errors name the place and never show a value."""
    if not isinstance(value, str):
        return value
    secret = _referred(value, (info.context or {}).get("environ", {}))
    if not secret or " " in secret or not (secret.isascii() and secret.isprintable()):
        raise ValueError("the key is empty or has characters that an HTTP header cannot carry")
    return secret


def _referred(reference: str, environ: Mapping[str, str]) -> str:
    scheme, colon, place = reference.partition(":")
    if colon and scheme == "env":
        if place not in environ:
            raise ValueError(f"the environment variable {place} is not set")
        return environ[place]
    if colon and scheme == "file":
        try:
            return Path(place).expanduser().read_text("utf-8").strip()
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"the file {place} cannot be read") from error
    return reference


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not (url.isascii() and url.isprintable()) or " " in url:
        raise ValueError("must be a URL such as https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("must hold no credentials, query or fragment; a key belongs into api_key")
    if parts.path.rstrip("/").endswith("/embeddings"):
        raise ValueError("must end before /embeddings, which is added to it")
    return url.rstrip("/")


def _is_openai(base_url: str) -> bool:
    return urlsplit(base_url).hostname == OPENAI_HOST


def _host(host: str) -> str:
    if not host or not (host.isascii() and host.isprintable()) or set(host) & set(" /[]@"):
        raise ValueError("must be an address or a host name, without scheme and port")
    return host


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("names something twice")
    return values


_Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_OneOrMore = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)

Secret: TypeAlias = Annotated[SecretStr, BeforeValidator(_secret)]
OptionalSecret: TypeAlias = Annotated[Secret | None, BeforeValidator(lambda value: None if value == "" else value)]
Names: TypeAlias = Annotated[tuple[str, ...], _Listed, Field(min_length=1), AfterValidator(_distinct)]
Secrets: TypeAlias = Annotated[tuple[Secret, ...], _Listed, _OneOrMore, Field(min_length=1)]
Spans: TypeAlias = Annotated[
    tuple[Annotated[float, Field(gt=0, le=3600)], ...], _Listed, Field(min_length=1, max_length=8)
]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=3600)]
PerMinute: TypeAlias = Annotated[int, Field(ge=0, le=10**12)]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]
"""Names travel in headers and labels."""

Tokenizer: TypeAlias = Literal["cl100k_base", "estimate"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


# ── sections ────────────────────────────────────────────────────────────────────────────────────────────────────────


class ServerSettings(_Section):
    """`[server]`; port 0 lets the system choose, log_file "" is the standard error stream."""

    host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
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


class _Deployment(_Section):
    requests_per_minute: PerMinute = _LIMITS.requests_per_minute
    tokens_per_minute: PerMinute = _LIMITS.tokens_per_minute
    judged_spans_s: Spans = _LIMITS.judged_spans_s
    max_in_flight: int = Field(default=_LIMITS.max_in_flight, ge=1, le=1024)
    max_batch_items: int = Field(default=_LIMITS.max_batch_items, ge=1, le=2048)
    max_batch_tokens: int = Field(default=_LIMITS.max_batch_tokens, ge=1, le=10_000_000)
    max_batch_bytes: int = Field(default=_LIMITS.max_batch_bytes, ge=1024, le=100_000_000)
    window_ms: float = Field(default=_LIMITS.window_s * 1000, ge=0, le=1000)
    timeout_s: Seconds = 30.0
    attempts: int = Field(default=_ATTEMPTS.most, ge=1, le=20)
    backoff_base_s: Seconds = _ATTEMPTS.backoff_base_s
    backoff_cap_s: Seconds = _ATTEMPTS.backoff_cap_s
    breaker_failures_in_a_row: int = Field(default=_BREAKER.failures_in_a_row, ge=1, le=1000)
    breaker_failure_ratio: float = Field(default=_BREAKER.failure_ratio, gt=0, le=1)
    breaker_ratio_min_calls: int = Field(default=_BREAKER.ratio_min_calls, ge=1, le=100_000)
    breaker_ratio_window_s: Seconds = _BREAKER.ratio_window_s
    breaker_open_s: Seconds = _BREAKER.open_s
    breaker_open_cap_s: Seconds = _BREAKER.open_cap_s
    breaker_probe_lease_s: Seconds = _BREAKER.probe_lease_s
    breaker_stall_least_s: Seconds = _BREAKER.stall_least_s

    def limits(self) -> Limits:
        """What the deployment takes."""
        return Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_in_flight=self.max_in_flight,
            max_batch_items=self.max_batch_items,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_bytes=self.max_batch_bytes,
            window_s=self.window_ms / 1000,
            judged_spans_s=self.judged_spans_s,
        )

    def retry(self) -> Attempts:
        """How often and how fast a text is tried again."""
        return Attempts(self.attempts, self.backoff_base_s, self.backoff_cap_s)

    def breaker(self) -> BreakerPolicy:
        """When the deployment is left alone."""
        return BreakerPolicy(**{f.name: getattr(self, f"breaker_{f.name}") for f in fields(BreakerPolicy)})


class OpenAIDeployment(_Deployment):
    """`[deployments.X]` of dialect `openai`: OpenAI itself, and what speaks like it."""

    dialect: Literal["openai"]
    base_url: Annotated[str, AfterValidator(_base_url)] = f"https://{OPENAI_HOST}/v1"
    api_key: OptionalSecret = None
    model: Name
    takes_token_ids: bool = Field(default_factory=lambda known: _is_openai(known["base_url"]))

    @property
    def is_openai(self) -> bool:
        """Whether OpenAI itself answers."""
        return _is_openai(self.base_url)


class LocalDeployment(_Deployment):
    """`[deployments.X]` of dialect `local`: a model's directory on this machine, or the built-in model."""

    dialect: Literal["local"]
    path: str = ""
    pooling: Literal["", "mean", "cls", "max", "last", "mean_sqrt_len"] = ""
    max_in_flight: int = Field(default=2, ge=1, le=1024)  # one runs, one is ready to
    max_batch_tokens: int = Field(default=8192, ge=1, le=10_000_000)  # a lone text waits for the call before it
    breaker_stall_least_s: Seconds = 30.0  # long texts after short ones are slow, not dead

    @property
    def model(self) -> str:
        """The model's name: that of its directory."""
        return Path(self.path).expanduser().resolve().name if self.path else BUILT_IN_MODEL


DeploymentSettings: TypeAlias = Annotated[OpenAIDeployment | LocalDeployment, Field(discriminator="dialect")]


class ModelSettings(_Section):
    """`[models.X]`: what is not set here is known from the catalog or the local model's files, see `ModelFacts`."""

    deployments: Names
    dimensions: int | None = Field(default=None, ge=1, le=65536)
    max_input_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    tokenizer: Tokenizer | None = None
    cuts_dimensions: bool | None = None
    token_ids: Literal["cl100k_base"] = "cl100k_base"  # noqa: S105
    long_input: Literal["error"] = "error"
    same_space: bool = False


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
    tokenizer: Tokenizer | None
    cuts_dimensions: bool
    unit_norm: bool
    created: int
    owned_by: str


class Settings(_Section):
    """All of the configuration, validated; `load` makes it."""

    server: ServerSettings = ServerSettings()
    queue: QueueSettings = QueueSettings()
    cache: CacheSettings = CacheSettings()
    deployments: Annotated[dict[Name, DeploymentSettings], Field(min_length=1)]
    models: Annotated[dict[Name, ModelSettings], Field(min_length=1)]
    tenants: dict[Name, TenantSettings] = {}

    def facts(self, name: str) -> ModelFacts:
        """What the configuration, then the catalog, knows of the model `name`."""
        model, first = self.models[name], self.deployments[self.models[name].deployments[0]]
        remote = isinstance(first, OpenAIDeployment)
        known = CATALOG.get(first.model) if remote else None
        return ModelFacts(
            upstream=first.model,
            dimensions=model.dimensions or (known.dimensions if known else None),
            max_input_tokens=model.max_input_tokens or (known.max_input_tokens if known else 8192 if remote else None),
            tokenizer=model.tokenizer or ("cl100k_base" if known else "estimate" if remote else None),
            cuts_dimensions=bool(known and known.cuts_dimensions)
            if model.cuts_dimensions is None
            else model.cuts_dimensions,
            unit_norm=known.unit_norm if known else False,
            created=known.created if known else 0,
            owned_by=known.owned_by if known else "embedgate",
        )


# ── every name ──────────────────────────────────────────────────────────────────────────────────────────────────────

FIELDS: Final[Mapping[str, Mapping[str, FieldInfo]]] = MappingProxyType(
    {
        "server": ServerSettings.model_fields,
        "queue": QueueSettings.model_fields,
        "cache": CacheSettings.model_fields,
        "deployments": OpenAIDeployment.model_fields | LocalDeployment.model_fields,
        "models": ModelSettings.model_fields,
        "tenants": TenantSettings.model_fields,
    }
)
"""The keys of each section, whatever the dialect."""

NAMED: Final = ("deployments", "models", "tenants")
"""Sections of tables whose names the operator chooses."""

# ── what later versions will take ───────────────────────────────────────────────────────────────────────────────────

LATER: Final[Mapping[str, Mapping[str, tuple[object, ...]]]] = MappingProxyType(
    {
        "server": {"workers": (1,), "secret": ("", "env:EMBEDGATE_SECRET"), "admin_port": (0,)},
        "stores": {
            "redis_url": ("",),
            "database_url": ("",),
            "data_dir": ("~/.local/share/embedgate",),
            "cache_redis_url": ("",),
            "max_replicas": (4,),
        },
        "cache": {
            "redis_ttl_s": (604800,),
            "sql_max_bytes": (0,),
            "sql_max_age_days": (0,),
            "float16": (False,),
            "compression": ("none",),
        },
        "deployments": {"tier": ("",), "headroom": (1.0,), "device": ("", "cpu"), "jitter": ("full",)},
        "models": {"on_outage": ("",), "order": ("listed",), "spill": ("wait",)},
        "tenants": {
            "budget_usd_per_month": (0,),
            "budget_usd_per_day": (0,),
            "requests_per_minute": (0,),
            "tokens_per_minute": (0,),
            "max_in_flight": (0,),
            "webhook_url": ("",),
            "cache_group": ("",),
        },
    }
)
"""Names of the grammar that this version takes only with a value that changes nothing."""

LATER_SECTIONS: Final = frozenset({"stores", "bulk", "tracing", "embed", "index"})
LATER_VALUES: Final = frozenset({"azure", "gemini", "voyage", "cohere", "mistral", "jina", "truncate", "mean"})
"""Dialects, and ways to treat long inputs."""
