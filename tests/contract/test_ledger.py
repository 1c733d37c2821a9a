"""What is spent is in the books once, to the nano-dollar, on both kinds of database: rows, sums, accounts."""

import asyncio
import io
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import generate_latest
from sqlalchemy import Row, func, select, update

from app import money
from app.errors import TryAgainLater
from app.ports import End, Part, Purchase
from app.storage.journal import SEGMENT_BYTES, Journal
from app.storage.ledger import BookedLedger
from app.storage.sql.database import Database
from app.storage.sql.entries import Line, Spared, State
from app.storage.sql.ledger import SqlLedger
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import leases, ledger, now_ms, replicas, spared, usage_days, usage_hours, usage_totals
from app.telemetry import Telemetry
from tests.contract.stored import SOON_S, change, scalars

NOON_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z
DAY, MONTH = "2026-11-21", "2026-11"
SEARCH = Part("search", "web", "k1", "u1", "miss", 2, 30)
ARCHIVE = Part("archive", "", "", "", "bulk", 1, 12)
STATES: tuple[State, ...] = ("begun", "unconfirmed", "billed", "estimated", "failed")
OWN = Part("", "", "", "", "canary", 3, 8)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated one of each kind."""
    async with Database(database_url) as opened:
        await migrate(opened)
        yield opened


@pytest.fixture
def sql(database: Database) -> SqlLedger:
    """The one of replica r1."""
    return SqlLedger(database, "r1")


def purchase(name: str, *parts: Part, price: int | None = 20_000, at_ms: int = NOON_MS) -> Purchase:
    """A call to `main`; 20,000 pico-USD per token are 0.02 USD per million."""
    return Purchase(name, at_ms, "main", "small", "s1-abc", price, parts or (SEARCH,))


def line(name: str, state: State, tokens: int, *parts: Part, replica: str = "r1", **more: Any) -> Line:
    """How a purchase of this name stands."""
    return Line(purchase(name, *parts, **more), state, tokens, replica)


async def rows_of(database: Database, table: Any) -> list[Row[Any]]:
    """All of it, in order."""
    statement = select(table).order_by(*table.primary_key)
    return [*await database.read(lambda connection: connection.execute(statement), within_s=SOON_S)]


async def states(database: Database) -> dict[str, tuple[str, int, int | None]]:
    """State, tokens and nano-USD of each call's first part."""
    return {row.call: (row.state, row.tokens, row.nano_usd) for row in await rows_of(database, ledger) if not row.part}


