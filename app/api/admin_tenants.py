"""Hides the routes with which operators make tenants, projects and keys."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request

from app.api import openapi_desk
from app.api.admin import admin_only, decoded, json_body, raw_body
from app.api.errors import NotReady
from app.errors import InvalidRequest
from app.runtime import Runtime
from app.storage.level import LevelDown
from app.tenant_desk import Budget, KeyPage, Listed, NewKey, NewTenant, Page, Rotation, TenantDesk, TenantTerms

_T = TypeVar("_T")
_P = TypeVar("_P")


def add(api: FastAPI, runtime: Runtime) -> None:
    """Adds the routes to `api`."""
    stores = runtime.stores
    desk = TenantDesk(runtime.settings, stores.database, stores.directory, stores.secret)
    _add_tenants(api, runtime, desk)
    _add_projects(api, runtime, desk)
    _add_keys(api, runtime, desk)


def _operators_only(runtime: Runtime) -> Callable[[Request], None]:
    """The check of all these routes; whoever passes it is told of names that no database takes."""
    check = admin_only(runtime)

    def checked(request: Request) -> None:
        check(request)
        _refuse_nul(request.scope["path"], *request.query_params.values())

    return checked


def _refuse_nul(*names: str) -> None:
    if any("\0" in name for name in names):
        raise InvalidRequest("A name must not contain the character U+0000.", code="invalid_value")


def _add_tenants(api: FastAPI, runtime: Runtime, desk: TenantDesk) -> None:
    check = _operators_only(runtime)

    @api.get("/admin/tenants", **openapi_desk.TENANTS)
    async def list_tenants(request: Request) -> dict[str, Any]:
        """All tenants, those of the configuration file first."""
        check(request)
        return _list(await _asked(desk.tenants(_page(request, Page))))

    @api.post("/admin/tenants", **openapi_desk.TENANT_CREATE)
    async def create_tenant(request: Request) -> dict[str, Any]:
        """Makes a tenant; its keys come after it."""
        check(request)
        new = await json_body(request, NewTenant)
        return await _changed(runtime, "tenant.created", desk.create_tenant(new))

    @api.get("/admin/tenants/{name}", **openapi_desk.TENANT)
    async def show_tenant(request: Request, name: str) -> dict[str, Any]:
        """One tenant with its projects."""
        check(request)
        return await _asked(desk.tenant(name))

    @api.get("/admin/tenants/{name}/webhook-secret", **openapi_desk.TENANT_WEBHOOK_SECRET)
    async def show_webhook_secret(request: Request, name: str) -> dict[str, Any]:
        """With what the tenant checks messages to its webhook."""
        check(request)
        return await _asked(desk.webhook_secret(name))

    @api.patch("/admin/tenants/{name}", **openapi_desk.TENANT_UPDATE)
    async def update_tenant(request: Request, name: str) -> dict[str, Any]:
        """Changes what the body names, and nothing else."""
        check(request)
        body = await raw_body(request)
        terms, given = decoded(body, TenantTerms), decoded(body, dict[str, msgspec.Raw])
        return await _changed(runtime, "tenant.changed", desk.update_tenant(name, terms, given.keys()))

    @api.delete("/admin/tenants/{name}", **openapi_desk.TENANT_DELETE)
    async def delete_tenant(request: Request, name: str) -> dict[str, Any]:
        """Ends a tenant with its projects and keys, and takes its name out of the books."""
        check(request)
        await _changed(runtime, "tenant.deleted", desk.delete_tenant(name), tenant=name)
        return {"object": "tenant.deleted", "name": name, "deleted": True}


def _add_projects(api: FastAPI, runtime: Runtime, desk: TenantDesk) -> None:
    check, path = _operators_only(runtime), "/admin/tenants/{name}/projects/{project}"

    @api.get(path, **openapi_desk.PROJECT)
    async def show_project(request: Request, name: str, project: str) -> dict[str, Any]:
        """One project of a tenant."""
        check(request)
        return await _asked(desk.project(name, project))

    @api.put(path, **openapi_desk.PROJECT_SET)
    async def set_project(request: Request, name: str, project: str) -> dict[str, Any]:
        """Makes a project."""
        check(request)
        budget = await json_body(request, Budget)
        return await _changed(runtime, "project.set", desk.set_project(name, project, budget))

    @api.delete(path, **openapi_desk.PROJECT_DELETE)
    async def delete_project(request: Request, name: str, project: str) -> dict[str, Any]:
        """Ends a project with its keys."""
        check(request)
        await _changed(runtime, "project.deleted", desk.delete_project(name, project), tenant=name)
        return {"object": "project.deleted", "tenant": name, "name": project, "deleted": True}


def _add_keys(api: FastAPI, runtime: Runtime, desk: TenantDesk) -> None:
    check = _operators_only(runtime)

    @api.get("/admin/keys", **openapi_desk.KEYS)
    async def list_keys(request: Request) -> dict[str, Any]:
        """Keys without their secrets; ended ones too."""
        check(request)
        return _list(await _asked(desk.keys(_page(request, KeyPage))))

    @api.post("/admin/keys", **openapi_desk.KEY_CREATE)
    async def create_key(request: Request) -> dict[str, Any]:
        """Makes a key; `key` of the answer is shown this once."""
        check(request)
        new = await json_body(request, NewKey)
        _refuse_nul(new.tenant, new.project)
        return await _changed(runtime, "key.created", desk.create_key(new))

    @api.post("/admin/keys/{id}/rotate", **openapi_desk.KEY_ROTATE)
    async def rotate_key(request: Request, id: str) -> dict[str, Any]:  # noqa: A002 — as the path has it
        """Gives a key another secret; the one before is good for a while beside it."""
        check(request)
        rotation = await json_body(request, Rotation)
        return await _changed(runtime, "key.rotated", desk.rotate_key(id, rotation))

    @api.delete("/admin/keys/{id}", **openapi_desk.KEY_REVOKE)
    async def revoke_key(request: Request, id: str) -> dict[str, Any]:  # noqa: A002 — as the path has it
        """Ends a key, on every replica within 5 s."""
        check(request)
        return await _changed(runtime, "key.revoked", desk.revoke_key(id))


async def _asked(answer: Awaitable[_T]) -> _T:
    try:
        return await answer
    except LevelDown as error:
        raise NotReady(["the database cannot be asked"]) from error


async def _changed(runtime: Runtime, event: str, answer: Awaitable[_T], *, tenant: str = "") -> _T:
    """The answer to a change, which holds here from now on, and is written down."""
    found = await _asked(answer)
    told: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    runtime.telemetry.directory_changed(
        event, tenant=tenant or told.get("tenant") or told.get("name", ""), key=told.get("id", "")
    )
    with suppress(LevelDown):
        await runtime.directory.refresh()
    return found


def _page(request: Request, kind: type[_P]) -> _P:
    """What of a list the query asks for. Raises InvalidRequest."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The query is not understood: {error}.", code="invalid_value") from None


def _list(found: Listed) -> dict[str, Any]:
    return {"object": "list", "data": found.rows, "has_more": found.has_more}
