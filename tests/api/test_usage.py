"""What tenants and operators are told of what was spent: over HTTP by whose key it is, at the terminal by format."""

import asyncio
import csv
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.storage.sql.database import Database
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import ledger
from tests.api.conftest import ADA, ADA_KEY, KEY, SMALL, Edge, running
from tests.api.test_cli import embedgate
from tests.contract.stored import SOON_S
from tests.contract.summed import bought, spared, sum_up
from tests.contract.test_usage import DAY, HOUR, row

ADMIN_KEY = "key-of-the-operator"
USAGE, UNCONFIRMED = "/v1/usage", "/admin/usage/unconfirmed"
NOVEMBER = {"start": "2026-11-01", "end": "2026-12-01"}
FACTS = (
    bought(HOUR, "search", SMALL, 1_234_567, project="p", deployment="main"),
    bought(HOUR + 1, "search", SMALL, 200, cause="retry", deployment="main", estimated_nano_usd=200),
    spared(HOUR + 1, "search", SMALL, 50, joined=2),
    bought(HOUR + 24, "archive", ADA, 10**12, deployment="ada"),
    bought(HOUR + 24, "", SMALL, 400, cause="canary", deployment="main"),
)


@asynccontextmanager
async def spending(folder: Path, **configured: str) -> AsyncIterator[Edge]:
    """A service that knows `FACTS`."""
    async with running(folder, **configured) as edge:
        await sum_up(edge.runtime.stores.database, FACTS)
        yield edge


async def ask(edge: Edge, path: str = USAGE, key: str = KEY, **given: str) -> httpx.Response:
    """What it says about November, unless told otherwise."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await edge.http.get(path, params=NOVEMBER | given, headers=headers)


def costs(answer: httpx.Response, *groups: str) -> dict[tuple[str, ...], int]:
    """Money by group."""
    assert answer.status_code == 200
    return {tuple(line[group] for group in groups): line["cost_nano_usd"] for line in answer.json()["data"]}


# ── whose ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_tenant_is_told_what_is_its_own(tmp_path: Path) -> None:
    """Whatever it groups by or asks for; the totals are its own too."""
    async with spending(tmp_path) as edge:
        own, theirs = await ask(edge, by="total", group="tenant"), await ask(edge, key=ADA_KEY, group="tenant,project")
        filtered = await ask(edge, by="total", group="cause", cause="retry")
        canaries = await ask(edge, cause="canary")
    assert costs(own, "tenant") == {("search",): 1_234_767}
    assert own.json()["totals"]["saved"] == own.json()["data"][0]["saved"]
    assert own.json()["totals"]["cost_usd"] == "0.001234767"
    assert costs(theirs, "tenant", "project") == {("archive", ""): 10**12}
    assert costs(filtered, "cause") == {("retry",): 200}
    assert (canaries.json()["data"], canaries.json()["totals"]["calls"]) == ([], 0)


async def test_a_foreign_tenant_looks_like_one_that_there_is_not(tmp_path: Path) -> None:
    """By every way to name one, to the byte; a place in an answer of everybody leads to its own lines only."""
    async with spending(tmp_path, server=f'admin_key = "{ADMIN_KEY}"') as edge:
        for given in ({"by": "total"}, {"group": "tenant"}, {"by": "hour", "group": ""}):
            foreign, absent = [await ask(edge, tenant=name, **given) for name in ("archive", "nobody")]
            assert (foreign.status_code, foreign.content) == (absent.status_code, absent.content)
            assert foreign.json()["data"] == []
        place = (await ask(edge, key=ADMIN_KEY, by="total", group="tenant", limit="1")).json()["next"]
        assert costs(await ask(edge, by="total", group="tenant", after=place), "tenant") == {("search",): 1_234_767}


async def test_the_admin_key_sees_all_and_may_name_a_tenant(tmp_path: Path) -> None:
    """Embedgate's own calls stand under no name."""
    async with spending(tmp_path, server=f'host = "0.0.0.0"\nadmin_key = "{ADMIN_KEY}"') as edge:
        everything = await ask(edge, key=ADMIN_KEY, by="month", group="tenant")
        named = await ask(edge, key=ADMIN_KEY, by="total", group="", tenant="archive")
        own = await ask(edge, key=ADMIN_KEY, by="total", group="", tenant="")
    assert costs(everything, "tenant") == {("",): 400, ("archive",): 10**12, ("search",): 1_234_767}
    assert everything.json()["totals"]["cost_nano_usd"] == 10**12 + 1_235_167
    assert (costs(named), costs(own)) == ({(): 10**12}, {(): 400})


