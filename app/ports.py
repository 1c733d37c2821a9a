"""What the engine needs from the world: Protocols whose docstrings are the contract.

Whoever implements a port passes the contract suite of that port in `tests/contract/`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from app.domain import Allowance, Cause, Limits, Priority, Space, Text, Vector

# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class TokenCounter(Protocol):
    """Counts, cuts and decodes in one vocabulary. Thread-safe; blocks, so large texts belong in a thread."""

    exact: bool
    """False for an estimate: then a text is never refused for its length, only the provider can."""

    def count(self, text: str) -> int:
        """How many tokens `text` is to the model, its special tokens included."""

    def cut(self, text: str, max_tokens: int) -> str:
        """The longest head of `text` that counts at most `max_tokens`."""


class TokenVocabulary(Protocol):
    """The vocabulary in which callers send token arrays."""

    size: int
    """Ids are below it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises KeyError for an unassigned id."""


# ── cache ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Cache(Protocol):
    """Keeps vectors by key. It may forget anything at any time; it never returns what was not put under that key."""

    def base(self, space: Space) -> bytes:
        """What every key of `space` has to be made with now; another one once its vectors have been invalidated."""

    async def get_many(
        self, space: Space, keys: Sequence[bytes], *, patient: bool = False
    ) -> list[Vector | None]:  # fmt: skip
        """One answer per key, in order. A level that fails is a miss, never an error.

        Who is `patient` would rather wait for seconds than buy what is kept somewhere.
        """

    def recall(self, keys: Sequence[bytes]) -> list[Vector | None]:
        """What this process itself has of them, without waiting."""

    def put_many(self, space: Space, entries: Iterable[tuple[bytes, Vector]]) -> None:
        """Keeps `entries`, without waiting; what does not fit is dropped."""


# ── limiter ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Stated:
    """The quotas that a provider says the account has, per minute, and what is left of them; None: it does not say."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_left: int | None = None
    tokens_left: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A wish to make one call of between `tokens_min` and `tokens_max` tokens, in the vendor's own counting.

    `account` is whose quota it is: a deployment's, or a tenant's. Where the vendor counts each text as a request, the
    call is of between `requests` and `requests_max` of them. `paced`: more waits than the quota can carry soon, so it
    must not take at once what others may need. Of claims that wait, the lower `rank` goes first within its priority.
    Without `waits` a no is final: nothing is booked ahead and no place is kept.
    """

    account: str
    tokens_min: int
    tokens_max: int
    priority: Priority
    requests: int = 1
    requests_max: int = 1
    paced: bool = False
    rank: float = 0.0
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Grant:
    """The yes to a Claim, all dimensions or nothing: what may be sent, from `start_in_s` on."""

    id: str
    account: str
    tokens: int
    requests: int = 1
    start_in_s: float = 0.0


Scarce: TypeAlias = Literal["tokens", "requests", "slots"]


@dataclass(frozen=True, slots=True)
class NotYet:
    """The honest no: the same claim may be granted after `wait_s`; `scarce` is what there is too little of.

    For slots nobody can know when a call ends: then it is a short while after which it is worth asking again.
    """

    wait_s: float
    scarce: Scarce = "tokens"


class Limiter(Protocol):
    """Fills the quota of an account and never breaks it.

    In every span that the vendor judges, the requests and tokens granted stay within the limit, and so do the calls
    that are not settled. Unknown accounts and dimensions without a limit are always granted. A claim for more than a
    whole limit is granted when the span is empty, since it can never fit better.
    """

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """Grants as many tokens and requests as fit, at least the least of each.

        Books ahead by at most 0.25 s, in order of asking.
        """

    async def settle(
        self, grant: Grant, tokens_used: int | None, *, requests_used: int = 1, stated: Stated | None = None
    ) -> None:
        """Ends a grant, once: gives back what was not used, charges what was used beyond it.

        `None`: what was used is unknown, so all of it counts. A second settlement of one grant changes nothing. What
        the provider stated with its answer may lower what is granted next, never raise it.
        """

    def allow(self, account: str, limits: Limits | None) -> None:
        """From now on the account has these limits, None: no more any; what it was granted still counts."""

    async def throttled(self, account: str, retry_after_s: float | None) -> None:
        """The provider said 429: nobody is granted anything until then, and the rate goes down for a while."""


# ── ledger ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Part(msgspec.Struct, frozen=True):
    """What of a call is bought for one payer and cause; `tokens` is our count or estimate."""

    tenant: str
    project: str
    key: str
    user: str
    cause: Cause
    texts: int
    tokens: int


class Purchase(msgspec.Struct, frozen=True):
    """One call that is about to be paid for; `id` is its own for all time, `at_ms` Unix milliseconds.

    `price` is in pico-USD per token; None: not known.
    """

    id: str
    at_ms: int
    deployment: str
    model: str
    space: str
    price: int | None
    parts: tuple[Part, ...]


End: TypeAlias = Literal["billed", "estimated", "failed", "unconfirmed"]
"""How a purchase ended: the vendor said what it counted; it answered and did not say; it took nothing; nobody knows."""


class Ledger(Protocol):
    """Writes down what is spent. What it was told outlives the process; each purchase is booked once.

    A purchase that was begun and never ended, because its process died, is booked as `unconfirmed`.
    """

    def begin(self, purchase: Purchase) -> None:
        """Before the call leaves, in one write. Raises TryAgainLater when it cannot be written: then it must not."""

    def end(self, purchase: Purchase, tokens: int, how: End) -> None:
        """It took so many tokens in all, 0 if it `failed`; the parts of the bill are as the parts' own tokens."""

    def spared(self, tenant: str, model: str, *, hits: int, joined: int, tokens: int, nano_usd: int | None) -> None:
        """What was not bought: texts found in the cache or bought for somebody else, and what they would have cost."""


