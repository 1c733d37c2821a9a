"""Hides how a question about what was spent is put in words, by the command line and the routes, and its answer."""

import asyncio
import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final, Literal, TypeVar, cast, get_args

import msgspec

from app import money
from app.errors import InvalidRequest
from app.storage.sql.usage import GROUPS, By, Group, Line, Question, Span, SqlUsage, Sums, tells_spared

Given = Iterable[tuple[str, str]]
"""Parameters by name, as somebody typed them; only `group` may stand there more than once."""

MOST_ROWS: Final = 10_000
"""In one answer."""

_USUAL_ROWS = 1000
_HOUR_S, _DAY_S = 3600, 86_400
_MOST_DAYS, _MOST_DAYS_BY_HOUR = 3660, 366
_LATEST_S = 4_102_444_800  # the year 2100
_INT4, _INT8 = 2**31, 2**63
_SECONDS = re.compile(r"[0-9]{1,10}").fullmatch
_TIME = r"T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})"
_MOMENT = re.compile(rf"[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}({_TIME})?").fullmatch
_ROWS = re.compile(r"[1-9][0-9]{0,4}").fullmatch
_MOST_WORD = 256

_T = TypeVar("_T")


class UsageDesk:
    """What the command line and the routes are told of what was spent. `now` is by UTC.

    Every method raises InvalidRequest for parameters that cannot be, and LevelDown.
    """

    def __init__(self, usage: SqlUsage, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._usage = usage
        self._now = now

    async def usage(self, given: Given, *, within: str | None) -> dict[str, Any]:
        """A page of lines and the totals of all, of the tenant `within`; None: of all of them.

        Takes `start`, `end`, `by`, `group`, `limit`, `after`, and the name of every group for those of one value.
        """
        asked = _Parameters(given, ("start", "end", "by", "group", "limit", "after", *GROUPS))
        question = _question(asked, within, self._now())
        lines, everything = await self._usage.lines(question._replace(most=question.most + 1))
        return await asyncio.to_thread(_answer, question, lines, everything)

    async def uncertain(self, given: Given) -> dict[str, Any]:
        """A page of the purchases whose price no vendor stated, oldest first: to be compared with its bill.

        Takes `start`, `end`, `tenant`, `limit` and `after`.
        """
        asked = _Parameters(given, ("start", "end", "tenant", "limit", "after"))
        start_s, end_s = _seconds(asked, self._now())
        most, after = _most(asked), asked.after(tuple[int, str, int], (_INT8, _MOST_WORD, _INT4))
        rows = await self._usage.uncertain(
            start_s * 1000, end_s * 1000, within=asked.word("tenant"), most=most + 1, after=after
        )
        return await asyncio.to_thread(_entries, rows, most)


class _Parameters:
    """What was given, by name. Raises InvalidRequest for names that nobody knows or that stand there twice."""

    def __init__(self, given: Given, known: Sequence[str]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in given:
            shown = "".join(c for c in name[:64] if c.isprintable())
            if name not in known:
                raise InvalidRequest(f"Unknown parameter: '{shown}'.", param=shown, code="unknown_parameter")
            if name in self._values and name != "group":
                raise _wrong(name, "must be given once")
            self._values.setdefault(name, []).append(value)

    def one(self, name: str) -> str | None:
        """Its value; None if there is none."""
        return self._values.get(name, [None])[0]

    def word(self, name: str) -> str | None:
        """Its value if it can be a name; "" is what has none."""
        value = self.one(name)
        if value is not None and not _is_word(value):
            raise _wrong(name, "must be a name")
        return value

    def choice(self, name: str, kind: Any, usual: str) -> Any:
        """Its value, one of those of the Literal `kind`."""
        value = self.one(name) or usual
        if value not in get_args(kind):
            raise _wrong(name, f"must be one of {', '.join(get_args(kind))}")
        return value

    def groups(self) -> tuple[Group, ...]:
        """All that were named, in their own order; by model if nothing is said."""
        named = ",".join(self._values.get("group", ["model"]))
        wanted = {each for each in named.split(",") if each}
        if wanted - {*GROUPS}:
            raise _wrong("group", f"must be some of {', '.join(GROUPS)}")
        return tuple(group for group in GROUPS if group in wanted)

    def after(self, kind: type[_T], bounds: Sequence[int]) -> _T | None:
        """The place that an answer before gave as `next`: a tuple of this `kind`, each part of it below its bound."""
        value = self.one("after")
        if value is None:
            return None
        try:
            place: Any = msgspec.json.decode(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)), type=kind)
            if all(_fits(part, bound) for part, bound in zip(place, bounds, strict=True)):
                return cast("_T", place)
        except ValueError:
            pass
        raise _wrong("after", "must be what an answer to the same question gave as 'next'")


