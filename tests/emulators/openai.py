"""Hides a stand-in for OpenAI's embeddings API: real HTTP, self-identifying vectors, a strict judge and a bill."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from app.errors import (
    BadCredential,
    InputRefused,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    Throttled,
    Transient,
)
from tests.emulators.cases import Case
from tests.emulators.faults import Wire, error_body
from tests.emulators.judge import Judge, OverLimit
from tests.emulators.openai_batches import OpenAIDesk
from tests.emulators.server import Asked, Emulator, RefusalError, Row, Text, as_base64, as_numbers, parsed, vocabulary

_INVALID_INPUT = "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
_NO_JSON = "We could not parse the JSON body of your request."
_FIELDS = {"input", "model", "encoding_format", "dimensions", "user"}
_CHAT_MODELS = {"gpt-4o", "gpt-4o-mini"}
_MOST_ITEMS = 2048
_MOST_TOKENS = 300_000
_STAMP = {"x-request-id": "req_emulator", "openai-processing-ms": "1"}
_UNITS = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


def refusal(
    status: int, message: str, kind: str = "invalid_request_error", *, code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> RefusalError:  # fmt: skip
    """A refusal in OpenAI's envelope."""
    return RefusalError(status, error_body(message, kind, code=code), {**_STAMP, **(headers or {})})


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
        self.batches = OpenAIDesk(self)
        self._older_wording = older_wording

    # ── answering ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        self._authenticate(headers.get("authorization", ""))
        if target == "POST /v1/embeddings":
            return await self._embeddings(wire, parsed(body, refusal(400, _NO_JSON)), headers, target)
        if target == "GET /v1/models":
            cards = [_model_object(name, card) for name, card in self.models.items()]
            return await wire.answer(200, orjson.dumps({"object": "list", "data": cards}), {})
        if await self.batches.answered(wire, target, headers, body):
            return None
        if target.startswith("GET /v1/models/"):
            name = target.removeprefix("GET /v1/models/")
            return await wire.answer(200, orjson.dumps(_model_object(name, self._card(name))), {})
        method, _, path = target.partition(" ")
        if path == "/v1/embeddings":
            raise refusal(405, f"Not allowed to {method} on /v1/embeddings.", code="method_not_supported")
        raise refusal(404, f"Invalid URL ({method} {path})")

    async def _embeddings(self, wire: Wire, given: dict[str, Any], headers: dict[str, str], target: str) -> None:
        texts, card = self._read(given)
        counts = [self.count(text) for text in texts]
        width = given.get("dimensions") or card.dimensions
        asked = Asked(given["model"], texts, sum(counts), width, given, headers, target.removeprefix("POST "))
        self.note(asked)
        if not self.constant:
            self._check_lengths(given["input"], counts, card)
        await self.honour(wire, asked)

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return self.models[model].dimensions

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        usage = {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens}
        return as_list(asked, rows, usage, base64=self.base64)

    def stamp(self, asked: Asked) -> dict[str, str]:
        """See `Emulator`."""
        limits: dict[str, str] = {}
        for kind, level in self.judge.levels().items():
            limits[f"x-ratelimit-limit-{kind}"] = str(level.limit)
            limits[f"x-ratelimit-remaining-{kind}"] = str(level.left)
            limits[f"x-ratelimit-reset-{kind}"] = f"{level.reset_s:.3f}s"
        said = {"openai-version": "2020-10-01", "openai-organization": "org-emulator", "openai-model": asked.model}
        return {**_STAMP, **said, **limits}

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


