"""What budgets promise, in one process and over replicas: never a nano-dollar more, and all that is left."""

import asyncio
import io
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain import Allowance
from app.errors import BudgetExhausted, TryAgainLater
from app.ports import Bounds
from app.storage.budgets import SharedBudgets
from app.storage.redis_server import RedisServer
from app.storage.sql.database import DatabaseDown
from app.storage.sql.entries import spans_of
from app.storage.sql.ledger import SqlLedger
from app.telemetry import Telemetry
from tests.replicas import TimelessServer, timeless

pytestmark = pytest.mark.looptime

DAY_S = 86_400
NOON_S = 20_000 * DAY_S + DAY_S // 2
TENANT = "tenant search"


def bounds(per_day: int | None = None, per_month: int | None = 1000, **others: Allowance) -> Bounds:
    """Those of a tenant, and of `others` by account."""
    more = tuple((f"project search/{name}", allowance) for name, allowance in others.items())
    return Bounds("search", ((TENANT, Allowance(per_day, per_month)), *more))


MONTHLY = bounds()


class Sql:
    """The sums of a database: what replicas booked, by account and span."""

    def __init__(self) -> None:
        self.sums: Counter[tuple[str, str]] = Counter()
        self.away = False
        self.asked = 0

    async def spent(self, accounts: Sequence[str], spans: Sequence[str]) -> Mapping[tuple[str, str], int]:
        """See `SqlLedger.spent`."""
        self.asked += 1
        if self.away:
            raise DatabaseDown("away")
        return {(account, span): self.sums[account, span] for account in accounts for span in spans}


