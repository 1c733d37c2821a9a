"""Hides a stand-in for Mistral's embeddings API: small calls, a validator's errors and flat ones, limits in headers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from app.errors import BadCredential, InputRefused, Misconfigured, QuotaExhausted, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire
from tests.emulators.judge import OverLimit
from tests.emulators.openai import as_list
from tests.emulators.server import Asked, Emulator, RefusalError, Row, parsed

_MOST_ITEMS = 256
_MOST_TOKENS = 16_384
_MOST_INPUT_TOKENS = 8192
_UNAUTHORIZED = {"message": "Unauthorized", "request_id": "emulator"}
_NO_SUCH_ROUTE = {"message": "no Route matched with those values", "request_id": "emulator"}
_NAMES = {"requests": "req", "tokens": "tokens"}


@dataclass(frozen=True, slots=True)
class _Model:
    dimensions: int
    most_dimensions: int


_EMBED, _CODESTRAL = _Model(1024, 1024), _Model(1536, 3072)
MODELS: Mapping[str, _Model] = {
    "mistral-embed": _EMBED,
    "mistral-embed-2312": _EMBED,
    "codestral-embed": _CODESTRAL,
    "codestral-embed-2505": _CODESTRAL,
}


class _Body(BaseModel):
    """What may be asked; only floats are made here, the integer types are nothing that embedgate asks for."""

    model_config = ConfigDict(extra="forbid")
    model: str
    input: str | list[str]
    output_dimension: int | None = None
    output_dtype: Literal["float"] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    metadata: dict[str, Any] | None = None


def _flat(
    status: int, message: str, kind: str, code: str | None, headers: Mapping[str, str] | None = None
) -> RefusalError:
    body = {"object": "error", "message": message, "type": kind, "param": None, "code": code, "raw_status_code": status}
    return RefusalError(status, body, headers)


def _invalid(field: str, kind: str, message: str, given: object) -> RefusalError:
    return RefusalError(422, {"detail": [{"type": kind, "loc": ["body", field], "msg": message, "input": given}]})


class MistralEmulator(Emulator):
    """Mistral; see `Emulator`."""

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        if target != "POST /v1/embeddings":
            raise RefusalError(404, _NO_SUCH_ROUTE)
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            raise RefusalError(401, _UNAUTHORIZED)
        given = parsed(body, _invalid("input", "json_invalid", "JSON decode error", {}))
        asked = self._read(given, headers, target)
        self.note(asked)
        await self.honour(wire, asked)

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return MODELS[model].most_dimensions

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        usage = {
            "prompt_tokens": asked.tokens, "completion_tokens": 0, "total_tokens": asked.tokens,
            "prompt_audio_seconds": None, "request_count": 1, "prompt_token_details": None,
        }  # fmt: skip
        return as_list(asked, rows, usage, id="emulator")

    def stamp(self, asked: Asked) -> dict[str, str]:
        """See `Emulator`."""
        said = {"x-ratelimit-tokens-query-cost": str(asked.tokens)}
        for kind, level in self.judge.levels().items():
            said[f"x-ratelimit-limit-{_NAMES[kind]}-minute"] = str(level.limit)
            said[f"x-ratelimit-remaining-{_NAMES[kind]}-minute"] = str(level.left)
        return said

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return _flat(400, "Invalid input.", "invalid_request_error", None)

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`; the gateway counts requests, what is behind it tokens."""
        headers = {"retry-after": str(math.ceil(over.wait_s))} if math.isfinite(over.wait_s) else {}
        if over.kind == "requests":
            return RefusalError(429, {"message": "Requests rate limit exceeded"}, headers)
        return _flat(429, "Rate limit exceeded", "rate_limited", "1300", headers)

    def _read(self, given: dict[str, Any], headers: dict[str, str], target: str) -> Asked:
        try:
            body = _Body.model_validate(given)
        except ValidationError as error:
            complaints = orjson.loads(error.json(include_url=False))
            located = [{**complaint, "loc": ["body", *complaint["loc"]]} for complaint in complaints]
            raise RefusalError(422, {"detail": located}) from None
        if body.model not in MODELS:
            raise _flat(400, f"Invalid model: {body.model}", "invalid_model", "1500")
        texts = [body.input] if isinstance(body.input, str) else body.input
        tokens = self._check_sizes(texts)
        return Asked(body.model, list(texts), tokens, _width(body), given, headers, target)

    def _check_sizes(self, texts: list[str]) -> int:
        if len(texts) > _MOST_ITEMS:
            text = "Too many inputs in request, split into more batches."
            raise _flat(400, text, "invalid_request_prompt", "3210")
        counts = [self.count(text) for text in texts]
        if max(counts, default=0) > _MOST_INPUT_TOKENS:  # in what words is not known
            raise _flat(400, "Input is too long.", "invalid_request_error", None)
        if sum(counts) > _MOST_TOKENS:
            text = "Too many tokens overall, split into more batches."
            raise _flat(400, text, "invalid_request_prompt", "3210")
        return sum(counts)


def _width(body: _Body) -> int:
    card, width = MODELS[body.model], body.output_dimension
    if width is None:
        return card.dimensions
    if card is _EMBED:
        raise _invalid("output_dimension", "value_error", "Value error, not supported by this model", width)
    if not 1 <= width <= card.most_dimensions:
        message = f"Input should be at least 1 and at most {card.most_dimensions}"
        raise _invalid("output_dimension", "value_error", message, width)
    return width


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────

