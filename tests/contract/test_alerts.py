"""Who is told that a budget is spent, how often and by whom, on both kinds of database."""

import asyncio
import base64
import hashlib
import hmac
import io
import itertools
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from aiohttp import web
from sqlalchemy import ColumnElement, Table, func, insert, select, text, update
from sqlalchemy.dialects import sqlite

from app.alerts import Alerts, webhook_secret
from app.directory import Terms
from app.domain import Allowance
from app.storage.secret import MasterSecret
from app.storage.sql.alerts import AGAIN_S, SqlAlerts
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.erasure import erase
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import alerts as table
from app.storage.sql.tables import ledger, left_open, now_ms, spent, uncertain, untold
from app.telemetry import Telemetry
from tests.contract.stored import SOON_S, change, scalars
from tests.servers import HOST, free_port

OLD, NEW = b"the secret of before, long", b"the secret of today, longer"
MASTER = MasterSecret(NEW, [OLD])
ACCOUNT, DAY, MONTH = "tenant search", "2026-11-21", "2026-11"
USD = 10**9
TOKEN = "whoever-knows-this-may-call"
DAY_MS = 86_400_000


class Message(NamedTuple):
    """One that came, as it came."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def data(self) -> dict[str, Any]:
        """What it tells."""
        found: dict[str, Any] = json.loads(self.body)["data"]
        return found

    def signed_with(self, secret: str) -> bool:
        """As https://www.standardwebhooks.com has it: `id.timestamp.body` under the bytes behind `whsec_`."""
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        signed = b".".join([self.headers["webhook-id"].encode(), self.headers["webhook-timestamp"].encode(), self.body])
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        return f"v1,{expected}" in self.headers["webhook-signature"].split(" ")


class Hook:
    """A tenant's own server: it answers with `statuses` in turn, then 204, and with nothing while it `hangs`."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{HOST}:{port}/hook?token={TOKEN}"
        self.statuses: deque[int] = deque()
        self.headers: dict[str, str] = {}
        self.messages: list[Message] = []
        self.hangs = False

    @property
    def percents(self) -> list[int]:
        """Those of all messages."""
        return [message.data["percent"] for message in self.messages]

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Takes a message, or does not."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.messages.append(Message(request.path_qs, headers, await request.read()))
        if self.hangs:
            await asyncio.Event().wait()
        return web.Response(status=self.statuses.popleft() if self.statuses else 204, headers=self.headers)


@asynccontextmanager
async def listening() -> AsyncIterator[Hook]:
    """A hook on loopback."""
    port = free_port()
    hook = Hook(port)
    runner = web.ServerRunner(web.Server(hook.answer, access_log=None), shutdown_timeout=0.01)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port).start()
        yield hook
    finally:
        await runner.cleanup()


class Replica:
    """One that notices, and looks when it is told to."""

    def __init__(self, database: Database, terms: Mapping[str, Terms], secret: MasterSecret = MASTER) -> None:
        self._log = io.BytesIO()
        self.telemetry = Telemetry(tenants=["search"], stream=self._log)
        self.sql = SqlAlerts(database)
        self.alerts = Alerts(self.sql, secret, self.telemetry, terms=terms.get, ready=lambda: False)

    async def look(self) -> None:
        """Writes down what was noticed and makes one attempt at what is due."""
        await self.alerts._look(trims=False)
        await asyncio.gather(*self.alerts._telling.values())

    async def look_until_idle(self) -> None:
        """Until nothing is due any more."""
        await self.look()
        while await self.sql.due():
            await self.look()

    @property
    def log(self) -> str:
        """All lines."""
        self.telemetry.close()
        return self._log.getvalue().decode()

    def told(self, event: str) -> list[dict[str, Any]]:
        """The events of a name."""
        return [line for line in map(json.loads, self.log.splitlines()) if line["event"] == event]


class Scene:
    """A database, a tenant's hook, and replicas of which each has connections of its own."""

    def __init__(self, url: str, database: Database, hook: Hook) -> None:
        self._url = url
        self.database = database
        self.hook = hook
        self.terms = {ACCOUNT: self.allowed(per_month=10 * USD)}

    def allowed(self, tenant: str = "search", *, url: str | None = None, **budget: int) -> Terms:
        """The terms of an account, with the hook unless there is another URL."""
        allowance = Allowance(budget.get("per_day"), budget.get("per_month"))
        return Terms(tenant, allowance, self.hook.url if url is None else url)

    @asynccontextmanager
    async def replica(self, secret: MasterSecret = MASTER) -> AsyncIterator[Replica]:
        """One more."""
        async with Database(self._url) as database:
            made = Replica(database, self.terms, secret)
            async with made.alerts:
                yield made

    async def spend(self, nano_usd: int, account: str = ACCOUNT, span: str = MONTH) -> None:
        """So much is in the books."""
        await change(self.database, insert(spent).values(account=account, span=span, nano_usd=nano_usd))

    async def age(self, seconds: float) -> None:
        """What is untold is as old."""
        at_ms = now_ms - int(1000 * seconds)
        await change(self.database, update(table).where(table.c.delivered_at_ms.is_(None)).values(at_ms=at_ms))

    async def untold(self) -> list[int]:
        """The attempts of those that nobody took."""
        of_untold = select(table.c.attempts).where(table.c.delivered_at_ms.is_(None))
        return await scalars(self.database, of_untold.order_by(table.c.percent))


