"""What the contract suite of Providers is held against."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeAlias

from app.domain import Space
from app.ports import Provider
from tests.emulators.server import Emulator


@dataclass(frozen=True)
class Subject:
    """A Provider and the Space that it is asked for; the stand-in that it calls, or that stands behind whom it calls.

    `stranger` is the same Provider with a key that nobody there knows.
    """

    provider: Provider
    space: Space
    emulator: Emulator | None = None
    stranger: Provider | None = None


Adapter: TypeAlias = Callable[[], AbstractAsyncContextManager[Subject]]
