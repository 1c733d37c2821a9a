"""Hides what Gemini's files and batches look like on the wire, for its stand-in."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import orjson

from tests.emulators.batches import Batch, Desk, Line, Reply
from tests.emulators.server import Asked, RefusalError, Row, as_numbers

if TYPE_CHECKING:
    from tests.emulators.gemini import GeminiEmulator

_VERSION = r"/(?:v1|v1beta)"
_UPLOAD = re.compile(rf"POST /upload{_VERSION}/files(?:\?(.*))?")
_CREATE = re.compile(rf"POST {_VERSION}/models/([^:/?]+):asyncBatchEmbedContent")
_LIST = re.compile(rf"GET {_VERSION}/batches(?:\?(.*))?")
_BATCH = re.compile(rf"(GET|POST|DELETE) {_VERSION}/(batches/[^:/?]+)(:cancel)?")
_DOWNLOAD = re.compile(rf"GET {_VERSION}/(files/[^:/?]+):download\?alt=media")
_STATES = {
    "validating": "PENDING", "in_progress": "RUNNING", "cancelling": "RUNNING", "completed": "SUCCEEDED",
    "failed": "FAILED", "expired": "EXPIRED", "cancelled": "CANCELLED",
}  # fmt: skip
_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 429: 8, 500: 13, 503: 14}


def _refused(status: int, word: str, message: str) -> RefusalError:
    return RefusalError(status, {"error": {"code": status, "message": message, "status": word}})


class GeminiDesk(Desk):
    """Gemini's; also of inline requests, whose answers keep their order."""

    emulator: "GeminiEmulator"

    def reply(self, target: str, headers: Mapping[str, str], body: bytes) -> Reply | None:
        """See `Desk`."""
        if called := _UPLOAD.fullmatch(target):
            return self._upload(called[1], headers, body)
        if called := _CREATE.fullmatch(target):
            return Reply("create", orjson.dumps(self._operation(self._ordered(called[1], orjson.loads(body)["batch"]))))
        if called := _LIST.fullmatch(target):
            return Reply("list", orjson.dumps(self._listed(parse_qs(called[1] or ""))))
        if called := _DOWNLOAD.fullmatch(target):
            if called[1] not in self.files:
                raise _refused(403, "PERMISSION_DENIED", "You do not have permission to access the File.")
            return Reply("content", self.files[called[1]].content)
        if called := _BATCH.fullmatch(target):
            batch = self.batches.get(called[2])
            if batch is None:
                raise _refused(404, "NOT_FOUND", "Requested entity was not found.")
            if called[1] == "DELETE":
                del self.batches[batch.id]
            elif called[3]:
                self.cancel(batch)
            else:
                return Reply("poll", orjson.dumps(self._operation(self.look(batch))))
            return Reply("cancel", b"{}")
        return None

    def knows_upload(self, target: str) -> bool:
        """Whether the URL is one that was given out, which is as good as a key."""
        called = _UPLOAD.fullmatch(target)
        return called is not None and f"files/{parse_qs(called[1] or '').get('upload_id', [''])[0]}" in self.files

    def file_id(self, number: int) -> str:
        """See `Desk`."""
        return f"files/{number:08}"

    def batch_id(self, number: int) -> str:
        """See `Desk`."""
        return f"batches/{number:08}"

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _upload(self, query: str | None, headers: Mapping[str, str], body: bytes) -> Reply:
        """Begins an upload, or takes the next bytes of one, as Google's resumable protocol has it."""
        command = headers.get("x-goog-upload-command", "")
        if command == "start":
            file_id = self.store(b"", "", "")
            url = f"{self.emulator.base_url.rpartition('/')[0]}/upload/v1/files?upload_id={file_id.partition('/')[2]}"
            return Reply("start", b"{}", {"x-goog-upload-url": url, "x-goog-upload-status": "active"})
        stored = self.files[f"files/{parse_qs(query or '')['upload_id'][0]}"]
        if int(headers["x-goog-upload-offset"]) != len(stored.content):
            raise _refused(400, "INVALID_ARGUMENT", "Invalid offset.")
        stored.content += body
        status = "final" if "finalize" in command else "active"
        said = {"file": {"name": stored.id, "sizeBytes": str(len(stored.content)), "state": "ACTIVE"}}
        return Reply("upload", orjson.dumps(said), {"x-goog-upload-status": status})

    # ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ordered(self, model: str, ordered: dict[str, Any]) -> Batch:
        source = ordered["inputConfig"]
        source_id = source.get("file_name") or source.get("fileName")
        inline = source.get("requests", {}).get("requests", [])
        if inline:
            lines = [orjson.dumps({"key": str(place), **item}) for place, item in enumerate(inline)]
            source_id = self.store(b"\n".join(lines), "", "")
        if source_id not in self.files:
            raise _refused(400, "INVALID_ARGUMENT", "Request contains an invalid argument.")
        if self.open >= self.most_open:
            raise _refused(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota).")
        return self.order(ordered, source_id, model)

    def _operation(self, batch: Batch) -> dict[str, Any]:
        at = datetime.fromtimestamp(batch.created_at, UTC).isoformat().replace("+00:00", "Z")
        done = batch.status in ("completed", "failed", "expired", "cancelled")
        total = max(batch.total, batch.completed + batch.failed)
        stats = {
            "requestCount": total, "successfulRequestCount": batch.completed, "failedRequestCount": batch.failed,
            "pendingRequestCount": 0 if done else total,
        }  # fmt: skip
        metadata = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.EmbedContentBatch",
            "model": f"models/{batch.model}", "name": batch.id, "displayName": batch.ordered.get("displayName"),
            "createTime": at, "updateTime": at, "endTime": at if done else None,
            "batchStats": {name: str(number) for name, number in stats.items()},
            "state": f"BATCH_STATE_{_STATES[batch.status]}", "priority": "0",
        }  # fmt: skip
        if batch.output is not None and "requests" in batch.ordered["inputConfig"]:
            metadata["output"] = {"inlinedResponses": {"inlinedResponses": self._inline(batch.output)}}
        elif batch.output is not None:
            metadata["output"] = {"responsesFile": batch.output}
        said: dict[str, Any] = {"name": batch.id, "done": done, "metadata": metadata}
        return {**said, "error": {"code": 8, "message": batch.fault[1]}} if batch.fault else said

    def _inline(self, output: str) -> list[dict[str, Any]]:
        lines = [orjson.loads(line) for line in self.files[output].content.splitlines()]
        lines.sort(key=lambda line: int(line["key"]))
        return [{name: value for name, value in line.items() if name != "key"} for line in lines]

    def _listed(self, query: Mapping[str, list[str]]) -> dict[str, Any]:
        start, size = int(query.get("pageToken", ["0"])[0]), int(query.get("pageSize", ["50"])[0])
        found = [self._operation(batch) for batch in reversed(self.batches.values())]
        more = {"nextPageToken": str(start + size)} if start + size < len(found) else {}
        rows = found[start : start + size]
        return {**({"operations": rows} if rows else {}), **more}

    # ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def store_results(self, batch: Batch, good: list[bytes], bad: list[bytes]) -> None:
        """See `Desk`; one file for all."""
        if good or bad:
            batch.output = self.store(b"\n".join(good + bad) + b"\n", "", "")

    def read(self, batch: Batch, given: dict[str, Any]) -> Line:
        """See `Desk`."""
        request = {"model": f"models/{batch.model}", **given["request"]}
        try:
            return Line(given["key"], self.emulator.read_one(batch.model, request))
        except RefusalError as refusal:
            return Line(given["key"], refusal)

    def good(self, batch: Batch, line: Line, rows: list[Row]) -> bytes:
        """See `Desk`; a token count comes from no model but the newer one, where it may."""
        assert isinstance(line.asked, Asked)
        tokens = b',"tokenCount":"%d"' % line.asked.tokens if self.emulator.tells_tokens(batch.model) else b""
        values = as_numbers(rows[0][1])
        return b'{"key":%s,"response":{"embedding":{"values":%s}%s}}' % (orjson.dumps(line.key), values, tokens)

    def bad(self, batch: Batch, key: str, refusal: RefusalError | str) -> bytes:
        """See `Desk`."""
        if isinstance(refusal, str):
            return orjson.dumps({"key": key, "error": {"code": 4, "message": "Not processed in time.", "details": []}})
        said = orjson.loads(refusal.body)["error"]
        return orjson.dumps({"key": key, "error": {**said, "code": _CODES[refusal.status]}})
