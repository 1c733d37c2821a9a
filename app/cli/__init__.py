"""Hides the command line: what an operator types, what is printed, and the exit codes.

1: a deployment does not answer as it should; 2: something to mend in the configuration.
"""

import io
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer

from app import __version__
from app.cli import cache, embed, index, jobs, keys, search, tenants, usage
from app.cli.running import Config, run, with_examples
from app.domain import Route
from app.errors import ConfigurationError
from app.providers.cards import KNOWN_ON
from app.settings import (
    Row,
    Settings,
    catalog_rows,
    cautions,
    describe,
    find,
    json_lines,
    load,
    table,
    usd_per_million,
    verdict,
)

_EXAMPLES = """
An embeddings gateway: OpenAI's /v1/embeddings in front of any provider, batched across callers, paid once.

Without any configuration it serves a small model on this machine, to this machine:

    embedgate serve
    curl http://127.0.0.1:8080/v1/embeddings -H 'content-type: application/json' -d '{"model": "all-MiniLM-L6-v2", "input": "hello"}'

With one (--config FILE, or EMBEDGATE_CONFIG, or ./embedgate.toml), look at what was understood first:

    embedgate check --config embedgate.toml
    embedgate check --config embedgate.toml --live
    embedgate serve --config embedgate.toml

Every value can be overridden by the environment: EMBEDGATE_SERVER__PORT=9000, EMBEDGATE_DEPLOYMENTS__OPENAI_MAIN__TIMEOUT_S=10.
"""  # noqa: E501 - lines to copy