@pytest_asyncio.fixture
async def scene(database_url: str) -> AsyncIterator[Scene]:
    """With one tenant, who may spend ten dollars a month."""
    async with Database(database_url) as database, listening() as hook:
        await migrate(database)
        yield Scene(database_url, database, hook)


# ── who tells, and how often ────────────────────────────────────────────────────────────────────────────────────────


async def test_each_part_of_a_budget_is_told_once_whichever_replica_is_first(scene: Scene) -> None:
    """To the log, the metrics and the hook; in order, although a jump passes several parts."""
    async with scene.replica() as one, scene.replica() as other:
        for nano_usd in (5 * USD - 1, 5 * USD, 6 * USD, 10 * USD):
            one.alerts.booked(ACCOUNT, MONTH, nano_usd)
            other.alerts.booked(ACCOUNT, MONTH, nano_usd)
            await asyncio.gather(one.look(), other.look())
        for each in (one, other, one):
            await each.look_until_idle()
        assert scene.hook.percents == [50, 80, 100]
        events = one.told("budget.alert") + other.told("budget.alert")
        assert sorted(event["percent"] for event in events) == [50, 80, 100]
        assert {(event["tenant"], event["account"], event["span"], event["budget_usd"]) for event in events} == {
            ("search", ACCOUNT, MONTH, "10.00")
        }
        counted = [
            each.telemetry.registry.get_sample_value(
                "embedgate_budget_alerts_total", {"tenant": "search", "percent": str(percent)}
            )
            for each in (one, other)
            for percent in (50, 80, 100)
        ]
        assert sum(filter(None, counted)) == 3
        assert await scene.untold() == []


async def test_two_replicas_share_what_is_due(scene: Scene) -> None:
    """Of many tenants at one moment each hears once."""
    names = [f"t{number}" for number in range(10)]
    scene.terms |= {f"tenant {name}": scene.allowed(name, per_month=100) for name in names}
    async with scene.replica() as one, scene.replica() as other:
        for name in names:
            one.alerts.booked(f"tenant {name}", MONTH, 50)
        await one.alerts._begin()
        await asyncio.gather(one.look(), other.look())
        await asyncio.gather(one.look(), other.look())
    assert sorted(message.data["tenant"] for message in scene.hook.messages) == names


async def test_who_starts_again_tells_nothing_twice(scene: Scene) -> None:
    """What was told is in the database."""
    for _ in range(2):
        async with scene.replica() as one:
            one.alerts.booked(ACCOUNT, MONTH, 9 * USD)
            await one.look_until_idle()
    assert scene.hook.percents == [50, 80]


