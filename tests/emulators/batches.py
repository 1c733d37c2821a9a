"""Hides what all stand-ins for vendors' batches share: files, lines that are carried out while one waits, lies, faults.

A vendor's own file says what its wire looks like.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import orjson

from tests.emulators.faults import Fault, Wire
from tests.emulators.server import Asked, Damage, Emulator, RefusalError, Row

Status: TypeAlias = Literal[
    "validating", "in_progress", "completed", "failed", "expired", "cancelling", "cancelled"
]  # fmt: skip
OPEN = {"validating", "in_progress", "cancelling"}


class Reply(NamedTuple):
    """A 200: what was asked for, in one word by which faults find it, and what is answered."""

    operation: str
    content: bytes
    headers: Mapping[str, str] = {}


class Line(NamedTuple):
    """One line of an input file that can be carried out, or the words of its refusal."""

    key: str
    asked: Asked | RefusalError


@dataclass(slots=True)
class Stored:
    """A file."""

    id: str
    content: bytes
    filename: str
    purpose: str
    created_at: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class Batch:
    """A batch; `ordered` is the body that ordered it, `fault` why it failed: code, message, line."""

    id: str
    ordered: dict[str, Any]
    source: str
    model: str
    status: Status = "validating"
    created_at: int = field(default_factory=lambda: int(time.time()))
    started_s: float = field(default_factory=time.monotonic)
    polls: int = 0
    total: int = 0
    completed: int = 0
    failed: int = 0
    tokens: int = 0
    output: str | None = None
    errors: str | None = None
    fault: tuple[str, str, int | None] | None = None


class Desk(ABC):
    """An emulator's batches; what is carried out is on its `batch_bill`.

    A batch is in progress for `steps` looks at it and for `latency_s` seconds. `most_open` may be so at once, others
    are refused. `lapses_after` so many lines it expires; None: never. With `queue_full` it fails. Lines come out in any
    order. `damage` is done to the vectors of a batch, first one of each line, before they are written down.
    """

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.steps = 1
        self.latency_s = 0.0
        self.most_open = 100
        self.lapses_after: int | None = None
        self.queue_full = False
        self.damage: Damage = list
        self.files: dict[str, Stored] = {}
        self.batches: dict[str, Batch] = {}
        self._faults: dict[str, Fault] = {}
        self._made = 0

    def inject(self, operation: str, fault: Fault) -> None:
        """The next `operation` (upload, create, list, poll, content, cancel) is carried out, and answered so."""
        self._faults[operation] = fault

    async def answered(self, wire: Wire, target: str, headers: Mapping[str, str], body: bytes) -> bool:
        """Whether the exchange was about files or batches; raises RefusalError."""
        reply = self.reply(target, headers, body)
        if reply is None:
            return False
        fault = self._faults.pop(reply.operation, None)
        if fault is not None:
            await fault(wire, reply.content)
        else:
            await wire.answer(200, reply.content, reply.headers)
        return True

    # ── what a vendor says in its own way ───────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def reply(self, target: str, headers: Mapping[str, str], body: bytes) -> Reply | None:
        """What is answered; None where this is not about batches."""

    @abstractmethod
    def read(self, batch: Batch, given: dict[str, Any]) -> Line:
        """A line of an input file."""

    @abstractmethod
    def good(self, batch: Batch, line: Line, rows: list[Row]) -> bytes:
        """The line that brings vectors."""

    @abstractmethod
    def bad(self, batch: Batch, key: str, refusal: RefusalError | str) -> bytes:
        """The line that says why there are none: a refusal, or the word for what was not carried out."""

    def check(self, batch: Batch, lines: list[Any]) -> tuple[str, str, int | None] | None:
        """What is wrong with an input file."""
        return None

    def store_results(self, batch: Batch, good: list[bytes], bad: list[bytes]) -> None:
        """Keeps them in two files, where there is anything."""
        if good:
            batch.output = self.store(b"\n".join(good) + b"\n", f"{batch.id}_output.jsonl", "batch_output")
        if bad:
            batch.errors = self.store(b"\n".join(bad) + b"\n", f"{batch.id}_error.jsonl", "batch_output")

    def file_id(self, number: int) -> str:
        """The name of the file with this number."""
        return f"file-{number:08}"

    def batch_id(self, number: int) -> str:
        """The name of the batch with this number."""
        return f"batch_{number:08}"

    # ── what all do ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def open(self) -> int:
        """How many are not over."""
        return sum(batch.status in OPEN for batch in self.batches.values())

    def store(self, content: bytes, filename: str, purpose: str) -> str:
        """Keeps a file."""
        self._made += 1
        stored = Stored(self.file_id(self._made), content, filename, purpose)
        self.files[stored.id] = stored
        return stored.id

    def order(self, ordered: dict[str, Any], source: str, model: str) -> Batch:
        """A new batch."""
        self._made += 1
        batch = Batch(self.batch_id(self._made), ordered, source, model)
        self.batches[batch.id] = batch
        return batch

    def look(self, batch: Batch) -> Batch:
        """The batch, one step further."""
        if batch.status == "cancelling":
            self._carry_out(batch, "cancelled", self.lapses_after or 0)
        elif batch.status in OPEN:
            batch.status = "in_progress"
            batch.polls += 1
            if self.queue_full:
                batch.status = "failed"
                batch.fault = ("token_limit_exceeded", "Enqueued token limit reached.", None)
            elif batch.polls > self.steps and time.monotonic() - batch.started_s >= self.latency_s:
                self._carry_out(batch, "completed" if self.lapses_after is None else "expired", self.lapses_after)
        return batch

    def cancel(self, batch: Batch) -> Batch:
        """Ends it soon; what is over stays."""
        if batch.status in OPEN:
            batch.status = "cancelling"
        return batch

    def _carry_out(self, batch: Batch, ending: Status, most: int | None) -> None:
        written = [_parsed(line) for line in self.files[batch.source].content.split(b"\n") if line.strip()]
        batch.fault = self.check(batch, written)
        if batch.fault is not None:
            batch.status = "failed"
            return
        lines = [self.read(batch, line) for line in written]
        most = len(lines) if most is None else most
        good, bad = self._done(batch, lines[:most])
        left = {"cancelled": "batch_cancelled"}.get(ending, "batch_expired")
        bad += [self.bad(batch, line.key, left) for line in lines[most:]]
        order = random.Random(batch.id)
        order.shuffle(good)
        order.shuffle(bad)
        batch.total, batch.status = len(lines), ending
        self.store_results(batch, good, bad)

    def _done(self, batch: Batch, lines: list[Line]) -> tuple[list[bytes], list[bytes]]:
        served: list[tuple[Line, Asked]] = []
        bad: list[bytes] = []
        for line in lines:
            asked = line.asked
            if isinstance(asked, Asked):
                place = next((place for place, text in enumerate(asked.texts) if text in self.emulator.poison), None)
                if place is None:
                    served.append((line, asked))
                    continue
                asked = self.emulator.poisoned(asked, place)
            bad.append(self.bad(batch, line.key, asked))
        self._charge(batch, [asked for _, asked in served], len(bad))
        rows = [(place, self._vector(asked, 0)) for place, (_, asked) in enumerate(served)]
        return [self._good(batch, served, place, vector) for place, vector in self.damage(rows)], bad

    def _good(self, batch: Batch, served: list[tuple[Line, Asked]], place: int, vector: np.ndarray[Any, Any]) -> bytes:
        line, asked = served[place] if place < len(served) else (Line("unasked", served[-1][1]), served[-1][1])
        more = [(other, self._vector(asked, other)) for other in range(1, len(asked.texts))]
        return self.good(batch, line, [(0, vector), *more])

    def _vector(self, asked: Asked, place: int) -> np.ndarray[Any, Any]:
        return self.emulator.vector(asked.model, asked.texts[place], asked.width)

    def _charge(self, batch: Batch, served: list[Asked], failed: int) -> None:
        batch.completed, batch.failed = len(served), failed
        batch.tokens = sum(asked.tokens for asked in served)
        bill = self.emulator.batch_bill
        bill.requests += len(served)
        bill.items += sum(len(asked.texts) for asked in served)
        bill.tokens += batch.tokens


def _parsed(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
