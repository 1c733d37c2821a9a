"""Hides what every command does alike: where its configuration is, how its help is laid out, on what loop it runs."""

import asyncio
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from app.errors import ConfigurationError
from app.settings import Settings
from app.settings.wording import in_words

if TYPE_CHECKING:
    from app.embed_desk import Asking, Desk

_T = TypeVar("_T")
_S = TypeVar("_S", bound=BaseModel)

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Default: $EMBEDGATE_CONFIG, then ./embedgate.toml."),
]


def with_examples(text: str) -> str:
    """Keeps indented lines as they are, where others are wrapped."""
    return text.replace("\n\n    ", "\n\n\b\n    ")


def run(work: Callable[[], Coroutine[Any, Any, _T]], *, interrupted: int = 130) -> _T:
    """Runs `work` on the fastest loop there is; Ctrl-C ends the command without complaint, `interrupted` says how."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(work())
    except KeyboardInterrupt:
        raise typer.Exit(interrupted) from None


def overridden(section: _S, options: Mapping[str, tuple[str, Any]]) -> _S:
    """A section of the configuration with what options say instead of its fields; None: nothing.

    Raises ConfigurationError for what may not stand there either.
    """
    given = {name: value for name, value in options.values() if value is not None}
    try:
        return section.model_validate(section.model_dump() | given)
    except ValidationError as error:
        named = {name: option for option, (name, _) in options.items()}
        told = filter(None, map(in_words, error.errors(include_url=False)))
        raise ConfigurationError("; ".join(f"{named[str(where[-1])]}: {why}" for where, why in told)) from None


def api_key() -> str:
    """What a running embedgate is asked with."""
    return os.environ.get("EMBEDGATE_API_KEY", "")


def span_s(text: str, option: str) -> int:
    """The seconds of a span such as 90d, given as an `option`."""
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if found is None:
        raise typer.BadParameter("must be a number with a unit, such as 90d, 12h or 30m", param_hint=option)
    return int(found[1]) * _UNITS_S[found[2]]


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


@asynccontextmanager
async def desk_at(settings: Settings, asking: "Asking", server: str) -> "AsyncIterator[Desk]":
    """Where texts are embedded; for a server that is away it waits, and says so. Raises GaveUp if it stays away."""
    from app.corpus.stream import GaveUp
    from app.embed_desk import Away, desk

    def waiting(why: str) -> None:
        print(f"embedgate: {why}; it is waited for", file=sys.stderr, flush=True)

    try:
        async with desk(settings, asking, server=server, api_key=api_key(), waiting=waiting) as at:
            yield at
    except Away as away:
        raise GaveUp(str(away)) from away


def priced(settings: Settings, model: str, server: str) -> Settings:
    """With the models whose price is to be told: all, the one that is named, or that of a server, which tells it."""
    from app.embed_desk import Away, known, offered

    if server:
        try:
            return run(lambda: offered(settings, model, server, api_key(), buys=False))
        except Away as away:
            raise ConfigurationError(str(away)) from away
    return settings.model_copy(update={"models": {known(settings, model): settings.models[model]}} if model else {})


@contextmanager
def explained(out: str = "") -> Iterator[None]:
    """What ends a run early is told in a line, with the command that goes on; of a password in `out` nothing is."""
    from app.corpus.address import shown
    from app.corpus.rows import DataError
    from app.corpus.stream import GaveUp

    try:
        name = shown(out)
        try:
            yield
        except GaveUp as gave_up:
            _tell_how_to_go_on(str(gave_up), out, name)
            raise typer.Exit(4) from gave_up
        except typer.Exit as left:  # Ctrl-C
            _tell_how_to_go_on("stopped", out, name)
            raise typer.Exit(130) from left
    except DataError as error:
        raise ConfigurationError(str(error)) from error


def _tell_how_to_go_on(why: str, out: str, name: str) -> None:
    """Without a password that stands in `out`."""
    arguments = [each.replace(out, name) if out else each for each in sys.argv[1:]]
    print(f"embedgate: {why}; go on with: {shlex.join(['embedgate', *arguments])}", file=sys.stderr)
