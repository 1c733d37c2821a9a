"""Hides how ASGI moves bytes: reading a body within bounds, noticing that the caller left, answering an error."""

import asyncio
import re
from collections.abc import Awaitable, Generator
from random import getrandbits
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from starlette.types import Receive, Scope, Send

from app.api.errors import ErrorReply, Header, body_too_large

T = TypeVar("T")

MOST_BODY_BYTES = 16_777_216
LINGER_S = 1.0
_WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}").fullmatch


class Begun(Generic[T]):
    """Something awaited at once, as far as that goes without waiting: `done` with its `result`, or to be awaited on.

    What usually need not wait is spared the price of being ready to. Not to be awaited when `done`.
    """

    __slots__ = ("_steps", "_waits_for", "done", "result")

    def __init__(self, awaitable: Awaitable[T]) -> None:
        self._steps = awaitable.__await__()
        self.done = False
        try:
            self._waits_for = self._steps.send(None)
        except StopIteration as end:
            self.done = True
            self.result: T = end.value

    def __await__(self) -> Generator[Any, Any, T]:
        """Goes on where it waits."""
        waits_for = self._waits_for
        try:
            while True:
                try:
                    sent = yield waits_for
                except BaseException as error:
                    waits_for = self._steps.throw(error)
                else:
                    waits_for = self._steps.send(sent)
        except StopIteration as end:
            return cast("T", end.value)


class CallerLeft(Exception):
    """The caller closed the connection: nobody waits for an answer."""


def request_id(given: bytes | None) -> bytes:
    """The caller's own id if it is well-formed, else a new one."""
    if given is not None and _WELL_FORMED_ID(given):
        return given
    return b"req_%024x" % getrandbits(96)


async def read_body(receive: Receive, claimed: bytes | None) -> bytes:
    """The whole body; `claimed` is the Content-Length.

    Raises CallerLeft, and HttpRefusal for a body that is too large, without reading on. That it comes fast enough is
    the server's business.
    """
    if claimed is not None and int(claimed) > MOST_BODY_BYTES:
        raise body_too_large(MOST_BODY_BYTES)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message["body"]
        return body
    parts, size_bytes = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise CallerLeft
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        if size_bytes > MOST_BODY_BYTES:
            raise body_too_large(MOST_BODY_BYTES)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


class Attended:
    """A block that is left with CallerLeft, from wherever it waits, as soon as the caller is gone.

    The body must have been read. Nothing is watched, and no task made, while the block does not wait. The last message
    of an answer must be sent after the block: from then on, being gone is what servers report of everybody.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._group = asyncio.TaskGroup()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._start = asyncio.get_running_loop().call_soon(self._watch)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._start.cancel()
        if self._task is not None:
            self._task.cancel()
        cancelled = isinstance(error, asyncio.CancelledError)
        try:
            await self._group.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
        except BaseExceptionGroup as group:
            raise CallerLeft from group

    def _watch(self) -> None:
        self._task = self._group.create_task(self._until_gone())

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise CallerLeft


async def send_whole(send: Send, status: int, headers: list[Header], body: bytes) -> None:
    """Answers in one piece."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(scope: Scope, receive: Receive, send: Send, reply: ErrorReply, *, body_read: bool) -> None:
    """Answers `reply`; a body that was not read is then thrown away for a moment, and the connection closed.

    Many a client reads no answer before it has written its whole body, and a connection closed under it loses the
    answer.
    """
    if body_read or not _has_body(scope):
        await send_whole(send, reply.status, reply.headers, reply.body)
        return
    close = [] if any(name == b"connection" for name, _ in reply.headers) else [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers + close})
    await send({"type": "http.response.body", "body": reply.body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )
