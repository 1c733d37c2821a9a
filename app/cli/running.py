"""Hides what every command does alike: where its configuration is, how its help is laid out, on what loop it runs."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

_T = TypeVar("_T")

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


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