def as_list(
    asked: Asked, rows: list[Row], usage: Mapping[str, object], *, base64: bool = True, **more: object
) -> bytes:
    """OpenAI's 200, with `more` beside it; floats whatever was asked unless `base64`."""
    write = as_base64 if base64 and asked.body.get("encoding_format") == "base64" else as_numbers
    items = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%s}' % (place, write(vector)) for place, vector in rows
    )
    rest = orjson.dumps({"object": "list", "model": asked.model, "usage": usage, **more})
    return b'{"data":[%s],%s' % (items, rest[1:])


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


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _row(
    row: str, status: int, message: str, means: type[ProviderError], *, kind: str = "invalid_request_error",
    code: str | None = None, headers: Mapping[str, str] | None = None, asks: Mapping[str, object] | None = None,
    wait_s: float | None = None, position: int | None = None, too_long: bool = False,
) -> Case:  # fmt: skip
    """A row whose answer is in OpenAI's envelope."""
    return Case(
        row=row, status=status, body=error_body(message, kind, code=code).decode(), headers=headers or {}, asks=asks,
        means=means, wait_s=wait_s, position=position, too_long=too_long,
    )  # fmt: skip


def _header(name: str, value: str) -> Case:
    return Case(row=f"§3 header {name}", status=200, headers={name: value}, asks={})


_LONGEST = "word" + " word" * 8191
_OF_MINUTE = "Rate limit reached for text-embedding-3-small in organization org-XXXX on"
_OLDER = "This model's maximum context length is 8192 tokens, however you requested 8610 tokens"
_ADA = {"model": "text-embedding-ada-002", "dimensions": 256}

