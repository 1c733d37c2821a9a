"""Hides what a process knows of its tenants' money: what it set aside, what ended, what it may have unasked."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.errors import EmbedgateError
from app.ports import Bounds


@dataclass(slots=True, eq=False)
class Account:
    """What this process has set aside of one, and lately did."""

    name: str
    aside: int = 0
    lately: int = 0
    pace: int = 0
    spans: dict[str, "Span"] = field(default_factory=dict)

    @property
    def wish(self) -> int:
        """What it would like to have ahead: as much as it sets aside in two seconds."""
        return 2 * (self.pace + self.lately)


@dataclass(slots=True, eq=False)
class Span:
    """A day or month of an account as this process sees it, in nano-USD.

    `ended` is what ended here since it is looked after, and `most` what that and what is set aside may be together;
    None: that has to be found out. `booked` is what SQL has of everybody; `left` what nobody had claimed when that was
    last heard, and `held` what the others think of as this process' own. `alone`: a part of `left` was added to `most`.
    """

    account: Account
    name: str
    allowance: int
    ended: int = 0
    most: int | None = None
    booked: int | None = None
    left: int | None = None
    held: int = 0
    alone: bool = False
    read_at: float | None = None

    @property
    def taken(self) -> int:
        """What ended here or is set aside."""
        return self.ended + self.account.aside

    @property
    def room(self) -> int:
        """How much more may be set aside without asking."""
        return 0 if self.most is None else max(0, self.most - self.taken)


@dataclass(slots=True, eq=False)
class Claim:
    """A wish to set something aside, for which somebody waits until `until` unless they `left`."""

    bounds: Bounds
    spans: Sequence[Span]
    nano_usd: int
    until: float
    answer: asyncio.Future[None]
    left: bool = False


@dataclass(slots=True, eq=False)
class Purse:
    """All accounts of a tenant; who asks for them asks alone, for all who wait."""

    tenant: str
    accounts: dict[str, Account] = field(default_factory=dict)
    waiting: list[Claim] = field(default_factory=list)
    asking: asyncio.Task[None] | None = None
    used_at: float = 0.0

    def spans(self) -> list[Span]:
        """All of them, in the order in which they came."""
        return [span for account in self.accounts.values() for span in account.spans.values()]

    def key(self, span: Span) -> str:
        """Where its state is; those of a tenant are in one slot of a cluster."""
        return f"eg:{{budget {self.tenant.encode().hex()}}}:{span.name}:{span.account.name.encode().hex()}"


def span_of(account: Account, name: str, allowance: int) -> Span:
    """What is known of it; what was found out holds for the allowance that it had then."""
    span = account.spans.get(name)
    if span is None:
        span = account.spans[name] = Span(account, name, allowance)
    elif span.allowance != allowance:
        span.allowance, span.most = allowance, None
    return span


def spans_of_claims(claims: Sequence[Claim]) -> list[Span]:
    """All of them, each once."""
    return list(dict.fromkeys(span for claim in claims for span in claim.spans))


def refuse(claim: Claim, error: EmbedgateError) -> None:
    """Whoever left does not hear of it."""
    if not claim.left:
        claim.answer.set_exception(error)
