"""How a tenant's name leaves the books, on both kinds of database: no money does."""

from typing import Any

from sqlalchemy import insert, select

from app.storage.sql.database import Database
from app.storage.sql.erasure import ERASED, erase
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import alerts, api_keys, ledger, spared, spent, usage_days, usage_hours
from tests.contract.stored import SOON_S, change, scalars

DAY_MS = 86_400_000
KEY = "8Q2xVd0L"
ROW = {
    "part": 0, "replica": "r", "project": "p", "key": KEY, "user": "u", "model": "m", "space": "s", "deployment": "d",
    "cause": "miss", "state": "billed", "texts": 1, "tokens_estimated": 1, "tokens": 1, "nano_usd": 5,
}  # fmt: skip
SUMS = {
    "model": "m", "deployment": "d", "cause": "miss", "calls": 5, "texts": 5, "tokens": 5, "nano_usd": 5,
    "estimated_nano_usd": 5, "unconfirmed_nano_usd": 5, "unpriced_tokens": 5,
}  # fmt: skip
SPENT = [("search", "p", 0), ("search", "q", 0), ("search", "p", 9000), ("other", "p", 0), (ERASED, "", 0)]
SAVED = {"minute": 7, "model": "m", "hits": 1, "joined": 2, "tokens": 3, "nano_usd": 4}
ACCOUNTS = [
    "tenant search", f"key {KEY}", "project search/p", "tenant other", "project search/x/p", "project searching/p",
]  # fmt: skip


async def filled(database: Database) -> None:
    """Books in which `search`, `other` and a tenant that was deleted before are."""
    values: dict[str, Any] = {"tenant": "search", "project": "", "label": "", "digest": b"", "scopes": "", "models": "",
                              "networks": "", "created_at_ms": 1, "version": 1}  # fmt: skip
    await change(database, insert(api_keys).values(id=KEY, **values))
    for call, tenant, at_ms in (("a", "search", 0), ("b", "search", 40 * DAY_MS), ("c", "other", 40 * DAY_MS)):
        await change(database, insert(ledger).values(call=call, tenant=tenant, at_ms=at_ms, **ROW))
    for table, moment in ((usage_hours, "hour"), (usage_days, "day")):
        for tenant, project, at in SPENT:
            await change(database, insert(table).values({"tenant": tenant, "project": project, moment: at, **SUMS}))
    for tenant in ("search", "other"):
        await change(database, insert(spared).values(tenant=tenant, **SAVED))
    for account in ACCOUNTS:
        span = {"account": account, "span": "2026-11"}
        await change(database, insert(spent).values(nano_usd=1, **span))
        await change(database, insert(alerts).values(percent=50, at_ms=1, attempts=0, **span))


async def test_the_name_leaves_and_no_money_does(database_url: str) -> None:
    """Rows and sums become the deleted tenants', once however often it is done; others keep theirs."""
    async with Database(database_url) as database:
        await migrate(database)
        await filled(database)
        for _ in range(2):
            await erase(database, "search")

        async def found(*columns: Any) -> list[tuple[Any, ...]]:
            rows = await database.fetch(select(*columns).order_by(*columns), {}, within_s=SOON_S)
            return [tuple(row) for row in rows]

        who = (ledger.c.call, ledger.c.tenant, ledger.c.project, ledger.c.key, ledger.c.user, ledger.c.nano_usd)
        nobody = (ERASED, "", "", "", 5)
        assert await found(*who) == [("a", *nobody), ("b", *nobody), ("c", "other", "p", KEY, "u", 5)]
        for table, moment in ((usage_hours, "hour"), (usage_days, "day")):
            sums = await found(table.c.tenant, table.c.project, table.c[moment], table.c.nano_usd, table.c.calls)
            assert sums == [(ERASED, "", 0, 15, 15), (ERASED, "", 9000, 5, 5), ("other", "p", 0, 5, 5)]
        assert await found(spared.c.tenant, spared.c.hits) == [(ERASED, 1), ("other", 1)]
        for table in (spent, alerts):
            assert sorted(await scalars(database, select(table.c.account))) == sorted(ACCOUNTS[3:])
