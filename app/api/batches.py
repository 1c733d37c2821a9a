"""Hides the routes of /v1/batches: ordering bulk work, following it and calling it off."""

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Final, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from app.api import batch_wire, openapi_bulk, wire
from app.api.admin import raw_body
from app.api.auth import Keys
from app.api.errors import NotReady, printable
from app.directory import Caller
from app.errors import InvalidRequest, NotFound, RateLimited
from app.job import ENDED, Job, Order
from app.job_ports import JobStore
from app.runtime import Runtime
from app.storage.level import LevelDown

_T = TypeVar("_T")

_FILE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII).fullmatch
_LONGEST_KEY = 255
_LOOK_S, _KEEP_ALIVE_S = 1.0, 15.0
_MOST_STREAMS: Final = 64
"""How many batches a tenant may watch at one moment in one process."""

_STREAMED = {"cache-control": "no-store", "x-accel-buffering": "no"}


def add(api: FastAPI, runtime: Runtime, keys: Keys) -> None:
    """Adds the routes to `api`."""
    desk = _Desk(runtime)

    def caller(request: Request) -> Caller:
        return keys.caller(request.scope, "batch")

    @api.post("/v1/batches", **openapi_bulk.BATCH_CREATE)
    async def create_batch(request: Request) -> Response:
        """Orders the embeddings that the lines of an uploaded file ask for."""
        who = caller(request)
        return _shown(await desk.create(who, request, await raw_body(request)))

    @api.get("/v1/batches", **openapi_bulk.BATCHES)
    async def list_batches(request: Request) -> Response:
        """The batches of this key's tenant, the newest first."""
        tenant = caller(request).tenant.name
        return _json(await desk.page(tenant, batch_wire.page(request.query_params.multi_items())))

    @api.get("/v1/batches/{batch_id}", **openapi_bulk.BATCH)
    async def retrieve_batch(request: Request, batch_id: str) -> Response:
        """One batch as it stands."""
        return _shown(await desk.job(caller(request).tenant.name, batch_id))

    @api.post("/v1/batches/{batch_id}/cancel", **openapi_bulk.BATCH_CANCEL)
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        """Calls a batch off; what was embedded until then is in its output file. A body is not looked at."""
        return _shown(await desk.cancel(caller(request).tenant.name, batch_id))

    @api.get("/v1/batches/{batch_id}/events", **openapi_bulk.BATCH_EVENTS)
    async def follow_batch(request: Request, batch_id: str) -> Response:
        """The batch now and whenever it changes, as server-sent events, until it has ended."""
        tenant = caller(request).tenant.name
        events = desk.events(tenant, await desk.job(tenant, batch_id))
        return StreamingResponse(events, media_type="text/event-stream", headers=_STREAMED)


