"""Hides the grammar of `embedgate.toml`: which names there are, what they may hold, what they are by default."""

import ipaddress
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

from app import money
from app.domain import Allowance, BreakerPolicy, InputType, Limits, Priority, Tenant, Tier, Truncation
from app.providers.cards import ModelCard
from app.settings.deployments import DeploymentSettings, LocalDeployment, RemoteDeployment
from app.settings.values import (
    BudgetUsd,
    DatabaseUrl,
    FilePath,
    Host,
    Name,
    Names,
    OptionalName,
    OptionalSecret,
    PerMinute,
    RedisUrl,
    Seconds,
    Secrets,
    SecretsIfAny,
    Section,
    Spill,
    WebhookUrl,
)

VOCABULARIES: Final = ("cl100k_base", "estimate")
"""What a model may name as its `tokenizer` that is no file."""

# ── sections ────────────────────────────────────────────────────────────────────────────────────────────────────────


class ServerSettings(Section):
    """`[server]`; port 0 lets the system choose, log_file "" is the standard error stream.

    `admin_port` is the only one with operators' routes; 0: they are on `port`. `secret` is what every key of ours is
    made from, then those that were it before.
    """

    host: Host = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    admin_port: int = Field(default=0, ge=0, le=65535)
    deadline_s: Seconds = 30.0
    log_sample: float = Field(default=1.0, ge=0, le=1)
    log_file: FilePath = ""
    secret: SecretsIfAny = ()
    admin_key: OptionalSecret = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class QueueSettings(Section):
    """`[queue]`; `bulk_share` is what the bulk priority keeps under load."""

    max_items: int = Field(default=100_000, ge=1, le=10_000_000)
    max_tokens: int = Field(default=20_000_000, ge=1, le=10**10)
    bulk_share: float = Field(default=0.05, ge=0.05, le=0.5)


class CacheSettings(Section):
    """`[cache]`; memory of 0 bytes keeps nothing, a bound of 0 on the database is none."""

    memory_bytes: int = Field(default=2**28, ge=0, le=2**40)
    redis_ttl_s: int = Field(default=604_800, ge=1, le=31_536_000)
    sql_max_bytes: int = Field(default=0, ge=0, le=2**50)
    sql_max_age_days: int = Field(default=0, ge=0, le=36_500)
    float16: bool = False
    compression: Literal["none", "zstd"] = "none"


class StoresSettings(Section):
    """`[stores]`; `data_dir` keeps what must outlive the process, unless a database does.

    `max_replicas` is into how many parts quotas fall while Redis is gone.
    """

    redis_url: RedisUrl = None
    database_url: DatabaseUrl = None
    cache_redis_url: RedisUrl = None
    max_replicas: int = Field(default=4, ge=1, le=10_000)
    data_dir: FilePath = Field(default="~/.local/share/embedgate", min_length=1)


class LedgerSettings(Section):
    """`[ledger]`: how much may wait on disk for the database, and for how many days rows are kept; 0 is for ever."""

    journal_max_bytes: int = Field(default=2**30, ge=2**24, le=2**50)
    keep_days: int = Field(default=400, ge=0, le=36_500)


class BulkSettings(Section):
    """`[bulk]`: files and batches. Bounds of 0 bytes or batches are none.

    `blobs` is where files are kept: a folder, "" for one in `data_dir`, or `s3://bucket/prefix`. `tasks` are worked on
    at one moment by a process, 0: none, another one does it; each with up to `lines_at_once` lines and
    `texts_at_once` texts. A line is tried `attempts` times. Calls for bulk work carry `min_request_tokens` where so
    many wait.
    """

    blobs: FilePath = ""
    max_file_bytes: int = Field(default=200_000_000, ge=1024, le=2**40)
    max_lines: int = Field(default=50_000, ge=1, le=100_000_000)
    max_inputs: int = Field(default=50_000, ge=1, le=10**9)
    max_open_batches: int = Field(default=20, ge=0, le=1_000_000)
    max_stored_bytes: int = Field(default=10_000_000_000, ge=0, le=2**50)
    keep_days: int = Field(default=30, ge=1, le=36_500)
    tasks: int = Field(default=4, ge=0, le=64)
    shard_lines: int = Field(default=2000, ge=1, le=1_000_000)
    lines_at_once: int = Field(default=256, ge=1, le=100_000)
    texts_at_once: int = Field(default=4096, ge=1, le=1_000_000)
    attempts: int = Field(default=5, ge=1, le=100)
    min_request_tokens: int = Field(default=1000, ge=1, le=1_000_000)


