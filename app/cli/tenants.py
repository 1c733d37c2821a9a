"""Hides the commands that make tenants and their projects, and how such commands reach the database."""

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer

from app.cli.running import Config, run, with_examples
from app.errors import ConfigurationError, EmbedgateError
from app.settings import Row, Settings, find, json_lines, load, table

if TYPE_CHECKING:
    from pathlib import Path

    from app.tenant_desk import Listed, Page, TenantDesk

_T = TypeVar("_T")
_P = TypeVar("_P", bound="Page")

_TENANTS = """
Make tenants while servers run: each is one paying team with its share, its limits, its cache. Servers notice within 5
s. Tenants of the configuration file are shown too, and are changed there.

    embedgate tenants create search --requests-per-minute 600 --budget-usd-per-month 50
    embedgate keys create --tenant search
    embedgate tenants list
"""
_CREATE = """
Make a tenant. Nobody can call for it before it has a key:

    embedgate tenants create search --weight 2 --priority interactive --models text-embedding-3-small
    embedgate tenants create crawler --priority bulk --budget-usd-per-day 2.50 --budget-usd-per-month 40
    embedgate tenants create archive --bulk-tier vendor_batch
    embedgate keys create --tenant search

What it buys is cached for it alone, unless it names a --cache-group: tenants of one group share what one of them
bought. With --bulk-tier vendor_batch its jobs are done by the vendor's own batches, most at half the price and within a
day, unless a job says otherwise.
"""
_UPDATE = """
Change what is named here, and nothing else; a limit of 0 is none:

    embedgate tenants update search --weight 3
    embedgate tenants update search --tokens-per-minute 0
    embedgate tenants update search --budget-usd-per-month 80 --webhook-url https://hooks.example.com/embedgate
"""
_SIGNED = """
Print the secret with which a tenant checks that a message to its webhook is from here: they are signed as
standardwebhooks.com describes, so its libraries take the secret as it is.

    embedgate tenants webhook-secret search
"""
_DELETE = """
End a tenant: its keys and projects end with it, its cache cannot be reached any more, and in the books what it spent
becomes a deleted tenant's, without project, key and user. What was under way may be booked a little later: the command
can be given again.

    embedgate tenants delete crawler
"""
_PROJECTS = """
Divide what a tenant spends. A key can belong to a project; other callers name one with the header x-embedgate-project.
`embedgate tenants show` lists them.

    embedgate projects set search indexing --budget-usd-per-month 20
    embedgate keys create --tenant search --project indexing
"""

