"""Hides OpenAI's batches: files by multipart, batches found by their metadata, answers and errors in two files."""

import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import orjson

from app.domain import Space, Text
from app.errors import ProviderError, Transient
from app.job_ports import BatchLimits, BatchState, BatchStatus
from app.providers.dialect import Ask, Said
from app.providers.http import Upload
from app.providers.refusals import Answer
from app.providers.vendor_batches import (
    PAGE_ITEMS,
    SEND_S,
    Answered,
    Lines,
    Page,
    VendorBatches,
    count,
    identifier,
    listed,
    object_at,
    objects,
    word,
)

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NAME = "embedgate"
"""Under which metadata our name for a batch is kept."""


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw = msgspec.Raw(b"null")
    message: Any = None


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: Any = None


_line_decoder = msgspec.json.Decoder(_Line)


class OpenAIBatches(VendorBatches):
    """OpenAI's; see `VendorBatches`."""

    # What is queued at one moment is bounded by the account's tier, by tokens; the lowest one's bound is here.
    limits: ClassVar[BatchLimits] = BatchLimits(50_000, 200_000_000, 3_000_000)
    statuses: ClassVar[Mapping[str, BatchStatus]] = {
        "validating": "running", "in_progress": "running", "finalizing": "running", "cancelling": "running",
        "completed": "done", "failed": "failed", "expired": "expired", "cancelled": "cancelled",
    }  # fmt: skip
    id_pattern = _ID
    window: ClassVar[str] = "24h"

    def line(self, key: str, text: Text, space: Space) -> object:
        """See `VendorBatches`."""
        body = self.dialect.ask([text], space).body
        return {"custom_id": key, "method": "POST", "url": "/v1/embeddings", "body": body}

    async def send(self, name: str, lines: Lines, size_bytes: int) -> str:
        """See `VendorBatches`."""
        boundary = secrets.token_hex(16)
        part = f"--{boundary}\r\ncontent-disposition: form-data; name="
        head = f'{part}"purpose"\r\n\r\nbatch\r\n{part}"file"; filename="{name}.jsonl"\r\n'
        head += "content-type: application/octet-stream\r\n\r\n"
        tail = f"\r\n--{boundary}--\r\n"
        upload = Upload(
            _framed(head.encode(), lines, tail.encode()),
            len(head) + size_bytes + len(tail),
            {"content-type": f"multipart/form-data; boundary={boundary}"},
        )
        answer = await self.endpoint.send("files", upload, most_bytes=65_536, timeout_s=SEND_S)
        return identifier(_ID, self.told(answer).get("id"))

    async def create(self, name: str, file_id: str, space: Space) -> Mapping[str, Any]:
        """See `VendorBatches`."""
        body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": self.window}
        return await self.call(Ask("batches", {**body, "metadata": {_NAME: name}, **self.common(space)}))

    def common(self, space: Space) -> Mapping[str, object]:
        """What else is said once for all texts."""
        return {}

    async def page(self, after: str) -> Page:
        """See `VendorBatches`."""
        said = await self.fetch(f"batches?limit={PAGE_ITEMS}" + (f"&after={after}" if after else ""))
        batches = listed(said, "data")
        more = bool(batches) and said.get("has_more") is not False
        return Page(batches, identifier(_ID, batches[-1].get("id")) if more else "")

    def name_of(self, batch: Mapping[str, Any]) -> object:
        """See `VendorBatches`."""
        return object_at(batch, "metadata").get(_NAME)

    def state_of(self, batch: Mapping[str, Any]) -> BatchState | None:
        """See `VendorBatches`."""
        status = self.statuses.get(str(batch.get("status")))
        if status is None:
            return None
        counts = object_at(batch, "request_counts")
        words = [word(error.get("code")) for error in objects(object_at(batch, "errors").get("data"))]
        return BatchState(
            status, count(counts.get("completed")), count(counts.get("failed")),
            reason=words[0] if words else "", crowded="token_limit_exceeded" in words,
        )  # fmt: skip

    def outputs(self, batch: Mapping[str, Any]) -> Sequence[str]:
        """See `VendorBatches`."""
        files = [batch.get("output_file_id"), batch.get("error_file_id")]
        return [f"files/{identifier(_ID, file)}/content" for file in files if file]

    def answered(self, line: bytes) -> Answered:
        """See `VendorBatches`; what was not carried out has no response but an error."""
        said = _line_decoder.decode(line)
        return Answered(said.custom_id, self._said(said))

    def _said(self, line: _Line) -> Said | ProviderError:
        response = line.response
        if response is None:
            code = line.error.get("code") if isinstance(line.error, dict) else None
            return Transient(f"not carried out: {word(code)}")
        if 200 <= response.status_code < 300:
            return self.dialect.read(bytearray(response.body))
        return self.dialect.refusal(Answer(response.status_code, {}, self.refused(response.body, response.message)))

    def refused(self, body: msgspec.Raw, message: object) -> bytearray:
        """The body of a refusal as it would have come alone."""
        return bytearray(body)


class VoyageBatches(OpenAIBatches):
    """Voyage's, which are like OpenAI's but for what is said once for all texts, and how a refusal looks."""

    limits: ClassVar[BatchLimits] = BatchLimits(100_000, 1_000_000_000, 1_000_000_000)
    window: ClassVar[str] = "12h"

    def line(self, key: str, text: Text, space: Space) -> object:
        """See `VendorBatches`."""
        return {"custom_id": key, "body": {"input": [text]}}

    def common(self, space: Space) -> Mapping[str, object]:
        """See `OpenAIBatches`; that vectors may come as base64 here too is not documented."""
        once = self.dialect.ask([], space).body
        return {"request_params": {name: once[name] for name in once if name not in ("input", "encoding_format")}}

    def refused(self, body: msgspec.Raw, message: object) -> bytearray:
        """See `OpenAIBatches`."""
        return bytearray(orjson.dumps({"detail": message})) if isinstance(message, str) else bytearray(body)


async def _framed(head: bytes, lines: Lines, tail: bytes) -> AsyncIterator[bytes]:
    yield head
    async for piece in lines.pieces():
        yield piece
    yield tail