async def check_sums(database: Database) -> None:
    """Every sum is that of the rows it stands for."""
    rows = [row for row in await rows_of(database, ledger) if row.state not in {"begun", "failed"}]
    expected: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        for key in ((row.at_ms // 3_600_000, row.tenant, row.project, row.model, row.deployment, row.cause),):
            expected[key, "tokens"] += row.tokens
            expected[key, "nano_usd"] += row.nano_usd or 0
            expected[key, "texts"] += row.texts
            expected[key, "estimated_nano_usd"] += (row.nano_usd or 0) * (row.state == "estimated")
            expected[key, "unconfirmed_nano_usd"] += (row.nano_usd or 0) * (row.state == "unconfirmed")
            expected[key, "unpriced_tokens"] += row.tokens if row.nano_usd is None else 0
    found: Counter[tuple[Any, ...]] = Counter()
    for row in await rows_of(database, usage_hours):
        for name in ("tokens", "nano_usd", "texts", "estimated_nano_usd", "unconfirmed_nano_usd", "unpriced_tokens"):
            found[tuple(row[:6]), name] += getattr(row, name)
    assert +found == +expected
    for table in (usage_days, usage_totals):
        for name in ("tokens", "nano_usd", "unconfirmed_nano_usd"):
            (total,) = await scalars(database, select(func.coalesce(func.sum(table.c[name]), 0)))
            assert int(total) == sum(count for (_, kind), count in expected.items() if kind == name)


# ── rows and sums ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_shared_call_is_split_to_the_last_nano_dollar(sql: SqlLedger, database: Database) -> None:
    """Tokens and money of the parts sum to the call's, and every sum says the same."""
    user_too = Part("search", "web", "k1", "u2", "miss", 1, 7)
    booked = await sql.book([line("c", "billed", 101, SEARCH, user_too, ARCHIVE, OWN, price=33_333)])
    rows = await rows_of(database, ledger)
    assert [row.tokens for row in rows] == [53, 12, 21, 15]
    assert sum(row.nano_usd for row in rows) == money.cost_nano_usd(101, 33_333) == 3367
    assert [(row.tenant, row.texts, row.tokens_estimated, row.state, row.price) for row in rows][:1] == [
        ("search", 2, 30, "billed", 33_333)
    ]
    of_search = rows[0].nano_usd + rows[1].nano_usd
    assert sorted(booked.spent) == sorted(
        (account, span, nano_usd)
        for account, nano_usd in [
            ("tenant search", of_search), ("project search/web", of_search), ("key k1", of_search),
            ("tenant archive", rows[2].nano_usd),
        ]
        for span in (DAY, MONTH)
    )  # fmt: skip
    assert booked.more == {
        ("search", "small", "miss"): of_search,
        ("archive", "small", "bulk"): rows[2].nano_usd,
        ("", "small", "canary"): rows[3].nano_usd,
    }
    days = {(row.tenant, row.cause): row.calls for row in await rows_of(database, usage_days)}
    assert days == {("search", "miss"): 1, ("archive", "bulk"): 1, ("", "canary"): 1}
    await check_sums(database)


async def test_told_again_it_counts_once(sql: SqlLedger, database: Database) -> None:
    """Alone, among others, and after another end was told of it."""
    await sql.book([line("a", "billed", 42, SEARCH, ARCHIVE)])
    again = await sql.book([line("a", "billed", 42, SEARCH, ARCHIVE), line("b", "billed", 1)])
    assert again.calls == 1
    assert {("tenant archive", DAY, 240), ("tenant search", MONTH, 620)} <= {*again.spent}  # told to whoever missed it
    assert (await sql.book([line("a", "unconfirmed", 99, SEARCH, ARCHIVE)])).calls == 0
    assert await states(database) == {"a": ("billed", 30, 600), "b": ("billed", 1, 20)}
    await check_sums(database)


@pytest.mark.parametrize(
    ("end", "tokens", "nano_usd"), [("billed", 50, 1000), ("estimated", 30, 600), ("failed", 0, 0)]
)
async def test_what_was_thought_lost_gives_way_to_its_real_end(
    sql: SqlLedger, database: Database, end: End, tokens: int, nano_usd: int
) -> None:
    """The sums are corrected by the difference; nothing that comes later changes them again."""
    await sql.book([line("a", "begun", 0)])
    assert await sql.spent(["tenant search"], [DAY, MONTH]) == {}
    await sql.book([line("a", "unconfirmed", 30)])
    await check_sums(database)
    booked = await sql.book([line("a", end, tokens)])
    assert {total for _, _, total in booked.spent} <= {nano_usd}
    for later in STATES:
        assert (await sql.book([line("a", later, 7)])).calls == 0
    assert await states(database) == {"a": (end, tokens, nano_usd)}
    spent = await sql.spent(["tenant search", "nobody"], [DAY, MONTH])
    assert spent == {("tenant search", DAY): nano_usd, ("tenant search", MONTH): nano_usd}
    await check_sums(database)


async def test_what_has_no_price_is_unknown_and_not_free(sql: SqlLedger, database: Database) -> None:
    """Its tokens stand beside the money; what failed took nothing at any price."""
    booked = await sql.book([line("a", "billed", 42, price=None), line("b", "failed", 0, price=None)])
    assert (booked.spent, booked.more) == ((), {})
    assert await states(database) == {"a": ("billed", 42, None), "b": ("failed", 0, 0)}
    (day,) = await rows_of(database, usage_days)
    assert (day.calls, day.tokens, day.nano_usd, day.unpriced_tokens) == (1, 42, 0, 42)


async def test_whatever_is_told_in_whatever_order_the_sums_are_those_of_the_rows(
    sql: SqlLedger, database: Database
) -> None:
    """Hundreds of calls, by two tellers at once, some twice, some thought lost, over the end of a month."""
    rng = random.Random(5)
    told = []
    for number in range(300):
        parts = rng.sample([SEARCH, ARCHIVE, OWN, Part("t", "p", "k2", "", "retry", 1, 5)], rng.randint(1, 4))
        price, at_ms = rng.choice([None, 1, 20_000, 130_000]), NOON_MS + rng.randrange(20) * 86_400_000
        for state in rng.sample(STATES, rng.randint(1, 4)):
            tokens = 0 if state in {"begun", "failed"} else rng.randint(0, 500)
            told.append(line(str(number), state, tokens, *parts, price=price, at_ms=at_ms))
    rng.shuffle(told)
    other = SqlLedger(database, "r2")
    for start in range(0, len(told), 80):
        one = {each.purchase.id: each for each in told[start : start + 40]}
        two = {each.purchase.id: each for each in told[start + 40 : start + 80] if each.purchase.id not in one}
        await asyncio.gather(sql.book([*one.values()]), other.book([*two.values()]))
    await check_sums(database)
    rows = await rows_of(database, ledger)
    spent = sum(row.nano_usd or 0 for row in rows if row.tenant == "search")
    spans = await sql.spent(["tenant search"], ["2026-11", "2026-12"])
    assert sum(spans.values()) == spent


async def test_two_who_tell_the_same_at_once_are_heard_once(sql: SqlLedger, database: Database) -> None:
    """As when a transaction is thought lost and goes on: the later one finds it, or is refused and told again."""
    lines = [line(str(number), "billed", 10) for number in range(100)]
    tellers = [SqlLedger(database, "r1") for _ in range(4)]
    await asyncio.gather(*(teller.book(lines) for teller in tellers), return_exceptions=True)
    await sql.book(lines)
    assert len(await states(database)) == 100
    await check_sums(database)


async def test_what_was_spared_is_added_up(sql: SqlLedger, database: Database) -> None:
    """By minute, and beside what was bought by hour and day."""
    await sql.book([line("a", "billed", 42)])
    minute = NOON_MS // 60_000
    for _ in range(2):
        await sql.add_spared({(minute, "search", "small"): Spared(3, 1, 40, 800, 0)})
    await sql.add_spared({(minute + 1, "search", "small"): Spared(1, 0, 9, 0, 9), (minute, "b", "m"): Spared(1)})
    assert {tuple(row[:3]): tuple(row[3:]) for row in await rows_of(database, spared)} == {
        (minute, "search", "small"): (6, 2, 80, 1600, 0),
        (minute + 1, "search", "small"): (1, 0, 9, 0, 9),
        (minute, "b", "m"): (1, 0, 0, 0, 0),
    }
    for table in (usage_hours, usage_days, usage_totals):
        sums = [getattr(table.c, name) for name in ("tokens", "hits", "spared_tokens", "spared_unpriced_tokens")]
        assert [
            int(total) for each in sums for total in await scalars(database, select(func.sum(each)))
        ] == [42, 8, 89, 9]  # fmt: skip


# ── replicas that are gone, rows that are old ───────────────────────────────────────────────────────────────────────


async def test_what_a_dead_replica_began_is_booked_by_another(sql: SqlLedger, database: Database) -> None:
    """Once nothing was seen of it for a minute; as if each text had taken what was expected."""
    other = SqlLedger(database, "r2")
    await sql.book([line("dead", "begun", 0, SEARCH, ARCHIVE)])
    await other.book([line("alive", "begun", 0, replica="r2")])
    assert (await other.sweep()).calls == 0
    await change(database, update(replicas).where(replicas.c.id == "r1").values(seen_at_ms=now_ms - 61_000))
    assert (await other.sweep()).calls == 0  # somebody has just looked
    await change(database, update(leases).values(taken_at_ms=0))
    swept = await other.sweep()
    assert swept.more == {("search", "small", "miss"): 600, ("archive", "small", "bulk"): 240}
    assert await states(database) == {"dead": ("unconfirmed", 30, 600), "alive": ("begun", 0, None)}
    await check_sums(database)
    await sql.book([line("dead", "billed", 100, SEARCH, ARCHIVE)])  # it was only cut off
    assert (await states(database))["dead"] == ("billed", 71, 1420)
    await check_sums(database)


async def test_old_rows_go_and_their_sums_stay(sql: SqlLedger, database: Database) -> None:
    """In batches; what is young enough stays too."""
    (now,) = await scalars(database, select(now_ms))
    lines = [line(str(number), "billed", 10, at_ms=now - 11 * 86_400_000) for number in range(1500)]
    await sql.book(lines[:1000])
    await sql.book([*lines[1000:], line("young", "billed", 10, at_ms=now - 9 * 86_400_000)])
    old, young = ((now - days * 86_400_000) // 60_000 for days in (11, 9))
    await sql.add_spared({(old, "search", "small"): Spared(1), (young, "search", "small"): Spared(2)})
    assert await sql.trim(10) == 1501
    assert list(await states(database)) == ["young"]
    assert await scalars(database, select(spared.c.hits)) == [2]
    assert await scalars(database, select(func.sum(usage_totals.c.tokens))) == [15_010]


# ── through the journal ─────────────────────────────────────────────────────────────────────────────────────────────


class Books:
    """A ledger over a journal, and what can be seen of it."""

    def __init__(self, folder: Path, database: Database, replica: str, *, max_bytes: int = 2**30) -> None:
        self.folder = folder / "journal"
        self.folder.mkdir(exist_ok=True)
        self.log = io.BytesIO()
        self.telemetry = Telemetry(tenants=["search"], stream=self.log)
        self.ready = True
        """Whether the database may be used."""
        self.journal = Journal(self.folder, replica, max_bytes=max_bytes)
        self.ledger = BookedLedger(self.journal, SqlLedger(database, replica), self.telemetry, ready=lambda: self.ready)
        self.totals: dict[tuple[str, str], int] = {}
        self.spent: dict[tuple[str, int], int] = {}
        self.settled_of: list[str] = []
        self.ledger.watchers.append(self)

    def ended(self, account: str, day: int, nano_usd: int) -> None:
        """See `Watcher`."""
        self.spent[account, day] = self.spent.get((account, day), 0) + nano_usd

    def booked(self, account: str, span: str, nano_usd: int) -> None:
        """See `Watcher`."""
        self.totals[account, span] = nano_usd

    def settled(self, replica: str) -> None:
        """See `Watcher`."""
        self.settled_of.append(replica)

    def buy(self, name: str, how: End = "billed", tokens: int = 42, **more: Any) -> None:
        """One call from beginning to end."""
        bought = purchase(name, SEARCH, ARCHIVE, **more)
        self.ledger.begin(bought)
        self.ledger.end(bought, tokens, how)

    @property
    def left(self) -> list[Path]:
        """What is left in the folder of journals."""
        return [*self.folder.iterdir()]


@asynccontextmanager
async def books(folder: Path, database: Database, replica: str = "r1", **more: Any) -> AsyncIterator[Books]:
    """One that is open."""
    opened = Books(folder, database, replica, **more)
    async with opened.ledger:
        yield opened
    opened.telemetry.close()


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what nobody tells."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_has_ended_is_soon_in_the_database(database: Database, tmp_path: Path) -> None:
    """Until then it is known here; then its totals are told, and nothing is left of the journal when it closes."""
    async with books(tmp_path, database) as opened:
        opened.buy("a")
        opened.buy("b", "failed", 0)
        assert opened.ledger.waiting == 2
        assert opened.ledger.unbooked("tenant search") == {DAY: 600, MONTH: 600}
        assert opened.ledger.unbooked("project search/web") == {DAY: 600, MONTH: 600}
        assert {account: nano_usd for (account, _), nano_usd in opened.spent.items()}["tenant search"] == 600
        await until(lambda: opened.ledger.waiting == 0)
        assert opened.ledger.unbooked("tenant search") == {}
        assert opened.totals["key k1", DAY] == 600
        opened.buy("c", price=None)
        assert opened.ledger.journal_bytes == SEGMENT_BYTES
    assert await states(database) == {"a": ("billed", 30, 600), "b": ("failed", 0, 0), "c": ("billed", 30, None)}
    assert opened.left == []
    scraped = generate_latest(opened.telemetry.registry).decode()
    assert 'embedgate_spent_usd_total{cause="miss",model="small",tenant="search"} 6e-07' in scraped
    assert 'embedgate_spent_usd_total{cause="bulk",model="small",tenant="other"} 2.4e-07' in scraped


async def test_what_takes_long_is_told_before_it_ends(database: Database, tmp_path: Path) -> None:
    """So that others can book it if this disk is lost; told in the end, it counts once."""
    async with books(tmp_path, database) as opened:
        slow, quick = (purchase(name, at_ms=int(time.time() * 1000) - ago) for name, ago in (("s", 2500), ("q", 0)))
        opened.ledger.begin(slow)
        opened.ledger.begin(quick)
        async with asyncio.timeout(10):
            while not await states(database):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await states(database) == {"s": ("begun", 0, None)}
        assert await scalars(database, select(replicas.c.id)) == ["r1"]
        opened.ledger.end(slow, 42, "billed")
        opened.ledger.end(quick, 42, "billed")
    assert await states(database) == {"s": ("billed", 42, 840), "q": ("billed", 42, 840)}
    await check_sums(database)


async def test_what_cannot_be_booked_at_closing_is_booked_by_who_comes_next(
    database: Database, tmp_path: Path
) -> None:  # fmt: skip
    """Ended or not; that which was not ended by whoever died is unconfirmed, with what was expected."""
    async with books(tmp_path, database) as first:
        first.ready = False
        for number in range(2500):  # more than a transaction takes
            first.buy(str(number))
        first.ledger.begin(purchase("lost", SEARCH, ARCHIVE))
        first.journal.append(b"\x92\x09\x00")  # of a later version
    assert len(first.left) == 1
    async with books(tmp_path, database, "r2") as second:
        await until(lambda: not second.left)
        assert second.ledger.unbooked("tenant search") == {}
    found = await states(database)
    assert found.pop("lost") == ("unconfirmed", 30, 600)
    assert found == {str(number): ("billed", 30, 600) for number in range(2500)}
    told = [json.loads(each) for each in second.log.getvalue().splitlines()]
    assert [sum(each[count] for each in told) for count in ("purchases", "unconfirmed")] == [2501, 1]
    await check_sums(database)


async def test_a_full_journal_refuses_what_begins_until_there_is_room(database: Database, tmp_path: Path) -> None:
    """What is under way can end; all that was taken is booked, nothing of what was refused."""
    async with books(tmp_path, database, max_bytes=SEGMENT_BYTES) as opened:
        opened.ready = False
        user = "u" * 60_000
        begun = [
            purchase(str(number), Part("search", "", "", user, "miss", 1, 10)) for number in range(80)
        ]  # fmt: skip
        taken = 0
        with suppress(TryAgainLater):
            for each in begun:
                opened.ledger.begin(each)
                taken += 1
        with pytest.raises(TryAgainLater, match="cannot be written down"):
            opened.ledger.begin(begun[-1])
        assert taken == SEGMENT_BYTES // 60_200
        for each in begun[:taken]:
            opened.ledger.end(each, 10, "billed")
        opened.ready = True
        await until(lambda: opened.ledger.waiting == 0)
    assert list((await states(database)).values()) == [("billed", 10, 200)] * taken
    assert opened.log.getvalue().count(b'"event":"journal.full"') == 1


async def test_a_journal_that_was_full_takes_again_what_begins(database: Database, tmp_path: Path) -> None:
    """As soon as what fills it is known to the database."""
    async with books(tmp_path, database, max_bytes=2 * SEGMENT_BYTES) as opened:
        user = "u" * 60_000
        for number in range(300):
            bought = purchase(str(number), Part("search", "", "", user, "miss", 1, 10))
            opened.ledger.begin(bought)
            opened.ledger.end(bought, 10, "billed")
            if number % 50 == 49:
                await until(lambda: opened.ledger.journal_bytes == SEGMENT_BYTES)
    assert len(await states(database)) == 300


async def test_what_was_spared_is_written_now_and_then(database: Database, tmp_path: Path) -> None:
    """And waits while the database may not be used."""
    async with books(tmp_path, database) as opened:
        opened.ready = False
        for nano_usd in (100, None):
            opened.ledger.spared("search", "small", hits=2, joined=1, tokens=5, nano_usd=nano_usd)
        opened.ready = True
    assert [tuple(row[3:]) for row in await rows_of(database, spared)] == [(4, 2, 10, 100, 5)]


async def test_a_claim_beyond_all_reason_does_not_stop_the_books(database: Database, tmp_path: Path) -> None:
    """A vendor that says it counted more tokens than fit into a row is believed as far as it fits."""
    async with books(tmp_path, database) as opened:
        opened.buy("mad", tokens=10**30, price=10**12)
        opened.buy("sane")
    assert {name: tokens for name, (_, tokens, _) in (await states(database)).items()} == {
        "mad": 1_533_916_890, "sane": 30,
    }  # fmt: skip
