"""Hides what vendors' own batches share: a file of lines out, a file of answers in, each answer bound to its text."""

import asyncio
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, NamedTuple

import msgspec
import orjson

from app.domain import Space, Text
from app.errors import InputRefused, MalformedReply, ProviderError, Transient
from app.job_ports import BatchAnswer, BatchLimits, BatchState, BatchStatus
from app.providers.dialect import Ask, Dialect, Said
from app.providers.http import Endpoint
from app.providers.reading import believed
from app.providers.refusals import Answer
from app.vectors import check

CALL_S = 60.0
"""The longest that the vendor may take over anything small."""
SEND_S = 1800.0
"""The longest that a file may be on its way to the vendor."""
PAGE_ITEMS = 100
_MOST_PAGES = 50
_MOST_CALL_BYTES = 20_000_000
_PIECE_BYTES = 2**16
_SLICE_TEXTS = 500
_WORD = re.compile(r"[A-Za-z0-9_]{1,64}")


class Answered(NamedTuple):
    """What a line of a vendor's output says: whose answer it is, and what the vendor made of that text."""

    key: str
    said: Said | ProviderError


class Page(NamedTuple):
    """A part of the vendor's list of batches, and where the next one begins; "" for the last."""

    batches: Sequence[Mapping[str, Any]]
    next: str


class Lines:
    """The input file, a line for each text; made anew whenever it is read, so that it is never whole in memory."""

    def __init__(self, line: Callable[[str, Text, Space], object], texts: Sequence[Text], space: Space) -> None:
        self._line = line
        self._texts = texts
        self._space = space

    async def pieces(self) -> AsyncIterator[bytes]:
        """Its bytes in pieces of about 64 KiB, between which the loop gets its turn."""
        piece = bytearray()
        for place, text in enumerate(self._texts):
            piece += orjson.dumps(self._line(key_of(place, text, self._space), text, self._space)) + b"\n"
            if len(piece) >= _PIECE_BYTES or place == len(self._texts) - 1:
                yield bytes(piece)
                piece.clear()
                await asyncio.sleep(0)

    async def size_bytes(self) -> int:
        """How long it is."""
        return sum([len(piece) async for piece in self.pieces()])


def key_of(place: int, text: Text, space: Space) -> str:
    """What names a text in its batch, and nothing else in any other: an answer that went astray answers nothing."""
    said = f"{space.id}\0{text!r}".encode(errors="surrogatepass")
    return f"{place}-{hashlib.blake2b(said, digest_size=8).hexdigest()}"


async def _places(texts: Sequence[Text], space: Space) -> dict[str, int]:
    """Which text each key names."""
    places: dict[str, int] = {}
    for place, text in enumerate(texts):
        places[key_of(place, text, space)] = place
        if place % _SLICE_TEXTS == 0:
            await asyncio.sleep(0)
    return places


