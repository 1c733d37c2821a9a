"""Hides the routes of /v1/files: keeping a tenant's files as they arrive, and giving them back."""

import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, Final, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api import file_wire, openapi_bulk
from app.api.auth import Keys
from app.api.errors import HttpRefusal, NotReady, printable, reply_to
from app.api.exchange import CallerLeft, refuse
from app.api.form import Form, bad_form
from app.errors import NotFound
from app.job import StoredFile, file_blob
from app.job_ports import Blobs, FileStore
from app.runtime import Runtime
from app.storage.level import LevelDown

_T = TypeVar("_T")

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII).fullmatch
_ID_CHARS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 24
_DAY_S = 86_400


def add(api: FastAPI, runtime: Runtime, keys: Keys) -> None:
    """Adds the routes to `api`."""
    desk = _Desk(runtime)

    def tenant(request: Request) -> str:
        return keys.caller(request.scope, "batch").tenant.name

    @api.post("/v1/files", **openapi_bulk.FILE_CREATE)
    async def create_file(request: Request) -> Response:
        """Keeps a file; it is written as it comes, and there once all of it has come."""
        owner = tenant(request)
        try:
            return _json(file_wire.written(await desk.receive(owner, request)))
        except HttpRefusal as refusal:
            return _Lingering(refusal)

    @api.get("/v1/files", **openapi_bulk.FILES)
    async def list_files(request: Request) -> Response:
        """The files of this key's tenant, the newest first unless asked otherwise."""
        owner = tenant(request)
        return _json(await desk.page(owner, file_wire.page(request.query_params.multi_items())))

    @api.get("/v1/files/{file_id}", **openapi_bulk.FILE)
    async def retrieve_file(request: Request, file_id: str) -> Response:
        """What is known of one file."""
        return _json(file_wire.written(await desk.file(tenant(request), file_id)))

    @api.get("/v1/files/{file_id}/content", **openapi_bulk.FILE_CONTENT)
    async def file_content(request: Request, file_id: str) -> Response:
        """Its bytes."""
        file = await desk.file(tenant(request), file_id)
        size = {"content-length": str(file.size_bytes)}
        return StreamingResponse(await desk.content(file), media_type="application/octet-stream", headers=size)

    @api.delete("/v1/files/{file_id}", **openapi_bulk.FILE_DELETE)
    async def delete_file(request: Request, file_id: str) -> Response:
        """Deletes one that no open batch reads."""
        await desk.delete(tenant(request), file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})


class _Desk:
    """What callers can do with their files. What is another tenant's is not there."""

    def __init__(self, runtime: Runtime) -> None:
        self._bulk = runtime.settings.bulk
        self._files: FileStore = runtime.stores.jobs
        self._blobs: Blobs = runtime.stores.blobs

    async def receive(self, tenant: str, request: Request) -> StoredFile:
        """Keeps the file of the form that `request` sends, or nothing of it."""
        file_id = "file-" + "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))
        form, most_bytes = Form(request, self._bulk.max_file_bytes), self._bulk.max_file_bytes
        kept: StoredFile | None = None
        try:
            async with self._blobs.writing(file_blob(file_id)) as writer:
                upload = await file_wire.read(form, writer.write, most_bytes=most_bytes)
                # The row comes first: bytes that no row names would stay for ever, a row without bytes expires.
                kept = await self._keep(file_id, tenant, upload)
        except CallerLeft:
            raise bad_form() from None  # which nobody hears
        except OSError as error:
            if kept is not None:
                with suppress(LevelDown):
                    await self._files.delete_file(tenant, file_id)
            raise _no_bytes() from error
        return kept

    async def _keep(self, file_id: str, tenant: str, upload: file_wire.Upload) -> StoredFile:
        now_s, lives_s = int(time.time()), upload.lives_s or self._bulk.keep_days * _DAY_S
        file = StoredFile(file_id, tenant, "batch", upload.filename, upload.size_bytes, now_s, now_s + lives_s)
        return await _asked(self._files.add_file(file, most_bytes=self._bulk.max_stored_bytes))

    async def file(self, tenant: str, file_id: str) -> StoredFile:
        """One of the tenant's. Raises NotFound."""
        found = await _asked(self._files.file(tenant, file_id)) if _ID(file_id) else None
        if found is None:
            raise _no_file(file_id, "id")
        return found

    async def page(self, tenant: str, wanted: file_wire.Page) -> dict[str, Any]:
        """A list of file objects. Raises NotFound for an `after` that is not there."""
        found = None
        if not wanted.after or _ID(wanted.after):
            found = await _asked(self._files.files(tenant, **wanted._asdict()))
        if found is None:
            raise _no_file(wanted.after, "after")
        data = [file_wire.written(file) for file in found.rows]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": found.has_more}

    async def content(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Its bytes; what can be known to be wrong with them is told at once. Raises NotFound."""
        pieces = aiter(self._blobs.reading(file_blob(file.id), size_bytes=file.size_bytes))
        try:
            first = await anext(pieces, b"")
        except FileNotFoundError:
            raise _no_file(file.id, "id") from None
        except OSError as error:
            raise _no_bytes() from error

        async def all_of_them() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return all_of_them()

    async def delete(self, tenant: str, file_id: str) -> None:
        """Deletes one. Raises NotFound, and Conflict while a batch needs it."""
        deleted = await _asked(self._files.delete_file(tenant, file_id)) if _ID(file_id) else False
        if not deleted:
            raise _no_file(file_id, "id")


class _Lingering(Response):
    """A refusal before the body has come: the rest of it is thrown away for a moment, so that the answer is read."""

    def __init__(self, refusal: HttpRefusal) -> None:
        super().__init__()
        self._reply = reply_to(refusal)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Response`."""
        await refuse(scope, receive, send, self._reply, body_read=False)


def _no_file(file_id: str, param: str) -> NotFound:
    return NotFound(f"No such File object: {printable(file_id)}", param=param, code=None)


def _no_bytes() -> NotReady:
    return NotReady(["files can neither be written nor read"])


async def _asked(answer: Awaitable[_T]) -> _T:
    try:
        return await answer
    except LevelDown as error:
        raise NotReady(["the database cannot be asked"]) from error


def _json(told: dict[str, Any]) -> Response:
    return Response(orjson.dumps(told), media_type="application/json")
