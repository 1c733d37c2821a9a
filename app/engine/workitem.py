"""One text waiting or in flight, and what it travels with and comes back as: the engine's own nouns."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from app.domain import EmbeddingRequest, Priority, Text


class Answer(msgspec.Struct, frozen=True, eq=False):
    """What a text's future brings: its vector, and how it was come by; after so many `retries`."""

    data: bytes
    tokens: int
    deployment: str
    batch_items: int
    queue_s: float
    retries: int = 0


@dataclass(slots=True, eq=False)
class WorkItem:
    """One text waiting or in flight, for all requests that want it: the only mutable noun.

    `tokens` is our count or estimate. `waiters` are the requests that still want it, first come first; an item without
    any is dropped at the door. `place` is the priority under which it waits, None when it does not; `returned` says
    that it waits in a group that came back, not in a lane; `flying` that a call carries it, and `payer` who pays for
    that: the first who still wanted it when the call left.
    """

    key: bytes
    payload: Text
    tokens: int
    size_bytes: int
    future: asyncio.Future[Answer]
    waiters: list[EmbeddingRequest]
    queued_at: float
    attempts: int = 0
    place: Priority | None = None
    returned: bool = False
    flying: bool = False
    payer: EmbeddingRequest | None = None
    left_at: float = 0.0

    @property
    def deadline(self) -> float:
        """When the last of its waiters stops caring."""
        waiters = self.waiters
        return waiters[0].deadline if len(waiters) == 1 else max((each.deadline for each in waiters), default=0.0)

    @property
    def priority(self) -> Priority:
        """The highest of its waiters."""
        return min((waiter.priority for waiter in self.waiters), default=Priority.BULK)


@dataclass(frozen=True, slots=True)
class Fit:
    """What one batch may hold at most."""

    items: int
    tokens: int
    size_bytes: int


@dataclass(slots=True, eq=False)
class Doubt:
    """Whether a text of a refused batch is bad, or the deployment refuses all; shared by the batch's pieces.

    `refusals` counts by how often a piece had been split. When both halves were refused, and both halves of both, and
    nothing was accepted, `unanimous` says that the texts may not be to blame; `blamed` who is, once that was found out.
    """

    refusals: list[int] = field(default_factory=lambda: [0, 0, 0])
    accepted: bool = False
    blamed: Literal["", "texts", "deployment"] = ""

    def refused(self, splits: int) -> None:
        """A piece that had been split so often was refused."""
        if splits < len(self.refusals):
            self.refusals[splits] += 1

    @property
    def unanimous(self) -> bool:
        """Whether whatever was sent was refused, two levels deep."""
        return not self.accepted and self.refusals == [1, 2, 4]


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that came back together after a failed call.

    `avoid` names the deployments that they should not go to again while there is another; and even when there is none,
    not before `rest_until`. `splits` says how often the batch was halved that they are left of, and `doubt` is shared
    with the other pieces of it.
    """

    items: tuple[WorkItem, ...]
    avoid: frozenset[str] = frozenset()
    rest_until: float = 0.0
    splits: int = 0
    doubt: Doubt | None = None


@dataclass(slots=True, eq=False)
class Remainder:
    """What of a group that came back still waits: `tokens` of `items`, and the `priority` with which it came."""

    group: Group
    items: deque[WorkItem]
    tokens: int
    priority: Priority


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that travel together, in the order in which they were waiting.

    `reason` is why no more came along; the rest is what the group knew that came back, see `Group`.
    """

    items: tuple[WorkItem, ...]
    tokens: int
    reason: str
    avoid: frozenset[str] = frozenset()
    splits: int = 0
    doubt: Doubt | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """What could go next: the first text, and how much would come along; `tokens` and `items` are at most so many.

    `back` is the group that came back and travels alone; None: whatever waits otherwise. Then `own_tokens` are those of
    the first text's tenant, `share` its part of the weight of all that wait, and `rank` how much more it has been
    served than whoever goes next at another replica; of all, `bulk_tokens` and `bulk_items` are bulk.
    """

    head: WorkItem
    tokens: int
    items: int
    priority: Priority
    back: Remainder | None = None
    own_tokens: int = 0
    share: float = 1.0
    rank: float = 0.0
    bulk_tokens: int = 0
    bulk_items: int = 0

    @property
    def avoid(self) -> frozenset[str]:
        """Whom it should not go to; see `Group`."""
        return self.back.group.avoid if self.back is not None else frozenset()

    @property
    def rest_until(self) -> float:
        """Until when it does not go there at all; see `Group`."""
        return self.back.group.rest_until if self.back is not None else 0.0
