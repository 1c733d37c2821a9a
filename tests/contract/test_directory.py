"""What a process knows of tenants and keys made at run time, and hears of their changes, on both kinds of database."""

import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import delete, insert, select, update

from app.alerts import webhook_secret
from app.directory import Caller, Directory, Terms
from app.domain import NO_BOUND, Allowance, Limits, Priority
from app.errors import InvalidRequest, NotFound
from app.settings import Settings
from app.storage import api_key
from app.storage.api_key import KeyHash
from app.storage.secret import MasterSecret
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.directory import SqlDirectory
from app.storage.sql.entries import spans_of
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import api_keys, counters, spent, tenants
from app.telemetry import Telemetry
from app.tenant_desk import Budget, KeyPage, NewKey, NewTenant, Page, Rotation, TenantDesk, TenantTerms
from tests.contract.stored import change, scalars

OLD, NEW = b"the secret of before, long", b"the secret of today, longer"
MASTER = MasterSecret(NEW, [OLD])
SETTINGS = Settings.model_validate(
    {
        "deployments": {"local": {"dialect": "local"}},
        "models": {"mini": {"deployments": ("local",)}, "maxi": {"deployments": ("local",)}},
        "tenants": {
            "filed": {
                "api_key": ("key-of-filed",),
                "weight": 3.0,
                "budget_usd_per_month": 2.5,
                "webhook_url": "http://h/filed",
                "bulk_tier": "vendor_batch",
            }
        },
    }
)


