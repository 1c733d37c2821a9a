"""Hides that an answer is written in two parts: its head waits for its body, and both leave in one system call."""

import asyncio
from typing import Any

_HEAD = b"HTTP/1.1 "
_INTERIM = b"HTTP/1.1 1"


class CorkedTransport:
    """A transport whose `write` holds back the head of an answer until more is written, `flush`ed or closed."""

    __slots__ = ("_head", "_transport", "_write")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write = transport.write
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        """Everything else is the transport's own."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Writes, together with what was held back; an interim answer (100 Continue) is not held back."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD) and not data.startswith(_INTERIM):
            self._head = data
            return
        self._write(data)

    def flush(self) -> None:
        """Writes what is held back, if anything."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Closes after everything written has left."""
        self.flush()
        self._transport.close()

    def write_eof(self) -> None:
        """Ends the stream after everything written."""
        self.flush()
        self._transport.write_eof()
