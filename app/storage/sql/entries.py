"""Hides how a purchase is split over those who pay, and what each part adds to which sums."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
from sqlalchemy import Table

from app import money
from app.ports import End, Purchase
from app.storage.sql.tables import spared, spent, usage_days, usage_hours, usage_totals

State: TypeAlias = End | Literal["begun"]

_DAY_MS, _HOUR_MS = 86_400_000, 3_600_000
_AS_JSON = msgspec.json.Encoder()


class Line(NamedTuple):
    """How a purchase of `replica` stands; `tokens` are those of the whole call."""

    purchase: Purchase
    state: State
    tokens: int
    replica: str


class Spared(NamedTuple):
    """What was not bought in a minute since 1970; what it would have cost is not known of `unpriced_tokens`."""

    hits: int = 0
    joined: int = 0
    tokens: int = 0
    nano_usd: int = 0
    unpriced_tokens: int = 0


SparedBy: TypeAlias = Mapping[tuple[int, str, str], Spared]
"""By minute, tenant and model."""


class Entry(msgspec.Struct):
    """A row of `ledger`."""

    call: str
    part: int
    at_ms: int
    replica: str
    tenant: str
    project: str
    key: str
    user: str
    model: str
    space: str
    deployment: str
    cause: str
    state: State
    texts: int
    tokens_estimated: int
    tokens: int
    price: int | None
    nano_usd: int | None


Calls: TypeAlias = Mapping[str, Sequence[Entry]]
"""Rows by call, in the order of their parts."""


def charges(purchase: Purchase, tokens: int) -> list[tuple[str, int, int]]:
    """Which account spent on which day since 1970 how many nano-USD, by a purchase of so many tokens.

    As far as is known what it costs; an account may be there more than once.
    """
    if purchase.price is None or not tokens:
        return []
    _, of_parts = _shares(tokens, [part.tokens for part in purchase.parts], purchase.price)
    day = purchase.at_ms // _DAY_MS
    return [
        (account, day, nano_usd)
        for part, nano_usd in zip(purchase.parts, of_parts, strict=True)
        if nano_usd
        for account in _accounts(part.tenant, part.project, part.key)
    ]


class Plan(NamedTuple):
    """What is to be written: rows as JSON, "" for none; of `more` and `calls` see `Booked`."""

    new: str
    changed: str
    sums: Sequence[tuple[Table, str]]
    spent: str
    more: Mapping[tuple[str, str, str], int]
    calls: int


def planned(wanted: Calls, known: Calls) -> Plan:
    """What `wanted` changes, where of some of these calls rows are `known`."""
    new: list[Entry] = []
    changed: list[Entry] = []
    sums, calls = _Sums(), 0
    for call, entries in wanted.items():
        if (before := known.get(call)) is None:
            new += entries
            sums.add(entries, 1)
        elif _gives_way(before[0].state, entries[0].state):
            after = [_as(old, end) for old, end in zip(before, entries, strict=True)]
            changed += after
            sums.add(before, -1)
            sums.add(after, 1)
        else:
            sums.touch(before)
            continue
        calls += 1
    return Plan(_json(new), _json(changed), sums.rows(), sums.spent_rows(), sums.more(), calls)


def _gives_way(before: State, after: State) -> bool:
    if before == "begun":
        return after != "begun"
    return before == "unconfirmed" and after in {"billed", "estimated", "failed"}


def _as(before: Entry, after: Entry) -> Entry:
    """Whose it was may have been changed since."""
    return msgspec.structs.replace(before, state=after.state, tokens=after.tokens, nano_usd=after.nano_usd)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def entries_of(line: Line) -> list[Entry]:
    """A row for each part; what they took, and what that costs, sums to the call's."""
    purchase, state, tokens, replica = line
    parts = purchase.parts
    shares: tuple[Sequence[int], Sequence[int | None]]
    if state == "begun":
        shares = [0] * len(parts), [None] * len(parts)
    elif state == "failed":
        shares = [0] * len(parts), [0] * len(parts)
    else:
        shares = _shares(tokens, [part.tokens for part in parts], purchase.price)
    return [
        Entry(
            purchase.id, number, purchase.at_ms, replica, part.tenant, part.project, part.key, part.user,
            purchase.model, purchase.space, purchase.deployment, part.cause, state, part.texts, part.tokens, of_tokens,
            purchase.price, nano_usd,
        )
        for number, (part, of_tokens, nano_usd) in enumerate(zip(parts, *shares, strict=True))
    ]  # fmt: skip


def unconfirmed(entries: Sequence[Entry]) -> list[Entry]:
    """As if each had taken what was expected of it."""
    expected = [entry.tokens_estimated for entry in entries]
    tokens, nano_usd = _shares(sum(expected), expected, entries[0].price)
    return [
        msgspec.structs.replace(entry, state="unconfirmed", tokens=of_tokens, nano_usd=cost)
        for entry, of_tokens, cost in zip(entries, tokens, nano_usd, strict=True)
    ]


def _shares(tokens: int, weights: Sequence[int], price: int | None) -> tuple[list[int], Sequence[int | None]]:
    """What is each part's of the tokens and of the nano-USD of a call; they sum to the call's."""
    of_tokens = money.split(tokens, weights)
    if price is None:
        return of_tokens, [None] * len(weights)
    return of_tokens, money.split(money.cost_nano_usd(tokens, price), of_tokens)