_WORDS = "word " * 4096
_TOO_MANY = "Too many tokens in batch. Max is 16384 got 17555"
_RATE_LIMITED = {
    "object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "param": None, "code": "1300",
    "raw_status_code": 429,
}  # fmt: skip
_LIMITS = {"x-ratelimit-limit-req-minute": "100000", "x-ratelimit-limit-tokens-minute": "100000000"}
_LEFT = {"x-ratelimit-remaining-req-minute": "99999", "x-ratelimit-remaining-tokens-minute": "99999999"}
_NO_MONTH_LEFT = {"x-ratelimitbysize-limit-month": "1000000000", "x-ratelimitbysize-remaining-month": "0"}

CASES: tuple[Case, ...] = (
    Case(
        row="§1 no token arrays",
        asks={"input": [[1, 2]]},
        status=422,
        body='["body","input","list[str]",0]',
        means=InputRefused,
        position=0,
    ),
    Case(
        row="§1 dimensions is no field",
        asks={"dimensions": 256},
        status=422,
        body='"loc":["body","dimensions"]',
        means=Misconfigured,
    ),
    Case(
        row="§1 output_dimension is for codestral-embed only",
        asks={"output_dimension": 256},
        status=422,
        body='"loc":["body","output_dimension"]',
        means=Misconfigured,
    ),
    Case(
        row="§2 codestral-embed makes any width up to 3072",
        asks={"model": "codestral-embed", "output_dimension": 3072},
        status=200,
    ),
    Case(
        row="§2 codestral-embed makes none above 3072",
        asks={"model": "codestral-embed", "output_dimension": 3073},
        status=422,
        body='"loc":["body","output_dimension"]',
        means=Misconfigured,
    ),
    Case(row="§2 256 inputs in a call", asks={"input": ["word"] * 256}, status=200),
    Case(row="§2 16,384 tokens in a call", asks={"input": [_WORDS[:-1]] * 4}, status=200),
    Case(
        row="§2 context of 8K: an over-long input is a 400",
        asks={"input": [_WORDS * 2 + "word"]},
        status=400,
        means=InputRefused,
    ),
    Case(
        row="§3 400 code 3210, too many inputs",
        asks={"input": ["word"] * 257},
        status=400,
        body='"message":"Too many inputs in request, split into more batches."',
        means=InputRefused,
    ),
    Case(
        row="§3 400 code 3210, too many tokens",
        asks={"input": [*[_WORDS[:-1]] * 4, "word"]},
        status=400,
        body='"message":"Too many tokens overall, split into more batches."',
        means=InputRefused,
        too_long=True,
    ),
    Case(
        row="§3 400 too many tokens in the older words",
        status=400,
        body={"object": "error", "message": _TOO_MANY, "type": "invalid_request_error", "param": None, "code": None},
        means=InputRefused,
        too_long=True,
    ),
    Case(
        row="§3 400 unknown model",
        asks={"model": "mistral-foo"},
        status=400,
        body='"message":"Invalid model: mistral-foo","type":"invalid_model"',
        means=Misconfigured,
    ),
    Case(row="§3 401 wrong key", status=401, body=_UNAUTHORIZED, means=BadCredential),
    Case(
        row="§3 401 no plan, or its money is spent",
        status=401,
        body={"message": "Inactive subscription or usage limit reached", "request_id": "emulator"},
        means=QuotaExhausted,
    ),
    Case(row="§3 403", status=403, body={"message": "Forbidden"}, means=BadCredential),
    Case(row="§3 404", status=404, body=_NO_SUCH_ROUTE, means=Misconfigured),
    Case(
        row="§3 422 names the field",
        asks={"input": 5},
        status=422,
        body='"loc":["body","input","str"],"msg":"Input should be a valid string","input":5',
        means=InputRefused,
    ),
    Case(
        row="§3 422 names the input",
        asks={"input": ["word", None]},
        status=422,
        body='"loc":["body","input","list[str]",1]',
        means=InputRefused,
        position=1,
    ),
    Case(row="§3 429 code 1300", status=429, body=_RATE_LIMITED, means=Throttled),
    Case(row="§3 429 code 1300, as a number", status=429, body={**_RATE_LIMITED, "code": 1300}, means=Throttled),
    Case(row="§3 429 of the gateway", status=429, body={"message": "Requests rate limit exceeded"}, means=Throttled),
    *(
        Case(row=f"§3 {status}", status=status, body={"message": "Sorry"}, means=Transient)
        for status in (500, 502, 503, 504)
    ),
    Case(
        row="§3 header Retry-After",
        status=429,
        body=_RATE_LIMITED,
        headers={"retry-after": "7"},
        means=Throttled,
        wait_s=7,
    ),
    Case(row="§3 headers of the limits per minute", asks={}, status=200, headers=_LIMITS),
    Case(row="§3 headers of what is left of them", asks={}, status=200, headers=_LEFT),
    Case(row="§3 header of what the call costs", asks={}, status=200, headers={"x-ratelimit-tokens-query-cost": "1"}),
    Case(row="§4 tokens per month", status=429, body=_RATE_LIMITED, headers=_NO_MONTH_LEFT, means=QuotaExhausted),
)
