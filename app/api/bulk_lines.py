"""Hides the wire words of the lines of bulk work: what a line asks for, and what is written of it."""

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

import orjson

from app.api import wire
from app.api.errors import NotReady, body_too_large, reply_to
from app.api.exchange import MOST_BODY_BYTES
from app.domain import EmbeddingRequest, EmbeddingResult, Priority
from app.errors import EmbedgateError, Unauthenticated
from app.job import Job, Order
from app.runtime import Runtime

_UNDONE: Final[Mapping[str, bytes]] = {
    code: orjson.dumps({"code": code, "message": message})
    for code, message in (
        ("batch_expired", "This request could not be executed before the completion window expired."),
        ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    )
}


class BulkLines:
    """Reads and writes lines for whom the directory of `runtime` knows.

    A line that is written again is the same to the byte: its ids come from its job and its custom_id.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._vocabulary = runtime.menu.vocabulary
        self._directory = runtime.directory

    def read(self, body: bytes, order: Order) -> tuple[EmbeddingRequest, wire.Asked]:
        """What the JSON object `body` of a line asks for, at bulk priority, and how its answer is to be written.

        Raises what the online route would: of the body, of whoever may not buy any more, and NotReady (a TryAgainLater)
        while nobody can know who may.
        """
        if len(body) > MOST_BODY_BYTES:
            raise body_too_large(MOST_BODY_BYTES)
        asked, texts = wire.read(body, self._vocabulary)
        directory = self._directory
        caller = directory.owner(order.tenant, order.key)
        if caller is None:
            if not directory.loaded:
                raise NotReady(["the keys cannot be read yet"])
            raise Unauthenticated("The API key that made this batch is not valid any more.", "invalid_api_key")
        request = EmbeddingRequest(
            tenant=caller.tenant,
            model=asked.model,
            texts=texts,
            deadline=math.inf,
            priority=Priority.BULK,
            dimensions=asked.dimensions,
            input_type=asked.input_type,
            truncation=asked.truncate,
            spender=directory.spender(caller, order.project, asked.user or ""),
            cause="bulk",
        )
        return request, asked

    def good(self, job: Job, custom_id: str, asked: wire.Asked, result: EmbeddingResult) -> bytes:
        """A line of the output file: the answer that the online route would give."""
        return _answered(job, custom_id, 200, b"".join(wire.pieces(asked, result)))

    def bad(self, job: Job, custom_id: str, error: EmbedgateError) -> bytes:
        """A line of the error file: the error that the online route would give."""
        reply = reply_to(error)
        return _answered(job, custom_id, reply.status, reply.body)

    def undone(self, job: Job, custom_id: str, code: str) -> bytes:
        """A line of the error file for what was not tried; `code` is `batch_expired` or `batch_cancelled`."""
        id_, _ = _ids(job, custom_id)
        form = b'{"id":"batch_req_%b","custom_id":%b,"response":null,"error":%b}\n'
        return form % (id_, orjson.dumps(custom_id), _UNDONE[code])


def _answered(job: Job, custom_id: str, status: int, body: bytes) -> bytes:
    """A line with a whole answer; joined, since formatting would copy it once more."""
    id_, request_id = _ids(job, custom_id)
    head = b'{"id":"batch_req_%b","custom_id":%b,"response":{"status_code":%d,"request_id":"req_%b","body":' % (
        id_, orjson.dumps(custom_id), status, request_id,
    )  # fmt: skip
    return b"".join((head, body, b'},"error":null}\n'))


def _ids(job: Job, custom_id: str) -> tuple[bytes, bytes]:
    """24 characters each, for the line and for its request."""
    digest = blake2b(f"{job.id}\0{custom_id}".encode(), digest_size=24).hexdigest().encode()
    return digest[:24], digest[24:]
