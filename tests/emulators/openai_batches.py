"""Hides what OpenAI's files and batches look like on the wire, for its stand-in."""

import email
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import orjson

from tests.emulators.batches import Batch, Desk, Line, Reply, Stored
from tests.emulators.server import Asked, RefusalError, Row

if TYPE_CHECKING:
    from tests.emulators.openai import OpenAIEmulator

_TARGET = re.compile(r"(GET|POST|DELETE) /v1/(files|batches)(?:/([^/?]+))?(?:/(content|cancel))?(?:\?(.*))?")
_MOST_LINES = 50_000
_MOST_BYTES = 200_000_000


class OpenAIDesk(Desk):
    """OpenAI's."""

    emulator: "OpenAIEmulator"
    windows = ("24h",)

    def refused(self, message: str, status: int = 400, param: str | None = None) -> RefusalError:
        """A refusal."""
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        return RefusalError(status, {"error": error})

    def reply(self, target: str, headers: Mapping[str, str], body: bytes) -> Reply | None:
        """See `Desk`."""
        called = _TARGET.fullmatch(target)
        if called is None:
            return None
        method, kind, name, rest, query = called.groups()
        asked = {key: values[0] for key, values in parse_qs(query or "").items()}
        match method, kind, name, rest:
            case "POST", "files", None, None:
                return self._said("upload", self.file_object(self._uploaded(headers["content-type"], body)))
            case "GET", "files", None, None:
                return self._said("list", self._files(asked))
            case "GET", "files", _, None:
                return self._said("file", self.file_object(self._file(name)))
            case "GET", "files", _, "content":
                return Reply("content", self._file(name).content, {"content-type": "application/octet-stream"})
            case "DELETE", "files", _, None:
                del self.files[self._file(name).id]
                return self._said("delete", {"id": name, "object": "file", "deleted": True})
            case "POST", "batches", None, None:
                return self._said("create", self.batch_object(self._ordered(orjson.loads(body))))
            case "GET", "batches", None, None:
                return self._said("list", self._batches(asked))
            case "GET", "batches", _, None:
                return self._said("poll", self.batch_object(self.look(self._batch(name))))
            case "POST", "batches", _, "cancel":
                return self._said("cancel", self.batch_object(self.cancel(self._batch(name))))
        return None

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def file_object(self, stored: Stored) -> dict[str, Any]:
        """What is said of a file."""
        return {
            "id": stored.id, "object": "file", "bytes": len(stored.content), "created_at": stored.created_at,
            "expires_at": stored.created_at + 30 * 86_400, "filename": stored.filename, "purpose": stored.purpose,
            "status": "processed", "status_details": None,
        }  # fmt: skip

    def _uploaded(self, content_type: str, body: bytes) -> Stored:
        message = email.message_from_bytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + body)
        parts: dict[Any, Any] = {
            part.get_param("name", header="content-disposition"): part
            for part in message.walk()
            if not part.is_multipart()
        }
        if "file" not in parts or parts.get("purpose") is None:
            raise self.refused("You must provide a file and its purpose.")
        purpose = parts["purpose"].get_payload().strip()
        if purpose != "batch":
            raise self.refused(f"'{purpose}' is not one of ['batch'] - 'purpose'", param="purpose")
        content = parts["file"].get_payload(decode=True)
        return self.files[self.store(content, parts["file"].get_filename(), purpose)]

    def _file(self, name: str) -> Stored:
        if name not in self.files:
            raise self.refused(f"No such File object: {name}", 404, "id")
        return self.files[name]

    def _files(self, asked: Mapping[str, str]) -> dict[str, Any]:
        found = [each for each in self.files.values() if asked.get("purpose", each.purpose) == each.purpose]
        return _page([self.file_object(each) for each in reversed(found)], asked, 10_000)

    # ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def batch_object(self, batch: Batch) -> dict[str, Any]:
        """What is said of a batch; all its times are that of its creation."""
        at, status = batch.created_at, batch.status
        ends = ("completed", "failed", "expired", "cancelled", "cancelling")
        times = {f"{word}_at": at if status == word else None for word in ends}
        begun = None if status == "validating" else at
        errors = None
        if batch.fault is not None:
            code, message, line = batch.fault
            errors = {"object": "list", "data": [{"code": code, "message": message, "param": None, "line": line}]}
        usage = {
            "input_tokens": batch.tokens, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": batch.tokens,
        }  # fmt: skip
        return {
            "id": batch.id, "object": "batch", "endpoint": batch.ordered["endpoint"], "model": batch.model,
            "errors": errors, "input_file_id": batch.source, "status": status,
            "completion_window": batch.ordered["completion_window"], "output_file_id": batch.output,
            "error_file_id": batch.errors, "created_at": at, "in_progress_at": begun, "expires_at": at + 86_400,
            "finalizing_at": begun if status == "completed" else None, **times,
            "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
            "usage": usage, "metadata": batch.ordered.get("metadata"),
        }  # fmt: skip

    def model_of(self, ordered: Mapping[str, Any], source: Stored) -> str:
        """Which model a batch is for; "" where nothing says so."""
        try:
            return str(orjson.loads(source.content.partition(b"\n")[0])["body"]["model"])
        except (orjson.JSONDecodeError, TypeError, KeyError):
            return ""

    def _ordered(self, ordered: dict[str, Any]) -> Batch:
        source = self._file(str(ordered.get("input_file_id")))
        if ordered.get("endpoint") != "/v1/embeddings":
            raise self.refused("Invalid endpoint.", param="endpoint")
        if ordered.get("completion_window") not in self.windows:
            raise self.refused("Invalid completion_window.", param="completion_window")
        if source.purpose != "batch":
            raise self.refused("The file's purpose is not 'batch'.", param="input_file_id")
        if self.open >= self.most_open:
            raise self.refused("Too many batches in progress.", 429)
        return self.order(ordered, source.id, self.model_of(ordered, source))

    def _batch(self, name: str) -> Batch:
        if name not in self.batches:
            raise self.refused(f"No batch found with id '{name}'.", 404)
        return self.batches[name]

    def _batches(self, asked: Mapping[str, str]) -> dict[str, Any]:
        return _page([self.batch_object(each) for each in reversed(self.batches.values())], asked, 20)

    # ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self, batch: Batch, lines: list[Any]) -> tuple[str, str, int | None] | None:
        """See `Desk`; the first thing that is wrong."""
        if not lines:
            return "empty_file", "The input file is empty.", None
        if len(lines) > _MOST_LINES or len(self.files[batch.source].content) > _MOST_BYTES:
            return "too_many_tasks", "The input file is too large.", None
        seen: set[str] = set()
        for number, line in enumerate(lines, 1):
            if not isinstance(line, dict):
                return "invalid_json_line", "This line is not parseable as valid JSON.", number
            if line.get("custom_id") in seen:
                return "duplicate_custom_id", "The custom_id is not unique.", number
            seen.add(line["custom_id"])
            if fault := self.fault_of(batch, line):
                return *fault, number
        return None

    def fault_of(self, batch: Batch, line: dict[str, Any]) -> tuple[str, str] | None:
        """What is wrong with a line that is one."""
        if line.get("url") != batch.ordered["endpoint"] or line.get("method") != "POST":
            return "url_mismatch", "The URL is not the batch's endpoint."
        if line["body"].get("model") != batch.model:
            return "mismatched_model", "The model is not that of the first line."
        return None

    def read(self, batch: Batch, given: dict[str, Any]) -> Line:
        """See `Desk`."""
        try:
            return Line(given["custom_id"], self.asked(batch, given["body"]))
        except RefusalError as refusal:
            return Line(given["custom_id"], refusal)

    def asked(self, batch: Batch, body: dict[str, Any]) -> Asked:
        """What a line's body asks for, if that is legal; raises RefusalError."""
        texts, card = self.emulator._read(body)
        counts = [self.emulator.count(text) for text in texts]
        self.emulator._check_lengths(body["input"], counts, card)
        return Asked(body["model"], texts, sum(counts), body.get("dimensions") or card.dimensions, body, {})

    def good(self, batch: Batch, line: Line, rows: list[Row]) -> bytes:
        """See `Desk`."""
        assert isinstance(line.asked, Asked)
        head = {"id": f"batch_req_{line.key}", "batch_id": batch.id, "custom_id": line.key, "error": None}
        body = self.emulator.write(line.asked, rows)
        return orjson.dumps(head)[:-1] + b',"response":{"status_code":200,"request_id":"req_1","body":%s}}' % body

    def bad(self, batch: Batch, key: str, refusal: RefusalError | str) -> bytes:
        """See `Desk`."""
        head = {"id": f"batch_req_{key}", "batch_id": batch.id, "custom_id": key}
        if isinstance(refusal, str):
            message = "This request could not be executed before the completion window expired."
            return orjson.dumps({**head, "response": None, "error": {"code": refusal, "message": message}})
        return orjson.dumps({**head, "response": self.response(refusal), "error": None})

    def response(self, refusal: RefusalError) -> dict[str, Any]:
        """How a refusal stands in a line."""
        return {"status_code": refusal.status, "request_id": "req_1", "body": orjson.loads(refusal.body)}

    def _said(self, operation: str, said: dict[str, Any]) -> Reply:
        return Reply(operation, orjson.dumps(said))


def _page(found: list[dict[str, Any]], asked: Mapping[str, str], usual: int) -> dict[str, Any]:
    """A page of what is listed, the newest first."""
    names = [each["id"] for each in found]
    start = names.index(asked["after"]) + 1 if asked.get("after") in names else 0
    rows = found[start : start + int(asked.get("limit", usual))]
    ends = {"first_id": rows[0]["id"] if rows else None, "last_id": rows[-1]["id"] if rows else None}
    return {"object": "list", "data": rows, **ends, "has_more": start + len(rows) < len(found)}
