"""Hides the command line: what an operator types, what is printed, and the exit codes (2: something to mend)."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from app import __version__
from app.domain import Route
from app.errors import ConfigurationError
from app.settings import Settings, describe, find, load

_T = TypeVar("_T")

_EXAMPLES = """
An embeddings gateway: OpenAI's /v1/embeddings in front of any provider, batched across callers, paid once.

Without any configuration it serves a small model on this machine, to this machine:

    embedgate serve
    curl http://127.0.0.1:8080/v1/embeddings -H 'content-type: application/json' -d '{"model": "all-MiniLM-L6-v2", "input": "hello"}'

With one (--config FILE, or EMBEDGATE_CONFIG, or ./embedgate.toml), look at what was understood first:

    embedgate check --config embedgate.toml
    embedgate serve --config embedgate.toml

Every value can be overridden by the environment: EMBEDGATE_SERVER__PORT=9000, EMBEDGATE_DEPLOYMENTS__OPENAI_MAIN__TIMEOUT_S=10.
"""  # noqa: E501 - lines to copy

command = typer.Typer(
    help=_EXAMPLES.replace("\n\n    ", "\n\n\b\n    "),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Default: $EMBEDGATE_CONFIG, then ./embedgate.toml."),
]


def main() -> None:
    """The console command; what the operator must mend is told in a line each, without a traceback."""
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
    config: _Config = None,
    host: Annotated[str | None, typer.Option(help="Listen here instead of [server] host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of [server] port; 0: any free.")] = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is in flight and leave."""
    named = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = load(find(config, os.environ), os.environ, options=named)
    from app.api import server  # only now, so that --help and refusals come fast

    _run(lambda: server.serve(settings, lambda base_url: _announce(settings, base_url)))


@command.command()
def check(config: _Config = None) -> None:
    """Say what is wrong with the configuration, or print what was understood, defaults included, keys masked."""
    path = find(config, os.environ)
    settings = load(path, os.environ)
    _run(lambda: _routes(settings))
    print(f"# {path or 'no configuration file: the embedded default'}\n\n{describe(settings)}")


@command.command()
def models(
    config: _Config = None, as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False
) -> None:
    """List the models: name, dimensions, longest input in tokens, deployments in the order they are tried."""
    settings = load(find(config, os.environ), os.environ)
    rows = [_row(route) for route in _run(lambda: _routes(settings))]
    if as_json:
        print(*map(json.dumps, rows), sep="\n")
        return
    shown = [["MODEL", "DIMENSIONS", "MAX TOKENS", "DEPLOYMENTS"]]
    shown += [[", ".join(value) if isinstance(value, list) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for cells in shown:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


def _row(route: Route) -> dict[str, Any]:
    return {
        "model": route.model,
        "dimensions": route.space.dimensions,
        "max_input_tokens": route.space.max_input_tokens,
        "deployments": [deployment.name for deployment in route.deployments],
    }


async def _routes(settings: Settings) -> list[Route]:
    """What would be served: models and files are opened as `serve` opens them."""
    from app.runtime import Runtime  # only now: see `serve`

    async with Runtime(settings) as runtime:
        return list(runtime.gateway.routes.values())


def _run(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Runs `work` on the fastest loop there is; Ctrl-C ends the command without complaint."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(work())
    except KeyboardInterrupt:
        raise typer.Exit from None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _announce(settings: Settings, base_url: str) -> None:
    served = ", ".join(f"{name} ({' > '.join(model.deployments)})" for name, model in settings.models.items())
    key = ' -H "authorization: Bearer $API_KEY"' if settings.tenants else ""
    body = json.dumps({"model": next(iter(settings.models)), "input": "hello"})
    print(
        f"embedgate {__version__} serves {served}",
        f"base URL  {base_url}",
        f"try       curl {base_url}/embeddings{key} -H 'content-type: application/json' -d '{body}'",
        sep="\n",
        flush=True,
    )