class VendorBatches(ABC):
    """The `BatchProvider` of a dialect over an `endpoint` of its own; see `job_ports.BatchProvider`.

    A subclass is what one vendor does in its own way. What the vendor says is a JSON object that nobody has checked.
    """

    limits: ClassVar[BatchLimits]
    statuses: ClassVar[Mapping[str, BatchStatus]]
    id_pattern: ClassVar[re.Pattern[str]]

    def __init__(self, dialect: Dialect, endpoint: Endpoint) -> None:
        self.dialect = dialect
        self.endpoint = endpoint

    async def submit(self, name: str, texts: Sequence[Text], space: Space) -> str:
        """See `job_ports.BatchProvider`."""
        if not 0 < len(texts) <= self.limits.texts:
            raise InputRefused(f"a batch of {len(texts)} texts")
        lines = Lines(self.line, texts, space)
        size_bytes = await lines.size_bytes()
        if size_bytes > self.limits.bytes:
            raise InputRefused(f"a batch of {size_bytes} bytes")
        await self._check(texts, space)
        file_id = await self.send(name, lines, size_bytes)
        return self._id(await self.create(name, file_id, space))

    async def find(self, name: str) -> str | None:
        """See `job_ports.BatchProvider`."""
        after = ""
        for _ in range(_MOST_PAGES):
            page = await self.page(after)
            for batch in page.batches:
                if self.name_of(batch) == name:
                    return self._id(batch)
            after = page.next
            if not after:
                break
        return None

    async def poll(self, vendor_id: str) -> BatchState:
        """See `job_ports.BatchProvider`."""
        return self._state(await self._fetched(vendor_id))

    async def results(self, vendor_id: str, texts: Sequence[Text], space: Space) -> AsyncGenerator[BatchAnswer, None]:
        """See `job_ports.BatchProvider`."""
        batch = await self._fetched(vendor_id)
        status = self._state(batch).status
        if status == "running":
            raise Transient("a batch that is not over")
        waiting = await _places(texts, space)
        heard: set[str] = set()
        most_bytes = [space.dimensions * 32 + 12 * len(text) + 65_536 for text in texts]
        for path in self.outputs(batch):
            async with aclosing(self._lines(path, most_line=max(most_bytes), most=sum(most_bytes))) as lines:
                async for line in lines:
                    key, said = self._understood(line)
                    if key in heard:
                        raise MalformedReply("two answers to one text")
                    if (place := waiting.pop(key, None)) is not None:
                        heard.add(key)
                        yield await self._answer(place, said, texts[place], space)
        for place in waiting.values():
            yield BatchAnswer(place, _silence(status), None)

    async def cancel(self, vendor_id: str) -> None:
        """See `job_ports.BatchProvider`."""
        if self._state(await self._fetched(vendor_id)).status == "running":
            await self.call(Ask(self.cancel_path(self._checked(vendor_id)), {}))

    async def aclose(self) -> None:
        """See `job_ports.BatchProvider`."""
        await self.endpoint.aclose()

    # ── what a vendor does in its own way ───────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def line(self, key: str, text: Text, space: Space) -> object:
        """The line of the input file that asks for `text`."""

    @abstractmethod
    async def send(self, name: str, lines: Lines, size_bytes: int) -> str:
        """Uploads the file; returns its id."""

    @abstractmethod
    async def create(self, name: str, file_id: str, space: Space) -> Mapping[str, Any]:
        """Orders the batch."""

    @abstractmethod
    async def page(self, after: str) -> Page:
        """A part of the list, newest first."""

    @abstractmethod
    def name_of(self, batch: Mapping[str, Any]) -> object:
        """The name under which it was submitted."""

    @abstractmethod
    def state_of(self, batch: Mapping[str, Any]) -> BatchState | None:
        """How it stands; None for what cannot be."""

    @abstractmethod
    def outputs(self, batch: Mapping[str, Any]) -> Sequence[str]:
        """Where the files are that hold the answers."""

    @abstractmethod
    def answered(self, line: bytes) -> Answered:
        """What a line of them says; may raise what msgspec raises."""

    def batch_path(self, vendor_id: str) -> str:
        """Where a batch is."""
        return f"batches/{vendor_id}"

    def cancel_path(self, vendor_id: str) -> str:
        """Where it is cancelled."""
        return f"{self.batch_path(vendor_id)}/cancel"

    # ── for subclasses ──────────────────────────────────────────────────────────────────────────────────────────────

    async def call(self, ask: Ask) -> Mapping[str, Any]:
        """The JSON object that the vendor answers; raises ProviderErrors."""
        body = orjson.dumps(ask.body)
        return self.told(await self.endpoint.post(ask.path, body, most_bytes=_MOST_CALL_BYTES, timeout_s=CALL_S))

    async def fetch(self, path: str) -> Mapping[str, Any]:
        """The same for what is there already."""
        return self.told(await self.endpoint.get(path, most_bytes=_MOST_CALL_BYTES, timeout_s=CALL_S))

    def told(self, answer: Answer) -> Mapping[str, Any]:
        """What a 2xx says; raises what anything else means."""
        self.honoured(answer)
        try:
            said = orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            said = None
        if not isinstance(said, dict):
            raise MalformedReply("a body that is no JSON object")
        return said

    def honoured(self, answer: Answer) -> Answer:
        """A 2xx as it is; raises what anything else means."""
        if not 200 <= answer.status < 300:
            raise self.dialect.refusal(answer)
        return answer

    # ── what all do ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _check(self, texts: Sequence[Text], space: Space) -> None:
        """Asks what must be known of the texts, some at a time; raises InputRefused."""
        step = self.dialect.max_batch_items
        for start in range(0, len(texts), step):
            try:
                await self.dialect.check(texts[start : start + step], space, self._post)
            except InputRefused as refused:
                if refused.position is not None:
                    refused.position += start
                raise

    async def _post(self, ask: Ask) -> Answer:
        body = orjson.dumps(ask.body)
        return self.honoured(await self.endpoint.post(ask.path, body, most_bytes=65_536, timeout_s=CALL_S))

    async def _fetched(self, vendor_id: str) -> Mapping[str, Any]:
        batch = await self.fetch(self.batch_path(self._checked(vendor_id)))
        if self._id(batch) != vendor_id:
            raise MalformedReply("another batch than the one asked for")
        return batch

    def _id(self, batch: Mapping[str, Any]) -> str:
        return self._checked(self.id_of(batch))

    def id_of(self, batch: Mapping[str, Any]) -> object:
        """The vendor's id."""
        return batch.get("id")

    def _checked(self, vendor_id: object) -> str:
        return identifier(self.id_pattern, vendor_id)

    def _state(self, batch: Mapping[str, Any]) -> BatchState:
        state = self.state_of(batch)
        if state is None:
            raise MalformedReply("a batch in no state that there is")
        return state

    async def _lines(self, path: str, *, most_line: int, most: int) -> AsyncGenerator[bytes, None]:
        """The lines of an output file; its last one may be torn, which who reads it will notice."""
        begun = bytearray()
        stream = self.endpoint.download(path, most_bytes=most, refusal=self.dialect.refusal)
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                begun += piece
                if b"\n" in piece:
                    *whole, rest = begun.split(b"\n")
                    begun = rest
                    for line in whole:
                        yield bytes(line)
                if len(begun) > most_line:
                    raise MalformedReply(f"a line of more than {most_line} bytes")
        yield bytes(begun)

    def _understood(self, line: bytes) -> Answered:
        """What a line says; one that says nothing answers nobody."""
        try:
            return self.answered(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return Answered("", MalformedReply("a line that is no answer"))

    async def _answer(self, place: int, said: Said | ProviderError, text: Text, space: Space) -> BatchAnswer:
        if isinstance(said, ProviderError):
            return BatchAnswer(place, said, None)
        try:
            read = await believed(said, self.dialect.target, [text], space)
            check(read.vectors, 1, space.dimensions, space.normalised)
        except MalformedReply as malformed:
            return BatchAnswer(place, malformed, None)
        return BatchAnswer(place, read.vectors[0], read.tokens)


# ── what a vendor says ──────────────────────────────────────────────────────────────────────────────────────────────


def identifier(pattern: re.Pattern[str], said: object) -> str:
    """A vendor's id, which will stand in a path; raises MalformedReply for one that could lead elsewhere."""
    if not isinstance(said, str) or not pattern.fullmatch(said):
        raise MalformedReply("an id that is none")
    return said


def word(said: object) -> str:
    """A machine word for logs; "" for what is none."""
    return said if isinstance(said, str) and _WORD.fullmatch(said) else ""


def count(said: object) -> int:
    """A number of texts; 0 for what is none. Google writes numbers as strings."""
    if isinstance(said, str) and said.isdecimal() and len(said) < 16:
        return int(said)
    return said if type(said) is int and said >= 0 else 0


def objects(said: object) -> list[Mapping[str, Any]]:
    """The JSON objects of a list."""
    return [each for each in said if isinstance(each, dict)] if isinstance(said, list) else []


def object_at(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The JSON object of that name, or an empty one."""
    found = said.get(name)
    return found if isinstance(found, dict) else {}


def listed(said: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The objects of a list; raises MalformedReply where there is none, lest that be taken for an empty one."""
    if not isinstance(said.get(name), list):
        raise MalformedReply("a body that is no list")
    return objects(said[name])


def _silence(status: BatchStatus) -> ProviderError:
    """Why there is no answer to a text."""
    return MalformedReply("no answer") if status == "done" else Transient(f"the batch is {status}")
