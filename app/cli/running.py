"""Hides what every command does alike: where its configuration is, how its help is laid out, on what loop it runs."""

import asyncio
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

_T = TypeVar("_T")

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Default: $EMBEDGATE_CONFIG, then ./embedgate.toml."),
]


def with_examples(text: str) -> str:
    """Keeps indented lines as they are, where others are wrapped."""
    return text.replace("\n\n    ", "\n\n\b\n    ")


def run(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Runs `work` on the fastest loop there is; Ctrl-C ends the command without complaint."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(work())
    except KeyboardInterrupt:
        raise typer.Exit from None


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
