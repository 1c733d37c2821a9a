"""The nouns of embedgate: frozen values that every floor above speaks in; no I/O.

What is made for every request is a msgspec Struct, a fifth of a frozen dataclass' price; the rest are dataclasses.
"""

import hashlib
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Literal, TypeAlias

import msgspec

Text: TypeAlias = str | tuple[int, ...]
"""One text to embed: a string, or token ids in the vocabulary that its model's route names."""

InputType: TypeAlias = Literal["query", "document"]
Truncation: TypeAlias = Literal["none", "end", "mean"]
"""What becomes of a text that is too long: refused, cut at its end, or the mean of its windows."""

Tier: TypeAlias = Literal["online", "vendor_batch"]
"""How bulk work is done: through the queue like everything else, or by the vendor's own batches at their price."""


class Priority(IntEnum):
    """Who goes first; the lower number. The lower classes keep a guaranteed share (see `engine/workqueue.py`)."""

    INTERACTIVE = 0
    DEFAULT = 1
    BULK = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """What one deployment takes, or one tenant may use; 0 is unlimited.

    `window_s` is the longest that a text waits for company while other calls of the deployment are in flight.
    `judged_spans_s` are the spans over which the vendor checks its per-minute quotas. `counts_texts`: each text of a
    call is a request to it. `target_latency_s` above 0: batches are kept so small, though not below
    `min_batch_tokens`, that nine calls of ten take no longer.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_in_flight: int = 8
    max_batch_items: int = 2048
    max_batch_tokens: int = 300_000
    max_batch_bytes: int = 8_000_000
    window_s: float = 0.005
    judged_spans_s: tuple[float, ...] = (60.0,)
    counts_texts: bool = False
    min_batch_tokens: int = 1000
    target_latency_s: float = 0.0


class Allowance(msgspec.Struct, frozen=True):
    """What may be spent in a day and in a month, by UTC, in nano-USD; None: no bound."""

    per_day: int | None = None
    per_month: int | None = None


NO_BOUND = Allowance()


@dataclass(frozen=True, slots=True)
class Tenant:
    """One paying team. `weight` is its share among tenants of one priority; `models` holds `*` or allowed names.

    Tenants of one `cache_group` share what was ever embedded for one of them; "" is the group of all who name none.
    `limits` and `allowance` are for what its requests buy; what is in the cache costs nothing. `webhook_url` is told
    how much of an allowance is spent; "": nobody is. `bulk_tier` is how its jobs are done that do not say.
    """

    name: str
    weight: float = 1.0
    priority: Priority = Priority.DEFAULT
    models: frozenset[str] = frozenset({"*"})
    cache_group: str = ""
    limits: Limits | None = None
    allowance: Allowance = NO_BOUND
    webhook_url: str = ""
    bulk_tier: Tier = "online"

    @property
    def account(self) -> str:
        """Its name where quotas are kept; no deployment's has a blank."""
        return f"tenant {self.name}"

    def may_use(self, model: str) -> bool:
        """Whether this tenant may call `model`."""
        return "*" in self.models or model in self.models


ANONYMOUS = Tenant("anonymous")
"""Who calls when no key is configured (loopback only)."""


Cause: TypeAlias = Literal["miss", "retry", "fallback", "bulk", "warm", "canary"]
"""Why something was bought."""

Scope: TypeAlias = Literal["embed", "batch", "admin"]
"""What a key is good for."""


class Spender(msgspec.Struct, frozen=True):
    """On whose account inside its tenant a request buys: a project, the public id of a key, a hashed user; "": none.

    `allowances` are what project and key may spend, by account.
    """

    project: str = ""
    key: str = ""
    user: str = ""
    allowances: tuple[tuple[str, Allowance], ...] = ()


class EmbeddingRequest(msgspec.Struct, frozen=True, eq=False):
    """What one tenant wants: one vector per text, in order, before `deadline` (seconds of the monotonic clock).

    `truncation` None: as the model's route has it. `allow_degraded`: when every deployment is out, vectors of the
    model that the operator named for this case are welcome. Compared by identity: two callers may want the same.
    """

    tenant: Tenant
    model: str
    texts: tuple[Text, ...]
    deadline: float
    priority: Priority = Priority.DEFAULT
    dimensions: int | None = None
    input_type: InputType | None = None
    truncation: Truncation | None = None
    allow_degraded: bool = False
    spender: Spender = Spender()
    cause: Cause = "miss"


class EmbeddingResult(msgspec.Struct, frozen=True, eq=False):
    """The answer to an `EmbeddingRequest`; `vectors[i]` is float32 little-endian bytes for `texts[i]`.

    `tokens` is the sum over all texts, bought or not. `cache_hits + bought + joined == len(vectors)`, where `joined`
    counts texts that were already in flight or repeated in the request. `deployments` are those that answered, in
    order of first use; `queue_s` is the longest wait of a text before its call left; `batch_items` the size of the
    largest batch that carried one; `calls` what of all calls was for this request, `cost_nano_usd` about what they
    cost, None where that is not known; `retries` how often a text was tried again, at most. `model` names who answered
    when that was not the model asked for.
    """

    vectors: list[bytes]
    tokens: int
    space: "Space"
    cache_hits: int
    joined: int = 0
    deployments: tuple[str, ...] = ()
    queue_s: float = 0.0
    batch_items: int = 0
    calls: float = 0.0
    cost_nano_usd: int | None = 0
    retries: int = 0
    model: str | None = None


