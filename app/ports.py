"""What the engine needs from the world: Protocols whose docstrings are the contract.

Whoever implements a port passes the contract suite of that port in `tests/contract/`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from app.domain import Priority, Space, Text, Vector

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

    async def get_many(self, keys: Sequence[bytes]) -> list[Vector | None]:
        """One answer per key, in order. A level that fails is a miss, never an error."""

    def put_many(self, entries: Iterable[tuple[bytes, Vector]]) -> None:
        """Keeps `entries`, without waiting; what does not fit is dropped."""


# ── limiter ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Claim:
    """A wish to make one call of between `tokens_min` and `tokens_max` tokens, in the vendor's own counting.

    Where the vendor counts each text as a request, the call is of between `requests` and `requests_max` of them.
    """

    deployment: str
    tokens_min: int
    tokens_max: int
    priority: Priority
    requests: int = 1
    requests_max: int = 1


@dataclass(frozen=True, slots=True)
class Grant:
    """The yes to a Claim, all dimensions or nothing: what may be sent, from `start_in_s` on."""

    id: int
    deployment: str
    tokens: int
    requests: int = 1
    start_in_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NotYet:
    """The honest no: the same claim may be granted after `wait_s` (more than can be booked ahead)."""

    wait_s: float


class Limiter(Protocol):
    """Fills a deployment's quota and never breaks it.

    In every span that the vendor judges, the requests and tokens granted stay within the limit. Unknown deployments
    and dimensions without a limit are always granted. A claim for more than a whole limit is granted when the span is
    empty, since it can never fit better.
    """

    async def reserve(self, claim: Claim) -> Grant | NotYet:
        """Grants as many tokens and requests as fit, at least the least of each.

        Books ahead by at most 0.25 s, in order of asking.
        """

    async def settle(self, grant: Grant, tokens_used: int | None, *, requests_used: int = 1) -> None:
        """Ends a grant, once: gives back what was not used, charges what was used beyond it.

        `None`: what was used is unknown, so all of it counts. A second settlement of one grant changes nothing.
        """

    async def throttled(self, deployment: str, retry_after_s: float | None) -> None:
        """The provider said 429: nobody is granted anything until then, and the rate goes down for a while."""


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
class Stated:
    """The quotas that a provider says the account has, per minute; None: it does not say."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


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
