"""Hides where the Python face embeds: a desk on a loop of its own, one for each place and process."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from app.domain import EmbeddingRequest, EmbeddingResult
from app.embed_desk import Asking, Desk, desk
from app.engine.breaker import CONDEMNED_S
from app.errors import ConfigurationError, DeadlineExceeded, TryAgainLater, UpstreamFailed
from app.settings import load

_T = TypeVar("_T")


class EmbeddingError(Exception):
    """There are no vectors; `rows` are the places of the texts that are known to be to blame."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


@dataclass(frozen=True, slots=True)
class Place:
    """Where is embedded: with which configuration, or at which server."""

    config: Path | None
    base_url: str
    api_key: str
    asking: Asking


class Home:
    """A desk on a loop of its own, in a thread that ends with the process. Raises ConfigurationError."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._throttles = 0  # until somebody was answered
        self._hopeless = ""
        self._hopeless_until = 0.0
        self._leave = asyncio.Event()
        self._ready: Future[Desk] = Future()
        self._thread = threading.Thread(target=self._live, name="embedgate", daemon=True)
        self._thread.start()
        self.desk = self._ready.result()

    @property
    def width(self) -> int:
        """How wide its vectors are."""
        return self.desk.dimensions

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """Of its gateway, on its loop; an EmbeddingError while nobody will answer before somebody mends something."""
        if self._loop.time() < self._hopeless_until:
            raise EmbeddingError(self._hopeless)
        try:
            result = await self.desk.runtime.gateway.embed(request)
        except (TryAgainLater, DeadlineExceeded, UpstreamFailed):
            if not (complaint := self.desk.complaint()):
                raise
            self._hopeless, self._hopeless_until = complaint, self._loop.time() + CONDEMNED_S
            raise EmbeddingError(complaint) from None
        if result.calls:
            self._throttles = self.desk.throttles()
        return result

    @property
    def is_throttled(self) -> bool:
        """Whether somebody has said 429 since anybody was answered."""
        return self.desk.throttles() > self._throttles

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Does it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Gives everything back."""
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(timeout=10.0)

    def _live(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        place = self._place
        try:
            settings = await asyncio.to_thread(load, place.config, os.environ)
            async with desk(settings, place.asking, server=place.base_url, api_key=place.api_key) as opened:
                self._ready.set_result(opened)
                await self._leave.wait()
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error if isinstance(error, ConfigurationError) else EmbeddingError(str(error)))


# By process: threads do not go along into a fork.
_homes: dict[tuple[int, Place], Home] = {}
_rooms: dict[int, asyncio.AbstractEventLoop] = {}
_opening = threading.Lock()


def home_at(place: Place) -> Home:
    """The one there, made by whoever asks first. Blocks; raises ConfigurationError and EmbeddingError."""
    with _opening:
        key = (os.getpid(), place)
        if key not in _homes:
            _homes[key] = Home(place)
        return _homes[key]


def close_all() -> None:
    """Gives back what this process has opened; who asks again opens anew."""
    for key in [key for key in _homes if key[0] == os.getpid()]:
        _homes.pop(key).close()


# What closes needs threads, and those of executors are refused before `atexit` has its turn.
getattr(threading, "_register_atexit", lambda _: None)(close_all)


def waiting_room() -> asyncio.AbstractEventLoop:
    """A loop in a thread, for callers whose own is busy with them."""
    with _opening:
        if os.getpid() not in _rooms:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="embedgate callers", daemon=True).start()
            _rooms[os.getpid()] = loop
    return _rooms[os.getpid()]