async def test_of_a_raised_budget_is_told_again(scene: Scene) -> None:
    """As a new message; of a lowered one only what was not told yet."""
    async with scene.replica() as one, scene.replica() as other:
        for budget in (10 * USD, 12 * USD, 8 * USD):
            scene.terms[ACCOUNT] = scene.allowed(per_month=budget)
            for each in (one, other):
                each.alerts.booked(ACCOUNT, MONTH, 6 * USD + 400_000_000)
                await each.look_until_idle()
    told = [(message.data["percent"], message.data["budget_usd"]) for message in scene.hook.messages]
    assert told == [(50, "10.00"), (50, "12.00"), (80, "8.00")]
    assert len({message.headers["webhook-id"] for message in scene.hook.messages}) == 3


class Raising(SqlAlerts):
    """While it first writes, the budget is raised and half of that is spent, too."""

    def __init__(self, database: Database, scene: Scene) -> None:
        super().__init__(database)
        self._scene = scene
        self.alerts: Alerts | None = None

    async def begin(self, account: str, span: str, percent: int, budget_nano_usd: int, *, tells: bool) -> bool:
        """See `SqlAlerts`."""
        alerts, self.alerts = self.alerts, None
        if alerts is not None:
            self._scene.terms[account] = self._scene.allowed(per_month=20 * USD)
            alerts.booked(account, span, 10 * USD)
        return await super().begin(account, span, percent, budget_nano_usd, tells=tells)


async def test_a_budget_that_is_raised_at_the_very_moment_is_told_too(scene: Scene) -> None:
    """Nothing that is noticed while something is written gets lost."""
    async with scene.replica() as one:
        one.alerts._sql = sql = Raising(scene.database, scene)
        sql.alerts = one.alerts
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look_until_idle()
        assert [event["budget_usd"] for event in one.told("budget.alert")] == ["10.00", "20.00"]


async def test_day_and_month_and_every_account_have_parts_of_their_own(scene: Scene) -> None:
    """And a message says of which it is; whoever has no budget is not spoken of."""
    scene.terms = {
        ACCOUNT: scene.allowed(per_day=USD, per_month=10 * USD),
        "project search/ix": scene.allowed(per_month=2 * USD),
        "key 8Q2xVd0L": scene.allowed(per_day=2 * USD),
        "tenant other": scene.allowed("other"),
    }
    async with scene.replica() as one:
        for account in (*scene.terms, "tenant nobody"):
            one.alerts.booked(account, DAY, USD)
            one.alerts.booked(account, MONTH, USD)
        await one.look_until_idle()
    fields = ("scope", "name", "period", "percent", "budget_usd")
    told = {tuple(message.data[field] for field in fields) for message in scene.hook.messages}
    assert told == {
        *(("tenant", "search", DAY, percent, "1.00") for percent in (50, 80, 100)),
        ("project", "ix", MONTH, 50, "2.00"), ("key", "8Q2xVd0L", DAY, 50, "2.00"),
    }  # fmt: skip
    assert {message.data["tenant"] for message in scene.hook.messages} == {"search"}


async def test_a_refusal_is_the_end_of_a_budget_only_if_most_is_spent(scene: Scene) -> None:
    """A request that was too large for an untouched one says nothing, nor does it keep the true end from being told."""
    async with scene.replica() as one, scene.replica() as other:
        one.alerts.exhausted(ACCOUNT, MONTH)
        await one.look_until_idle()
        assert scene.hook.percents == []
        await scene.spend(8 * USD)
        await one.look_until_idle()  # what was set aside has come to the books
        assert scene.hook.percents == [50, 80, 100]
        for each in (one, other):
            each.alerts.exhausted(ACCOUNT, MONTH)
            await each.look_until_idle()
        assert scene.hook.percents == [50, 80, 100]
        assert (one.alerts._refused, other.alerts._refused) == ({}, {})


