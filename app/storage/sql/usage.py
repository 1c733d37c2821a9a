"""Hides from which sums a question about what was spent is answered, and how its answer is cut into pages."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from sqlalchemy import ColumnElement, Row, Select, Table, case, func, literal, null, select, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from app.storage.level import LevelDown
from app.storage.sql.database import Database
from app.storage.sql.tables import ledger, uncertain, usage_days, usage_hours, usage_totals

Group: TypeAlias = Literal["tenant", "project", "model", "deployment", "cause"]
By: TypeAlias = Literal["hour", "day", "month", "total"]
Place: TypeAlias = tuple[int | str, ...]
"""Where a row stands among all of an answer, as its next page has to know it."""

GROUPS: Final[tuple[Group, ...]] = ("tenant", "project", "model", "deployment", "cause")
"""In the order of the sums' keys, so that an answer in this order need not be sorted."""

_OF_TENANTS: Final = frozenset({"tenant", "project"})
_OF_PURCHASES: Final = frozenset({"project", "deployment", "cause"})  # what is spared has none of them
_WITHIN_S = 10.0
_AT_ONCE, _MOST_WAITING = 2, 50


class Sums(NamedTuple):
    """What was bought, and what was spared. Of `nano_usd` parts were estimated or are unconfirmed.

    Unpriced tokens cost nobody knows what: no money stands for them.
    """

    calls: int
    texts: int
    tokens: int
    nano_usd: int
    estimated_nano_usd: int
    unconfirmed_nano_usd: int
    unpriced_tokens: int
    hits: int
    joined: int
    spared_tokens: int
    spared_nano_usd: int
    spared_unpriced_tokens: int


class Span(NamedTuple):
    """From the start of `first` up to, and without, `end`: whole hours or days since 1970, by UTC."""

    first: int
    end: int


class Question(NamedTuple):
    """What is asked: `span` in hours if `by` hour, else in days. `within` a tenant, or (None) all of them.

    `only` has one value for each group that it names. Lines begin with the span and, `by` month, on the days `months`
    in it.
    """

    span: Span
    by: By
    groups: tuple[Group, ...]
    only: Mapping[Group, str]
    within: str | None
    most: int
    after: Place | None = None
    months: Sequence[int] = ()


class Line(NamedTuple):
    """The sums of one group from the hour or day `begins`."""

    begins: int
    group: tuple[str, ...]
    sums: Sums

    @property
    def place(self) -> Place:
        """Behind which the next page begins."""
        return (self.begins, *self.group)


def tells_spared(groups: Iterable[Group], only: Iterable[Group]) -> bool:
    """Whether what was not bought can be told beside what was."""
    return not _OF_PURCHASES & {*groups, *only}


class SqlUsage:
    """Reads the sums that the ledger's writer makes; a few at a time, so that nobody else waits for it.

    Every method raises LevelDown.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    async def lines(self, question: Question) -> tuple[list[Line], Sums]:
        """At most `most` of the lines after `after`, by time and then by group; and the sums of all there are."""
        *rows, everything = await self._rows(_statement(question))
        width = 2 + len(question.groups)
        return await asyncio.to_thread(_lines, rows, width), _sums(everything, width)

    async def uncertain(
        self, start_ms: int, end_ms: int, *, within: str | None, most: int, after: Place | None = None
    ) -> Sequence[Row[Any]]:
        """At most so many rows of `ledger` whose money no vendor stated, begun from `start_ms` up to `end_ms`.

        Oldest first; the next page comes after the last one's `at_ms`, `call` and `part`.
        """
        place = (ledger.c.at_ms, ledger.c.call, ledger.c.part)
        asked = select(ledger).where(uncertain, ledger.c.at_ms >= start_ms, ledger.c.at_ms < end_ms)
        if within is not None:
            asked = asked.where(ledger.c.tenant == within)
        if after is not None:
            asked = asked.where(tuple_(*place) > after)
        return await self._rows(asked.order_by(*place).limit(most))

    async def _rows(self, statement: Any) -> Sequence[Row[Any]]:
        if self._waiting >= _MOST_WAITING:
            raise LevelDown("busy")
        self._waiting += 1
        try:
            async with self._slots:
                return await self._database.read(partial(_all, statement=statement), within_s=_WITHIN_S)
        finally:
            self._waiting -= 1


async def _all(connection: AsyncConnection, statement: Any) -> Sequence[Row[Any]]:
    return (await connection.execute(statement)).all()


# ── one statement ───────────────────────────────────────────────────────────────────────────────────────────────────


def _statement(question: Question) -> Select[Any]:
    """A page, and behind it the one row of everything: of one moment, whoever writes meanwhile."""
    both = union_all(select(_page(question).subquery()), _everything(question)).subquery()
    return select(both).order_by(both.c.of_all, both.c.begins, *(both.c[group] for group in question.groups))


def _page(question: Question) -> Select[Any]:
    asked = _asked(question, question.groups).subquery()
    place = [asked.c.begins, *(asked.c[group] for group in question.groups)]
    lines = select(literal(0).label("of_all"), *place, *(func.sum(asked.c[each]).label(each) for each in Sums._fields))
    if question.after is not None:
        lines = lines.where(tuple_(*place) > question.after)
    return lines.group_by(*place).order_by(*place).limit(question.most)


def _everything(question: Question) -> Any:
    asked = _asked(question, ()).subquery()
    nobody = (null().label(group) for group in question.groups)
    sums = (func.coalesce(func.sum(asked.c[each]), 0).label(each) for each in Sums._fields)
    return select(literal(1).label("of_all"), literal(question.span.first).label("begins"), *nobody, *sums)


def _asked(question: Question, groups: Sequence[Group]) -> Select[Any]:
    """The rows to be summed up: as few as there are sums for."""
    table = _source(question, groups)
    (moment,) = (table.c[name] for name in ("hour", "day") if name in table.c)
    scale = 24 if moment.name == "hour" and question.by != "hour" else 1
    begins = _begins(question, moment if scale == 1 else moment // scale).label("begins")
    columns = (table.c[name] for name in (*groups, *Sums._fields))
    first, end = question.span
    rows = select(begins, *columns).where(moment >= first * scale, moment < end * scale)
    rows = rows.where(*(table.c[group] == value for group, value in question.only.items()))
    if question.within is not None:
        rows = rows.where(table.c.tenant == question.within)
    return rows if tells_spared(groups, question.only) else rows.where(table.c.cause != "")


def _source(question: Question, groups: Sequence[Group]) -> Table:
    if question.within is None and not _OF_TENANTS & {*groups, *question.only}:
        return usage_totals
    return usage_hours if question.by == "hour" else usage_days


def _begins(question: Question, moment: ColumnElement[int]) -> ColumnElement[int]:
    """When the line begins to which a moment belongs."""
    if question.by in {"hour", "day"}:
        return moment
    starts = [question.span.first, *question.months]
    whens = [(moment < end, start) for start, end in pairwise(starts)]
    return case(*whens, else_=starts[-1]) if whens else literal(starts[-1])


def _lines(rows: Sequence[Row[Any]], width: int) -> list[Line]:
    return [Line(row.begins, tuple(row[2:width]), _sums(row, width)) for row in rows]


def _sums(row: Row[Any], width: int) -> Sums:
    return Sums(*map(int, row[width:]))
