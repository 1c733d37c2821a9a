"""Hides the commands that make, list and end API keys."""

from typing import Annotated

import typer

from app.cli.running import Config, span_s, with_examples
from app.cli.tenants import AsJson, Models, PerDay, PerMonth, at_desk, every, named, several, show, understood
from app.settings import Row, json_lines, table

_KEYS = """
Make API keys while servers run. A key is shown once: only a keyed hash of it is kept. Whatever changes holds on every
server within 5 s.

    embedgate keys create --tenant search --label "laptop of Ada"
    embedgate keys list --tenant search
    embedgate keys revoke 8Q2xVd0L
"""
_CREATE = """
Make a key, which is shown this once:

    embedgate keys create --tenant search
    embedgate keys create --tenant search --project indexing --models text-embedding-3-small --expires 90d
    embedgate keys create --tenant search --network 10.0.0.0/8 --network fd00::/8

With --admin it is an operator's: for /admin, /metrics and everybody's usage, where server.admin_key opens them too:

    embedgate keys create --admin --label dashboards
"""
_ROTATE = """
Give a key another secret. Both are good until the overlap ends, so that callers can be changed one after the other:

    embedgate keys rotate 8Q2xVd0L
    embedgate keys rotate 8Q2xVd0L --overlap 7d
    embedgate keys rotate 8Q2xVd0L --overlap 0s
"""

commands = typer.Typer(help=with_examples(_KEYS), no_args_is_help=True, rich_markup_mode=None)

_Id = Annotated[str, typer.Argument(metavar="ID", help="The public id: the 8 characters after eg_live_.")]
_SHORT = ("id", "tenant", "project", "label", "state", "scopes", "models", "expires_at")


@commands.command(help=with_examples(_CREATE))
def create(
    config: Config = None,
    tenant: Annotated[str | None, typer.Option(help="Whose it is.")] = None,
    project: Annotated[str | None, typer.Option(help="For which of its projects; default: any.")] = None,
    label: Annotated[str | None, typer.Option(help="What you will know it by.")] = None,
    scopes: Annotated[str | None, typer.Option(metavar="A,B", help="Of embed and batch; default: both.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="An operator's, of no tenant.")] = False,
    models: Models = None,
    expires: Annotated[str | None, typer.Option(metavar="SPAN", help="From now: 90d, 12h; default: never.")] = None,
    network: Annotated[
        list[str] | None, typer.Option(metavar="CIDR", help="From where it is taken; may be repeated.")
    ] = None,
    per_day: PerDay = None,
    per_month: PerMonth = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """See `_CREATE`."""
    from app.tenant_desk import NewKey

    if admin == (tenant is not None) or (admin and scopes is not None):
        raise typer.BadParameter("name the --tenant whose key it is, or --admin alone for an operator's")
    given = named(
        tenant=tenant, project=project, label=label, scopes=["admin"] if admin else several(scopes),
        models=several(models), networks=network or None, budget_usd_per_day=per_day, budget_usd_per_month=per_month,
        expires_s=None if expires is None else span_s(expires, "--expires"),
    )  # fmt: skip
    wanted = understood(given, NewKey)
    _show_new(at_desk(config, lambda desk: desk.create_key(wanted)), as_json=as_json)


@commands.command("list")
def list_keys(
    config: Config = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List keys, ended ones too, without their secrets."""
    from app.tenant_desk import KeyPage

    rows = at_desk(config, lambda desk: every(desk.keys, KeyPage(tenant=tenant), "id"))
    show([row if as_json else _short(row) for row in rows], as_json=as_json)


@commands.command(help=with_examples(_ROTATE))
def rotate(
    public_id: _Id,
    config: Config = None,
    overlap: Annotated[str, typer.Option(metavar="SPAN", help="How long the secret before is good beside it.")] = "24h",
    as_json: AsJson = False,
) -> None:
    """See `_ROTATE`."""
    from app.tenant_desk import Rotation

    rotation = understood({"overlap_s": span_s(overlap, "--overlap")}, Rotation)
    _show_new(at_desk(config, lambda desk: desk.rotate_key(public_id, rotation)), as_json=as_json)


@commands.command()
def revoke(public_id: _Id, config: Config = None, as_json: AsJson = False) -> None:
    """End a key: within 5 s no server takes it any more."""
    row = at_desk(config, lambda desk: desk.revoke_key(public_id))
    print(json_lines([row]) if as_json else f"revoked {public_id}")


def _short(key: Row) -> Row:
    return {name: key[name] for name in _SHORT}


def _show_new(key: Row, *, as_json: bool) -> None:
    if as_json:
        print(json_lines([key]))
        return
    print(table([_short(key)]), f"key  {key['key']}", "Shown this once: only a keyed hash of it is kept.", sep="\n\n")