# ── budgets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Bounds(msgspec.Struct, frozen=True):
    """What a request may spend: the accounts of its tenant that have an allowance, and which."""

    tenant: str
    allowances: tuple[tuple[str, Allowance], ...]


class Budgets(Protocol):
    """Keeps what is spent within allowances: what is set aside, together with what was spent, never exceeds one."""

    async def reserve(self, bounds: Bounds, nano_usd: int, *, within_s: float) -> None:
        """Sets so much aside on every account, for calls that leave within `within_s` seconds.

        Raises BudgetExhausted where it is more than what is left, and TryAgainLater while nobody knows what is left.
        """

    def release(self, bounds: Bounds, nano_usd: int) -> None:
        """So much of what was set aside has been spent, and is in the ledger; or will not be."""


# ── shares ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Served(msgspec.Struct):
    """What one replica served in one queue since it last told: tokens by tenant, each divided by its weight.

    `level` is how much the tenant has been served that goes first there, or would; `waiting`: there is one.
    """

    tokens: dict[str, float]
    level: float = 0.0
    waiting: bool = False


class Shares(Protocol):
    """Tells replicas whom the others served, so that a tenant's share is one, wherever its requests arrive."""

    @property
    def replicas(self) -> int:
        """How many there were lately."""

    async def exchange(self, own: dict[str, Served]) -> Sequence[dict[str, Served]] | None:
        """Tells what this replica served, by queue, and hears what others told since the last call.

        None: nobody was told, and nothing heard.
        """


# ── landmarks ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Landmarks(Protocol):
    """The first accepted vectors of the probes of each Space, for all replicas; a place is a name for a file."""

    async def vectors(self, place: str) -> npt.NDArray[np.float32] | None:
        """The accepted ones, float32, shape (probes, d); None: there are none yet."""

    async def accept(self, place: str, vectors: npt.NDArray[np.float32]) -> None:
        """From now on these are the accepted ones."""

    async def claim(self, place: str, interval_s: float) -> bool:
        """Whether the caller is the one to probe now: one of all in every `interval_s`."""

    async def release(self, place: str) -> None:
        """It should be probed again sooner."""


# ── provider ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Reply:
    """What one call brought: row i of `vectors` (float32, shape (n, d)) answers text i.

    `tokens_billed` is the provider's own count for the whole call; None when it names none.
    """

    vectors: npt.NDArray[np.float32]
    tokens_billed: int | None = None
    stated: Stated = Stated()


class Provider(Protocol):
    """One deployment's wire dialect. Order is restored here; every other check of a reply is the dispatcher's."""

    @property
    def max_items(self) -> int:
        """The most vectors worth asking for in one call now: lower while answers are expensive to parse."""

    async def embed(self, texts: Sequence[Text], space: Space, *, timeout_s: float) -> Reply:
        """One call for `texts`, complete within `timeout_s` seconds.

        Raises only `errors.ProviderError`s. Never retries, never truncates silently, and follows no redirect.
        Cancelling it closes what it holds.
        """

    async def aclose(self) -> None:
        """Gives back connections and threads."""