async def test_without_any_key_this_machine_sees_all(tmp_path: Path) -> None:
    """On loopback, as it may do everything else there."""
    async with spending(tmp_path, tenants="") as edge:
        assert costs(await ask(edge, key="", by="total", group="model"), "model") == {
            (SMALL,): 1_235_167,
            (ADA,): 10**12,
        }


@pytest.mark.parametrize("key", ["", "key-of-nobody", ADMIN_KEY + "x"])
async def test_without_a_key_of_ours_nothing_is_told(tmp_path: Path, key: str) -> None:
    """Nor is it looked at what was asked."""
    async with spending(tmp_path, server=f'admin_key = "{ADMIN_KEY}"') as edge:
        answer = await ask(edge, key=key, by="nonsense")
    assert (answer.status_code, answer.json()["error"]["param"]) == (401, None)


async def test_only_operators_see_what_no_vendor_confirmed(tmp_path: Path) -> None:
    """Elsewhere than on loopback a tenant's key is as good as none."""
    async with running(tmp_path, server=f'host = "0.0.0.0"\nadmin_key = "{ADMIN_KEY}"') as edge:
        rows = [row(1, "billed"), row(2, "unconfirmed", tenant="search")]
        await edge.runtime.stores.database.write(lambda c: c.execute(ledger.insert(), rows), within_s=SOON_S)
        refused = [(await ask(edge, UNCONFIRMED, key)).status_code for key in ("", KEY)]
        told, other = await ask(edge, UNCONFIRMED, ADMIN_KEY), await ask(edge, UNCONFIRMED, ADMIN_KEY, tenant="other")
    assert refused == [401, 401]
    assert [entry["call"] for entry in told.json()["data"]] == ["call-2"]
    assert other.json() == {"object": "list", "data": [], "has_more": False, "next": None}


async def test_nonsense_is_refused_in_the_usual_envelope(tmp_path: Path) -> None:
    """With the name of the parameter; so it is on both routes."""
    async with spending(tmp_path) as edge:
        for path, name, value in ((USAGE, "by", "week"), (USAGE, "user", "u"), (UNCONFIRMED, "by", "day")):
            answer = await ask(edge, path, **{name: value})
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", name)


async def test_a_database_that_is_down_is_told_as_such(tmp_path: Path) -> None:
    """Who asks may ask again."""
    async with spending(tmp_path) as edge:
        edge.runtime.stores.database.up = False
        answer = await ask(edge)
        edge.runtime.stores.database.up = True
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert int(answer.headers["retry-after"]) >= 1


async def test_what_is_bought_is_told_soon_afterwards(tmp_path: Path) -> None:
    """Once the ledger has summed it up: what the emulator billed at the catalog's price, and what the cache saved."""
    async with running(tmp_path) as edge, asyncio.timeout(20):
        for _ in range(2):
            await edge.post({"model": SMALL, "input": ["one text", "another"]})
        while True:
            answer = await edge.http.get(USAGE, headers={"authorization": f"Bearer {KEY}"})
            totals = answer.json()["totals"]
            if (totals["calls"], totals["saved"]["hits"]) == (1, 2):
                break
            await asyncio.sleep(0.05)
    tokens = sum(map(edge.upstream.count, ["one text", "another"]))
    assert (totals["tokens"], totals["cost_nano_usd"]) == (tokens, tokens * 20)
    assert (totals["saved"]["tokens"], totals["saved"]["cost_nano_usd"]) == (tokens, tokens * 20)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def book(folder: Path) -> AsyncIterator[Database]:
    """A database where the command looks for it, of a server that has it open, and is writing."""
    (folder / "data").mkdir()
    async with Database(f"sqlite:///{folder}/data/embedgate.db", serves=True) as database:
        await migrate(database)
        await sum_up(database, FACTS)
        yield database


