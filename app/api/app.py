"""Hides which of two answers a request: the hot route, bare, or the framework, which serves everything else."""

import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import embeddings, ops
from app.api.auth import Attempts, Keys
from app.api.errors import reply_to
from app.api.exchange import refuse, request_id
from app.runtime import Runtime

_CLOSE = (b"connection", b"close")


def create_app(runtime: Runtime) -> ASGIApp:
    """The whole HTTP face of `runtime` as an ASGI application. Called inside the event loop that will serve it.

    Who comes to `server.admin_port` meets operators' routes, and nobody else does.
    """
    keys = Keys(runtime)
    attempts = Attempts()
    hot = embeddings.EmbeddingsRoute(runtime, keys, attempts)
    rest = _stamped(ops.for_callers(runtime, keys, attempts), runtime)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = hot if scope["type"] == "http" and scope["path"] == embeddings.PATH else rest
        await answer(scope, receive, send)

    admin_port = runtime.settings.server.admin_port
    return _parted(app, _stamped(ops.for_operators(runtime, attempts), runtime), admin_port) if admin_port else app


def _parted(main: ASGIApp, admin: ASGIApp, admin_port: int) -> ASGIApp:
    """Two applications by the port that was connected to, which no header can change."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        _, port = scope["server"]
        await (admin if port == admin_port else main)(scope, receive, send)

    return app


def _stamped(framework: FastAPI, runtime: Runtime) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The framework, with our headers on its answers, and our envelope for its crashes."""
    clock = time.monotonic

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        started_s, answering = clock(), False
        id_ = request_id(next((value for name, value in scope["headers"] if name == b"x-request-id"), None))

        async def stamp(message: Message) -> None:
            nonlocal answering
            if message["type"] == "http.response.start":
                answering = True
                elapsed_ms = b"%d" % ((clock() - started_s) * 1000)
                message["headers"] += [(b"x-request-id", id_), (b"openai-processing-ms", elapsed_ms)]
                message["headers"] += [_CLOSE] if runtime.draining else []
            await send(message)

        try:
            await framework(scope, receive, stamp)
        except Exception as error:
            runtime.telemetry.loop_crashed(loop="request", error=error)
            if answering:
                raise
            await refuse(scope, receive, stamp, reply_to(error), body_read=True)

    return app
