"""Hides the HTTP server: its socket, its bounds on what is no proper request, and how it stops without losing one."""

import asyncio
import gc
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import FrameType
from typing import cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app import __version__
from app.api import bulk
from app.api.app import create_app
from app.api.corked import CorkedTransport
from app.api.errors import malformed_http, reply_to
from app.api.exchange import LINGER_S
from app.errors import ConfigurationError
from app.runtime import Runtime
from app.settings import Settings

_MOST_HEAD_BYTES = 65_536
_MOST_HEADERS = 199
PATIENCE_S = 10.0
"""How long a caller may take to send something complete, or to read something; the longer, the more it moves."""

_SLOWEST_BYTES_PER_S = 65_536
_KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections (60 s), so that the one that closes is not the one that answers."""

_HOST = re.compile(rb"[A-Za-z0-9._~-]+(:[0-9]{0,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{0,5})?").fullmatch


async def serve(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what it has begun, and returns.

    Calls `on_ready` with the base URL once requests are answered. Raises ConfigurationError when `settings` cannot be
    served or the port is taken.
    """
    server = settings.server
    ports = [server.port, *filter(None, [server.admin_port])]
    with ExitStack() as stack:
        listeners = [stack.enter_context(listening(server.host, port)) for port in ports]
        async with Runtime(settings) as runtime, runtime.canary, bulk.working(runtime):
            _shorten_pauses()
            runtime.tell_retirements()
            await EdgeServer(runtime, on_ready).serve(listeners)
            runtime.telemetry.service_changed("stopped")


def _shorten_pauses() -> None:
    """Garbage is looked for among what is new, and threads that count let the loop go on every millisecond."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    sys.setswitchinterval(0.001)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket: callers may connect from now on. Raises ConfigurationError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}.") from error
    with listener:
        yield listener


class EdgeServer(uvicorn.Server):
    """uvicorn with our protocol, for one `runtime`; from the first signal on it drains."""

    def __init__(self, runtime: Runtime, on_ready: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            create_app(runtime),
            http=EdgeProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="critical",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(runtime.settings.server.deadline_s)),
        )
        super().__init__(config)
        self._runtime = runtime
        self._on_ready = on_ready

    def drain(self) -> None:
        """Stops taking requests and ends `serve` when those in flight have been answered."""
        if not self._runtime.draining:
            self._runtime.telemetry.service_changed("draining")
        self._runtime.draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second Ctrl-C does not wait for those in flight."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells the base URL, of the first socket, once all are served; the second is operators'."""
        await super().startup(sockets)
        main, *admin = [_url(listener) for listener in sockets or []]
        base_url, named = f"{main}/v1", {"admin_url": admin[0]} if admin else {}
        self._runtime.telemetry.service_changed("started", version=__version__, base_url=base_url, **named)
        self._on_ready(base_url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's own, ends the process by returning: a drained server has done well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _HeadTooLarge(Exception):
    """More headers, or longer ones, than we take."""


class _BadHost(Exception):
    """There is not exactly one proper Host header."""


class EdgeProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on heads and on patience; what breaks them reaches no application.

    A connection that sends no complete request in `PATIENCE_S`, or reads nothing of its answer for so long, is broken
    off, unless it moves `_SLOWEST_BYTES_PER_S`.
    """

    _head_done = False
    _message_done = False
    _head_bytes = 0
    _packet_bytes = 0
    _moved_bytes = 0
    _head_too_large = False
    _refused = False
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts waiting for the first head."""
        super().connection_made(cast("asyncio.Transport", CorkedTransport(transport)))
        self._set_reading(PATIENCE_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops every clock."""
        super().connection_lost(exc)
        self._set_reading(None)
        if self._writing is not None:
            self._writing.cancel()

    # ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, and keeps an eye on heads that do not end."""
        if self._refused:
            return
        self._packet_bytes = len(data)
        self._moved_bytes += self._packet_bytes
        self._head_bytes += 0 if self._head_done else self._packet_bytes
        super().data_received(data)
        if not self._head_done and self._head_bytes > _MOST_HEAD_BYTES and not self._refused:
            self._head_too_large = True
            self.send_400_response("")
        if self._message_done is (self._reading is not None) and not self._refused:
            self._set_reading(None if self._message_done else PATIENCE_S)

    def _set_reading(self, patience_s: float | None) -> None:
        """Measures the caller's patience for `patience_s`; None: no more."""
        if self._reading is not None:
            self._reading.cancel()
        self._moved_bytes = 0
        self._reading = None if patience_s is None else self.loop.call_later(patience_s, self._read_enough)

    def _read_enough(self) -> None:
        if self._refused or self._moved_bytes < PATIENCE_S * _SLOWEST_BYTES_PER_S:
            self.transport.abort()
        else:
            self._set_reading(PATIENCE_S)

    def on_message_begin(self) -> None:
        """A new head."""
        super().on_message_begin()
        self._head_done = self._message_done = False
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Checks the head as a whole before the application sees it."""
        too_large = len(self.headers) > _MOST_HEADERS
        if self._head_bytes + self._packet_bytes > _MOST_HEAD_BYTES:  # of which a part may be a body's
            too_large |= len(self.url) + sum(map(len, chain.from_iterable(self.headers))) > _MOST_HEAD_BYTES
        if too_large:
            self._head_too_large = True
            raise _HeadTooLarge
        hosts = [value for name, value in self.headers if name == b"host"]
        needed = self.parser.get_http_version() != "1.0"
        if len(hosts) > 1 or (needed and not hosts) or not all(map(_HOST, hosts)):
            raise _BadHost
        self._head_done = True
        super().on_headers_complete()
        self.headers = []  # what comes after the body (trailers) does not get into the head that was checked

    def on_message_complete(self) -> None:
        """The body has ended."""
        super().on_message_complete()
        self._message_done = True

    def on_response_complete(self) -> None:
        """The answer has ended: nothing of it is held back."""
        cast("CorkedTransport", self.transport).flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, in our envelope, and closes; not into the middle of another answer.

        What still comes is thrown away for a moment: a connection closed under its caller loses the answer.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            reply = reply_to(malformed_http(too_large=self._head_too_large))
            head = b"".join(b"%b: %b\r\n" % header for header in reply.headers)
            self.transport.write(STATUS_LINE[reply.status] + head + b"\r\n" + reply.body)
        if cycle is not None:
            cycle.disconnected = True  # whoever began to answer this request must not go on
            cycle.message_event.set()
        self._refused = True
        self.transport.write_eof()
        self._set_reading(LINGER_S)

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def pause_writing(self) -> None:
        """The caller does not read: its patience is measured."""
        super().pause_writing()
        self._watch_writing(-1)

    def resume_writing(self) -> None:
        """The caller reads."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _watch_writing(self, left_bytes: int) -> None:
        """Breaks the connection off if not a byte was read since `left_bytes` were left to write."""
        left_now_bytes = self.transport.get_write_buffer_size()
        if left_now_bytes == left_bytes:
            self.transport.abort()
        else:
            self._writing = self.loop.call_later(PATIENCE_S, self._watch_writing, left_now_bytes)