async def shown(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`embedgate usage …` of November."""
    given = ("--start", "2026-11-01", "--end", "2026-12-01", *arguments)
    return await asyncio.to_thread(embedgate, "usage", *given, folder=folder)


TABLE = """
START       MODEL                   CALLS  TEXTS  TOKENS        COST USD  ESTIMATED USD  HITS  JOINED   SAVED USD
2026-11-01  text-embedding-3-small      2      2      20     0.001234767      0.0000002     1       2  0.00000005
2026-11-02  text-embedding-3-small      1      1      10     0.0000004        0.00          0       0  0.00
2026-11-02  text-embedding-ada-002      1      1      10  1000.00             0.00          0       0  0.00
total                                   4      4      40  1000.001235167      0.0000002     1       2  0.00000005
"""


async def test_people_get_a_table_while_a_server_writes(tmp_path: Path) -> None:
    """Exact dollars with their points below each other, totals at the end, and no column of nothing special."""
    async with book(tmp_path) as database:

        async def writing(connection: Any) -> subprocess.CompletedProcess[str]:
            await connection.execute(ledger.insert(), [row(1, "billed")])
            return await shown(tmp_path)

        done = await database.write(writing, within_s=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == TABLE.strip().splitlines()


async def test_spreadsheets_get_every_column_and_no_formula(tmp_path: Path) -> None:
    """Names are texts, whatever a caller named its project."""
    async with book(tmp_path) as database:
        await sum_up_more(database)
        done = await shown(tmp_path, "--csv", "--by", "total", "--group", "project", "--tenant", "evil")
    assert done.returncode == 0
    (line,) = csv.DictReader(done.stdout.splitlines())
    assert line == {
        "start": "2026-11-01T00:00:00Z", "end": "2026-12-01T00:00:00Z", "project": "'=HYPERLINK(0)", "calls": "1",
        "texts": "1", "tokens": "10", "cost_usd": "", "unpriced_tokens": "10", "estimated_usd": "0.00",
        "unconfirmed_usd": "0.00",
    }  # fmt: skip
    assert done.stderr.startswith("embedgate: warning: 10 tokens have no known price")


async def sum_up_more(database: Database) -> None:
    """A purchase without a price, by somebody who means no good, on another day."""
    await sum_up(database, [bought(HOUR + 48, "evil", "m", 0, project="=HYPERLINK(0)", unpriced_tokens=10)])


async def test_programs_get_what_the_route_says(tmp_path: Path) -> None:
    """An object a line, the totals last; the next page is told on the other stream."""
    async with book(tmp_path):
        done = await shown(tmp_path, "--json", "--limit", "2", "--group", "tenant", "--by", "hour")
        place = done.stderr.removeprefix("embedgate: there are more: --after ").strip()
        rest = await shown(tmp_path, "--json", "--after", place, "--group", "tenant", "--by", "hour")
    lines = [json.loads(line) for line in (*done.stdout.splitlines(), *rest.stdout.splitlines())]
    assert [line["object"] for line in lines] == [*["usage"] * 2, "usage.totals"] * 2
    assert [(line["start"], line["tenant"], line["cost_nano_usd"]) for line in lines if "tenant" in line] == [
        ("2026-11-01T00:00:00Z", "search", 1_234_567), ("2026-11-01T01:00:00Z", "search", 200),
        ("2026-11-02T00:00:00Z", "", 400), ("2026-11-02T00:00:00Z", "archive", 10**12),
    ]  # fmt: skip
    assert lines[2] == lines[-1]


async def test_what_no_vendor_confirmed_is_listed_one_by_one(tmp_path: Path) -> None:
    """With what it was, whose, and what it may have cost."""
    async with book(tmp_path) as database:
        rows = [row(1, "billed"), row(2, "unconfirmed"), row(3, "estimated", nano_usd=None, price=None)]
        await database.write(lambda connection: connection.execute(ledger.insert(), rows), within_s=SOON_S)
        done = await shown(tmp_path, "--unconfirmed")
    head, *lines = map(str.split, done.stdout.splitlines())
    assert head[:4] == ["AT", "CALL", "PART", "STATE"]
    assert [(line[0], line[1], line[3], line[-1]) for line in lines] == [
        ("2026-11-01T00:02:00Z", "call-2", "unconfirmed", "0.0000002"),
        ("2026-11-01T00:03:00Z", "call-3", "estimated", "-"),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--by", "week"), "'by' must be one of hour, day, month, total."),
        (("--start", "yesterday"), "'start' must be a date such as"),
        (("--group", "user"), "'group' must be some of"),
        (("--unconfirmed", "--by", "day"), "Unknown parameter: 'by'."),
        (("--csv", "--json"), "--csv and --json exclude each other"),
    ],
)
async def test_what_cannot_be_asked_is_told_with_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    """And nothing else is printed."""
    async with book(tmp_path):
        done = await asyncio.to_thread(embedgate, "usage", *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_a_database_without_tables_is_told_in_a_line(tmp_path: Path) -> None:
    """And how to make them; a span of nothing is no error."""
    first = embedgate("usage", folder=tmp_path)
    assert (first.returncode, first.stdout) == (2, "")
    assert first.stderr == "embedgate: the database has no such tables yet; run `embedgate migrate`\n"
    assert embedgate("migrate", folder=tmp_path).returncode == 0
    second = embedgate("usage", "--start", str(DAY * 86_400), folder=tmp_path)
    assert (second.returncode, second.stdout, second.stderr) == (0, "nothing was bought or spared\n", "")