class Office:
    """A database, what operators do to it, and a process that follows."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.source = SqlDirectory(database)
        self.desk = TenantDesk(SETTINGS, database, self.source, MASTER)
        self.heard: list[tuple[str, Limits | None]] = []
        self.directory = self.process()

    def process(self, secret: MasterSecret = MASTER) -> Directory:
        """One more that follows, when it is refreshed."""
        configured = {name: each.tenant(name) for name, each in SETTINGS.tenants.items()}
        return Directory(
            self.source, secret, Telemetry(), configured=configured, on_limits=lambda *told: self.heard.append(told)
        )

    async def key(self, tenant: str = "search", **more: Any) -> str:
        """A new key, which the process knows."""
        made = await self.desk.create_key(NewKey(tenant=tenant, **more))
        await self.directory.refresh()
        return str(made["key"])

    def caller(self, key: str) -> Caller:
        """Whom it knows by `key`."""
        found = self.directory.find(key.encode())
        assert found is not None
        return found

    def knows(self, key: str) -> bool:
        """Whether `key` is taken."""
        return self.directory.find(key.encode()) is not None


@pytest_asyncio.fixture
async def office(database_url: str) -> AsyncIterator[Office]:
    """With one tenant."""
    async with Database(database_url) as database:
        await migrate(database)
        made = Office(database)
        await made.desk.create_tenant(NewTenant(name="search"))
        await made.directory.refresh()
        yield made


# ── tenants ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_stands_for_its_tenant_as_it_is_now(office: Office) -> None:
    """Every term arrives, and so does every change; what was not named stays."""
    key = await office.key()
    first = office.caller(key).tenant
    assert (first.name, first.weight, first.priority, first.limits) == ("search", 1.0, Priority.DEFAULT, None)
    assert first.bulk_tier == "online"
    await office.desk.update_tenant("search", TenantTerms(weight=2.0, models=["mini"]), ["weight", "models"])
    await office.desk.update_tenant(
        "search",
        TenantTerms(priority="bulk", max_in_flight=9, bulk_tier="vendor_batch"),
        ["priority", "max_in_flight", "bulk_tier"],
    )
    await office.directory.refresh()
    after = office.caller(key).tenant
    assert (after.weight, after.priority, after.models) == (2.0, Priority.BULK, frozenset({"mini"}))
    assert after.limits == Limits(0, 0, 9)
    assert (after.cache_group, after.bulk_tier) == (first.cache_group, "vendor_batch")


async def test_limits_are_told_as_they_come_change_and_go(office: Office) -> None:
    """And only then: the limiter hears of nobody who has none."""
    await office.desk.create_tenant(NewTenant(name="slow", requests_per_minute=5))
    await office.directory.refresh()
    await office.desk.update_tenant("slow", TenantTerms(weight=9.0), ["weight"])
    await office.directory.refresh()
    await office.desk.update_tenant("slow", TenantTerms(requests_per_minute=6), ["requests_per_minute"])
    await office.directory.refresh()
    await office.desk.delete_tenant("slow")
    await office.directory.refresh()
    assert office.heard == [
        ("tenant slow", Limits(5, 0, 0)), ("tenant slow", Limits(6, 0, 0)), ("tenant slow", None),
    ]  # fmt: skip


async def test_a_cache_is_a_tenants_own_unless_it_names_a_group(office: Office) -> None:
    """No configured group can have its name, and whoever takes the name of a deleted one does not find its cache."""
    first = office.caller(await office.key()).tenant.cache_group
    assert " " in first
    await office.desk.delete_tenant("search")
    await office.desk.create_tenant(NewTenant(name="search"))
    await office.desk.create_tenant(NewTenant(name="friend", cache_group="friends"))
    again = office.caller(await office.key()).tenant.cache_group
    assert again not in {first, ""}
    assert office.caller(await office.key("friend")).tenant.cache_group == "friends"


async def test_tenants_of_the_file_go_first(office: Office) -> None:
    """Nobody takes their name or changes them; but they may have keys and projects made at run time."""
    with pytest.raises(InvalidRequest, match="already"):
        await office.desk.create_tenant(NewTenant(name="filed"))
    with pytest.raises(InvalidRequest, match="configuration file"):
        await office.desk.update_tenant("filed", TenantTerms(weight=1.0), ["weight"])
    with pytest.raises(InvalidRequest, match="configuration file"):
        await office.desk.delete_tenant("filed")
    caller = office.caller(await office.key("filed"))
    assert (caller.tenant.name, caller.tenant.weight, caller.tenant.cache_group) == ("filed", 3.0, "")
    rows = (await office.desk.tenants(Page())).rows
    assert [(row["name"], row["configured"], row["bulk_tier"]) for row in rows] == [
        ("filed", True, "vendor_batch"), ("search", False, "online"),
    ]  # fmt: skip


async def test_deleting_a_tenant_ends_its_keys_for_good(office: Office) -> None:
    """They do not come back with the name."""
    key = await office.key()
    await office.desk.delete_tenant("search")
    await office.directory.refresh()
    assert not office.knows(key)
    await office.desk.create_tenant(NewTenant(name="search"))
    await office.directory.refresh()
    assert not office.knows(key)
    with pytest.raises(NotFound):
        await office.desk.delete_tenant("nobody")


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_only_the_whole_key_is_taken(office: Office) -> None:
    """Not its public id with another secret, nor any other bytes; and what is kept is not the key."""
    key = await office.key()
    assert office.knows(key)
    wrong = [api_key.make(), api_key.make(key[8:16]), key[:-1], key + "0", key.swapcase(), "", key[:16], "\xff" * 65]
    assert [each for each in wrong if office.knows(each)] == []
    kept = await scalars(office.database, select(api_keys.c.digest))
    assert key[16:].encode() not in kept[0]


class Counting(KeyHash):
    """Writes down what it is asked for."""

    def __init__(self) -> None:
        super().__init__(MASTER)
        self.calls: list[str] = []

    def of(self, key: bytes) -> bytes:
        """See `KeyHash`."""
        self.calls.append("of")
        return super().of(key)

    def older(self, key: bytes) -> list[bytes]:
        """See `KeyHash`."""
        self.calls.append("older")
        return super().older(key)


async def test_an_unknown_id_costs_what_a_wrong_secret_costs(office: Office) -> None:
    """The same hashes are made for both; for a right key one."""
    key = await office.key()
    for given, expected in (
        (key, ["of"]), (api_key.make(key[8:16]), ["of", "older"]), (api_key.make(), ["of", "older"]),
    ):  # fmt: skip
        office.directory._hash = counting = Counting()
        assert (office.knows(given), counting.calls) == (given == key, expected)


async def test_both_secrets_are_good_while_they_overlap(office: Office) -> None:
    """T48: then only the new one; the public id stays."""
    key = await office.key()
    rotated = await office.desk.rotate_key(key[8:16], Rotation(overlap_s=3600))
    await office.directory.refresh()
    assert office.knows(key)
    assert office.knows(rotated["key"])
    assert rotated["id"] == key[8:16]
    over = update(api_keys).values(previous_until_ms=api_keys.c.previous_until_ms - 3_600_000, version=99)
    await change(office.database, over)
    await change(office.database, update(counters).values(number=99))
    await office.directory.refresh()
    assert not office.knows(key)
    assert office.knows(rotated["key"])
    third = await office.desk.rotate_key(key[8:16], Rotation(overlap_s=0))
    await office.directory.refresh()
    assert [office.knows(each) for each in (key, rotated["key"], third["key"])] == [False, False, True]


async def test_a_key_ends_when_it_expires_by_the_databases_clock(office: Office) -> None:
    """Nobody has to tell: no change arrives between the two looks."""
    now = [1000.0]
    directory = Directory(
        office.source, MASTER, Telemetry(), configured={}, on_limits=lambda *_: None, clock=lambda: now[0]
    )  # fmt: skip
    key = (await office.key(expires_s=60)).encode()
    await directory.refresh()
    assert directory.find(key) is not None
    now[0] += 61
    assert directory.find(key) is None


async def test_a_revoked_key_is_gone_with_the_next_look(office: Office) -> None:
    """Revoking it again changes nothing; it stays listed."""
    key = await office.key()
    first = await office.desk.revoke_key(key[8:16])
    again = await office.desk.revoke_key(key[8:16])
    assert first["revoked_at"] == again["revoked_at"]
    await office.directory.refresh()
    assert not office.knows(key)
    assert [row["state"] for row in (await office.desk.keys(KeyPage(tenant="search"))).rows] == ["revoked"]
    with pytest.raises(NotFound):
        await office.desk.rotate_key(key[8:16], Rotation())


async def test_models_of_a_key_are_those_of_its_tenant_at_most(office: Office) -> None:
    """Whatever either says."""
    key = await office.key(models=["mini"])
    assert office.caller(key).tenant.models == frozenset({"mini"})
    await office.desk.update_tenant("search", TenantTerms(models=["maxi"]), ["models"])
    await office.directory.refresh()
    assert office.caller(key).tenant.models == frozenset()
    with pytest.raises(InvalidRequest, match="no model"):
        await office.desk.create_key(NewKey(tenant="search", models=["nobody"]))


async def test_allowances_of_key_and_project_come_with_the_caller(office: Office) -> None:
    """By account, exact, as they are now; another project brings its own."""
    await office.desk.set_project("search", "ix", Budget(budget_usd_per_day=Decimal("0.000000001")))
    await office.desk.set_project("search", "web", Budget(budget_usd_per_month=Decimal("12.5")))
    pinned = office.caller(await office.key(project="ix", budget_usd_per_month=Decimal(9_000_000)))
    free = office.caller(await office.key())
    key_id = pinned.spender.key
    assert pinned.spender.project == "ix"
    assert pinned.spender.allowances == (
        (f"key {key_id}", Allowance(None, 9 * 10**15)), ("project search/ix", Allowance(1, None)),
    )  # fmt: skip
    assert office.directory.spender(free, "web", "").allowances == (
        ("project search/web", Allowance(None, 12_500_000_000)),
    )
    assert office.directory.spender(free, "unmade", "").allowances == ()
    hashed = office.directory.spender(free, "", "someone@example.com").user
    assert (len(hashed), hashed) == (16, office.directory.spender(pinned, "", "someone@example.com").user)
    assert hashed != office.process(MasterSecret(OLD)).spender(free, "", "someone@example.com").user
    await office.desk.delete_project("search", "web")
    await office.directory.refresh()
    assert office.directory.spender(free, "web", "").allowances == ()


async def test_what_an_account_may_spend_is_known_by_its_name(office: Office) -> None:
    """Of a tenant of either kind, a project, a key; with whoever is to be told. Who is gone has no terms."""
    hook = "https://example.com/hook?token=1"
    terms = TenantTerms(budget_usd_per_day=Decimal(1), budget_usd_per_month=Decimal("20.5"), webhook_url=hook)
    given = ["budget_usd_per_day", "budget_usd_per_month", "webhook_url"]
    await office.desk.update_tenant("search", terms, given)
    for tenant in ("search", "filed"):
        await office.desk.set_project(tenant, "ix", Budget(budget_usd_per_day=Decimal("0.5")))
    key = await office.key(budget_usd_per_month=Decimal(3))
    of_filed = await office.key("filed")
    operators = (await office.desk.create_key(NewKey(scopes=["admin"])))["id"]
    await office.directory.refresh()
    known = {
        "tenant search": Terms("search", Allowance(10**9, 20_500_000_000), hook),
        "tenant filed": Terms("filed", Allowance(None, 2_500_000_000), "http://h/filed"),
        "project search/ix": Terms("search", Allowance(5 * 10**8, None), hook),
        "project filed/ix": Terms("filed", Allowance(5 * 10**8, None), "http://h/filed"),
        "project search/unmade": Terms("search", NO_BOUND, hook),
        f"key {key[8:16]}": Terms("search", Allowance(None, 3 * 10**9), hook),
        f"key {of_filed[8:16]}": Terms("filed", NO_BOUND, "http://h/filed"),
        "tenant nobody": None, "project nobody/ix": None, "key 00000000": None, f"key {operators}": None,
        "key ": None,
    }  # fmt: skip
    assert {account: office.directory.terms(account) for account in known} == known
    await office.desk.update_tenant("search", TenantTerms(), given)
    await office.desk.delete_project("search", "ix")
    await office.desk.revoke_key(key[8:16])
    await office.directory.refresh()
    for account in ("tenant search", "project search/ix"):
        assert office.directory.terms(account) == Terms("search", NO_BOUND, "")
    assert office.directory.terms(f"key {key[8:16]}") is None
    await office.desk.delete_tenant("search")
    await office.directory.refresh()
    assert office.directory.terms("tenant search") is None


async def test_a_tenant_is_shown_with_what_it_spent(office: Office) -> None:
    """Today and this month, by itself and by each of its projects, to the last digit; of no other time or tenant."""
    await office.desk.set_project("search", "ix", Budget(budget_usd_per_day=Decimal(1)))
    await office.desk.set_project("search", "web", Budget())
    _, now_ms = await office.source.now()
    today, month = spans_of(now_ms // 86_400_000)
    rows = [
        ("tenant search", today, 1), ("tenant search", month, 12_500_000_000), ("project search/ix", month, 10**9),
        ("tenant search", "1999-01", 7), ("tenant searching", month, 7), ("tenant filed", today, 10**9),
    ]  # fmt: skip
    for account, span, nano_usd in rows:
        await change(office.database, insert(spent).values(account=account, span=span, nano_usd=nano_usd))
    shown, filed = await office.desk.tenant("search"), await office.desk.tenant("filed")
    assert (shown["spent_usd_today"], shown["spent_usd_this_month"]) == ("0.000000001", "12.50")
    assert [(each["name"], each["spent_usd_today"], each["spent_usd_this_month"]) for each in shown["projects"]] == [
        ("ix", "0.00", "1.00"), ("web", "0.00", "0.00"),
    ]  # fmt: skip
    assert (filed["spent_usd_today"], filed["budget_usd_per_month"], filed["webhook_url"]) == (
        "1.00", "2.50", "http://h/filed",
    )  # fmt: skip


async def test_every_tenant_has_a_webhook_secret_of_its_own(office: Office) -> None:
    """The same whenever it is asked for, also of a configured one; nobody else has one."""
    first = await office.desk.webhook_secret("search")
    assert first == await office.desk.webhook_secret("search")
    assert first["secret"] == webhook_secret(MasterSecret(NEW), "search")
    assert (await office.desk.webhook_secret("filed"))["secret"] != first["secret"]
    with pytest.raises(NotFound):
        await office.desk.webhook_secret("nobody")


async def test_keys_outlive_a_rotation_of_the_servers_secret(office: Office) -> None:
    """As long as the older one is named, in processes before and after it."""
    older = TenantDesk(SETTINGS, office.database, office.source, MasterSecret(OLD))
    key = (await older.create_key(NewKey(tenant="search")))["key"].encode()
    for secret, taken in ((MasterSecret(OLD), True), (MASTER, True), (MasterSecret(NEW), False)):
        directory = office.process(secret)
        await directory.refresh()
        assert [directory.find(key) is not None for _ in range(2)] == [taken, taken]


async def test_an_operators_key_is_of_no_tenant(office: Office) -> None:
    """And a tenant's key is never an operator's."""
    assert not office.directory.operated
    made = await office.desk.create_key(NewKey(scopes=["admin"]))
    await office.directory.refresh()
    caller = office.caller(made["key"])
    assert (office.directory.operated, caller.scopes, office.directory.keyed) == (True, frozenset({"admin"}), False)
    for wrong in (NewKey(), NewKey(tenant="search", scopes=["embed", "admin"]), NewKey(scopes=["embed", "admin"])):
        with pytest.raises(InvalidRequest):
            await office.desk.create_key(wrong)
    with pytest.raises(NotFound):
        await office.desk.create_key(NewKey(tenant="nobody"))
    with pytest.raises(NotFound):
        await office.desk.create_key(NewKey(tenant="search", project="nobody"))


# ── following ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_known_stays_valid_while_the_database_is_away(office: Office) -> None:
    """Whoever knew nothing before does not claim to know."""
    key = await office.key()
    office.database.up = False
    late = office.process()
    for directory in (office.directory, late):
        with pytest.raises(DatabaseDown):
            await directory.refresh()
    office.database.up = True
    assert office.knows(key)
    assert (office.directory.loaded, late.loaded) == (True, False)


async def test_another_database_in_the_same_place_is_learned_anew(office: Office) -> None:
    """From a backup, say: who is no longer there is not known any more."""
    key, kept = await office.key(), await office.key()
    await office.desk.create_tenant(NewTenant(name="later", requests_per_minute=1))
    await office.directory.refresh()
    await change(office.database, delete(api_keys).where(api_keys.c.id == key[8:16]))
    await change(office.database, delete(tenants).where(tenants.c.name == "later"))
    await change(office.database, update(counters).values(number=2))
    await office.directory.refresh()
    assert (office.knows(key), office.knows(kept), office.directory.size) == (False, True, 1)
    assert office.heard[-1] == ("tenant later", None)


async def test_looks_that_find_nothing_new_read_one_row(office: Office) -> None:
    """Whoever follows idle tenants asks for one number."""
    asked: list[int] = []
    since = office.source.since

    async def counting(version: int) -> Any:
        asked.append(version)
        return await since(version)

    office.source.since = counting  # type: ignore[method-assign]
    for _ in range(3):
        await office.directory.refresh()
    assert asked == []


@asynccontextmanager
async def crowd(office: Office, count: int) -> AsyncIterator[None]:
    """So many more tenants, each with a key."""
    term = {
        "weight": 1.0, "priority": "default", "models": "*", "requests_per_minute": 60, "tokens_per_minute": 0,
        "max_in_flight": 0, "cache_group": "", "webhook_url": "", "created_at_ms": 1, "version": 50,
    }  # fmt: skip
    key = {
        "project": "", "label": "", "digest": b"?" * 32, "scopes": "embed\nbatch", "models": "*", "networks": "",
        "created_at_ms": 1, "version": 50,
    }  # fmt: skip
    rows = [{"name": f"crowd{n}", **term} for n in range(count)]
    keys = [{"id": f"{n:08d}", "tenant": f"crowd{n}", **key} for n in range(count)]
    for table, values in ((tenants, rows), (api_keys, keys)):
        for start in range(0, count, 1000):
            await change(office.database, insert(table).values(values[start : start + 1000]))
    await change(office.database, update(counters).values(number=50))
    yield


async def test_ten_thousand_tenants_cost_nothing_while_they_are_idle(office: Office) -> None:
    """Loaded once in a second or two, a few KB each; from then on a look is as cheap as with one."""
    count = 10_000
    async with crowd(office, count):
        tracemalloc.start()
        started = time.perf_counter()
        await office.directory.refresh()
        loaded_s = time.perf_counter() - started
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(20):
            await office.directory.refresh()
        look_s, busy_s = (time.perf_counter() - started) / 20, (time.process_time() - cpu) / 20
    print(f"10,000 tenants: loaded in {loaded_s:.2f} s (traced), {used / count:.0f} B each")
    print(f"a look: {look_s * 1e3:.2f} ms, of these {busy_s * 1e3:.2f} ms busy")
    assert office.directory.size == count + 1
    assert used / count < 4096
    assert busy_s < 0.02