async def test_a_refusal_is_forgotten_after_a_while(scene: Scene) -> None:
    """Else everybody who once asked for too much would be looked after for ever."""
    async with scene.replica() as one:
        one.alerts.exhausted(ACCOUNT, MONTH)
        one.alerts._refused[ACCOUNT, MONTH] -= 61.0
        await one.look()
        assert not one.alerts._refused
        scene.terms.clear()
        one.alerts.exhausted(ACCOUNT, MONTH)
        assert not one.alerts._refused


async def test_what_was_noticed_while_the_database_is_away_is_told_later(scene: Scene) -> None:
    """Nothing is lost, and the order stays."""
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 8 * USD)
        one.sql._database.up = False
        with pytest.raises(DatabaseDown):
            await one.look()
        one.sql._database.up = True
        await one.look_until_idle()
    assert scene.hook.percents == [50, 80]


async def test_a_running_service_tells_by_itself(scene: Scene) -> None:
    """At once, one message after the other; nobody has to ask."""
    async with scene.replica() as one:
        one.alerts._ready = lambda: True
        one.alerts.booked(ACCOUNT, MONTH, 10 * USD)
        async with asyncio.timeout(SOON_S):
            while await scene.untold() or len(scene.hook.messages) < 3:  # noqa: ASYNC110 — the database tells nobody
                await asyncio.sleep(0.01)
    assert scene.hook.percents == [50, 80, 100]


# ── what is sent ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_message_is_signed_as_standard_webhooks_has_it(scene: Scene) -> None:
    """A change of one byte, another tenant's secret and an unknown one do not verify."""
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look()
    (message,) = scene.hook.messages
    secret = webhook_secret(MASTER, "search")
    assert (secret[:6], len(base64.b64decode(secret[6:]))) == ("whsec_", 32)
    assert message.signed_with(secret)
    assert not message._replace(body=message.body.replace(b"50", b"51")).signed_with(secret)
    assert not message._replace(headers={**message.headers, "webhook-id": "msg_other"}).signed_with(secret)
    assert not message.signed_with(webhook_secret(MASTER, "another"))
    assert message.path == f"/hook?token={TOKEN}"
    assert message.headers["content-type"] == "application/json"
    told = json.loads(message.body)
    assert (sorted(told), told["type"]) == (["data", "timestamp", "type"], "budget.alert")
    at_ms, now = (await scalars(scene.database, select(table.c.at_ms)))[0], int(message.headers["webhook-timestamp"])
    assert told["timestamp"].endswith("Z")
    assert abs(now - at_ms / 1000) < 60
    assert message.data == {
        "tenant": "search", "scope": "tenant", "name": "search", "period": MONTH, "percent": 50, "budget_usd": "10.00",
    }  # fmt: skip


async def test_both_secrets_verify_while_the_servers_is_rotated(scene: Scene) -> None:
    """Whoever has copied the new one, and whoever has not yet."""
    async with scene.replica(MASTER) as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look()
    async with scene.replica(MasterSecret(NEW)) as after:
        after.alerts.booked(ACCOUNT, MONTH, 8 * USD)
        await after.look()
    old, new = (webhook_secret(MasterSecret(secret), "search") for secret in (OLD, NEW))
    assert [[each.signed_with(secret) for secret in (old, new)] for each in scene.hook.messages] == [
        [True, True], [False, True],
    ]  # fmt: skip


# ── who does not take it ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_message_that_is_not_taken_is_sent_again(scene: Scene) -> None:
    """With the same id and a new signature, by whoever is there; taken once, it is not sent any more."""
    scene.hook.statuses += [500, 429]
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look_until_idle()
        assert await scene.untold() == [1]
    async with scene.replica() as heir:
        await heir.look_until_idle()
        assert await scene.untold() == [1]
        for seconds in AGAIN_S[1:4]:
            await scene.age(seconds)
            await heir.look_until_idle()
        outcomes = [(event["attempts"], event["outcome"]) for event in heir.told("alert.failed")]
        assert outcomes == [(2, "HTTP 429")]
        assert [event["attempts"] for event in heir.told("alert.delivered")] == [3]
    messages = scene.hook.messages
    assert (len(messages), len({each.headers["webhook-id"] for each in messages})) == (3, 1)
    assert all(each.signed_with(webhook_secret(MASTER, "search")) for each in messages)
    assert await scene.untold() == []