@dataclass(frozen=True)
class Space:
    """Where vectors may be compared: everything that changes a vector's meaning, and nothing else.

    `dimensions` is the full width that is bought; smaller sizes of a Matryoshka model are cut from it and share the
    Space. `prompt` is the text that stands in front of an input of this `input_type` when the model reads it.
    """

    model: str
    dimensions: int
    revision: str = ""
    pooling: str = ""
    normalised: bool = True
    max_input_tokens: int = 8192
    input_type: InputType | None = None
    prompt: str = ""
    truncation: Truncation = "none"

    @cached_property
    def id(self) -> str:
        """A versioned name that is equal for equal spaces in every process: the cache prefix and batching key."""
        fields = (
            self.model, self.dimensions, self.revision, self.pooling, self.normalised, self.max_input_tokens,
            self.input_type or "", self.prompt, self.truncation,
        )  # fmt: skip
        digest = hashlib.blake2b(digest_size=12)
        for value in map(str, fields):
            data = value.encode()
            digest.update(len(data).to_bytes(4, "little") + data)
        return f"s1-{digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Attempts:
    """How often and how fast a text is tried again: after `min(cap, base · 2^n)` seconds, give or take `jitter` of it.

    `jitter` None: anything from no time at all up to that. After 429s in a row that name no longer time, the deployment
    rests for twice as long each time, `cooldown_s` up to `cooldown_cap_s`.
    """

    most: int = 3
    backoff_base_s: float = 0.5
    backoff_cap_s: float = 8.0
    jitter: float | None = None
    cooldown_s: float = 1.0
    cooldown_cap_s: float = 4.0


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a deployment is left alone, and for how long; see `engine/breaker.py`."""

    failures_in_a_row: int = 5
    failure_ratio: float = 0.5
    ratio_min_calls: int = 10
    ratio_window_s: float = 30.0
    open_s: float = 1.0
    open_cap_s: float = 4.0
    probe_lease_s: float = 5.0
    stall_least_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """One paid endpoint that serves one Space (in its variants by input type and truncation).

    `unit_norm`: the vendor promises unit vectors, so others are malformed. `takes_token_ids`: it understands token
    ids of the route's vocabulary as they are. `price` is in pico-USD per token; None: not known.
    """

    name: str
    model: str
    limits: Limits = field(default_factory=Limits)
    attempts: Attempts = field(default_factory=Attempts)
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    timeout_s: float = 30.0
    unit_norm: bool = False
    takes_token_ids: bool = False
    price: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A model name that callers send, the Space that answers, and who serves it, in order of preference.

    `cuts_dimensions`: a cut of the full vector is the vendor's own smaller vector (Matryoshka), so callers may name
    `dimensions`; `sizes` are those that the vendor makes (none: any). `prompts` tells which input types the model
    tells apart, and what stands in front of each (see `Space.prompt`); `default_input_type` is meant by who names none.
    `long_input` is what becomes of long texts unless the caller says; `overlap_tokens` are shared by neighbouring
    windows of a mean. `vendor_cuts`: every deployment's vendor cuts at the end itself when asked; `always_cuts`: one
    does so unasked, and nobody here can tell.
    `spread`: deployments share the load instead of standing in for each other. `spill_s`: a longer wait for quota
    sends a text to the next deployment. `on_outage` names another model, of another Space, for callers who allow it.
    `created` is a Unix time for `/v1/models`.
    """

    model: str
    space: Space
    deployments: tuple[Deployment, ...]
    cuts_dimensions: bool = False
    sizes: Sequence[int] = ()
    prompts: tuple[tuple[InputType, str], ...] = ()
    default_input_type: InputType | None = None
    long_input: Truncation = "none"
    overlap_tokens: int = 64
    vendor_cuts: bool = False
    always_cuts: bool = False
    spread: bool = False
    spill_s: float = math.inf
    on_outage: str = ""
    max_request_tokens: int = 300_000
    created: int = 0
    owned_by: str = "embedgate"

    @property
    def takes_token_ids(self) -> bool:
        """Whether every deployment understands the callers' token ids: else they are decoded to text first."""
        return all(deployment.takes_token_ids for deployment in self.deployments)


class Vector(msgspec.Struct, frozen=True, gc=False):
    """One embedding as it is kept: float32 little-endian bytes, and how many tokens its text counted."""

    data: bytes
    tokens: int


class Basket(msgspec.Struct, eq=False):
    """What is bought for a request before it is answered: vectors by key, elsewhere or by tries that failed.

    Who wants `each` text that can be had waits for the others if one is refused; else that ends the request. Of what
    such tries bought `calls` are their part of all calls, `nano_usd` about what they cost, None where that is not
    known, and `texts` how many texts of the request it was for.
    """

    vectors: MutableMapping[bytes, Vector] = {}
    each: bool = False
    texts: int = 0
    calls: float = 0.0
    nano_usd: int | None = 0
