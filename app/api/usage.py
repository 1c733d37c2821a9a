"""Hides the routes that tell what was spent: a tenant what is its own, operators everything."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from app.api import admin, openapi
from app.api.auth import Keys
from app.api.errors import NotReady
from app.directory import ANYBODY
from app.runtime import Runtime
from app.storage.level import LevelDown
from app.usage_desk import UsageDesk


def add(api: FastAPI, runtime: Runtime, within: Callable[[Request], str | None]) -> None:
    """Adds the route to `api` that tells of the tenant which `within` names, or refuses to; None: of all."""
    desk = UsageDesk(runtime.stores.usage)

    @api.get("/v1/usage", **openapi.USAGE)
    async def usage(request: Request) -> Response:
        """What was bought and what was not, by time and by group, exact to the nano-dollar."""
        whose = within(request)
        return await _told(desk.usage(request.query_params.multi_items(), within=whose))


def add_unconfirmed(api: FastAPI, runtime: Runtime) -> None:
    """Adds the route to `api` that only operators may use."""
    check, desk = admin.admin_only(runtime), UsageDesk(runtime.stores.usage)

    @api.get("/admin/usage/unconfirmed", **openapi.USAGE_UNCONFIRMED)
    async def unconfirmed(request: Request) -> Response:
        """The purchases whose price no vendor stated, oldest first: to be compared with its bill."""
        check(request)
        return await _told(desk.uncertain(request.query_params.multi_items()))


def whose(keys: Keys, request: Request) -> str | None:
    """The tenant whose usage the caller may see; None: that of all, for operators and where there are no keys."""
    if keys.is_operator(request.scope):
        return None
    caller = keys.caller(request.scope)
    return None if caller is ANYBODY else caller.tenant.name


async def _told(answer: Awaitable[dict[str, Any]]) -> Response:
    """Not by the framework, which takes a hundred times as long for thousands of lines."""
    try:
        return Response(orjson.dumps(await answer), media_type="application/json")
    except LevelDown as error:
        raise NotReady(["the database cannot be asked"]) from error