async def test_attempts_are_made_at_their_times_and_then_no_more(scene: Scene) -> None:
    """Not a moment before; after the last one it is given up."""
    scene.hook.statuses += [503] * 100
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look_until_idle()
        for made, (before, at) in enumerate(itertools.pairwise(AGAIN_S), 1):
            await scene.age((before + at) / 2)
            await one.look_until_idle()
            assert len(scene.hook.messages) == made
            await scene.age(at)
            await one.look_until_idle()
            assert len(scene.hook.messages) == made + 1
        await scene.age(2 * AGAIN_S[-1])
        await one.look_until_idle()
    assert len(scene.hook.messages) == len(AGAIN_S)
    assert await scene.untold() == [len(AGAIN_S)]


async def test_redirects_are_not_followed(scene: Scene) -> None:
    """A server that answers elsewhere has not taken it."""
    async with listening() as elsewhere, scene.replica() as one:
        scene.hook.statuses += [302, 307, 308]
        scene.hook.headers = {"location": elsewhere.url}
        for nano_usd in (5 * USD, 8 * USD, 10 * USD):
            one.alerts.booked(ACCOUNT, MONTH, nano_usd)
            await one.look()
        assert elsewhere.messages == []
        outcomes = [event["outcome"] for event in one.told("alert.failed")]
        assert outcomes == ["HTTP 302", "HTTP 307", "HTTP 308"]


