"""What becomes of the books when the process is killed, the database goes away, or a connection breaks in between."""

import asyncio
import io
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Row, func, select

from app.ports import Part, Purchase
from app.runtime import Runtime
from app.settings import load
from app.storage.journal import Journal
from app.storage.ledger import BookedLedger
from app.storage.sql.database import Database
from app.storage.sql.ledger import SqlLedger
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import ledger, usage_totals
from app.telemetry import Telemetry
from tests.books import Vendor, balance
from tests.contract.stored import SOON_S, scalars
from tests.emulators.openai import OpenAIEmulator
from tests.servers import PostgresProcess
from tests.tcp_proxy import TcpProxy

KILLS, AT_ONCE, IN_FLIGHT = 20, 8, 4
PRICE = 20_000
PARTS = tuple(Part(f"tenant{number}", "web", "k", "u", "miss", 1, 10 + number) for number in range(3))

CONFIGURATION = """
[server]
log_file = "{folder}/log.jsonl"
[stores]
data_dir = "{folder}/data"
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
max_in_flight = 4
[models.small]
deployments = ["main"]
"""

BUYS_UNTIL_KILLED = """
import asyncio, itertools, os, random, signal, sys, time
from pathlib import Path
from app.domain import ANONYMOUS, EmbeddingRequest, Spender
from app.runtime import Runtime
from app.serving import Menu
from app.settings import load

settings, kills, at_once = load(Path(sys.argv[1]), {}), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(37)
Menu(settings).models["small"].counter.count("what takes long to load is loaded once")

async def buy(runtime, numbers):
    for number in numbers:
        request = EmbeddingRequest(
            ANONYMOUS, "small", (f"text {number} " + "word " * (number % 50),), time.monotonic() + 30,
            spender=Spender(user=str(number)),
        )
        await runtime.gateway.embed(request)
        if number % 1000 == 0:
            os.write(ready, b".")

async def live(life):
    numbers = itertools.count(1000 * life)
    async with Runtime(settings) as runtime:
        await asyncio.gather(*(buy(runtime, numbers) for _ in range(at_once)))

for life in range(kills):
    heard, ready = os.pipe()
    child = os.fork()
    if child == 0:
        asyncio.run(live(life))
    os.read(heard, 1)
    time.sleep(rng.uniform(0.0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard), os.close(ready)
"""


async def rows_of(database: Database) -> list[Row[Any]]:
    """The whole ledger."""
    rows = await database.read(lambda connection: connection.execute(select(ledger)), within_s=SOON_S)
    return [*rows]


async def until(holds: Callable[[], bool], within_s: float = 20.0) -> None:
    """Waits for what nobody tells."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# ── kills ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_kill_loses_or_doubles_a_cent(tmp_path: Path) -> None:
    """Twenty, at random moments under load: every call on the bill is booked once, and what nobody knows is bounded."""
    path = tmp_path / "embedgate.toml"
    async with OpenAIEmulator(latency_s=0.005) as upstream:
        path.write_text(CONFIGURATION.format(folder=tmp_path, upstream=upstream.base_url))
        buyer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BUYS_UNTIL_KILLED, path, str(KILLS), str(AT_ONCE)
        )  # fmt: skip
        assert await buyer.wait() == 0
        await until(lambda: upstream.connections == 0)
        async with Runtime(load(path, {})) as runtime:
            await until(lambda: not [*(tmp_path / "data" / "journal").iterdir()])
            rows = await rows_of(runtime.stores.database)
        vendor = Vendor(upstream, "0.02")  # as the catalog says
        books = await balance(f"sqlite:///{tmp_path}/data/embedgate.db", {"main": vendor}, in_flight=KILLS * IN_FLIGHT)
        inputs = (arrival.body["input"] for arrival in upstream.arrivals)
        texts = (text for given in inputs for text in ([given] if isinstance(given, str) else given))
        arrived = Counter(text.split()[1] for text in texts)
    states = {row.user: row.state for row in rows}
    assert len(states) == len(rows) > 20 * AT_ONCE  # each text has a row of its own, and one
    assert set(arrived.values()) == {1}
    assert arrived.keys() <= states.keys()
    assert {states[user] for user in states.keys() - arrived.keys()} <= {"unconfirmed"}
    unconfirmed = Counter(int(row.user) // 1000 for row in rows if row.state == "unconfirmed")
    assert unconfirmed.total() > 0
    assert max(unconfirmed.values()) <= AT_ONCE
    print(f"{len(rows)} texts, {KILLS} kills, {books}")


# ── the database ────────────────────────────────────────────────────────────────────────────────────────────────────


class Buyer:
    """Buys steadily, whatever becomes of the database, and knows what it bought."""

    def __init__(self, books: BookedLedger) -> None:
        self.books = books
        self.bought = 0
        self.slowest_s = 0.0

    async def buy(self, seconds: float) -> None:
        """Two hundred calls a second, each of three tenants."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            purchase = Purchase(f"c{self.bought}", int(time.time() * 1000), "main", "small", "s1-a", PRICE, PARTS)
            started = time.thread_time()
            self.books.begin(purchase)
            self.books.end(purchase, 40, "billed")
            self.slowest_s = max(self.slowest_s, time.thread_time() - started)
            self.bought += 1
            await asyncio.sleep(0.005)

    async def check(self, database: Database) -> None:
        """All of it is booked, once."""
        await until(lambda: self.books.waiting == 0)
        rows = await rows_of(database)
        assert Counter(row.call for row in rows) == {f"c{number}": 3 for number in range(self.bought)}
        assert {row.state for row in rows} == {"billed"}
        (nano_usd,) = await scalars(database, select(func.sum(usage_totals.c.nano_usd)))
        assert nano_usd == sum(row.nano_usd for row in rows) == 800 * self.bought
        assert self.books.unbooked("tenant tenant0") == {}
        spent = await self.books.sql.spent(["project tenant2/web"], [time.strftime("%Y-%m", time.gmtime())])
        assert sum(spent.values()) == sum(row.nano_usd for row in rows if row.tenant == "tenant2")


