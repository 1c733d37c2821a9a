"""Hides how a provider misbehaves on the wire: every fault is a function that answers one call instead of the truth."""

import asyncio
import gzip
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias

import numpy as np
import orjson
import pybase64

Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Wire:
    """One HTTP exchange; `status` is what was answered, None before that.

    `answered` is the body of a whole answer whose caller was there for it.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.status: int | None = None
        self.answered: bytes | None = None

    async def body(self) -> bytes:
        """The whole request body."""
        parts = []
        while True:
            message = await self._receive()
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    async def start(self, status: int, headers: Mapping[str, str], length_bytes: int) -> None:
        """Sends the head of the answer."""
        self.status = status
        fields = {"content-type": "application/json", "content-length": str(length_bytes), **headers}
        pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, chunk: bytes, *, last: bool = False) -> None:
        """Sends a piece of the body."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": not last})

    async def answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        """Sends a whole answer."""
        await self.start(status, headers, len(content))
        await self.write(content, last=True)
        if not self._send.__self__.disconnected:  # type: ignore[attr-defined]  # uvicorn's cycle
            self.answered = content

    async def left(self) -> None:
        """Returns when the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def reset(self) -> None:
        """Breaks the connection with a TCP RST; what was not sent is lost."""
        transport = self._transport()
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    def close(self) -> None:
        """Closes the connection after what was written."""
        self._transport().close()

    def _transport(self) -> asyncio.Transport:
        transport: asyncio.Transport = self._send.__self__.transport  # type: ignore[attr-defined]  # uvicorn's cycle
        return transport


Fault: TypeAlias = Callable[[Wire, bytes], Awaitable[None]]
"""Answers a call on the wire, given the truthful reply's body."""
Items: TypeAlias = list[dict[str, Any]]


# ── the wire itself ─────────────────────────────────────────────────────────────────────────────────────────────────


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error envelope."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def status(code: int, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Fault:
    """Answers with this status and, unless given, a server error's body."""
    content = error_body("The server had an error.", "server_error") if body is None else body

    async def answer(wire: Wire, _: bytes) -> None:
        await wire.answer(code, content, headers or {})

    return answer


def body(content: bytes, headers: Mapping[str, str] | None = None) -> Fault:
    """Answers 200 with exactly this body."""
    return status(200, content, headers)


async def hang(wire: Wire, _: bytes) -> None:
    """Accepts the call and never answers."""
    await wire.left()


async def reset(wire: Wire, _: bytes) -> None:
    """Resets the connection before any answer."""
    wire.reset()
    await wire.left()


async def half_body(wire: Wire, content: bytes) -> None:
    """Sends half of the truth and closes."""
    await wire.start(200, {}, len(content))
    await wire.write(content[: len(content) // 2])
    wire.close()
    await wire.left()


async def stalled_body(wire: Wire, content: bytes) -> None:
    """Sends half of the truth and then nothing, ever."""
    await wire.start(200, {}, len(content))
    await wire.write(content[: len(content) // 2])
    await wire.left()


def slow_body(pieces: int, pause_s: float) -> Fault:
    """Sends the truth in this many pieces with a pause before each."""

    async def answer(wire: Wire, content: bytes) -> None:
        size = -(-len(content) // pieces)
        await wire.start(200, {}, len(content))
        for start in range(0, len(content), size):
            await asyncio.sleep(pause_s)
            await wire.write(content[start : start + size])
        await wire.write(b"", last=True)

    return answer


async def gzip_bomb(wire: Wire, _: bytes) -> None:
    """A hundred megabytes of blanks in a hundred kilobytes."""
    await wire.answer(200, gzip.compress(bytes(100_000_000), compresslevel=1), {"content-encoding": "gzip"})


async def endless_body(wire: Wire, _: bytes) -> None:
    """A gigabyte of JSON blanks."""
    await wire.start(200, {}, 2**30)
    for _piece in range(2**10):
        await wire.write(b" " * 2**20)


# ── what the reply says ─────────────────────────────────────────────────────────────────────────────────────────────


def altered(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """Answers the truth after `change` worked on it in place."""

    async def answer(wire: Wire, content: bytes) -> None:
        reply = orjson.loads(content)
        change(reply)
        await wire.answer(200, orjson.dumps(reply), {})

    return answer


def altered_items(change: Callable[[Items], Iterable[dict[str, Any]]]) -> Fault:
    """Answers the truth with `data` replaced by what `change` makes of it."""
    return altered(lambda reply: reply.update(data=list(change(reply["data"]))))


def component(text: str) -> Fault:
    """Answers floats, the first one of the last vector written as `text`, JSON or not (`NaN`, `1e400`, `"0.5"`)."""

    async def answer(wire: Wire, content: bytes) -> None:
        reply = orjson.loads(content)
        for item in reply["data"]:
            item["embedding"] = floats(item)
        reply["data"][-1]["embedding"][0] = "\0"
        await wire.answer(200, json.dumps(reply).replace('"\\u0000"', text).encode(), {})

    return answer


def floats(item: Mapping[str, Any]) -> list[float]:
    """The numbers of one item of `data`, however they were written."""
    embedding = item["embedding"]
    if isinstance(embedding, str):
        return [float(value) for value in np.frombuffer(pybase64.b64decode(embedding), "<f4")]
    return list(embedding)


def _with_index(items: Items, index: Callable[[int], object]) -> Items:
    return [{**item, "index": index(place)} for place, item in enumerate(items)]


def _with_last(items: Items, embedding: Callable[[bytes], object]) -> Items:
    data = np.array(floats(items[-1]), dtype="<f4").tobytes()
    return [*items[:-1], {**items[-1], "embedding": embedding(data)}]


def _base64(data: bytes) -> str:
    return pybase64.b64encode(data).decode()


# The ready ones; where one vector is bad, it is the last.
as_floats = altered_items(lambda items: [{**item, "embedding": floats(item)} for item in items])
out_of_order = altered_items(lambda items: items[::-1])
short = altered_items(lambda items: items[:-1])
surplus = altered_items(lambda items: [*items, {**items[-1], "index": len(items)}])
duplicate_index = altered_items(lambda items: _with_index(items, lambda _: 0))
negative_index = altered_items(lambda items: _with_index(items, lambda place: place - 1))
index_beyond = altered_items(lambda items: _with_index(items, lambda place: place + 1))
no_index = altered_items(lambda items: [{"embedding": item["embedding"]} for item in items])
some_index = altered_items(lambda items: [*items[:-1], {"embedding": items[-1]["embedding"]}])
zeros = altered_items(lambda items: _with_last(items, lambda data: _base64(bytes(len(data)))))
not_a_number = altered_items(lambda items: _with_last(items, lambda data: _base64(b"\0\0\xc0\x7f" + data[4:])))
narrower = altered_items(lambda items: _with_last(items, lambda data: _base64(data[4:])))
wider = altered_items(lambda items: _with_last(items, lambda data: _base64(data + data[:4])))
odd_base64 = altered_items(lambda items: _with_last(items, lambda data: _base64(data[:-1])))