class _Desk:
    """What callers can do with their batches. What is another tenant's is not there."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._jobs: JobStore = runtime.stores.jobs
        self._watched: Counter[str] = Counter()

    async def create(self, caller: Caller, request: Request, body: bytes) -> Job:
        """Orders what `body` asks for, or finds what was ordered before with the same idempotency key."""
        order = self._order(caller, request, body)
        await self._check_purpose(order)
        most_open = self._runtime.settings.bulk.max_open_batches
        job = await _asked(self._jobs.create(order, most_open=most_open))
        if job.id == order.id:
            self._runtime.telemetry.job_changed("created", job=job.id, tenant=order.tenant, tier=order.tier)
        return job

    def _order(self, caller: Caller, request: Request, body: bytes) -> Order:
        wanted, again = batch_wire.read(body), _idempotency_key(request)
        project = wire.project(dict(request.scope["headers"]), of_key=caller.spender.project)
        spender = self._runtime.directory.spender(caller, project, "")
        return Order(
            id=f"batch_{secrets.token_hex(12)}",
            tenant=caller.tenant.name,
            project=spender.project,
            key=spender.key,
            input_file_id=wanted.input_file_id,
            window_s=wanted.window_s,
            metadata=wanted.metadata,
            tier=wanted.tier or caller.tenant.bulk_tier,
            output_expires_after_s=wanted.output_expires_after_s,
            idempotency_key=again,
            digest=blake2b(body, digest_size=32).digest() if again else b"",
        )

    async def _check_purpose(self, order: Order) -> None:
        """Refuses what cannot be read. That a file is not there is said by the store: it may have been, before."""
        file_id = order.input_file_id
        if not _FILE_ID(file_id):
            raise NotFound(f"No such File object: {printable(file_id)}", param="input_file_id", code=None)
        file = await _asked(self._jobs.file(order.tenant, file_id))
        if file is not None and file.purpose != "batch":
            message = f"Invalid value for 'input_file_id'. The purpose of the file is '{file.purpose}', not 'batch'."
            raise InvalidRequest(message, param="input_file_id", code="invalid_value")

    async def job(self, tenant: str, job_id: str) -> Job:
        """One of the tenant's. Raises NotFound."""
        return _found(await _asked(self._jobs.job(tenant, job_id)), job_id)

    async def page(self, tenant: str, wanted: batch_wire.Page) -> dict[str, Any]:
        """A list of batch objects. Raises NotFound for an `after` that is not there."""
        found = await _asked(self._jobs.jobs(tenant, after=wanted.after, limit=wanted.limit))
        if found is None:
            raise _no_batch(wanted.after, "after")
        data = [batch_wire.written(job) for job in found.rows]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": found.has_more}

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Calls one off. Raises NotFound, and Conflict for one that has ended."""
        job = _found(await _asked(self._jobs.cancel(tenant, job_id)), job_id)
        self._runtime.telemetry.job_changed("cancelled", job=job.id, tenant=tenant)
        return job

    def events(self, tenant: str, job: Job) -> AsyncIterator[bytes]:
        """What becomes of a job, until it has ended or this process drains. RateLimited for a stream too many."""
        if self._watched[tenant] >= _MOST_STREAMS:
            message = f"Rate limit reached: {_MOST_STREAMS} event streams at once."
            raise RateLimited(message, kind="requests", retry_after_s=_KEEP_ALIVE_S)

        async def counted() -> AsyncIterator[bytes]:
            self._watched[tenant] += 1
            try:
                async for event in told(job, look, over=lambda: self._runtime.draining):
                    yield event
            finally:
                self._watched[tenant] -= 1

        async def look() -> Job | None:
            return await self._jobs.job(tenant, job.id)

        return counted()


async def told(
    job: Job, look: Callable[[], Awaitable[Job | None]], *, over: Callable[[], bool]
) -> AsyncIterator[bytes]:  # fmt: skip
    """The job as server-sent events: now and whenever it has changed; something at least every 15 s.

    Ends once the job has ended, is not there any more, or it is `over`.
    """
    shown, silent_s = b"", 0.0
    while True:
        now = orjson.dumps(batch_wire.written(job))
        if now != shown:
            shown, silent_s = now, 0.0
            yield b"event: batch\ndata: %b\n\n" % now
        elif silent_s >= _KEEP_ALIVE_S:
            silent_s = 0.0
            yield b": still there\n\n"
        if job.status in ENDED or over():
            return
        await asyncio.sleep(_LOOK_S)
        silent_s += _LOOK_S
        with suppress(LevelDown):
            found = await look()
            if found is None:
                return
            job = found


def _idempotency_key(request: Request) -> str:
    key: str | None = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not 1 <= len(key) <= _LONGEST_KEY:
        message = f"Invalid value for 'Idempotency-Key'. Must be 1 to {_LONGEST_KEY} characters."
        raise InvalidRequest(message, param="Idempotency-Key", code="invalid_value")
    return key


def _found(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise _no_batch(job_id, "id")
    return job


def _no_batch(job_id: str, param: str) -> NotFound:
    return NotFound(f"No such Batch object: {printable(job_id)}", param=param, code=None)


async def _asked(answer: Awaitable[_T]) -> _T:
    try:
        return await answer
    except LevelDown as error:
        raise NotReady(["the database cannot be asked"]) from error


def _shown(job: Job) -> Response:
    return _json(batch_wire.written(job))


def _json(told: dict[str, Any]) -> Response:
    return Response(orjson.dumps(told), media_type="application/json")
