"""Hides how log lines get out of the way: JSON, written by a thread, dropped rather than waited for."""

import asyncio
import threading
from queue import SimpleQueue
from typing import Any, BinaryIO

import orjson


class LogWriter:
    """JSON lines to a stream that may be slow: collected for 0.1 s, written by a thread, dropped, never waited for."""

    _MOST_CHUNKS = 1000

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._chunks: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._scheduled = False
        self.dropped_lines = 0

    def write(self, fields: dict[str, Any]) -> None:
        """Takes one event; returns at once."""
        self.write_line(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE).decode())

    def write_line(self, line: str) -> None:
        """Takes one event, already written as a line of JSON."""
        self._lines.append(line)
        if self._scheduled:
            return
        try:
            asyncio.get_running_loop().call_later(0.1, self._flush)
            self._scheduled = True
        except RuntimeError:
            self._flush()

    def close(self) -> None:
        """Writes what is left and stops the thread."""
        self._flush()
        if self._thread is not None:
            self._chunks.put(None)
            self._thread.join(timeout=5)
            self._thread = None

    def _flush(self) -> None:
        self._scheduled = False
        lines, self._lines = self._lines, []
        if not lines:
            return
        if self._chunks.qsize() >= self._MOST_CHUNKS:
            self.dropped_lines += len(lines)
            return
        self._chunks.put("".join(lines).encode())
        if self._thread is None:
            self._thread = threading.Thread(target=self._drain, name="log-writer", daemon=True)
            self._thread.start()

    def _drain(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            try:
                self._stream.write(chunk)
                self._stream.flush()
            except (OSError, ValueError):
                self.dropped_lines += chunk.count(b"\n")