@lru_cache(maxsize=10_000)
def _accounts(tenant: str, project: str, key: str) -> tuple[str, ...]:
    """On whose account it is; embedgate's own calls are on nobody's."""
    of_tenant = (f"tenant {tenant}", *([f"project {tenant}/{project}"] if project else [])) if tenant else ()
    return (*of_tenant, *([f"key {key}"] if key else []))


@lru_cache(maxsize=64)
def spans_of(day: int) -> tuple[str, str]:
    """The names of a day since 1970, and of the month that it lies in."""
    name = (date(1970, 1, 1) + timedelta(day)).isoformat()
    return name, name[:7]


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_SUMS = ("calls", "texts", "tokens", "nano_usd", "estimated_nano_usd", "unconfirmed_nano_usd", "unpriced_tokens")
_Amounts: TypeAlias = dict[tuple[Any, ...], list[int]]


class _Sums:
    """What calls add to the sums, or (`sign` -1) no longer add; a call counts once in each of them."""

    def __init__(self) -> None:
        self._hours: _Amounts = {}
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._spent: Counter[tuple[str, int]] = Counter()

    def add(self, call: Sequence[Entry], sign: int) -> None:
        state, hour = call[0].state, call[0].at_ms // _HOUR_MS
        if state in {"begun", "failed"}:
            return
        payers = set()
        for entry in call:
            payer = (hour, entry.tenant, entry.project, entry.model, entry.deployment, entry.cause)
            payers.add(payer)
            sums = self._hours.setdefault(payer, [0] * len(_SUMS))
            tokens, nano_usd = sign * entry.tokens, sign * (entry.nano_usd or 0)
            sums[1] += sign * entry.texts
            sums[2] += tokens
            sums[3] += nano_usd
            sums[4] += nano_usd if state == "estimated" else 0
            sums[5] += nano_usd if state == "unconfirmed" else 0
            sums[6] += tokens if entry.nano_usd is None else 0
            if nano_usd:
                for account in _accounts(entry.tenant, entry.project, entry.key):
                    self._spent[account, hour // 24] += nano_usd
        for payer in payers:
            self._hours[payer][0] += sign
        for by_cause in {_by_cause(payer) for payer in payers}:
            self._calls[by_cause] += sign

    def touch(self, call: Sequence[Entry]) -> None:
        """Its accounts are asked for, though nothing is added: whoever tells twice may not know what they spent."""
        for entry in call:
            for account in _accounts(entry.tenant, entry.project, entry.key) if entry.nano_usd else ():
                self._spent[account, entry.at_ms // _DAY_MS] += 0

    def rows(self) -> list[tuple[Table, str]]:
        """What is to be added to each table, as JSON; in an order in which nobody waits for each other crosswise."""
        days: _Amounts = {}
        totals: _Amounts = {}
        for payer, sums in self._hours.items():
            _add(days, (payer[0] // 24, *payer[1:]), sums)
            _add(totals, _by_cause(payer), sums)
        for by_cause, calls in self._calls.items():
            totals[by_cause][0] = calls
        tables = ((usage_hours, self._hours), (usage_days, days), (usage_totals, totals))
        return [(table, _summed(table, _SUMS, amounts)) for table, amounts in tables if amounts]

    def spent_rows(self) -> str:
        """The same of `spent`."""
        sums: _Amounts = {}
        for (account, day), nano_usd in self._spent.items():
            for span in spans_of(day):
                _add(sums, (account, span), [nano_usd])
        return _summed(spent, ("nano_usd",), sums)

    def more(self) -> Mapping[tuple[str, str, str], int]:
        """See `Booked`."""
        more: Counter[tuple[str, str, str]] = Counter()
        for (_, tenant, _, model, _, cause), sums in self._hours.items():
            more[tenant, model, cause] += sums[3]
        return {by: nano_usd for by, nano_usd in more.items() if nano_usd}


def _by_cause(payer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of `usage_totals` to one of `usage_hours`."""
    hour, _, _, *of_what = payer
    return (hour, *of_what)


def _add(to: _Amounts, key: tuple[Any, ...], amounts: Sequence[int]) -> None:
    before = to.get(key)
    to[key] = [*amounts] if before is None else [a + b for a, b in zip(before, amounts, strict=True)]


_SPARED = ("hits", "joined", "spared_tokens", "spared_nano_usd", "spared_unpriced_tokens")


def spared_rows(amounts: SparedBy) -> list[tuple[Table, str]]:
    """By minute, and beside what was bought: there it is of no project, deployment and cause."""
    sums: dict[str, _Amounts] = {"usage_hours": {}, "usage_days": {}, "usage_totals": {}}
    for (minute, tenant, model), of_minute in amounts.items():
        _add(sums["usage_hours"], (minute // 60, tenant, "", model, "", ""), of_minute)
        _add(sums["usage_days"], (minute // 1440, tenant, "", model, "", ""), of_minute)
        _add(sums["usage_totals"], (minute // 60, model, "", ""), of_minute)
    tables = [(table, _summed(table, _SPARED, sums[table.name])) for table in (usage_hours, usage_days, usage_totals)]
    return [(spared, _summed(spared, Spared._fields, {by: [*each] for by, each in amounts.items()})), *tables]


def _summed(table: Table, names: Sequence[str], amounts: _Amounts) -> str:
    keys = [each.name for each in table.primary_key]
    return _json([dict(zip((*keys, *names), (*key, *amounts[key]), strict=True)) for key in sorted(amounts)])


def _json(rows: Sequence[object]) -> str:
    return _AS_JSON.encode(rows).decode() if rows else ""
