"""Hides a stand-in for OpenAI's embeddings API: real HTTP, self-identifying vectors, a strict judge and a bill."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from tests.emulators.faults import Wire, error_body
from tests.emulators.judge import Judge, OverLimit
from tests.emulators.server import Asked, Emulator, RefusalError, Row, Text, as_base64, as_numbers, parsed, vocabulary

_INVALID_INPUT = "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
_NO_JSON = "We could not parse the JSON body of your request."
_FIELDS = {"input", "model", "encoding_format", "dimensions", "user"}
_CHAT_MODELS = {"gpt-4o", "gpt-4o-mini"}
_MOST_ITEMS = 2048
_MOST_TOKENS = 300_000
_UNITS = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


def refusal(
    status: int, message: str, kind: str = "invalid_request_error", *, code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> RefusalError:  # fmt: skip
    """A refusal in OpenAI's envelope."""
    stamp = {"x-request-id": "req_emulator", "openai-processing-ms": "1", **(headers or {})}
    return RefusalError(status, error_body(message, kind, code=code), stamp)


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


class OpenAIEmulator(Emulator):
    """OpenAI; see `Emulator`. `base64=False` answers floats whatever was asked."""

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
        super().__init__(
            api_key=api_key, latency_s=latency_s, latency_per_token_s=latency_per_token_s, constant=constant,
            judge=judge,
        )  # fmt: skip
        self.models = models
        self.base64 = base64
        self._older_wording = older_wording

    # ── answering ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
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
            raise refusal(405, f"Not allowed to {method} on /v1/embeddings.", code="method_not_supported")
        raise refusal(404, f"Invalid URL ({method} {path})")

    async def _embeddings(self, wire: Wire, headers: dict[str, str], body: bytes) -> None:
        given = parsed(body, refusal(400, _NO_JSON))
        texts, card = self._read(given)
        counts = [self.count(text) for text in texts]
        width = given.get("dimensions") or card.dimensions
        asked = Asked(given["model"], texts, sum(counts), width, given, headers)
        self.note(asked)
        if not self.constant:
            self._check_lengths(given["input"], counts, card)
        await self.honour(wire, asked)

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return self.models[model].dimensions

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        as_text = self.base64 and asked.body.get("encoding_format") == "base64"
        write = as_base64 if as_text else as_numbers
        items = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%s}' % (place, write(vector)) for place, vector in rows
        )
        usage = orjson.dumps({"prompt_tokens": asked.tokens, "total_tokens": asked.tokens})
        return b'{"object":"list","data":[%s],"model":%s,"usage":%s}' % (items, orjson.dumps(asked.model), usage)

    def stamp(self, asked: Asked) -> dict[str, str]:
        """See `Emulator`."""
        limits: dict[str, str] = {}
        for kind, level in self.judge.levels().items():
            limits[f"x-ratelimit-limit-{kind}"] = str(level.limit)
            limits[f"x-ratelimit-remaining-{kind}"] = str(level.left)
            limits[f"x-ratelimit-reset-{kind}"] = f"{level.reset_s:.3f}s"
        return {"x-request-id": "req_emulator", "openai-version": "2020-10-01", **limits}

    # ── refusing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return refusal(400, _INVALID_INPUT)

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`."""
        whose = f"for {asked.model} in organization org-emulator on {_UNITS[over.kind]}: Limit {over.limit}"
        if math.isinf(over.wait_s):
            text = f"Request too large {whose}, Requested {over.asked}. The input or output tokens must be reduced."
            return refusal(429, text, over.kind, code="rate_limit_exceeded")
        text = f"Rate limit reached {whose}, Used {over.used}, Requested {over.asked}."
        text += f" Please try again in {over.wait_s:.3f}s."
        headers = {"retry-after": str(math.ceil(over.wait_s)), "retry-after-ms": str(math.ceil(over.wait_s * 1000))}
        return refusal(429, text, over.kind, code="rate_limit_exceeded", headers=headers)

    def _authenticate(self, authorization: str) -> None:
        if self.api_key is None or authorization == f"Bearer {self.api_key}":
            return
        if not authorization:
            raise refusal(
                401,
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
            )
        key = authorization.removeprefix("Bearer ")
        masked = f"{key[:5]}***{key[-4:]}"
        where = "You can find your API key at https://platform.openai.com/account/api-keys."
        raise refusal(401, f"Incorrect API key provided: {masked}. {where}", code="invalid_api_key")

    def _card(self, model: str) -> ModelCard:
        if model in _CHAT_MODELS:
            raise refusal(403, "You are not allowed to generate embeddings from this model")
        if model not in self.models:
            message = f"The model `{model}` does not exist or you do not have access to it."
            raise refusal(404, message, code="model_not_found")
        return self.models[model]

    def _read(self, asked: Any) -> tuple[list[Text], ModelCard]:
        texts = _read_input(asked.get("input"))
        if not isinstance(asked.get("model"), str):
            raise refusal(400, "you must provide a model parameter")
        if unknown := sorted(asked.keys() - _FIELDS):
            raise refusal(400, f"Unrecognized request argument supplied: {unknown[0]}")
        if asked.get("encoding_format", "float") not in ("float", "base64"):
            raise refusal(400, "Invalid value for 'encoding_format'. Supported values are: 'float' and 'base64'.")
        card = self._card(asked["model"])
        if (dimensions := asked.get("dimensions")) is not None:
            _check_dimensions(dimensions, card)
        return texts, card

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
            raise refusal(400, message)
        if sum(counts) > _MOST_TOKENS:
            message = f"Requested {sum(counts)} tokens, max {_MOST_TOKENS} tokens per request"
            raise refusal(400, message, "max_tokens_per_request", code="max_tokens_per_request")


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
    raise refusal(400, _INVALID_INPUT)


def _are_ids(values: list[object]) -> bool:
    return all(type(value) is int and 0 <= value <= vocabulary().max_token_value for value in values)


def _check_dimensions(dimensions: object, card: ModelCard) -> None:
    if not card.cuts:
        raise refusal(400, "This model does not support specifying dimensions.")
    if type(dimensions) is not int or dimensions < 1:
        raise refusal(400, f"Invalid value for 'dimensions' = {dimensions}. Must be an integer of at least 1.")
    if dimensions > card.dimensions:
        limit = f"Must be less than or equal to {card.dimensions}."
        raise refusal(400, f"Invalid value for 'dimensions' = {dimensions}. {limit}")


def _model_object(name: str, card: ModelCard) -> dict[str, object]:
    return {"id": name, "object": "model", "created": card.created, "owned_by": card.owned_by}