command = typer.Typer(
    help=with_examples(_EXAMPLES),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

command.add_typer(cache.commands, name="cache")
command.add_typer(tenants.commands, name="tenants")
command.add_typer(tenants.projects, name="projects")
command.add_typer(keys.commands, name="keys")
command.add_typer(jobs.commands, name="jobs")
command.command(help=usage.HELP)(usage.usage)
command.command(help=embed.HELP)(embed.embed)
command.command(help=index.HELP)(index.index)
command.command(help=search.HELP)(search.search)

_CHECK = """
Say what is wrong with the configuration (exit code 2), or print what is in force: defaults, tiers, headroom and catalog
included, keys masked. What can be served but deserves a look is told on the standard error.

With --live, call every deployment of every model once with three texts instead, one of them near the longest that fits,
and print a row for each: how long it took, how wide the vectors are, how near to those first accepted (--accept makes
these the accepted ones), the limits per minute that the vendor states beside those configured, and the price. Exit code
1 when one does not answer, answers other vectors, or has a smaller quota than configured:

    embedgate check --live
    embedgate check --live --json | jq 'select(.wrong != [])'
"""
_MIGRATE = """
Bring the tables of the database to what this version knows. Servers do that by themselves when they start, as long as
servers of the version before can go on working beside them; where they could not, stop those first and run this:

    embedgate migrate
"""
_MODELS = f"""
List the models that are served, with their deployments in the order they are tried, and then the catalog: what is known
of the vendors' models as of {KNOWN_ON}. A model of the catalog needs only dialect, model and key; any other one needs
its dimensions.

With --json, a line with "deployments" is served, a line with "dialect" is of the catalog:

    embedgate models --json | jq 'select(.dialect == "voyage")'
"""


_WORKER = """
Work on files of requests and nothing else, beside servers that share its database and Redis: so bulk work grows apart
from serving. Servers work on jobs, too, unless `bulk.tasks` is 0 there:

    embedgate worker --config embedgate.toml
    EMBEDGATE_BULK__TASKS=8 embedgate worker
"""


def main() -> None:
    """The console command; what the operator must mend is told in a line each, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may hold what the terminal cannot show
    try:
        command(prog_name="embedgate")
    except ConfigurationError as error:
        for line in str(error).splitlines():
            print(f"embedgate: {line}", file=sys.stderr)
        sys.exit(2)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"embedgate {__version__}")
        raise typer.Exit


@command.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Stands before the commands; the help text is `_EXAMPLES`."""


@command.command()
def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Listen here instead of [server] host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of [server] port; 0: any free.")] = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is in flight and leave."""
    named = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = load(find(config, os.environ), os.environ, options=named)
    from app.api import server  # only now, so that --help and refusals come fast

    run(lambda: server.serve(settings, lambda base_url: _announce(settings, base_url)), interrupted=0)


@command.command(help=with_examples(_WORKER))
def worker(config: Config = None) -> None:
    """See `_WORKER`."""
    settings = load(find(config, os.environ), os.environ)
    from app.api import bulk  # only now: see `serve`

    served = ", ".join(settings.models)
    told = f"embedgate {__version__} works on jobs for {served}"
    run(lambda: bulk.work(settings, lambda: print(told, flush=True)), interrupted=0)


@command.command(help=with_examples(_CHECK))
def check(
    config: Config = None,
    live: Annotated[bool, typer.Option("--live", help="Call every deployment once.")] = False,
    accept: Annotated[
        bool, typer.Option("--accept", help="With --live: from now on its vectors are those to compare with.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --live: one JSON object per line.")] = False,
) -> None:
    """See `_CHECK`."""
    if (accept or as_json) and not live:
        raise typer.BadParameter("--accept and --json belong to --live")
    path = find(config, os.environ)
    settings = load(path, os.environ)
    if live:
        rows = run(lambda: _probed(settings, accept=accept))
    else:
        _routes(settings)
    for caution in cautions(settings, datetime.now(UTC).date()):
        print(f"embedgate: warning: {caution}", file=sys.stderr)
    if not live:
        print(f"# {path or 'no configuration file: the embedded default'}\n\n{describe(settings)}")
        return
    print(json_lines(rows) if as_json else table(rows))
    if any(row["wrong"] for row in rows):
        raise typer.Exit(1)


@command.command(help=with_examples(_MODELS))
def models(
    config: Config = None, as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False
) -> None:
    """See `_MODELS`."""
    settings = load(find(config, os.environ), os.environ)
    served = [_row(settings, route) for route in _routes(settings)]
    if as_json:
        print(json_lines([*served, *catalog_rows()]))
        return
    print(f"{table(served)}\n\nThe catalog as of {KNOWN_ON}:\n\n{table(catalog_rows())}")


@command.command(help=with_examples(_MIGRATE))
def migrate(config: Config = None) -> None:
    """See `_MIGRATE`."""
    settings = load(find(config, os.environ), os.environ)
    print(run(lambda: cache.migrated(settings)))


def _row(settings: Settings, route: Route) -> Row:
    bought_at = [settings.deployments[deployment.name] for deployment in route.deployments]
    return {
        "model": route.model,
        "dimensions": route.space.dimensions,
        "max_input_tokens": route.space.max_input_tokens,
        "deployments": [deployment.name for deployment in route.deployments],
        "usd_per_million": [usd_per_million(deployment.price) for deployment in bought_at],
        "prices_from": [deployment.price_source for deployment in bought_at],
    }


async def _probed(settings: Settings, *, accept: bool) -> Sequence[Row]:
    """A row per deployment of each model; the log stays out of the answer."""
    from app.runtime import Runtime  # only now: see `serve`

    quiet = settings.server.model_copy(update={"log_file": os.devnull})
    async with Runtime(settings.model_copy(update={"server": quiet}), serves=False) as runtime:
        return [verdict(settings, finding) for finding in await runtime.probe(accept=accept)]


def _routes(settings: Settings) -> list[Route]:
    """What would be served: models and files are opened as `serve` opens them."""
    from app.serving import Menu  # only now: see `serve`

    return [served.route for served in Menu(settings).models.values()]


def _announce(settings: Settings, base_url: str) -> None:
    served = ", ".join(f"{name} ({' > '.join(model.deployments)})" for name, model in settings.models.items())
    key = ' -H "authorization: Bearer $API_KEY"' if settings.tenants else ""
    body = json.dumps({"model": next(iter(settings.models)), "input": "hello"})
    admin_port, own = settings.server.admin_port, base_url.rpartition(":")[0]
    print(
        f"embedgate {__version__} serves {served}",
        f"base URL  {base_url}",
        *([f"operators {own}:{admin_port}, for /metrics, /admin and everybody's /v1/usage"] if admin_port else []),
        f"try       curl {base_url}/embeddings{key} -H 'content-type: application/json' -d '{body}'",
        sep="\n",
        flush=True,
    )
