"""Hides how POST /v1/embeddings is answered: bare ASGI in front of the framework, because it is the hot route."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from app.api import bulky, wire
from app.api.auth import Attempts, Keys
from app.api.errors import (
    Header,
    compressed_body,
    method_not_allowed,
    reply_to,
    unsupported_media_type,
)
from app.api.exchange import Attended, Begun, CallerLeft, read_body, refuse, request_id, send_whole
from app.directory import ANYBODY, Caller
from app.domain import EmbeddingResult, Spender
from app.errors import EmbedgateError, ShuttingDown, Unauthenticated
from app.runtime import Runtime

PATH = "/v1/embeddings"
_MEDIA_TYPE = b"application/json"
_JSON: Header = (b"content-type", _MEDIA_TYPE)
_LEFT = 499


@dataclass(slots=True)
class _Visit:
    """What is known so far of one request; it becomes its log line."""

    headers: dict[bytes, bytes]
    id: bytes
    started_s: float
    caller: Caller = ANYBODY
    model: str = "unknown"
    items: int = 0
    result: EmbeddingResult | None = None
    status: int = 0
    code: str | None = None
    body_read: bool = False
    answering: bool = False


class EmbeddingsRoute:
    """The ASGI application behind `PATH`, any method."""

    def __init__(self, runtime: Runtime, keys: Keys, attempts: Attempts) -> None:
        self._attempts = attempts
        self._runtime = runtime
        self._keys = keys
        self._clock = time.monotonic
        self._doorway = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, and tells of it exactly once."""
        headers = dict(scope["headers"])
        visit = _Visit(headers, request_id(headers.get(b"x-request-id")), self._clock())
        try:
            await self._serve(visit, scope, receive, send)
        except CallerLeft:
            visit.status = _LEFT
        except asyncio.CancelledError:  # the server gives up on what outlived its grace
            await self._refuse(visit, scope, receive, send, ShuttingDown())
            raise
        except Exception as error:  # whatever it is, the caller gets an answer
            await self._refuse(visit, scope, receive, send, error)
        finally:
            self._tell(visit)

    async def _serve(self, visit: _Visit, scope: Scope, receive: Receive, send: Send) -> None:
        runtime = self._runtime
        try:
            self._admit(visit, scope)
        except Unauthenticated:
            await self._attempts.failed(scope)
            raise
        body = await read_body(receive, visit.headers.get(b"content-length"))
        visit.body_read = True
        visit.started_s = now_s = self._clock()
        if len(body) > bulky.BYTES:
            await self._one_by_one()
        asked, texts = wire.read(body, runtime.menu.vocabulary)
        if asked.model in runtime.gateway.routes:
            visit.model = asked.model
        visit.items = len(texts)
        deadline_s = runtime.settings.server.deadline_s
        tenant, spender = visit.caller.tenant, self._spender(visit, asked.user)
        request = wire.request(asked, texts, tenant, visit.headers, spender=spender, now_s=now_s, deadline_s=deadline_s)
        embedding = Begun(runtime.gateway.embed(request))
        if not embedding.done:
            async with Attended(receive):
                embedding.result = await embedding
        visit.result = result = embedding.result
        headers = [_JSON, *self._stamp(visit), *wire.headers(result)]
        visit.status, visit.answering = 200, True
        if wire.is_large(result) and scope["http_version"] != "1.0":  # which knows no chunks
            await _send_pieces(receive, send, headers, wire.pieces(asked, result))
        else:
            answer = b"".join(wire.pieces(asked, result))
            await send_whole(send, 200, [*headers, (b"content-length", b"%d" % len(answer))], answer)

    def _spender(self, visit: _Visit, user: str | None) -> Spender:
        """On whose account inside its tenant the caller buys. Raises InvalidRequest."""
        project = wire.project(visit.headers, of_key=visit.caller.spender.project)
        if not (project or user):
            return visit.caller.spender
        return self._runtime.directory.spender(visit.caller, project, user or "")

    async def _one_by_one(self) -> None:
        """Lets others have their turn between two large requests: reading one keeps the loop for some milliseconds."""
        async with self._doorway:
            await asyncio.sleep(0)

    def _admit(self, visit: _Visit, scope: Scope) -> None:
        """Raises for a request whose body need not be read."""
        if self._runtime.draining:
            raise ShuttingDown
        if scope["method"] != "POST":
            raise method_not_allowed(scope["method"], PATH, "POST")
        visit.caller = self._keys.caller(scope, "embed")
        media_type = visit.headers.get(b"content-type", _MEDIA_TYPE)
        if media_type != _MEDIA_TYPE and media_type.partition(b";")[0].strip().lower() != _MEDIA_TYPE:
            raise unsupported_media_type()
        encoding = visit.headers.get(b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in {b"identity", b""}:
            raise compressed_body()

    def _stamp(self, visit: _Visit) -> list[Header]:
        elapsed_ms = (self._clock() - visit.started_s) * 1000
        return [(b"x-request-id", visit.id), (b"openai-processing-ms", b"%d" % elapsed_ms)]

    async def _refuse(self, visit: _Visit, scope: Scope, receive: Receive, send: Send, error: BaseException) -> None:
        if not isinstance(error, EmbedgateError):
            self._runtime.telemetry.loop_crashed(loop="request", error=error)
        reply = reply_to(error)
        visit.status, visit.code = reply.status, reply.code
        if visit.answering:
            raise error  # too late for words: the server breaks the connection off
        visit.answering = True
        reply.headers.extend(self._stamp(visit))
        await refuse(scope, receive, send, reply, body_read=visit.body_read)

    def _tell(self, visit: _Visit) -> None:
        result = visit.result
        self._runtime.telemetry.request_finished(
            request_id=visit.id.decode(),
            tenant=visit.caller.tenant.name,
            model=visit.model,
            status=visit.status,
            code=visit.code,
            duration_s=self._clock() - visit.started_s,
            items=visit.items,
            tokens=result.tokens if result else 0,
            cache_hits=result.cache_hits if result else 0,
            joined=result.joined if result else 0,
            queue_s=result.queue_s if result else 0.0,
            deployment=",".join(result.deployments) if result else "",
        )


async def _send_pieces(receive: Receive, send: Send, headers: list[Header], pieces: Iterator[bytes]) -> None:
    """Answers in as many messages as there are pieces, so that others get their turn in between.

    Waits while the caller does not read; raises CallerLeft when it is gone.
    """
    async with Attended(receive):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})