class EmbedSettings(Section):
    """`[embed]`: how `embedgate embed` asks, unless its options say otherwise; 0: as the deployments have it.

    Calls have at most `batch` texts, `pool` of them at once. Of `tokens_per_minute` the part `safety_buffer` is left
    free.
    """

    batch: int = Field(default=0, ge=0, le=2048)
    pool: int = Field(default=0, ge=0, le=1024)
    attempts: int = Field(default=3, ge=1, le=10)
    backoff_base_s: Seconds = 4.0
    backoff_cap_s: Seconds = 16.0
    tokens_per_minute: PerMinute = 0
    safety_buffer: float = Field(default=0.0, ge=0, le=0.9)
    min_request_tokens: int = Field(default=1000, ge=1, le=1_000_000)
    give_up_after_s: Seconds = 3600.0
    tier: Tier = "online"


class IndexSettings(Section):
    """`[index]`: how `embedgate index` cuts and skips files, unless its options say otherwise.

    Chunks have at most `chunk_tokens`, and begin with at most `overlap_tokens` of the one before, never more than the
    model takes and an eighth of that. Of all files the part `max_failed` may fail.
    """

    chunk_tokens: int = Field(default=2048, ge=32, le=100_000)
    overlap_tokens: int = Field(default=200, ge=0, le=10_000)
    max_file_bytes: int = Field(default=2**20, ge=1024, le=2**30)
    max_failed: float = Field(default=0.05, ge=0, le=1)


class ModelSettings(Section):
    """`[models.X]`: what is not set here is known from the catalog or the local model's files, see `ModelFacts`."""

    deployments: Names
    dimensions: int | None = Field(default=None, ge=1, le=65536)
    max_input_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    tokenizer: FilePath | None = None
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


class TenantSettings(Section):
    """`[tenants.X]`: one team, its keys, its share."""

    api_key: Secrets
    weight: float = Field(default=1.0, gt=0, le=1000)
    priority: Literal["interactive", "default", "bulk"] = "default"
    models: Names = ("*",)
    requests_per_minute: PerMinute = 0
    tokens_per_minute: PerMinute = 0
    max_in_flight: int = Field(default=0, ge=0, le=100_000)
    budget_usd_per_day: BudgetUsd = 0.0
    budget_usd_per_month: BudgetUsd = 0.0
    webhook_url: WebhookUrl = ""
    cache_group: OptionalName = ""
    bulk_tier: Tier = "online"

    def tenant(self, name: str) -> Tenant:
        """The noun, under its name."""
        return Tenant(
            name, self.weight, Priority[self.priority.upper()], frozenset(self.models), self.cache_group, self.limits,
            self.allowance, self.webhook_url, self.bulk_tier,
        )  # fmt: skip

    @property
    def allowance(self) -> Allowance:
        """What its requests may spend together."""
        per_day, per_month = (
            money.nano_usd_of(Decimal(repr(dollars))) or None
            for dollars in (self.budget_usd_per_day, self.budget_usd_per_month)
        )
        return Allowance(per_day, per_month)

    @property
    def limits(self) -> Limits | None:
        """What its requests may use together, if that is limited."""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.max_in_flight)
        return Limits(*limits) if any(limits) else None


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


class Settings(Section):
    """All of the configuration, validated; `load` makes it."""

    server: ServerSettings = ServerSettings()
    queue: QueueSettings = QueueSettings()
    cache: CacheSettings = CacheSettings()
    stores: StoresSettings = StoresSettings()
    ledger: LedgerSettings = LedgerSettings()
    bulk: BulkSettings = BulkSettings()
    embed: EmbedSettings = EmbedSettings()
    index: IndexSettings = IndexSettings()
    deployments: Annotated[dict[Name, DeploymentSettings], Field(min_length=1)]
    models: Annotated[dict[Name, ModelSettings], Field(min_length=1)]
    tenants: dict[Name, TenantSettings] = {}  # noqa: RUF012 — pydantic copies it

    def breaker(self, name: str) -> BreakerPolicy:
        """When the deployment `name` is given a rest; it is alone where no model has another one beside it."""
        served = (model.deployments for model in self.models.values() if name in model.deployments)
        return self.deployments[name].breaker(alone=all(listed == (name,) for listed in served))

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
            unit_norm=card is not None and card.normalised is not None,
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
        "ledger": LedgerSettings.model_fields,
        "bulk": BulkSettings.model_fields,
        "embed": EmbedSettings.model_fields,
        "index": IndexSettings.model_fields,
        "deployments": RemoteDeployment.model_fields | LocalDeployment.model_fields,
        "models": ModelSettings.model_fields,
        "tenants": TenantSettings.model_fields,
    }
)
"""The keys of each section, whatever the dialect."""

NAMED: Final = ("deployments", "models", "tenants")
"""Sections of tables whose names the operator chooses."""
