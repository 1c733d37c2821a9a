"""Hides where the Python face embeds: everything that does, on a loop of its own, once for each place and process."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from app.domain import Basket, EmbeddingRequest, EmbeddingResult
from app.embed_desk import Asking, Away, Desk, desk
from app.engine.breaker import CONDEMNED_S
from app.errors import ConfigurationError, DeadlineExceeded, TryAgainLater, UpstreamFailed
from app.settings import Settings, load

_T = TypeVar("_T")


class EmbeddingError(Exception):
    """There are no vectors; `rows` are the places of the texts that are known to be to blame."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


@dataclass(frozen=True, slots=True)
class Place:
    """Where is embedded: with which configuration, or at which server, that with which `model`."""

    config: Path | None
    base_url: str = ""
    api_key: str = ""
    model: str = ""


class Home:
    """Everything that embeds at a place, on a loop of its own, in a thread that ends with the process.

    It is `ready` once it is open, with a desk that can be asked for anything there; or with why it is not:
    ConfigurationError, Away, or EmbeddingError.
    """

    def __init__(self, place: Place, settings: Settings) -> None:
        self.ready: Future[Desk] = Future()
        self.ready.set_running_or_notify_cancel()  # whoever waits no more takes it from nobody
        self.patience_s = settings.embed.give_up_after_s
        self._settings = settings
        self._place = place
        self._hopeless: dict[str, tuple[str, float]] = {}
        self._leave = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, name="embedgate", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether it could not be opened."""
        return self.ready.done() and self.ready.exception() is not None

    async def embed(self, at: Desk, request: EmbeddingRequest, basket: Basket | None = None) -> EmbeddingResult:
        """See `Gateway`; on its loop. An EmbeddingError while nobody will answer before somebody mends something."""
        complaint, until_s = self._hopeless.get(request.model, ("", 0.0))
        if self._loop.time() < until_s:
            raise EmbeddingError(complaint)
        try:
            return await at.runtime.gateway.embed(request, basket)
        except (TryAgainLater, DeadlineExceeded, UpstreamFailed):
            if not (complaint := at.complaint()):
                raise
            self._hopeless[request.model] = complaint, self._loop.time() + CONDEMNED_S
            raise EmbeddingError(complaint) from None

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Does it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Gives everything back; if it is not open yet it never will be."""
        with suppress(RuntimeError):  # it could not be opened, so its loop has ended
            self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(timeout=10.0)

    def _live(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        opening = asyncio.create_task(self._open())
        leaving = asyncio.create_task(self._leave.wait())
        await asyncio.wait((opening, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not self.ready.done():
            opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening

    async def _open(self) -> None:
        place = self._place
        try:
            async with desk(
                self._settings, Asking(place.model), server=place.base_url, api_key=place.api_key
            ) as opened:
                self.ready.set_result(opened)
                await self._leave.wait()
        except BaseException as error:
            if self.ready.done():
                raise
            told = isinstance(error, ConfigurationError | Away)
            self.ready.set_exception(error if told else EmbeddingError(str(error) or type(error).__name__))


# By process: threads do not go along into a fork.
_homes: dict[tuple[int, Place], Home] = {}
_rooms: dict[int, asyncio.AbstractEventLoop] = {}
_opening = threading.Lock()


def home_at(place: Place) -> Home:
    """The one there, opened by whoever asks first, and anew where that was in vain. Reads the configuration."""
    with _opening:
        key = (os.getpid(), place)
        home = _homes.get(key)
        if home is None or home.failed:
            home = _homes[key] = Home(place, load(place.config, os.environ))
        return home


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
