"""Hides how an input file is checked, line by line and once, and cut into shards; memory does not grow with it."""

import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from app.job import LineError, Shard

MOST_ERRORS: Final = 100
ENDPOINT: Final = "/v1/embeddings"

_MOST_LINE_BYTES = 2**25
_MOST_SHARD_BYTES = 2**23
_DEEPEST = 64
_LONGEST_ID = 512
_BOM = b"\xef\xbb\xbf"
_REQUIRED = ("custom_id", "method", "url", "body")
_NOT_JSON = "This line is not parseable as valid JSON."
_NO_OBJECT = "This line is not a JSON object."


class Intake(AbstractContextManager["Intake"]):
    """Takes an input file piece by piece; its methods block, so they belong into a thread, one at a time.

    `wrong` says why a model cannot be had, None: it can. What is wrong is told for at most `MOST_ERRORS` lines. Ids
    that were seen are kept on disk, by a hash.
    """

    def __init__(
        self, *, wrong: Callable[[str], LineError | None], max_lines: int, max_inputs: int, shard_lines: int
    ) -> None:  # fmt: skip
        self.shards: list[Shard] = []
        self.errors: list[LineError] = []
        self.model = ""
        self.total = 0
        self._unfit = wrong
        self._max_lines = max_lines
        self._max_inputs = max_inputs
        self._shard_lines = shard_lines
        self._inputs = 0
        self._line = 0  # the number of the next one, blank ones counted
        self._offset = 0  # and where it begins
        self._blank_since: int | None = None
        self._rest = b""
        self._first_line, self._first_offset, self._in_shard = 0, 0, 0
        self._over = False

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="embedgate-")
        self._seen = sqlite3.connect(Path(self._folder.name) / "ids", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode=off", "synchronous=off", "cache_size=-16384"):
            self._seen.execute(f"PRAGMA {setting}")
        self._seen.execute("CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._seen.execute("BEGIN")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seen.close()
        self._folder.cleanup()

    def feed(self, data: bytes) -> bool:
        """The next piece of the file; whether more of it is worth reading."""
        if not self._line and not self._offset and not self._rest and data.startswith(_BOM):
            self._offset, data = len(_BOM), data[len(_BOM) :]
            self._first_offset = self._offset
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line, len(line) + 1)
        if len(self._rest) > _MOST_LINE_BYTES:
            self._wrong("invalid_json_line", _NOT_JSON)
            self._over = True
        return not self._over and len(self.errors) < MOST_ERRORS

    def finish(self) -> None:
        """The file is over."""
        if self._rest and not self._over:
            self._take(self._rest, len(self._rest))
        self._rest = b""
        self._cut()
        if not self.total and not self.errors:
            self.errors.append(LineError("empty_file", "The input file is empty."))
        del self.errors[MOST_ERRORS:]

    # ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, line: bytes, size_bytes: int) -> None:
        if self._over or len(self.errors) >= MOST_ERRORS:
            return
        if not line.strip():
            self._blank_since = self._line if self._blank_since is None else self._blank_since
        else:
            if self._blank_since is not None:  # blank lines are fine at the end only
                self.errors.append(LineError("invalid_json_line", _NOT_JSON, None, self._blank_since + 1))
                self._blank_since = None
            self._check(line)
            self.total += 1
            self._in_shard += 1
        self._line += 1
        self._offset += size_bytes
        if self._in_shard >= self._shard_lines or self._offset - self._first_offset >= _MOST_SHARD_BYTES:
            self._cut()
        if self.total > self._max_lines or self._inputs > self._max_inputs:
            what = f"{self._max_lines} requests" if self.total > self._max_lines else f"{self._max_inputs} inputs"
            self.errors.append(LineError("too_many_tasks", f"A batch may have at most {what}."))
            self._over = True

    def _cut(self) -> None:
        """What was taken since the last cut is a shard."""
        if self._in_shard:
            size_bytes = self._offset - self._first_offset
            self.shards.append(Shard(self._first_line, self._in_shard, self._first_offset, size_bytes))
        self._first_line, self._first_offset, self._in_shard = self._line, self._offset, 0

    def _wrong(self, code: str, message: str, param: str | None = None) -> None:
        self.errors.append(LineError(code, message, param, self._line + 1))

    def _check(self, line: bytes) -> None:
        try:
            found = _parsed(line)
        except ValueError:
            self._wrong("invalid_json_line", _NOT_JSON)
            return
        if not isinstance(found, dict) or not isinstance(found.get("body", {}), dict):
            self._wrong("invalid_json_line", _NO_OBJECT)
            return
        missing = next((name for name in _REQUIRED if name not in found), None)
        if missing is not None:
            self._wrong("missing_required_parameter", f"Missing required parameter: '{missing}'.", missing)
        elif found["method"] != "POST":
            self._wrong("invalid_value", "Invalid value for 'method'. Must be 'POST'.", "method")
        elif found["url"] != ENDPOINT:
            self._wrong("url_mismatch", f"The url of this line is not the batch's endpoint, '{ENDPOINT}'.", "url")
        elif not _is_id(found["custom_id"]):
            text = f"Invalid value for 'custom_id'. Must be a string of 1 to {_LONGEST_ID} characters without NUL."
            self._wrong("invalid_value", text, "custom_id")
        elif not self._is_new(found["custom_id"]):
            self._wrong("duplicate_custom_id", "The custom_id of this line was used before in this file.", "custom_id")
        else:
            self._check_model(found["body"].get("model"))
            self._inputs += _inputs(found["body"].get("input"))

    def _check_model(self, model: object) -> None:
        """What is no name of a model is told when the line's turn comes, as all that is wrong with its body."""
        if not isinstance(model, str) or model == self.model:
            return
        if self.model:
            self._wrong("model_mismatch", "All lines of a batch must name the same model.", "body.model")
        elif (unfit := self._unfit(model)) is not None:
            self._wrong(unfit.code, unfit.message, unfit.param)
        self.model = self.model or model

    def _is_new(self, custom_id: str) -> bool:
        digest = blake2b(custom_id.encode(), digest_size=16).digest()
        return self._seen.execute("INSERT OR IGNORE INTO ids VALUES (?)", (digest,)).rowcount == 1


def _parsed(line: bytes) -> Any:
    """A line as JSON has it. ValueError."""
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(line) > _DEEPEST:
        raise ValueError("nested too deeply")
    return orjson.loads(line)


def _depth(line: bytes) -> int:
    """How deeply brackets nest outside of strings."""
    deepest = depth = 0
    quoted = escaped = False
    for byte in line:
        if quoted:
            quoted, escaped = escaped or byte != 0x22, not escaped and byte == 0x5C
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _is_id(custom_id: object) -> bool:
    return isinstance(custom_id, str) and 0 < len(custom_id) <= _LONGEST_ID and "\0" not in custom_id


def _inputs(given: object) -> int:
    """How many embeddings a line asks for, as far as that can be told."""
    if isinstance(given, Sequence) and not isinstance(given, str) and given and not isinstance(given[0], int):
        return len(given)
    return 1