def _wrong(name: str, what: str) -> InvalidRequest:
    """What is said of a parameter that is not `what` it must be."""
    return InvalidRequest(f"'{name}' {what}.", param=name, code="invalid_value")


def _is_word(value: str) -> bool:
    return len(value) < _MOST_WORD and value.isprintable()


def _fits(part: object, bound: int) -> bool:
    return 0 <= part < bound if isinstance(part, int) else isinstance(part, str) and _is_word(part)


# ── the question ────────────────────────────────────────────────────────────────────────────────────────────────────


def _question(asked: _Parameters, within: str | None, now: datetime) -> Question:
    by: By = asked.choice("by", By, "day")
    groups = asked.groups()
    start_s, end_s = _seconds(asked, now)
    unit_s = _HOUR_S if by == "hour" else _DAY_S
    span = Span(start_s // unit_s, -(-end_s // unit_s))
    if span.end - span.first > (24 * _MOST_DAYS_BY_HOUR if by == "hour" else _MOST_DAYS):
        raise _wrong("start", f"must be at most {_MOST_DAYS_BY_HOUR if by == 'hour' else _MOST_DAYS} days before 'end'")
    only = {group: value for group in GROUPS if (value := asked.word(group)) is not None}
    kind: Any = tuple[(int, *(str for _ in groups))]  # type: ignore[misc]
    after = asked.after(kind, (_INT4, *(_MOST_WORD for _ in groups)))
    months = _months(span) if by == "month" else ()
    return Question(span, by, groups, only, within, _most(asked), after, months)


def _most(asked: _Parameters) -> int:
    value = asked.one("limit") or str(_USUAL_ROWS)
    if not _ROWS(value) or int(value) > MOST_ROWS:
        raise _wrong("limit", f"must be a number from 1 to {MOST_ROWS}")
    return int(value)


def _seconds(asked: _Parameters, now: datetime) -> tuple[int, int]:
    """From when, and up to when, in Unix seconds: this month, if nothing is said."""
    end_s = _second(asked, "end")
    if end_s is None:
        end_s = _unix(_month_after(now))
    start_s = _second(asked, "start")
    if start_s is None:
        start_s = _unix(_month_of(datetime.fromtimestamp(max(end_s - 1, 0), UTC)))
    if start_s >= end_s:
        raise _wrong("end", "must be after 'start'")
    return start_s, end_s


def _second(asked: _Parameters, name: Literal["start", "end"]) -> int | None:
    value = asked.one(name)
    if value is None:
        return None
    found = -1
    if _SECONDS(value):
        found = int(value)
    elif _MOMENT(value):
        try:
            moment = datetime.fromisoformat(value)
            found = _unix(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
        except ValueError:
            pass
    if not 0 <= found <= _LATEST_S:
        raise _wrong(name, "must be a date such as 2026-11-21, with a time as in 2026-11-21T09:30:00Z, or Unix seconds")
    return found


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


def _month_of(moment: datetime) -> datetime:
    return moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def _month_after(moment: datetime) -> datetime:
    return _month_of(_month_of(moment) + timedelta(days=31))


def _months(days: Span) -> list[int]:
    """The first days of the months that begin in these days, but for the first one."""
    found: list[int] = []
    month = _month_after(datetime.fromtimestamp(days.first * _DAY_S, UTC))
    while (day := _unix(month) // _DAY_S) < days.end:
        found.append(day)
        month = _month_after(month)
    return found


# ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _listed(rows: list[dict[str, Any]], last: tuple[object, ...] | None) -> dict[str, Any]:
    """`last` is the place of the last one, if there are more."""
    after = None if last is None else base64.urlsafe_b64encode(msgspec.json.encode(last)).rstrip(b"=").decode()
    return {"object": "list", "data": rows, "has_more": after is not None, "next": after}


def _answer(question: Question, lines: Sequence[Line], everything: Sums) -> dict[str, Any]:
    """Of so many lines that the loop should not wait for it; one more than asked for tells that there are more."""
    most, spared = question.most, tells_spared((), question.only)
    last = lines[most - 1].place if lines[most:] else None
    totals = _times(question, *question.span) | _sums(everything, spared=spared)
    return _listed([_line(question, line) for line in lines[:most]], last) | {"totals": totals}


def _line(question: Question, line: Line) -> dict[str, Any]:
    groups: dict[str, str] = dict(zip(question.groups, line.group, strict=True))
    spared = tells_spared(question.groups, question.only)
    times = _times(question, line.begins, _end(question, line.begins))
    return {"object": "usage", **times, **groups, **_sums(line.sums, spared=spared)}


def _end(question: Question, begins: int) -> int:
    """When the line ends that begins there."""
    if question.by in {"hour", "day"}:
        return begins + 1
    ends = dict(pairwise((question.span.first, *question.months, question.span.end)))
    return ends[begins]


def _times(question: Question, first: int, end: int) -> dict[str, Any]:
    unit_s = _HOUR_S if question.by == "hour" else _DAY_S
    return {"start": _moment(first * unit_s), "end": _moment(end * unit_s)}


def _moment(second: float) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _sums(sums: Sums, *, spared: bool) -> dict[str, Any]:
    """Without `spared` what was not bought cannot be told, since the groups are of what was."""
    saved = {
        "hits": sums.hits,
        "joined": sums.joined,
        "tokens": sums.spared_tokens,
        **_money(sums.spared_nano_usd, sums.spared_tokens, sums.spared_unpriced_tokens),
    }
    return {
        "calls": sums.calls,
        "texts": sums.texts,
        "tokens": sums.tokens,
        **_money(sums.nano_usd, sums.tokens, sums.unpriced_tokens),
        "estimated_nano_usd": sums.estimated_nano_usd,
        "unconfirmed_nano_usd": sums.unconfirmed_nano_usd,
        "saved": saved if spared else None,
    }


def _money(nano_usd: int, tokens: int, unpriced_tokens: int) -> Mapping[str, object]:
    """What is known of a cost; None: nothing is."""
    known = None if tokens == unpriced_tokens > 0 else nano_usd
    return {
        "cost_usd": None if known is None else money.usd(known),
        "cost_nano_usd": known,
        "complete": unpriced_tokens == 0,
        "unpriced_tokens": unpriced_tokens,
    }


def _entries(rows: Sequence[Any], most: int) -> dict[str, Any]:
    last = (rows[most - 1].at_ms, rows[most - 1].call, rows[most - 1].part) if rows[most:] else None
    return _listed([_entry(row) for row in rows[:most]], last)


def _entry(row: Any) -> dict[str, Any]:
    named = {name: getattr(row, name) for name in ("call", "part", "state", *GROUPS)}
    counted = {name: getattr(row, name) for name in ("texts", "tokens_estimated", "tokens")}
    cost = None if row.nano_usd is None else money.usd(row.nano_usd)
    at = {"object": "usage.uncertain", "at": _moment(row.at_ms // 1000)}
    return {**at, **named, **counted, "cost_usd": cost, "cost_nano_usd": row.nano_usd}
