"""Hides the routes beside the hot one: the models there are, whether this process lives and can serve, its metrics."""

from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from app import __version__
from app.api import admin, admin_tenants, batch_wire, batches, file_wire, files, openapi, openapi_desk, usage
from app.api.auth import Attempts, Keys
from app.api.errors import HttpRefusal, NotReady, method_not_allowed, reply_to, unknown_url
from app.domain import Route, Tenant
from app.engine.intake import space_for
from app.errors import EmbedgateError, RateLimited, Unauthenticated, UnknownModel
from app.providers.embedgate import About
from app.runtime import Runtime
from app.serving import Served
from app.settings import usd_per_million
from app.tokens import Cl100k

_SCHEMAS = {**openapi_desk.SCHEMAS, **batch_wire.SCHEMAS, **file_wire.SCHEMAS}


def for_callers(runtime: Runtime, keys: Keys, attempts: Attempts) -> FastAPI:
    """Every route of the main port but the hot one: operators' too, unless these have a port of their own."""
    api = _framework(runtime, attempts)
    _add_models(api, runtime, keys)
    usage.add(api, runtime, partial(usage.whose, keys))
    files.add(api, runtime, keys)
    batches.add(api, runtime, keys)
    if not runtime.settings.server.admin_port:
        _add_operations(api, runtime)
    openapi.complete(api, _SCHEMAS, embeds=True)
    return api


def for_operators(runtime: Runtime, attempts: Attempts) -> FastAPI:
    """Every route of the admin port; what was spent is told there as operators see it."""
    api = _framework(runtime, attempts)
    usage.add(api, runtime, admin.admin_only(runtime))
    _add_operations(api, runtime)
    openapi.complete(api, _SCHEMAS, embeds=False)
    return api


def _framework(runtime: Runtime, attempts: Attempts) -> FastAPI:
    """A FastAPI application with the probes, whose errors have our envelope."""
    api = FastAPI(title="embedgate", version=__version__, redoc_url=None, redirect_slashes=False)
    api.add_exception_handler(HTTPException, _as_refusal)
    api.add_exception_handler(EmbedgateError, _as_reply)
    api.add_exception_handler(Unauthenticated, partial(_as_failed_attempt, attempts))
    _add_probes(api, runtime)
    return api


def _add_operations(api: FastAPI, runtime: Runtime) -> None:
    _add_metrics(api, runtime)
    admin.add(api, runtime)
    admin_tenants.add(api, runtime)
    usage.add_unconfirmed(api, runtime)


def _add_models(api: FastAPI, runtime: Runtime, keys: Keys) -> None:
    models = {
        name: _model(served, runtime.settings.models[name].long_input) for name, served in runtime.menu.models.items()
    }

    def tenant(request: Request) -> Tenant:
        return keys.caller(request.scope, "embed").tenant

    @api.get("/v1/models", **openapi.MODELS)
    async def list_models(request: Request) -> dict[str, Any]:
        """The models that this key may use."""
        caller = tenant(request)
        return {"object": "list", "data": [model for name, model in models.items() if caller.may_use(name)]}

    @api.get("/v1/models/{model:path}", **openapi.MODEL)
    async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
        """One model; what this key may not use is answered like what does not exist."""
        if not tenant(request).may_use(model) or model not in models:
            raise UnknownModel(model)
        return models[model]


def _model(served: Served, long_input: str) -> dict[str, Any]:
    """As OpenAI tells of one, and what our own clients want to know."""
    route = served.route
    about = About(
        space=space_for(route).id,
        input_types={kind: space_for(route, kind).id for kind, _ in route.prompts},
        dimensions=route.space.dimensions,
        sizes=_spans(route),
        unit_length=route.space.normalised,
        max_input_tokens=route.space.max_input_tokens,
        long_input=long_input,
        tokenizer="cl100k_base" if isinstance(served.counter, Cl100k) else None,
        usd_per_million_tokens=usd_per_million(route.deployments[0].price),
    )
    told = {"id": route.model, "object": "model", "created": route.created, "owned_by": route.owned_by}
    return told | {"embedgate": msgspec.to_builtins(about)}


def _spans(route: Route) -> list[tuple[int, int]]:
    """The widths that may be asked for, both ends included."""
    sizes = route.sizes or (range(1, route.space.dimensions + 1) if route.cuts_dimensions else ())
    return [(sizes[0], sizes[-1])] if isinstance(sizes, range) else [(size, size) for size in sizes]


def _add_probes(api: FastAPI, runtime: Runtime) -> None:
    @api.get("/healthz", **openapi.HEALTH)
    async def alive() -> dict[str, str]:
        """This process lives: its event loop turns."""
        return {"status": "ok"}

    @api.get("/readyz", **openapi.READINESS)
    async def ready() -> dict[str, str]:
        """This process should get requests; if not, the error says why."""
        if reasons := runtime.why_not_ready():
            raise NotReady(reasons)
        return {"status": "ready"}


def _add_metrics(api: FastAPI, runtime: Runtime) -> None:
    check = admin.admin_only(runtime)

    @api.get("/metrics", **openapi.METRICS)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics, for operators."""
        check(request)
        return Response(generate_latest(runtime.telemetry.registry), media_type=CONTENT_TYPE_LATEST)


async def _as_refusal(request: Request, error: Exception) -> Response:
    """The framework's own errors, in our words."""
    assert isinstance(error, HTTPException)  # noqa: S101 — narrows what it was registered for
    method, path = request.scope["method"], request.scope["path"]
    if error.status_code == 405:
        return await _as_reply(request, method_not_allowed(method, path, (error.headers or {}).get("Allow", "GET")))
    if error.status_code == 404:
        return await _as_reply(request, unknown_url(method, path))
    return await _as_reply(request, HttpRefusal(error.status_code, "The request cannot be served."))


async def _as_failed_attempt(attempts: Attempts, request: Request, error: Exception) -> Response:
    try:
        await attempts.failed(request.scope)
    except RateLimited as limited:
        return await _as_reply(request, limited)
    return await _as_reply(request, error)


async def _as_reply(_: Request, error: Exception) -> Response:
    reply = reply_to(error)
    response = Response(reply.body, reply.status)
    response.raw_headers[:] = reply.headers
    return response