CASES: tuple[Case, ...] = (
    Case(row="§2 a lone empty string is embedded", status=200, asks={"input": ""}),
    Case(row="§2 8192 tokens per input", status=200, body='"prompt_tokens":8192', asks={"input": _LONGEST}),
    Case(row="§2 dimensions up to the model's own", status=200, asks={"dimensions": 1536}),
    _row("§3 400 empty string in a list", 400, _INVALID_INPUT, InputRefused, asks={"input": ["a", ""]}),
    _row("§3 400 empty list", 400, _INVALID_INPUT, InputRefused, asks={"input": []}),
    _row("§3 400 wrong type of input", 400, _INVALID_INPUT, InputRefused, asks={"input": 5}),
    _row("§3 400 more than 2048 inputs", 400, _INVALID_INPUT, InputRefused, asks={"input": ["a"] * 2049}),
    _row(
        "§3 400 more than 2048 inputs, wording of September 2026", 400,
        "'$.input' is invalid: array length must be 2048 or less.", InputRefused,
    ),
    _row(
        "§3 400 more than 300,000 tokens", 400, "Requested 303104 tokens, max 300000 tokens per request", InputRefused,
        kind="max_tokens_per_request", code="max_tokens_per_request", asks={"input": [_LONGEST] * 37},
    ),
    _row(
        "§3 400 one input too long, older wording", 400,
        f"{_OLDER} (8610 in your prompt; 0 for the completion). Please reduce your prompt; or completion length.",
        InputRefused, too_long=True,
    ),
    _row(
        "§3 400 a single input too long", 400, "Invalid 'input': maximum context length is 8192 tokens.", InputRefused,
        asks={"input": _LONGEST + " word"}, too_long=True,
    ),
    _row(
        "§3 400 an input of many too long", 400, "Invalid 'input[2]': maximum input length is 8192 tokens.",
        InputRefused, asks={"input": ["a", "b", _LONGEST + " word"]}, position=2, too_long=True,
    ),
    _row("§3 400 dimensions for ada-002", 400, "This model does not support specifying dimensions.", Misconfigured,
         asks=_ADA),
    _row(
        "§3 400 dimensions too large", 400,
        "Invalid value for 'dimensions' = 4096. Must be less than or equal to 1536.", Misconfigured,
        asks={"dimensions": 4096},
    ),
    _row("§3 400 no model", 400, "you must provide a model parameter", Misconfigured, asks={"model": None}),
    _row("§3 400 no JSON", 400, _NO_JSON, InputRefused),
    _row("§3 401 wrong key", 401, "Incorrect API key provided: sk-pr***1234.", BadCredential, code="invalid_api_key"),
    _row("§3 401 no key", 401, "You didn't provide an API key.", BadCredential),
    _row(
        "§3 401 key lacks scope", 401,
        "You have insufficient permissions for this operation. Missing scopes: model.request", BadCredential,
        code="missing_scope",
    ),
    _row(
        "§3 403 chat model", 403, "You are not allowed to generate embeddings from this model", Misconfigured,
        asks={"model": "gpt-4o"},
    ),
    _row(
        "§3 403 country not supported", 403, "Country, region, or territory not supported", BadCredential,
        kind="request_forbidden", code="unsupported_country_region_territory",
    ),
    _row(
        "§3 404 unknown model", 404, "The model `foo` does not exist or you do not have access to it.", Misconfigured,
        code="model_not_found", asks={"model": "foo"},
    ),
    _row("§3 404 unknown URL", 404, "Invalid URL (POST /v1/foo)", Misconfigured),
    _row(
        "§3 429 tokens per minute", 429,
        f"{_OF_MINUTE} tokens per min (TPM): Limit 1000000, Used 976163, Requested 70716. Please try again in 2.812s.",
        Throttled, kind="tokens", code="rate_limit_exceeded", headers={"retry-after": "3"}, wait_s=3,
    ),
    _row(
        "§3 429 requests per minute", 429,
        f"{_OF_MINUTE} requests per min (RPM): Limit 3, Used 3, Requested 1. Please try again in 20s.",
        Throttled, kind="requests", code="rate_limit_exceeded", headers={"retry-after": "20"}, wait_s=20,
    ),
    _row(
        "§3 429 larger than the whole bucket", 429,
        "Request too large for text-embedding-3-small in organization org-XXXX on tokens per min (TPM): Limit 30000, "
        "Requested 36055. The input or output tokens must be reduced in order to run successfully.",
        InputRefused, kind="tokens", code="rate_limit_exceeded",
    ),
    _row(
        "§3 429 no credit", 429, "You exceeded your current quota, please check your plan and billing details.",
        QuotaExhausted, kind="insufficient_quota", code="insufficient_quota",
    ),
    _row("§3 429 hard billing limit", 429, "", QuotaExhausted, code="billing_hard_limit_reached"),
    _row("§3 400 hard billing limit", 400, "", QuotaExhausted, code="billing_hard_limit_reached"),
    _row("§3 408 retryable", 408, "", Transient),
    _row("§3 409 retryable", 409, "", Transient),
    _row(
        "§3 500 internal", 500, "The server had an error while processing your request. Sorry about that!", Transient,
        kind="server_error",
    ),
    _row("§3 503 overloaded", 503, "Slow down", Transient, kind="service_unavailable"),
    _header("x-ratelimit-limit-requests", "3000"),
    _header("x-ratelimit-limit-tokens", "1000000"),
    _header("x-ratelimit-remaining-requests", "2999"),
    _header("x-ratelimit-remaining-tokens", "999999"),
    _row(
        "§3 header x-ratelimit-reset-requests", 429, _OF_MINUTE, Throttled, kind="requests",
        headers={"x-ratelimit-reset-requests": "8.64s", "x-ratelimit-reset-tokens": "6m0s"}, wait_s=8.64,
    ),
    _row(
        "§3 header x-ratelimit-reset-tokens", 429, _OF_MINUTE, Throttled, kind="tokens",
        headers={"x-ratelimit-reset-requests": "20ms", "x-ratelimit-reset-tokens": "1m2.5s"}, wait_s=62.5,
    ),
    _row(
        "§3 header retry-after", 429, _OF_MINUTE, Throttled,
        headers={"retry-after": "3", "x-ratelimit-reset-tokens": "6m0s"}, wait_s=3,
    ),
    _row(
        "§3 header retry-after-ms", 429, _OF_MINUTE, Throttled, headers={"retry-after": "3", "retry-after-ms": "2812"},
        wait_s=2.812,
    ),
    _row(
        "§3 header x-should-retry", 429, "You exceeded your current quota", QuotaExhausted, code="insufficient_quota",
        headers={"x-should-retry": "false"},
    ),
    _header("x-request-id", "req_emulator"),
    _header("openai-processing-ms", "1"),
    _header("openai-organization", "org-emulator"),
    _header("openai-version", "2020-10-01"),
    _header("openai-model", "text-embedding-3-small"),
)  # fmt: skip
