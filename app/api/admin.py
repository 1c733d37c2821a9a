"""Hides the routes for operators: how full the cache is, filling it in advance, saying what is no longer wanted."""

import ipaddress
from collections.abc import Callable
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from fastapi import FastAPI, Request

from app.api import openapi
from app.api.auth import Keys
from app.api.errors import NotReady, compressed_body, unknown_url, unsupported_media_type
from app.api.exchange import CallerLeft, read_body
from app.cache_desk import CacheDesk, Invalidation, Warming
from app.errors import InvalidRequest
from app.runtime import Runtime
from app.storage.level import LevelDown

_T = TypeVar("_T")


class WarmRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts of which vectors are wanted in the cache."""

    model: str
    texts: list[str] = msgspec.field(name="input")
    input_type: Literal["query", "document"] | None = None
    cache_group: str = ""


def admin_only(runtime: Runtime) -> Callable[[Request], None]:
    """What lets operators pass: on loopback everybody, elsewhere who has an admin key.

    Where there is no such key, it is whoever comes to the admin port, or nobody. On loopback they must ask for a name
    of this machine: a browser's page, or a proxy, that leads here comes with another.
    """
    server, directory, keys = runtime.settings.server, runtime.directory, Keys(runtime)

    def check(request: Request) -> None:
        if (server.loopback and _names_loopback(request)) or keys.is_operator(request.scope):
            return
        if server.admin_key is not None or directory.operated:
            raise keys.refusal(request.scope)
        if server.loopback or not server.admin_port:
            raise unknown_url(request.method, request.scope["path"])
        if not directory.loaded:
            raise NotReady(["the keys cannot be read yet"])

    return check


def _names_loopback(request: Request) -> bool:
    try:
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def add(api: FastAPI, runtime: Runtime) -> None:
    """Adds the routes to `api`."""
    check, desk = admin_only(runtime), CacheDesk(runtime)

    @api.get("/admin/cache", **openapi.CACHE_STATS)
    async def cache_stats(request: Request) -> dict[str, Any]:
        """How full each level of the cache is, nearest first; null for one that cannot say now."""
        check(request)
        stats = await desk.stats()
        return {
            name: None if each is None else {"entries": each.entries, "bytes": each.used_bytes, "max": each.max_bytes}
            for name, each in stats.items()
        }

    @api.post("/admin/cache/invalidate", **openapi.CACHE_INVALIDATE)
    async def cache_invalidate(request: Request) -> dict[str, int]:
        """Makes vectors unreachable in every process within 5 s; says how many rows left the database."""
        check(request)
        wanted = await json_body(request, Invalidation)
        try:
            return {"rows": await desk.invalidate(wanted)}
        except LevelDown as error:
            raise NotReady(["the database cannot be asked"]) from error

    @api.post("/admin/cache/warm", **openapi.CACHE_WARM)
    async def cache_warm(request: Request) -> dict[str, int]:
        """Embeds at bulk priority what is not kept yet."""
        check(request)
        wanted, done = await json_body(request, WarmRequest), Warming()
        texts = desk.warm(wanted.model, wanted.texts, input_type=wanted.input_type, cache_group=wanted.cache_group)
        async for step in texts:
            done = step
        return {"texts": done.texts, "kept": done.kept, "failed": done.failed, "tokens": done.tokens}


async def json_body(request: Request, kind: type[_T]) -> _T:
    """The JSON body as a `kind`; read within the bounds of the embeddings route.

    It must say that it is JSON: a page in a browser on this machine may send anything else without asking first.
    """
    return decoded(await raw_body(request), kind)


async def raw_body(request: Request) -> bytes:
    """The same, still to be decoded."""
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise unsupported_media_type()
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise compressed_body()
    length = headers.get("content-length", "0")
    try:
        return await read_body(request.receive, length.encode() if length.isdecimal() else None)
    except CallerLeft:  # who hears nothing of it
        raise InvalidRequest("The body is not complete.", code="invalid_json") from None


def decoded(body: bytes, kind: type[_T]) -> _T:
    """A JSON body as a `kind`. Raises InvalidRequest."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body is not understood: {error}.", code="invalid_value") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest("The body is not valid JSON.", code="invalid_json") from None