@asynccontextmanager
async def buying(database: Database, folder: Path, replica: str = "r1") -> AsyncIterator[Buyer]:
    """A Buyer with a ledger of its own."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    journal, sql = Journal(folder, replica, max_bytes=2**30), SqlLedger(database, replica)
    telemetry = Telemetry(stream=io.BytesIO())
    async with BookedLedger(journal, sql, telemetry, ready=lambda: True) as books:
        yield Buyer(books)
    telemetry.close()


async def test_a_database_that_is_away_hears_everything_once_it_is_back(
    own_postgres: PostgresProcess, tmp_path: Path
) -> None:  # fmt: skip
    """Frozen, then killed, under load: nobody waits for it, nothing is lost or doubled."""
    async with Database(own_postgres.url) as database:
        await migrate(database)
        async with buying(database, tmp_path / "journal") as buyer:
            await buyer.buy(1.0)
            own_postgres.freeze()
            await buyer.buy(2.0)
            own_postgres.thaw()
            await buyer.buy(0.5)
            await asyncio.to_thread(own_postgres.kill)
            await buyer.buy(1.0)
            assert buyer.books.waiting > 0
            await asyncio.to_thread(own_postgres.start)
            await buyer.buy(0.5)
            await buyer.check(database)
        assert buyer.slowest_s < 0.02


async def test_closing_waits_for_a_frozen_database_no_longer_than_it_may(
    own_postgres: PostgresProcess, tmp_path: Path
) -> None:  # fmt: skip
    """What is not booked by then is booked by who comes next, and then nothing is left of it on disk."""
    async with Database(own_postgres.url) as database:
        await migrate(database)
        async with buying(database, tmp_path / "journal") as first:
            await first.buy(0.2)
            own_postgres.freeze()
            await first.buy(0.2)
            started = time.monotonic()
        assert time.monotonic() - started < 2.5
    own_postgres.thaw()
    async with Database(own_postgres.url) as database:
        async with buying(database, tmp_path / "journal", "r2") as second:
            await until(lambda: not [*(tmp_path / "journal").iterdir()])
        second.bought = first.bought
        await second.check(database)


async def test_connections_that_break_at_any_moment_double_nothing(
    own_postgres: PostgresProcess, tmp_path: Path
) -> None:  # fmt: skip
    """Also where nobody can tell whether what was sent has been done."""
    rng = random.Random(5)
    async with TcpProxy(own_postgres.port) as proxy:
        url = urlsplit(own_postgres.url)._replace(netloc=f"user@127.0.0.1:{proxy.port}").geturl()
        async with Database(url) as database:
            await migrate(database)
            proxy.latency_s = 0.005  # so that much is on its way
            async with buying(database, tmp_path / "journal") as buyer, asyncio.TaskGroup() as group:
                group.create_task(buyer.buy(4.0))
                for _ in range(6):
                    await asyncio.sleep(rng.uniform(0.1, 0.5))
                    proxy.cut()
                    await asyncio.sleep(rng.uniform(0.1, 0.5))
                    proxy.drop_reply(rng.randint(2, 9))
                proxy.drop_reply(0)
                proxy.latency_s = 0.0
                await buyer.check(database)


async def test_a_disk_that_filled_up_books_what_it_took(tmp_path: Path) -> None:
    """The database's own file: the journal keeps what does not fit, and it is booked once there is room."""
    async with Database(f"sqlite:///{tmp_path / 'x.db'}") as database:
        await migrate(database)

        async def bound(pages: int) -> None:
            await database.write(lambda c: c.exec_driver_sql(f"PRAGMA max_page_count = {pages}"), within_s=SOON_S)

        async with buying(database, tmp_path / "journal") as buyer:
            await bound(1)  # as many as it has
            await buyer.buy(2.0)
            assert buyer.books.waiting > 0
            await bound(100_000)
            await buyer.check(database)
