"""Hides the commands that look after the cache and the database it is kept in."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from app.cli.running import Config, run, span_s, with_examples
from app.errors import ConfigurationError, EmbedgateError
from app.settings import Settings, find, json_lines, load, table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from app.cache_desk import Warming
    from app.runtime import Runtime
    from app.storage.level import LevelStats

_CACHE = """
See how full the cache is, fill it ahead of time, or say what is no longer wanted. All of it works beside running
servers, which notice within 5 s.
"""
_WARM = """
Embed the lines of FILE ("-" is the standard input) at the lowest priority, as far as they are not kept yet. A line that
is a JSON object, array or string gives its "input" or "text", its items, or itself; any other line is the text:

    embedgate cache warm questions.txt --model text-embedding-3-small --input-type query
"""
_INVALIDATE = """
Make kept vectors unreachable in every process within 5 s and drop them from the database; they are bought again when
they are asked for:

    embedgate cache invalidate --model text-embedding-3-small
    embedgate cache invalidate --older-than 90d
    embedgate cache invalidate --space s1-0123456789abcdef01234567 --older-than 12h
    embedgate cache invalidate --all
"""

commands = typer.Typer(help=with_examples(_CACHE), no_args_is_help=True, rich_markup_mode=None)

_Json = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


@commands.command()
def stats(config: Config = None, as_json: _Json = False) -> None:
    """Print how full each shared level is: entries, bytes, the bound in bytes (0: none)."""
    settings = load(find(config, os.environ), os.environ)

    async def look() -> list[dict[str, Any]]:
        async with _tool(settings) as runtime:
            found = await runtime.stores.cache.stats()
        found.pop("memory")  # this process's own, which is empty
        return [_level(name, each) for name, each in found.items()]

    rows = run(look)
    print(json_lines(rows) if as_json else table(rows))


def _level(name: str, stats: "LevelStats | None") -> dict[str, Any]:
    if stats is None:
        return {"level": name, "state": "down"}
    return {"level": name, "state": "up", "entries": stats.entries, "bytes": stats.used_bytes, "max": stats.max_bytes}


@commands.command(help=with_examples(_WARM))
def warm(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='Lines of text or JSON; "-": the standard input.')],
    model: Annotated[str, typer.Option(help="A model that is served.")],
    config: Config = None,
    input_type: Annotated[
        Literal["query", "document"] | None, typer.Option(help="For models that tell them apart.")
    ] = None,
    cache_group: Annotated[str, typer.Option(help="Of the tenants that will ask; default: those that name none.")] = "",
    requests_per_minute: Annotated[
        int, typer.Option(min=0, help="Of up to 256 texts; 0: as fast as the quotas allow.")
    ] = 0,
    as_json: _Json = False,
) -> None:
    """See `_WARM`."""
    settings = load(find(config, os.environ), os.environ)

    async def fill() -> "Warming":
        from app.cache_desk import CacheDesk, Warming

        done = Warming()
        async with _tool(settings) as runtime:
            steps = CacheDesk(runtime).warm(
                model, _texts(file), input_type=input_type, cache_group=cache_group,
                requests_per_minute=requests_per_minute,
            )  # fmt: skip
            started = time.monotonic()
            async for done in steps:
                _show(done, started)
        return done

    done = run(fill)
    row = {"texts": done.texts, "bought": done.texts - done.kept - done.failed, "kept": done.kept,
           "failed": done.failed, "tokens": done.tokens}  # fmt: skip
    print(json.dumps(row) if as_json else table([row]))
    if done.failed:
        raise typer.Exit(3)


@commands.command(help=with_examples(_INVALIDATE))
def invalidate(
    config: Config = None,
    model: Annotated[str, typer.Option(help="Everything of this model.")] = "",
    space: Annotated[str, typer.Option(help="Everything of this Space; x-embedgate-space names it.")] = "",
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Only what is older: 90d, 12h, 30m.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Whatever there is.")] = False,
    as_json: _Json = False,
) -> None:
    """See `_INVALIDATE`."""
    older_than_s = span_s(older_than, "--older-than") if older_than else None
    settings = load(find(config, os.environ), os.environ)

    async def forget() -> int:
        from app.cache_desk import CacheDesk, Invalidation

        wanted = Invalidation(model, space, everything, older_than_s)
        async with _tool(settings) as runtime:
            return await CacheDesk(runtime).invalidate(wanted)

    rows = run(forget)
    print(json.dumps({"rows": rows}) if as_json else f"invalidated; {rows} rows dropped from the database")


async def migrated(settings: Settings) -> str:
    """Migrates, and says from what to what."""
    from app.storage.level import LevelDown
    from app.storage.sql.migrations import migrate
    from app.stores import open_database  # only now: see `serve`

    try:
        async with open_database(settings, serves=False) as database:
            before, after = await migrate(database)
    except LevelDown as error:
        raise ConfigurationError(f"the database cannot be reached: {error}") from error
    return f"up to date: {after}" if before == after else f"migrated from {before or 'nothing'} to {after}"


@asynccontextmanager
async def _tool(settings: Settings) -> "AsyncIterator[Runtime]":
    """Everything but a server, its log out of the way; what goes wrong is told in a line."""
    from app.runtime import Runtime  # only now: see `serve`
    from app.storage.level import LevelDown

    quiet = settings.server.model_copy(update={"log_file": os.devnull})
    try:
        async with Runtime(settings.model_copy(update={"server": quiet}), serves=False) as runtime:
            yield runtime
    except LevelDown as error:
        raise ConfigurationError(f"the database cannot be reached: {error}") from error
    except EmbedgateError as error:
        raise ConfigurationError(str(error)) from error


def _texts(file: Path) -> Iterator[str]:
    """The texts of a file's lines; empty lines are none."""
    try:
        with open(0, encoding="utf-8", closefd=False) if str(file) == "-" else file.open(encoding="utf-8") as lines:
            for line in lines:
                yield from _texts_of(line.rstrip("\r\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error


def _texts_of(line: str) -> Iterator[str]:
    found: object = line
    if line[:1] in '{["':
        try:
            found = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError):
            found = line
    if isinstance(found, dict):
        found = found.get("input", found.get("text", ""))
    for text in found if isinstance(found, list) else [found]:
        if isinstance(text, str) and text:
            yield text


def _show(done: "Warming", started: float) -> None:
    """Progress: on a terminal one line that moves, elsewhere nothing until the end."""
    if sys.stderr.isatty():
        speed = done.texts / max(time.monotonic() - started, 1e-3)
        print(f"\r{done.texts} texts, {done.kept} kept already, {speed:.0f}/s ", end="", file=sys.stderr, flush=True)