commands = typer.Typer(help=with_examples(_TENANTS), no_args_is_help=True, rich_markup_mode=None)
projects = typer.Typer(help=with_examples(_PROJECTS), no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
PerDay = Annotated[
    str | None, typer.Option("--budget-usd-per-day", metavar="USD", help="May be spent in a day, by UTC; 0: no bound.")
]
PerMonth = Annotated[str | None, typer.Option("--budget-usd-per-month", metavar="USD", help="The same in a month.")]
Models = Annotated[str | None, typer.Option(metavar="A,B", help="The models that may be asked for; default: all.")]
_SHORT = {
    "name": "name", "weight": "weight", "priority": "priority", "models": "models",
    "requests/min": "requests_per_minute", "tokens/min": "tokens_per_minute", "at_once": "max_in_flight",
    "usd/day": "budget_usd_per_day", "usd/month": "budget_usd_per_month", "cache_group": "cache_group",
}  # fmt: skip
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the tenant.")]
_Project = Annotated[str, typer.Argument(metavar="PROJECT", help="Its name within the tenant.")]
_Weight = Annotated[float | None, typer.Option(help="Its share among tenants of one priority; default: 1.")]
_Priority = Annotated[str | None, typer.Option(help="interactive, default or bulk.")]
_Requests = Annotated[int | None, typer.Option("--requests-per-minute", help="0: no limit.")]
_Tokens = Annotated[int | None, typer.Option("--tokens-per-minute", help="0: no limit.")]
_InFlight = Annotated[int | None, typer.Option("--max-in-flight", help="Requests at one moment; 0: no limit.")]
_Group = Annotated[str | None, typer.Option("--cache-group", help='With whom it shares the cache; "": nobody.')]
_Webhook = Annotated[
    str | None, typer.Option("--webhook-url", metavar="URL", help="Is told when 50, 80, 100 % of a budget are spent.")
]
_BulkTier = Annotated[
    str | None, typer.Option("--bulk-tier", help="Of jobs that name none: online or vendor_batch; default: online.")
]


@commands.command(help=with_examples(_CREATE))
def create(  # noqa: PLR0913 — an option each
    name: _Name, config: Config = None, weight: _Weight = None, priority: _Priority = None, models: Models = None,
    requests_per_minute: _Requests = None, tokens_per_minute: _Tokens = None, max_in_flight: _InFlight = None,
    per_day: PerDay = None, per_month: PerMonth = None, cache_group: _Group = None, webhook_url: _Webhook = None,
    bulk_tier: _BulkTier = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """See `_CREATE`."""
    from app.tenant_desk import NewTenant

    given = named(
        name=name, weight=weight, priority=priority, models=several(models), requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute, max_in_flight=max_in_flight, budget_usd_per_day=per_day,
        budget_usd_per_month=per_month, cache_group=cache_group, webhook_url=webhook_url, bulk_tier=bulk_tier,
    )  # fmt: skip
    wanted = understood(given, NewTenant)
    show([_row(at_desk(config, lambda desk: desk.create_tenant(wanted)), as_json=as_json)], as_json=as_json)


@commands.command("list")
def list_tenants(config: Config = None, as_json: AsJson = False) -> None:
    """List all tenants, those of the configuration file first."""
    from app.tenant_desk import Page

    rows = at_desk(config, lambda desk: every(desk.tenants, Page(), "name"))
    show([_row(row, as_json=as_json) for row in rows], as_json=as_json)


@commands.command("show")
def show_tenant(name: _Name, config: Config = None, as_json: AsJson = False) -> None:
    """Print one tenant and its projects, and what they spent today and this month by UTC."""
    found = at_desk(config, lambda desk: desk.tenant(name))
    if as_json:
        show([found], as_json=True)
        return
    show([{**_row(found, as_json=False), **_spent(found)}], as_json=False)
    if found["projects"]:
        print()
        show([{**_project_row(each), **_spent(each)} for each in found["projects"]], as_json=False)


@commands.command("webhook-secret", help=with_examples(_SIGNED))
def show_webhook_secret(name: _Name, config: Config = None, as_json: AsJson = False) -> None:
    """See `_SIGNED`."""
    found = at_desk(config, lambda desk: desk.webhook_secret(name))
    print(json_lines([found]) if as_json else found["secret"])


@commands.command(help=with_examples(_UPDATE))
def update(  # noqa: PLR0913 — an option each
    name: _Name, config: Config = None, weight: _Weight = None, priority: _Priority = None, models: Models = None,
    requests_per_minute: _Requests = None, tokens_per_minute: _Tokens = None, max_in_flight: _InFlight = None,
    per_day: PerDay = None, per_month: PerMonth = None, cache_group: _Group = None, webhook_url: _Webhook = None,
    bulk_tier: _BulkTier = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """See `_UPDATE`."""
    from app.tenant_desk import TenantTerms

    given = named(
        weight=weight, priority=priority, models=several(models), requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute, max_in_flight=max_in_flight, budget_usd_per_day=per_day,
        budget_usd_per_month=per_month, cache_group=cache_group, webhook_url=webhook_url, bulk_tier=bulk_tier,
    )  # fmt: skip
    terms = understood(given, TenantTerms)
    show([_row(at_desk(config, lambda desk: desk.update_tenant(name, terms, given)), as_json=as_json)], as_json=as_json)


@commands.command(help=with_examples(_DELETE))
def delete(name: _Name, config: Config = None, as_json: AsJson = False) -> None:
    """See `_DELETE`."""
    at_desk(config, lambda desk: desk.delete_tenant(name))
    print(json_lines([{"name": name, "deleted": True}]) if as_json else f"deleted {name}")


@projects.command("set")
def set_project(
    tenant: _Name, project: _Project, config: Config = None, per_day: PerDay = None, per_month: PerMonth = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a project of a tenant, or change its budget: what is not named has no bound."""
    from app.tenant_desk import Budget

    budget = understood(named(budget_usd_per_day=per_day, budget_usd_per_month=per_month), Budget)
    found = at_desk(config, lambda desk: desk.set_project(tenant, project, budget))
    show([found if as_json else _project_row(found)], as_json=as_json)


@projects.command("delete")
def delete_project(tenant: _Name, project: _Project, config: Config = None, as_json: AsJson = False) -> None:
    """End a project of a tenant, and its keys."""
    at_desk(config, lambda desk: desk.delete_project(tenant, project))
    row = {"tenant": tenant, "name": project, "deleted": True}
    print(json_lines([row]) if as_json else f"deleted {project} of {tenant}")


def _row(tenant: Row, *, as_json: bool) -> Row:
    """A tenant; for people as much of it as fits into a line."""
    if as_json:
        return tenant
    made_in = "the file" if tenant["configured"] else "the database"
    return {short: tenant[name] for short, name in _SHORT.items()} | {"made_in": made_in}


def _project_row(project: Row) -> Row:
    return {
        "project": project["name"],
        "usd/day": project["budget_usd_per_day"],
        "usd/month": project["budget_usd_per_month"],
    }


def _spent(account: Row) -> Row:
    return {"spent_today": account["spent_usd_today"], "this_month": account["spent_usd_this_month"]}


# ── for the commands about keys, too ────────────────────────────────────────────────────────────────────────────────


def named(**options: object) -> dict[str, object]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def several(names: str | None) -> list[str] | None:
    """The names of a list with commas."""
    return None if names is None else [each.strip() for each in names.split(",")]


def understood(given: Mapping[str, object], kind: type[_T]) -> _T:
    """What was `given` as a `kind`; else a line that names the option."""
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        said = re.fullmatch(r"(.*) - at `\$\.(\w+).*`", str(error))
        text = f"--{said[2].replace('_', '-')}: {said[1]}" if said else str(error)
        raise ConfigurationError(text) from error


def show(rows: "list[Row]", *, as_json: bool) -> None:
    """Prints what was found."""
    print(json_lines(rows) if as_json else table(rows))


async def every(page_of: "Callable[[_P], Awaitable[Listed]]", page: "_P", column: str) -> list[Row]:
    """The rows of all pages; `column` is what they go by."""
    rows: list[Row] = []
    while True:
        found = await page_of(page)
        rows += found.rows
        if not found.has_more:
            return rows
        page = msgspec.structs.replace(page, after=found.rows[-1][column])


def at_desk(config: "Path | None", work: "Callable[[TenantDesk], Awaitable[_T]]") -> _T:
    """What `work` gets from the database that the configuration names; what goes wrong is told in a line."""
    settings = load(find(config, os.environ), os.environ)

    async def visit() -> _T:
        async with _desk(settings) as desk:
            return await work(desk)

    return run(visit)


@asynccontextmanager
async def _desk(settings: Settings) -> "AsyncIterator[TenantDesk]":
    from app.storage.level import LevelDown
    from app.storage.secret import confirm
    from app.storage.sql.directory import SqlDirectory
    from app.storage.sql.migrations import migrate
    from app.stores import master_secret, open_database
    from app.tenant_desk import TenantDesk  # only now, so that --help and refusals come fast

    try:
        async with open_database(settings, serves=False) as database:
            secret = master_secret(settings)
            await migrate(database, only_additive=True)
            await confirm(database, secret)
            yield TenantDesk(settings, database, SqlDirectory(database), secret)
    except LevelDown as error:
        raise ConfigurationError(f"the database cannot be reached: {error}") from error
    except EmbedgateError as error:
        raise ConfigurationError(str(error)) from error