class Replica:
    """One that spends as it is let, and books now and then."""

    def __init__(self, sql: Sql, server: TimelessServer | None, name: str, *, parts: int, began_s: float) -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        self.name = name
        self.sql = sql
        self.began_s = began_s
        self.now_s: Callable[[], float] = lambda: began_s + loop.time() - start_s
        self.budgets = SharedBudgets(
            cast("SqlLedger", sql), Telemetry(stream=io.BytesIO()), server=cast("RedisServer | None", server),
            replica=name, max_replicas=parts, clock=self.now_s,
        )  # fmt: skip
        self.unbooked: dict[str, Counter[str]] = {}
        self.budgets.unbooked = lambda account: self.unbooked.get(account, {})
        self.aside: Counter[str] = Counter()

    async def reserve(self, of: Bounds, cost: int, *, within_s: float = 30.0) -> bool:
        """Whether it may."""
        try:
            await self.budgets.reserve(of, cost, within_s=within_s)
        except BudgetExhausted:
            return False
        for account, _ in of.allowances:
            self.aside[account] += cost
        return True

    def spend(self, of: Bounds, cost: int, really: int | None = None) -> None:
        """What was reserved is spent, or something else."""
        day = int(self.now_s() // DAY_S)
        really = cost if really is None else really
        for account, _ in of.allowances:
            sums = self.unbooked.setdefault(account, Counter())
            for span in spans_of(day):
                sums[span] += really
            self.budgets.ended(account, day, really)
            self.aside[account] -= cost
        self.budgets.release(of, cost)

    async def buy(self, of: Bounds, cost: int, really: int | None = None) -> bool:
        """Both, one after the other."""
        if not await self.reserve(of, cost):
            return False
        self.spend(of, cost, really)
        return True

    def book(self) -> None:
        """What it spent is in the database, which tells the sums."""
        for account, sums in self.unbooked.items():
            for span, nano_usd in sums.items():
                self.sql.sums[account, span] += nano_usd
            booked, self.unbooked[account] = sums, Counter()
            for span in booked:
                self.budgets.booked(account, span, self.sql.sums[account, span])


def spent(sql: Sql, replicas: Sequence[Replica], account: str = TENANT, *, day_s: float = NOON_S) -> int:
    """All that was spent in the month, and is set aside."""
    month = spans_of(int(day_s // DAY_S))[1]
    of_each = (each.unbooked.get(account, Counter())[month] + each.aside[account] for each in replicas)
    return sql.sums[account, month] + sum(of_each)


_names = itertools.count()


@asynccontextmanager
async def replicas(
    sql: Sql, server: TimelessServer | None, count: int = 1, *, parts: int = 4, began_s: float = NOON_S
) -> AsyncIterator[list[Replica]]:
    """So many, of at most `parts`."""
    async with AsyncExitStack() as stack:
        made = [Replica(sql, server, f"r{next(_names)}", parts=parts, began_s=began_s) for _ in range(count)]
        for each in made:
            await stack.enter_async_context(each.budgets)
        yield made


@pytest.fixture
def server(redis_url: str) -> Iterator[TimelessServer]:
    """An empty server in virtual time."""
    with timeless(redis_url) as found:
        yield found


@pytest.fixture(params=["alone", "shared"])
def either(request: pytest.FixtureRequest, redis_url: str) -> Iterator[TimelessServer | None]:
    """A server, or none."""
    if request.param == "alone":
        yield None
        return
    with timeless(redis_url) as found:
        yield found


# ── one process, or one of many ─────────────────────────────────────────────────────────────────────────────────────


async def test_all_of_a_budget_is_spent_and_nothing_more(either: TimelessServer | None) -> None:
    """To the unit, whatever the size of what is asked for."""
    sql, rng = Sql(), random.Random(5)
    async with replicas(sql, either) as (one,):
        for _ in range(200):
            await one.buy(MONTHLY, rng.randint(1, 60))
            if rng.random() < 0.2:
                one.book()
                await asyncio.sleep(1.0)
        while await one.buy(MONTHLY, 1):
            pass
        assert spent(sql, [one]) == 1000
        assert not await one.buy(MONTHLY, 1)


async def test_what_was_spent_before_counts(either: TimelessServer | None) -> None:
    """The database knows, also of other days of the month; of other months it does not matter."""
    sql = Sql()
    today, month = spans_of(int(NOON_S // DAY_S))
    sql.sums[TENANT, month], sql.sums[TENANT, today], sql.sums[TENANT, "1999-01"] = 940, 10, 5000
    async with replicas(sql, either) as (one,):
        daily = bounds(per_day=50)
        assert not await one.buy(daily, 41)
        assert await one.buy(daily, 40)
        assert not await one.buy(daily, 1)
        assert await one.buy(MONTHLY, 20)


async def test_what_turns_out_cheaper_or_dearer_counts_as_what_it_was(either: TimelessServer | None) -> None:
    """A call that took nothing leaves everything; one that took more leaves less."""
    async with replicas(Sql(), either) as (one,):
        assert await one.buy(MONTHLY, 600, really=0)
        assert await one.buy(MONTHLY, 600, really=900)
        assert not await one.buy(MONTHLY, 101)
        assert await one.buy(MONTHLY, 100)


async def test_every_account_of_a_request_is_bound(either: TimelessServer | None) -> None:
    """What one of them does not allow is taken from none."""
    both = bounds(web=Allowance(None, 100))
    async with replicas(Sql(), either) as (one,):
        with pytest.raises(BudgetExhausted) as refusal:
            await one.budgets.reserve(both, 101, within_s=30.0)
        assert refusal.value.account == "project search/web"
        assert await one.buy(both, 100)
        assert not await one.buy(both, 1)
        assert await one.buy(MONTHLY, 900)


async def test_those_who_ask_at_once_are_answered_each_for_itself(either: TimelessServer | None) -> None:
    """One that is too large keeps nobody out who fits."""
    async with replicas(Sql(), either) as (one,):
        costs = [1001, 300, 2000, 300, 400, 1]
        answers = await asyncio.gather(*(one.reserve(MONTHLY, cost) for cost in costs))
        assert answers == [False, True, False, True, True, False]


async def test_who_goes_away_takes_nothing_along(either: TimelessServer | None) -> None:
    """Cancelled while it asks, or just as it is answered."""
    async with replicas(Sql(), either) as (one,):
        for yields in range(6):
            asking = asyncio.create_task(one.budgets.reserve(MONTHLY, 1000, within_s=30.0))
            for _ in range(yields):
                await asyncio.sleep(0)
            if asking.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await asking
            else:
                one.budgets.release(MONTHLY, 1000)
            await asyncio.sleep(2.0)
        assert await one.buy(MONTHLY, 1000)


async def test_a_changed_allowance_holds_from_the_next_request_on(either: TimelessServer | None) -> None:
    """Larger or smaller."""
    async with replicas(Sql(), either) as (one,):
        assert await one.buy(MONTHLY, 900)
        assert await one.buy(bounds(per_month=2000), 1000)
        assert not await one.buy(bounds(per_month=1950), 51)
        assert not await one.buy(bounds(per_month=100), 1)


async def test_a_new_day_has_a_budget_of_its_own(either: TimelessServer | None) -> None:
    """And what is asked for just before midnight counts on both, since nobody knows on which it leaves."""
    late_s, daily = NOON_S + DAY_S // 2 - 100.0, bounds(per_day=100, per_month=None)
    async with replicas(Sql(), either, began_s=late_s) as (one,):
        assert await one.buy(daily, 100)
        await asyncio.sleep(80.0)
        assert not await one.reserve(daily, 60)
        await asyncio.sleep(21.0)
        assert await one.buy(daily, 60)
        assert not await one.buy(daily, 41)
    if either is not None:
        either.client.flushall()
    async with replicas(Sql(), either, began_s=late_s + 80.0) as (one,):
        assert await one.reserve(daily, 60)
        await asyncio.sleep(21.0)
        one.spend(daily, 60)
        assert not await one.buy(daily, 41)
        assert await one.buy(daily, 40)


async def test_nobody_spends_what_nobody_knows_of(either: TimelessServer | None) -> None:
    """With the database away at the start: 503, until it is back."""
    sql = Sql()
    sql.away = True
    async with replicas(sql, either) as (one,):
        if either is not None:
            either.asleep = True
        with pytest.raises(TryAgainLater):
            await one.reserve(MONTHLY, 1)
        sql.away = False
        assert await one.buy(MONTHLY, 1)


async def test_a_database_that_goes_away_later_changes_nothing(either: TimelessServer | None) -> None:
    """What was spent since is known here."""
    sql = Sql()
    async with replicas(sql, either) as (one,):
        assert await one.buy(MONTHLY, 400)
        sql.away = True
        for _ in range(6):
            assert await one.buy(MONTHLY, 100)
            await asyncio.sleep(1.0)
        assert not await one.buy(MONTHLY, 1)


async def test_tenants_who_are_gone_cost_nothing(either: TimelessServer | None) -> None:
    """After a minute nothing is known of them, and nothing told."""
    async with replicas(Sql(), either) as (one,):
        for number in range(50):
            assert await one.buy(Bounds(f"t{number}", ((f"tenant t{number}", Allowance(None, 10)),)), 5)
        one.book()
        await asyncio.sleep(120.0)
        asked = either.calls if either is not None else 0
        await asyncio.sleep(60.0)
        assert not one.budgets._purses
        assert not one.budgets._accounts
        assert either is None or either.calls == asked


# ── T2: replicas together ───────────────────────────────────────────────────────────────────────────────────────────


async def test_no_burst_gets_through(server: TimelessServer) -> None:
    """Fifty requests at three replicas at one moment, and a budget for exactly ten: ten."""
    async with replicas(Sql(), server, 3) as three:
        answers = await asyncio.gather(*(three[at % 3].reserve(MONTHLY, 100) for at in range(50)))
        assert sum(answers) == 10
        assert not any(await asyncio.gather(*(each.reserve(MONTHLY, 1) for each in three)))


async def test_under_load_hardly_anybody_asks(server: TimelessServer) -> None:
    """A replica that spends steadily asks a few times a second, whatever it buys."""
    async with replicas(Sql(), server, 2) as two:
        for _ in range(10):
            for _ in range(100):
                assert await two[0].buy(bounds(per_month=10**9), 50)
                await asyncio.sleep(0.01)
            two[0].book()
        begun = server.calls
        for _ in range(500):
            assert await two[0].buy(bounds(per_month=10**9), 50)
            await asyncio.sleep(0.01)
        assert server.calls - begun <= 5 * 4


async def test_what_is_held_ahead_is_given_back_to_who_needs_it(server: TimelessServer) -> None:
    """One spends steadily, then another wants all that is left: it gets that, a little later."""
    of, sql = bounds(per_month=100_000), Sql()
    async with replicas(sql, server, 2) as (steady, other):
        for _ in range(200):
            assert await steady.buy(of, 50)
            await asyncio.sleep(0.01)
        begun = asyncio.get_running_loop().time()
        assert await other.buy(of, 90_000)
        assert asyncio.get_running_loop().time() - begun <= 2.0
        assert not await steady.buy(of, 1)
        assert spent(sql, [steady, other]) == 100_000


async def test_a_killed_replica_keeps_what_it_held_until_its_journal_is_booked(server: TimelessServer) -> None:
    """Then what it really spent is in the database, and the rest is there for all."""
    sql = Sql()
    async with replicas(sql, server, 2) as (killed, heir):
        assert await killed.reserve(MONTHLY, 700)
        killed.budgets._ticking.cancel()  # type: ignore[union-attr]  # nothing is heard of it any more
        killed.budgets._purses.clear()
        await asyncio.sleep(100.0)
        assert not await heir.reserve(MONTHLY, 301)
        month = spans_of(int(NOON_S // DAY_S))[1]
        sql.sums[TENANT, month] = 150
        heir.budgets.booked(TENANT, month, 150)
        heir.budgets.settled(killed.name)
        assert await heir.reserve(MONTHLY, 850)
        assert not await heir.reserve(MONTHLY, 1)


async def test_a_replica_that_leaves_holds_nothing_any_more(server: TimelessServer) -> None:
    """It tells so when it is closed, after its last purchases are booked."""
    sql = Sql()
    async with replicas(sql, server, 1) as (stays,):
        async with replicas(sql, server, 1) as (leaves,):
            assert await leaves.buy(MONTHLY, 400)
            leaves.book()
        assert await stays.buy(MONTHLY, 600)
        assert not await stays.buy(MONTHLY, 1)


# ── a server that forgets, or is away ───────────────────────────────────────────────────────────────────────────────


async def test_an_emptied_server_grants_nothing_before_all_have_told_it(server: TimelessServer) -> None:
    """Then exactly what is left."""
    sql = Sql()
    async with replicas(sql, server, 3) as three:
        for each in three:
            assert await each.reserve(MONTHLY, 300)
        await asyncio.sleep(1.5)
        server.client.flushall()
        begun = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(each.reserve(MONTHLY, 60) for each in three))
        assert sum(answers) == 1
        assert 2.0 <= asyncio.get_running_loop().time() - begun <= 3.0
        assert spent(sql, three) == 960


async def test_an_emptied_server_is_told_by_the_database_what_was_spent(server: TimelessServer) -> None:
    """Also by a replica that was not there before."""
    sql = Sql()
    async with replicas(sql, server, 1) as (before,):
        assert await before.buy(MONTHLY, 700)
        before.book()
    server.client.flushall()
    async with replicas(sql, server, 1) as (after,):
        assert not await after.buy(MONTHLY, 301)
        assert await after.buy(MONTHLY, 300)


async def test_without_the_server_each_spends_its_part_of_what_was_left(server: TimelessServer) -> None:
    """Three of at most four spend three quarters of it; when it is back the rest is there, and not more."""
    sql = Sql()
    async with replicas(sql, server, 3) as three:
        for each in three:
            assert await each.buy(MONTHLY, 200)
        await asyncio.sleep(1.5)  # all have heard of each other
        server.asleep = True
        for each in three:
            while await each.buy(MONTHLY, 10):
                pass
            each.book()
        assert spent(sql, three) == 600 + 3 * 100
        await asyncio.sleep(60.0)
        assert not any([await each.buy(MONTHLY, 10) for each in three])
        server.asleep = False
        await asyncio.sleep(1.5)
        assert not await three[0].buy(MONTHLY, 101)
        assert await three[0].buy(MONTHLY, 100)


async def test_a_cold_start_without_the_server_goes_by_the_database(server: TimelessServer) -> None:
    """A quarter of what is left for one of four."""
    sql = Sql()
    sql.sums[TENANT, spans_of(int(NOON_S // DAY_S))[1]] = 600
    server.asleep = True
    async with replicas(sql, server, 1) as (one,):
        assert not await one.buy(MONTHLY, 101)
        assert await one.buy(MONTHLY, 100)
        assert not await one.buy(MONTHLY, 1)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
async def test_whatever_happens_a_budget_is_never_exceeded(server: TimelessServer, seed: int) -> None:
    """Replicas come, go, are killed, book late; the server forgets. Sums are checked after every step."""
    server.client.flushall()
    rng, sql = random.Random(seed), Sql()
    month = spans_of(int(NOON_S // DAY_S))[1]
    async with replicas(sql, server, 4, parts=4) as four:
        gone: list[Replica] = []
        flushed_at = asyncio.get_running_loop().time()
        for _ in range(rng.randint(20, 80)):
            alive = [each for each in four if each not in gone]
            one, step = rng.choice(alive), rng.random()
            if step < 0.55:
                waves = (rng.choice(alive).buy(MONTHLY, rng.randint(1, 120), 0 if rng.random() < 0.2 else None)
                         for _ in range(rng.randint(1, 6)))  # fmt: skip
                await asyncio.gather(*waves)
            elif step < 0.7:
                one.book()
            elif step < 0.93:
                await asyncio.sleep(rng.choice([0.1, 0.4, 1.0, 2.5]))
            elif step < 0.96 and not gone:  # else nobody knows of what the killed ones held
                await asyncio.sleep(1.1)
                server.client.flushall()
                flushed_at = asyncio.get_running_loop().time()
            elif len(alive) > 1 and asyncio.get_running_loop().time() - flushed_at > 1.0:
                one.budgets._ticking.cancel()  # type: ignore[union-attr]
                one.budgets._purses.clear()
                gone.append(one)
            assert spent(sql, four) <= 1000
        for each in gone:  # their journals are found
            for account, sums in each.unbooked.items():
                for span, nano_usd in sums.items():
                    sql.sums[account, span] += nano_usd
            each.unbooked.clear()
            for other in four:
                other.budgets.booked(TENANT, month, sql.sums[TENANT, month])
                other.budgets.settled(each.name)
        await asyncio.sleep(5.0)
        last = next(each for each in four if each not in gone)
        while await last.buy(MONTHLY, 1):
            pass
        assert spent(sql, four) == 1000