async def test_neither_url_nor_secret_is_in_any_log(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever becomes of the message; and nothing that a hook can be is a bug."""
    caplog.set_level(logging.DEBUG)
    scene.hook.statuses += [500, 302]
    hidden = [TOKEN, "/hook", "whsec_", webhook_secret(MASTER, "search").removeprefix("whsec_")]
    urls = {
        "closed": f"http://{HOST}:{free_port()}/hook?{TOKEN}", "no name": f"http://{'a' * 64}.example/hook?{TOKEN}",
        "no tls": scene.hook.url.replace("http:", "https:"),
        "broken": scene.hook.url, "moved": scene.hook.url, "fine": scene.hook.url,
    }  # fmt: skip
    async with scene.replica() as one:
        for name, url in urls.items():
            scene.terms[f"tenant {name}"] = scene.allowed(name, url=url, per_month=100)
            one.alerts.booked(f"tenant {name}", MONTH, 50)
            await one.look()
        said = one.log + caplog.text
        assert one.told("loop.crashed") == []
        assert [event["tenant"] for event in one.told("alert.failed")] == [*urls][:-1]
        assert [event["tenant"] for event in one.told("alert.delivered")] == ["fine"]
    assert [each for each in hidden if each in said] == []


async def test_a_slow_hook_delays_nobody(scene: Scene) -> None:
    """Others hear at once, it hears of one thing at a time, and the service closes without it."""
    async with listening() as slow:
        slow.hangs = True
        scene.terms |= {f"key {n}": scene.allowed("slow", url=slow.url, per_month=100) for n in range(10)}
        async with asyncio.timeout(4.0), scene.replica() as one:
            for number in range(10):
                one.alerts.booked(f"key {number}", MONTH, 100)
            one.alerts.booked(ACCOUNT, MONTH, 10 * USD)
            while len(scene.hook.messages) < 3:
                await one.alerts._look(trims=False)
                await asyncio.gather(*(task for whom, task in one.alerts._telling.items() if whom != "slow"))
            assert len(slow.messages) <= 1
            assert len(one.alerts._telling) == 1
        assert scene.hook.percents == [50, 80, 100]
        assert len(await scene.untold()) == 30


async def test_those_who_never_took_anything_hide_nobody(scene: Scene) -> None:
    """A thousand messages that wait for their next time are not in the way of a new one."""
    row = {"span": MONTH, "percent": 50, "attempts": 7, "budget_nano_usd": 1, "at_ms": now_ms - 30_000_000}
    for start in range(0, 1500, 500):
        rows = [{"account": f"tenant {number}", **row} for number in range(start, start + 500)]
        await change(scene.database, insert(table).values(rows))
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look()
    assert scene.hook.percents == [50]


# ── who is not to be told ───────────────────────────────────────────────────────────────────────────────────────────


async def test_without_a_hook_only_the_operator_is_told(scene: Scene) -> None:
    """And who has one later hears of what comes then, not of what was; who has none any more hears nothing."""
    scene.terms[ACCOUNT] = scene.allowed(url="", per_month=10 * USD)
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look_until_idle()
        scene.terms[ACCOUNT] = scene.allowed(per_month=10 * USD)
        await one.look_until_idle()
        assert scene.hook.messages == []
        scene.hook.statuses.append(500)
        one.alerts.booked(ACCOUNT, MONTH, 8 * USD)
        await one.look_until_idle()
        scene.terms[ACCOUNT] = scene.allowed(url="", per_month=10 * USD)
        await scene.age(AGAIN_S[1])
        await one.look_until_idle()
        assert scene.hook.percents == [80]
        assert [event["percent"] for event in one.told("budget.alert")] == [50, 80]
        assert len(one.told("alert.failed")) == 1
    assert await scene.untold() == []


async def test_of_a_deleted_tenant_nobody_is_told(scene: Scene) -> None:
    """What was noticed of it is erased with it, and what comes late goes nowhere."""
    scene.hook.statuses.append(500)
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.look_until_idle()
        one.alerts.booked(ACCOUNT, MONTH, 8 * USD)
        scene.terms.clear()
        await scene.age(AGAIN_S[1])
        await one.look_until_idle()
        await erase(scene.database, "search")
        one.alerts.booked(ACCOUNT, MONTH, 10 * USD)
        await one.look_until_idle()
        assert (len(scene.hook.messages), one.told("loop.crashed")) == (1, [])
    assert await scalars(scene.database, select(func.count()).select_from(table)) == [0]


async def test_a_tenant_that_a_replica_does_not_know_yet_is_told_later(scene: Scene) -> None:
    """Its message is not taken for one that nobody wants."""
    async with scene.replica() as one:
        one.alerts.booked(ACCOUNT, MONTH, 5 * USD)
        await one.alerts._begin()
        known = scene.terms.pop(ACCOUNT)
        await one.look_until_idle()
        assert scene.hook.messages == []
        scene.terms[ACCOUNT] = known
        await scene.age(AGAIN_S[1])
        await one.look_until_idle()
    assert scene.hook.percents == [50]


async def test_alerts_of_long_ago_are_forgotten(scene: Scene) -> None:
    """After more than a year; later ones stay."""
    old = {"percent": 50, "attempts": 0, "budget_nano_usd": 1, "delivered_at_ms": 1}
    for days, span in ((401, "2025-10"), (399, "2025-11")):
        row = {"account": ACCOUNT, "span": span, "at_ms": now_ms - days * DAY_MS, **old}
        await change(scene.database, insert(table).values(row))
    async with scene.replica() as one:
        await one.alerts._look(trims=True)
    assert await scalars(scene.database, select(table.c.span)) == ["2025-11"]


@pytest.mark.parametrize(
    ("kind", "where", "index"),
    [(table, untold, "alerts_untold"), (ledger, left_open, "ledger_open"), (ledger, uncertain, "ledger_uncertain")],
    ids=["untold", "left open", "uncertain"],
)
async def test_a_file_finds_the_few_rows_that_are_open_by_their_index(
    sqlite_url: str, kind: Table, where: ColumnElement[bool], index: str
) -> None:
    """Whoever looks every few seconds does not read all that ever was."""
    asked = select(kind.c.at_ms).where(where).compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    async with Database(sqlite_url) as database:
        await migrate(database)
        plan = await database.read(lambda c: c.execute(text(f"EXPLAIN QUERY PLAN {asked}")), within_s=SOON_S)
    assert index in f"{plan.all()}"
