"""Hides what a failure looks like in HTTP: status, envelope and headers of every error, here and only here."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from app.errors import (
    BatchLimitExceeded,
    BudgetExhausted,
    Conflict,
    DeadlineExceeded,
    EmbedgateError,
    IdempotencyMismatch,
    InsufficientScope,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProviderUnavailable,
    RateLimited,
    RejectedInput,
    ShuttingDown,
    TryAgainLater,
    Unauthenticated,
    UnknownModel,
    UpstreamFailed,
)

Header = tuple[bytes, bytes]

_NEVER = ((b"x-should-retry", b"false"),)
_INVALID, _OURS, _LATER = "invalid_request_error", "server_error", "service_unavailable_error"
_LONGEST_WAIT_S = 60.0
_JITTER = 0.2
_CLOSE: Header = (b"connection", b"close")


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as it is sent; `code` is for logs and metrics, too."""

    status: int
    code: str | None
    headers: list[Header]
    body: bytes


class HttpRefusal(EmbedgateError):
    """A request that HTTP itself makes unacceptable, before its meaning is looked at."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: tuple[Header, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


class NotReady(TryAgainLater):
    """The readiness probe's no."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("Not ready: " + "; ".join(reasons), 1.0)


def unknown_url(method: str, path: str) -> HttpRefusal:
    """There is nothing at this path."""
    return HttpRefusal(404, f"Invalid URL ({printable(method)} {printable(path)})")


def method_not_allowed(method: str, path: str, allowed: str) -> HttpRefusal:
    """There is something at this path, for other methods."""
    message = f"Not allowed to {printable(method)} on {printable(path)}."
    return HttpRefusal(405, message, "method_not_supported", ((b"allow", allowed.encode()),))


def unsupported_media_type() -> HttpRefusal:
    """The body claims to be no JSON."""
    return HttpRefusal(415, "Unsupported content type. Use 'application/json'.", "unsupported_media_type")


def compressed_body() -> HttpRefusal:
    """The body is compressed."""
    message = "Compressed request bodies are not supported."
    return HttpRefusal(415, message, "unsupported_content_encoding", ((b"accept-encoding", b"identity"),))


def body_too_large(most_bytes: int) -> HttpRefusal:
    """The body is, or claims to be, longer than `most_bytes`."""
    message = f"Request body too large. Maximum is {most_bytes} bytes."
    return HttpRefusal(413, message, "request_too_large", (_CLOSE, (b"x-should-retry", b"false")))


def malformed_http(*, too_large: bool) -> HttpRefusal:
    """The bytes are no HTTP request that we take; the connection is of no use any more."""
    if too_large:
        return HttpRefusal(431, "Request header fields too large.", "request_header_fields_too_large", (_CLOSE,))
    return HttpRefusal(400, "Invalid HTTP request received.", None, (_CLOSE,))


def printable(name: str) -> str:
    """As much of a caller's `name` as may be echoed: its printable characters, 64 of them at most."""
    return "".join(c for c in name[:64] if c.isprintable())


def reply_to(error: BaseException) -> ErrorReply:
    """What the caller is told; of anything that is no EmbedgateError only that it happened."""
    known = error if isinstance(error, EmbedgateError) else InternalError()
    status, kind, param, code, headers = _FACES.get(type(known), _internal)(known)
    fault = {"message": str(known), "type": kind, "param": param, "code": code}
    body = orjson.dumps({"error": fault})
    sized = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    return ErrorReply(status, code, sized, body)


_Face = tuple[int, str, str | None, str | None, tuple[Header, ...]]
"""Status, type, param, code, headers."""


def _internal(_: EmbedgateError) -> _Face:
    return 500, _OURS, None, "internal_error", ()


def _http(error: HttpRefusal) -> _Face:
    return error.status, _INVALID, None, error.code, error.headers


def _invalid(error: InvalidRequest) -> _Face:
    return 400, error.kind, error.param, error.code, ()


def _unauthenticated(error: Unauthenticated) -> _Face:
    return 401, _INVALID, None, error.code, ((b"www-authenticate", b"Bearer"),)


def _wait(retry_after_s: float) -> tuple[Header, Header]:
    jittered_s = max(0.0, retry_after_s) * (1 + _JITTER * random.random())  # noqa: S311 — spreads callers
    wait_ms = max(1, math.ceil(min(jittered_s, _LONGEST_WAIT_S) * 1000))
    return (b"retry-after", b"%d" % math.ceil(wait_ms / 1000)), (b"retry-after-ms", b"%d" % wait_ms)


def _limited(error: RateLimited) -> _Face:
    if error.retry_after_s is None:
        return 429, error.kind, None, error.code, _NEVER
    return 429, error.kind, None, error.code, _wait(error.retry_after_s)


def _later(code: str, *headers: Header) -> Callable[[TryAgainLater], _Face]:
    return lambda error: (503, _LATER, None, code, (*_wait(error.retry_after_s), *headers))


_FACES: dict[type[EmbedgateError], Callable[..., _Face]] = {
    HttpRefusal: _http,
    InvalidRequest: _invalid,
    UnknownModel: lambda _: (404, _INVALID, None, "model_not_found", ()),
    RejectedInput: lambda _: (400, _INVALID, "input", "upstream_rejected_input", ()),
    NotFound: lambda error: (404, _INVALID, error.param, error.code, ()),
    Conflict: lambda error: (409, _INVALID, None, error.code, _NEVER),
    IdempotencyMismatch: lambda _: (422, _INVALID, None, "idempotency_mismatch", ()),
    BatchLimitExceeded: lambda _: (429, "requests", None, "batch_limit_exceeded", _NEVER),
    Unauthenticated: _unauthenticated,
    InsufficientScope: lambda _: (403, _INVALID, None, "insufficient_scope", ()),
    RateLimited: _limited,
    BudgetExhausted: lambda _: (429, "insufficient_quota", None, "insufficient_quota", _NEVER),
    Overloaded: _later("server_is_overloaded"),
    ProviderUnavailable: _later("provider_unavailable"),
    ShuttingDown: _later("shutting_down", _CLOSE),
    NotReady: _later("not_ready"),
    DeadlineExceeded: lambda _: (504, _OURS, None, "deadline_exceeded", ()),
    UpstreamFailed: lambda error: (502, _OURS, None, error.code, ()),
    InternalError: _internal,
}
