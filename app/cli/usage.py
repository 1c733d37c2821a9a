"""Hides the command that tells what was spent: as a table, for spreadsheets, for programs."""

import csv
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from app import money
from app.cli.running import Config, run, with_examples
from app.errors import ConfigurationError, InvalidRequest
from app.settings import Settings, find, json_lines, load, table

HELP: Final = with_examples("""
Tell what was bought and what was not, exact to the nano-dollar: this month's, by day and model, unless you say
otherwise. It works beside running servers and knows what they spent up to a second ago:

    embedgate usage
    embedgate usage --by month --start 2026-01-01 --group tenant,model
    embedgate usage --by hour --start 2026-11-21 --tenant search --csv > search.csv
    embedgate usage --by total --group cause --json

What is not known is not counted as nothing: tokens without a price are told beside the money, and a cost of which
nothing is known is "-". Of the money, parts were estimated, where a vendor does not say what it billed, or are
unconfirmed, where nobody heard the end of a call. With --unconfirmed, list those purchases one by one, to be compared
with the vendor's bill:

    embedgate usage --unconfirmed --start 2026-11-01 --end 2026-12-01
""")

_ONLY_IF_ANY = {"unpriced_tokens", "estimated_usd", "unconfirmed_usd", "saved_unpriced_tokens"}
_NOT_IN_TABLES = {"end", "saved_tokens"}  # which should fit into a window
_WORDS = {"start", "at", "call", "state", "tenant", "project", "model", "deployment", "cause"}

_When = Annotated[
    str | None, typer.Option(metavar="WHEN", help="2026-11-21, 2026-11-21T09:30:00Z, or Unix seconds; by UTC.")
]
_Only = Annotated[str | None, typer.Option(metavar="NAME", help='Only of this one; "": of none.')]


def usage(  # noqa: PLR0913 — options
    config: Config = None,
    start: _When = None,
    end: _When = None,
    by: Annotated[str | None, typer.Option(metavar="SPAN", help="hour, day (default), month or total.")] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help='Some of tenant,project,model,deployment,cause; default: model, "": none.'),
    ] = None,
    tenant: _Only = None,
    project: _Only = None,
    model: _Only = None,
    deployment: _Only = None,
    cause: _Only = None,
    limit: Annotated[str | None, typer.Option(metavar="ROWS", help="At most; default: 1000, up to 10000.")] = None,
    after: Annotated[str | None, typer.Option(metavar="PLACE", help="Where the rows before ended.")] = None,
    unconfirmed: Annotated[bool, typer.Option("--unconfirmed", help="List what no vendor confirmed.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="With a head, and without totals.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line, the totals last.")] = False,
) -> None:
    """See `HELP`."""
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json exclude each other")
    given = {
        "start": start, "end": end, "by": by, "group": group, "tenant": tenant, "project": project, "model": model,
        "deployment": deployment, "cause": cause, "limit": limit, "after": after,
    }  # fmt: skip
    settings = load(find(config, os.environ), os.environ)
    asked = [(name, value) for name, value in given.items() if value is not None]
    answer = run(lambda: _answer(settings, asked, unconfirmed=unconfirmed))
    print(_shown(answer, as_csv=as_csv, as_json=as_json), end="")
    for line in _remarks(answer):
        print(f"embedgate: {line}", file=sys.stderr)


async def _answer(settings: Settings, asked: Sequence[tuple[str, str]], *, unconfirmed: bool) -> dict[str, Any]:
    """What the database says; no server is needed, and none is disturbed."""
    from app.storage.level import LevelDown
    from app.storage.sql.migrations import pending
    from app.storage.sql.usage import SqlUsage
    from app.stores import open_database  # only now: see `serve`
    from app.usage_desk import UsageDesk

    try:
        async with open_database(settings, serves=False) as database:
            if await pending(database):
                raise ConfigurationError("the database has no such tables yet; run `embedgate migrate`")
            desk = UsageDesk(SqlUsage(database))
            return await (desk.uncertain(asked) if unconfirmed else desk.usage(asked, within=None))
    except LevelDown as error:
        raise ConfigurationError(f"the database cannot be asked: {error}") from error
    except InvalidRequest as error:
        raise ConfigurationError(str(error)) from error


def _remarks(answer: Mapping[str, Any]) -> Iterator[str]:
    if unpriced := answer.get("totals", {}).get("unpriced_tokens"):
        yield f"warning: {unpriced} tokens have no known price; set usd_per_million_tokens of their deployments"
    if answer["has_more"]:
        yield f"there are more: --after {answer['next']}"


# ── how it is shown ─────────────────────────────────────────────────────────────────────────────────────────────────


def _shown(answer: Mapping[str, Any], *, as_csv: bool, as_json: bool) -> str:
    if as_json:
        totals = [{"object": "usage.totals", **answer["totals"]}] if "totals" in answer else []
        return "".join(f"{json_lines([row])}\n" for row in [*answer["data"], *totals])
    if as_csv:
        return _csv([_flat(row) for row in answer["data"]])
    rows = [_flat(row) for row in answer["data"]]
    if rows and "totals" in answer:
        total = _flat(answer["totals"]) | {"start": "total"}
        rows.append({name: total.get(name, "") for name in rows[0]})
    return f"{_aligned(rows)}\n" if rows else "nothing was bought or spared\n"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an answer with a column for each of its facts, money in dollars."""
    told_otherwise = {"object", "complete", "saved", "cost_nano_usd"}
    flat = {name: value for name, value in row.items() if name not in told_otherwise}
    for part in ("estimated", "unconfirmed"):
        if (nano_usd := flat.pop(f"{part}_nano_usd", None)) is not None:
            flat[f"{part}_usd"] = money.usd(nano_usd)
    if saved := row.get("saved"):
        flat |= {"hits": saved["hits"], "joined": saved["joined"], "saved_tokens": saved["tokens"]}
        flat |= {"saved_usd": saved["cost_usd"], "saved_unpriced_tokens": saved["unpriced_tokens"]}
    return flat


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _inert(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _inert(value: object) -> object:
    """What a spreadsheet takes for a text: callers choose names, and some begin a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@") else value


def _aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table whose numbers stand below each other; without columns of nothing but special cases that never came."""
    columns: dict[str, list[str]] = {}
    for name in rows[0]:
        cells = ["-" if row[name] is None else str(row[name]) for row in rows]
        if name in _NOT_IN_TABLES or (name in _ONLY_IF_ANY and {*cells} <= {"0", "0.00"}):
            continue
        if name == "start" and all(cell.endswith("T00:00:00Z") or cell == "total" for cell in cells):
            cells = [cell.removesuffix("T00:00:00Z") for cell in cells]
        columns |= {name: cells} if name in _WORDS else _numbers(name, cells)
    return table([dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)])


def _numbers(name: str, cells: Sequence[str]) -> dict[str, list[str]]:
    """A column with its points below each other, and its name above its end."""
    tails = [len(cell.partition(".")[1] + cell.partition(".")[2]) for cell in cells]
    padded = [cell + " " * (max(tails) - tail) for cell, tail in zip(cells, tails, strict=True)]
    width = max(map(len, (name, *padded)))
    return {name.rjust(width): [cell.rjust(width) for cell in padded]}
