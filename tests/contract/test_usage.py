"""What was spent, as it is told on both kinds of database: every sum equals that of the facts behind it."""

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import InvalidRequest
from app.storage.level import LevelDown
from app.storage.sql.database import Database
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import ledger
from app.storage.sql.usage import GROUPS, SqlUsage
from app.usage_desk import UsageDesk
from tests.contract.stored import SOON_S
from tests.contract.summed import Fact, added, bought, overheard, spared, sum_up

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
DAY = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp()) // 86_400
HOUR = DAY * 24
NOVEMBER = {"start": "2026-11-01T00:00:00Z", "end": "2026-12-01T00:00:00Z"}


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated one of each kind."""
    async with Database(database_url) as opened:
        await migrate(opened)
        yield opened


def desk(database: Database) -> UsageDesk:
    """Who is asked, on a day in November."""
    return UsageDesk(SqlUsage(database), now=lambda: NOW)


async def told(database: Database, within: str | None = None, **given: str) -> dict[str, Any]:
    """One answer."""
    return await desk(database).usage([*given.items()], within=within)


async def paged(database: Database, within: str | None, given: dict[str, str]) -> list[dict[str, Any]]:
    """The lines of all pages, three to a page."""
    answer = await told(database, within, **given, limit="3")
    lines = answer["data"]
    while answer["has_more"]:
        assert len(answer["data"]) == 3
        answer = await told(database, within, **given, limit="3", after=answer["next"])
        lines += answer["data"]
    assert answer["next"] is None
    return [*lines]


# ── the sums ────────────────────────────────────────────────────────────────────────────────────────────────────────


def some_facts(rng: random.Random) -> list[Fact]:
    """A quarter of a year of few tenants, with every special case somewhere."""
    facts = []
    for _ in range(300):
        hour = HOUR + rng.randrange(-35 * 24, 60 * 24)
        tenant, model = rng.choice(["", "a", "b", "B c"]), rng.choice(["small", "large"])
        if rng.random() < 0.3:
            unpriced = rng.choice([0, 10])
            facts.append(spared(hour, tenant, model, 0 if unpriced else 7, joined=2, spared_unpriced_tokens=unpriced))
            continue
        unpriced = rng.choice([0, 0, 10])
        nano_usd = 0 if unpriced else rng.randrange(10**12)
        facts.append(
            bought(
                hour, tenant, model, nano_usd, project=rng.choice(["", "p", "q"]), cause=rng.choice(["miss", "retry"]),
                deployment=rng.choice(["near", "far"]), estimated_nano_usd=rng.choice([0, nano_usd]),
                unconfirmed_nano_usd=rng.choice([0, nano_usd]), unpriced_tokens=unpriced,
            )
        )  # fmt: skip
    return facts


def bucket(by: str, hour: int, start_hour: int) -> str:
    """When the line of an hour begins."""
    moment = datetime.fromtimestamp(hour * 3600, UTC)
    first = datetime.fromtimestamp(start_hour * 3600, UTC)
    match by:
        case "day":
            moment = moment.replace(hour=0)
        case "month":
            moment = max(moment.replace(day=1, hour=0), first)
        case "total":
            moment = first
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_asked_the_sums_are_those_of_the_facts(database: Database, seed: int) -> None:
    """Any grouping, any filter, any span, any page; nothing is lost between pages, and the totals are of all."""
    rng = random.Random(seed)
    facts = some_facts(rng)
    await sum_up(database, facts)
    for _ in range(25):
        by = rng.choice(["hour", "day", "month", "total"])
        groups = [group for group in GROUPS if rng.random() < 0.4]
        only = {group: value for group, value in {"tenant": "a", "project": "p", "model": "small", "deployment": "far",
                "cause": "miss"}.items() if rng.random() < 0.15}  # fmt: skip
        within = rng.choice([None, None, "a", "B c", "nobody"])
        start = DAY + rng.randrange(-40, 40)
        end = start + rng.randrange(1, 90 if by != "hour" else 20)
        given = {"by": by, "start": str(start * 86_400), "end": str(end * 86_400), "group": ",".join(groups), **only}
        wanted = [
            fact for fact in facts
            if start <= fact.hour // 24 < end
            and within in {None, fact.tenant}
            and all(getattr(fact, name) == value for name, value in only.items())
        ]  # fmt: skip
        purchases = {"project", "deployment", "cause"}
        expected: dict[tuple[str, ...], list[Fact]] = {}
        for fact in wanted:
            if fact.cause or not purchases & {*groups, *only}:
                key = (bucket(by, fact.hour, start * 24), *(getattr(fact, group) for group in groups))
                expected.setdefault(key, []).append(fact)
        lines = await paged(database, within, given)
        assert {(line["start"], *(line[group] for group in groups)) for line in lines} == {*expected}
        assert len(lines) == len(expected)
        for line in lines:
            key = (line["start"], *(line[group] for group in groups))
            check(line, expected[key], saved=not purchases & {*groups, *only})
        totals = (await told(database, within, **given))["totals"]
        check(totals, [fact for fact in wanted if fact.cause or not purchases & {*only}], saved=not purchases & {*only})


def check(line: dict[str, Any], facts: list[Fact], *, saved: bool) -> None:
    """Every number of a line is that of its facts."""
    sums = added(fact.sums for fact in facts)
    known = None if sums.tokens == sums.unpriced_tokens > 0 else sums.nano_usd
    assert (line["calls"], line["texts"], line["tokens"]) == (sums.calls, sums.texts, sums.tokens)
    assert (line["cost_nano_usd"], line["unpriced_tokens"]) == (known, sums.unpriced_tokens)
    assert line["complete"] is (sums.unpriced_tokens == 0)
    assert line["estimated_nano_usd"] == sums.estimated_nano_usd
    assert line["unconfirmed_nano_usd"] == sums.unconfirmed_nano_usd
    if not saved:
        assert line["saved"] is None
        return
    spared_known = None if sums.spared_tokens == sums.spared_unpriced_tokens > 0 else sums.spared_nano_usd
    assert line["saved"]["cost_nano_usd"] == spared_known
    assert [line["saved"][name] for name in ("hits", "joined", "tokens", "unpriced_tokens")] == [
        sums.hits, sums.joined, sums.spared_tokens, sums.spared_unpriced_tokens,
    ]  # fmt: skip


async def test_a_line_of_an_answer_to_the_last_digit(database: Database) -> None:
    """Names, times and money as they are documented."""
    await sum_up(database, [bought(HOUR + 30, "a", "small", 1_234_567), spared(HOUR + 30, "a", "small", 20)])
    answer = await told(database)
    line = {
        "object": "usage", "start": "2026-11-02T00:00:00Z", "end": "2026-11-03T00:00:00Z", "model": "small",
        "calls": 1, "texts": 1, "tokens": 10, "cost_usd": "0.001234567", "cost_nano_usd": 1_234_567,
        "complete": True, "unpriced_tokens": 0, "estimated_nano_usd": 0, "unconfirmed_nano_usd": 0,
        "saved": {"hits": 1, "joined": 0, "tokens": 10, "cost_usd": "0.00000002", "cost_nano_usd": 20,
                  "complete": True, "unpriced_tokens": 0},
    }  # fmt: skip
    totals = {name: value for name, value in line.items() if name not in {"object", "model"}} | NOVEMBER
    assert answer == {"object": "list", "data": [line], "has_more": False, "next": None, "totals": totals}


async def test_nothing_spent_is_nothing_and_not_unknown(database: Database) -> None:
    """An empty answer has totals of 0 that are complete."""
    answer = await told(database, "a")
    assert (answer["data"], answer["totals"]["cost_usd"], answer["totals"]["complete"]) == ([], "0.00", True)


async def test_money_beyond_what_a_float_holds_is_exact(database: Database) -> None:
    """A billion dollars and a nano-dollar."""
    await sum_up(database, [bought(HOUR, "a", "m", 10**18), bought(HOUR + 1, "a", "m", 1)])
    assert (await told(database))["data"][0]["cost_usd"] == "1000000000.000000001"


async def test_a_price_that_is_not_known_is_never_zero(database: Database) -> None:
    """Nothing known is null; known in part is a sum that says so."""
    unknown = bought(HOUR, "a", "m", 0, unpriced_tokens=10)
    await sum_up(database, [unknown, bought(HOUR + 24, "a", "m", 5), unknown._replace(hour=HOUR + 25)])
    lines = (await told(database))["data"]
    assert [(line["cost_usd"], line["complete"], line["unpriced_tokens"]) for line in lines] == [
        (None, False, 10), ("0.000000005", False, 10),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "span"),
    [
        ({}, ("2026-11-01", "2026-12-01")),
        ({"start": "2026-11-21"}, ("2026-11-21", "2026-12-01")),
        ({"end": "2026-11-01"}, ("2026-10-01", "2026-11-01")),
        ({"end": "2026-10-31T23:00:00+01:00"}, ("2026-10-01", "2026-11-01")),
        ({"start": "2026-11-05T10:30:00Z", "end": "2026-11-05T10:31:00.5Z"}, ("2026-11-05", "2026-11-06")),
        ({"start": "1762300800", "end": "1762300801"}, ("2025-11-05", "2025-11-06")),
        ({"start": "0", "end": "1970-01-02"}, ("1970-01-01", "1970-01-02")),
    ],
)
async def test_spans_are_whole_days_around_what_was_asked(
    sqlite_url: str, given: dict[str, str], span: tuple[str, str]
) -> None:
    """This month unless something is said; the answer tells what it covers."""
    async with Database(sqlite_url) as database:
        await migrate(database)
        totals = (await told(database, **given))["totals"]
    assert (totals["start"], totals["end"]) == tuple(f"{day}T00:00:00Z" for day in span)


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("start", [("start", "yesterday")]),
        ("start", [("start", "2026-13-01")]),
        ("start", [("start", "2026-11-01T00:00:00")]),
        ("start", [("start", "2026-W01-1")]),
        ("start", [("start", "-1")]),
        ("start", [("start", "99999999999")]),
        ("start", [("start", "٣")]),
        ("start", [("start", "0001-01-01T00:00:00+23:00")]),
        ("start", [("start", "2000-01-01")]),
        ("start", [("start", "2024-11-01"), ("by", "hour")]),
        ("start", [("start", "2026-11-01"), ("start", "2026-11-02")]),
        ("end", [("end", "")]),
        ("end", [("start", "2026-11-02"), ("end", "2026-11-02")]),
        ("end", [("end", "0")]),
        ("by", [("by", "week")]),
        ("group", [("group", "user")]),
        ("group", [("group", "model"), ("group", "model,key")]),
        ("limit", [("limit", "0")]),
        ("limit", [("limit", "10001")]),
        ("limit", [("limit", "1e3")]),
        ("model", [("model", "a\0b")]),
        ("model", [("model", "\ud800")]),
        ("model", [("model", "m" * 256)]),
        ("after", [("after", "")]),
        ("after", [("after", "!")]),
        ("after", [("after", "é")]),
        ("after", [("after", "WzFd")]),
        ("after", [("after", "WzEsICJcdTAwMDAiXQ")]),
        ("after", [("after", "Wzk5OTk5OTk5OTk5LCAiYSJd")]),
        ("tenant ", [("tenant ", "a")]),
        ("limits", [("limits", "1")]),
    ],
)
async def test_what_cannot_be_asked_is_refused_by_name(
    sqlite_url: str, param: str, given: list[tuple[str, str]]
) -> None:
    """Before the database hears of it."""
    async with Database(sqlite_url) as database:
        with pytest.raises(InvalidRequest) as refused:
            await desk(database).usage(given, within=None)
    assert refused.value.param == param


async def test_nobody_waits_for_ever_behind_questions(database: Database) -> None:
    """What comes while fifty wait is refused, and those before it are answered."""
    usage = SqlUsage(database)
    questions = (usage.uncertain(0, 1, within=None, most=1) for _ in range(60))
    answers = await asyncio.gather(*questions, return_exceptions=True)
    assert [isinstance(answer, LevelDown) for answer in answers] == [*[False] * 50, *[True] * 10]
    assert [*await usage.uncertain(0, 1, within=None, most=1)] == []


# ── what no vendor confirmed ────────────────────────────────────────────────────────────────────────────────────────


def row(number: int, state: str, **other: Any) -> dict[str, Any]:
    """A row of the ledger, one a minute from the beginning of November."""
    return {
        "call": f"call-{number}", "part": 0, "at_ms": (HOUR * 3600 + 60 * number) * 1000, "replica": "r",
        "tenant": "a", "project": "", "key": "", "user": "", "model": "m", "space": "s1-x", "deployment": "main",
        "cause": "miss", "state": state, "texts": 1, "tokens_estimated": 9, "tokens": 10, "price": 20_000,
        "nano_usd": 200, **other,
    }  # fmt: skip


async def test_only_what_no_vendor_confirmed_is_listed(database: Database) -> None:
    """In the order of time, page by page, within the span, of one tenant if one is named."""
    states = ["billed", "unconfirmed", "estimated", "failed", "begun"] * 4
    rows = [row(number, state, tenant="ab"[number % 2]) for number, state in enumerate(states)]
    rows.append(row(-1, "unconfirmed"))
    rows.append(row(99, "unconfirmed", price=None, nano_usd=None))
    await database.write(lambda connection: connection.execute(ledger.insert(), rows), within_s=SOON_S)

    async def listed(**given: str) -> list[str]:
        answer = await desk(database).uncertain([*given.items(), ("limit", "2")])
        found = [entry["call"] for entry in answer["data"]]
        while answer["has_more"]:
            answer = await desk(database).uncertain([*given.items(), ("limit", "2"), ("after", answer["next"])])
            found += [entry["call"] for entry in answer["data"]]
        return found

    numbers = [1, 2, 6, 7, 11, 12, 16, 17]
    assert await listed() == [f"call-{number}" for number in [*numbers, 99]]
    assert await listed(tenant="b") == [f"call-{number}" for number in numbers if number % 2]
    assert await listed(start="2026-10-31", end="2026-11-01") == ["call--1"]
    last = (await desk(database).uncertain([]))["data"][-1]
    assert (last["at"], last["state"], last["cost_usd"]) == ("2026-11-01T01:39:00Z", "unconfirmed", None)


async def test_what_no_vendor_confirmed_is_found_without_reading_the_ledger(postgres_url: str) -> None:
    """By an index that holds nothing else."""
    async with Database(postgres_url) as database:
        await migrate(database)
        rows = [row(number, "billed" if number % 100 else "estimated") for number in range(5000)]
        await database.write(lambda connection: connection.execute(ledger.insert(), rows), within_s=SOON_S)

        with overheard(database) as heard:
            await desk(database).uncertain([("limit", "9")])
        ((statement, parameters),) = heard

        async def plan(connection: AsyncConnection) -> str:
            await connection.execute(text("ANALYZE ledger"))
            return "\n".join((await connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)).scalars())

        assert "Index Scan using ledger_uncertain" in await database.read(plan, within_s=SOON_S)
