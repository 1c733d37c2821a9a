"""Hides how a link between a client and a server is made slow, deaf, lossy or dead while both go on."""

import asyncio
import math
import random
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from tests.servers import HOST, free_port

CHUNK_BYTES = 65_536
MOST_CHUNKS_ON_THE_WAY = 64
RESET = struct.pack("ii", 1, 0)
"""As SO_LINGER: closing sends RST."""


@dataclass(eq=False, slots=True)
class _Connection:
    """A client's socket and the one to the server in its name; closed with RST unless both sides ended in peace."""

    client: socket.socket
    server: socket.socket
    ended_in_peace: bool = False
    lost_bytes: bool = False
    doomed: bool = False

    def close(self) -> None:
        for end in (self.client, self.server):
            if not self.ended_in_peace:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.close()


@dataclass(eq=False, slots=True)
class _Direction:
    """What flows from one socket of a connection to the other: chunks with the times at which they arrive."""

    connection: _Connection
    source: socket.socket
    sink: socket.socket
    on_the_way: asyncio.Queue[tuple[float, bytes]] = field(
        default_factory=lambda: asyncio.Queue(MOST_CHUNKS_ON_THE_WAY)
    )

    @property
    def is_request(self) -> bool:
        return self.source is self.connection.client


class TcpProxy:
    """Forwards a loopback port of its own to the server's, from when the block is entered until it is left.

    Everything may be set at any time and holds from the next chunk on: `latency_s` and `jitter_s` (added to it,
    uniform) in each direction, order kept; `bandwidth_bytes_s` of each connection and direction.
    """

    def __init__(self, server_port: int, server_host: str = HOST) -> None:
        self.port = free_port()
        self.latency_s = 0.0
        self.jitter_s = 0.0
        self.bandwidth_bytes_s = math.inf
        self.connections = 0
        """Accepted so far."""
        self.bytes_in = 0
        """Come from clients so far."""
        self.bytes_out = 0
        """Gone to clients so far."""
        self._server = (server_host, server_port)
        self._listener: socket.socket | None = None
        self._open: dict[asyncio.Task[None], _Connection] = {}
        self._black_hole = False
        self._drop_every = 0
        self._requests = 0
        self._rng = random.Random(5)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self.accept()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.refuse()
        await self._tasks.__aexit__(None, None, None)

    # ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def black_hole(self) -> bool:
        """Whether everything that should arrive is swallowed, in old connections and in new ones.

        When it ends, the connections that lost something are reset: no TCP goes on after a gap.
        """
        return self._black_hole

    @black_hole.setter
    def black_hole(self, swallows: bool) -> None:
        self._black_hole = swallows
        if not swallows:
            self._reset([task for task, connection in self._open.items() if connection.lost_bytes])

    def drop_reply(self, every: int) -> None:
        """From now on each `every`th chunk of requests arrives, but its reply is lost and its connection then reset.

        0 ends it. A chunk is what a client sends at once (≤ 64 KiB).
        """
        self._drop_every, self._requests = every, 0

    def cut(self) -> None:
        """Resets every connection; new ones are welcome."""
        self._reset(self._open)

    def refuse(self) -> None:
        """Resets every connection and refuses new ones."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self.cut()

    def accept(self) -> None:
        """Accepts connections again, at the same port."""
        if self._listener is None:
            self._listener = socket.create_server((HOST, self.port), backlog=512)
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._connect, self._listener)

    def _reset(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()

    # ── forwarding ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _connect(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # it has already left
        connection = _Connection(client, socket.socket())
        for end in (client, connection.server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections += 1
        task = self._tasks.create_task(self._serve(connection))
        self._open[task] = connection
        task.add_done_callback(lambda done: self._open.pop(done).close())

    async def _serve(self, connection: _Connection) -> None:
        """Forwards until both sides have ended, or one is reset."""
        try:
            await self._loop.sock_connect(connection.server, self._server)
            async with asyncio.TaskGroup() as group:
                for ends in ((connection.client, connection.server), (connection.server, connection.client)):
                    direction = _Direction(connection, *ends)
                    group.create_task(self._receive(direction))
                    group.create_task(self._deliver(direction))
            connection.ended_in_peace = True
        except* OSError:
            pass  # so its other side is reset too

    async def _receive(self, direction: _Direction) -> None:
        """Puts what the source sends on its way, b"" at its end."""
        free_at, chunk = 0.0, b" "
        while chunk:
            chunk = await self._loop.sock_recv(direction.source, CHUNK_BYTES)
            self._judge(direction, len(chunk))
            delay_s = self.latency_s + self._rng.uniform(0, self.jitter_s)
            free_at = max(self._loop.time() + delay_s, free_at) + len(chunk) / self.bandwidth_bytes_s
            await direction.on_the_way.put((free_at, chunk))

    def _judge(self, direction: _Direction, size_bytes: int) -> None:
        """Counts a chunk of a request; loses a reply whose turn it is."""
        if not direction.is_request:
            if direction.connection.doomed:
                raise ConnectionResetError
        elif size_bytes:
            self.bytes_in += size_bytes
            self._requests += 1
            if self._drop_every and self._requests % self._drop_every == 0:
                direction.connection.doomed = True

    async def _deliver(self, direction: _Direction) -> None:
        """Gives the sink what has come, when it is due."""
        chunk = b" "
        while chunk:
            due, chunk = await direction.on_the_way.get()
            wait_s = due - self._loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if self._black_hole:
                direction.connection.lost_bytes = True
            elif chunk:
                await self._loop.sock_sendall(direction.sink, chunk)
                self.bytes_out += 0 if direction.is_request else len(chunk)
            else:
                direction.sink.shutdown(socket.SHUT_WR)
