"""Hides a stand-in for Cohere's v2/embed: 96 texts, flat errors, each text a request, texts told back in the reply."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from app.errors import BadCredential, InputRefused, Misconfigured, QuotaExhausted, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire
from tests.emulators.judge import OverLimit
from tests.emulators.server import (
    Asked,
    Emulator,
    RefusalError,
    Row,
    Text,
    as_base64,
    as_numbers,
    parsed,
    vocabulary,
)

_MOST_TEXTS = 96
_INPUT_TYPES = {"search_document", "search_query", "classification", "clustering", "image"}
_FIELDS = {
    "model", "input_type", "texts", "images", "inputs", "embedding_types", "output_dimension", "max_tokens",
    "truncate", "priority",
}  # fmt: skip
_STEP = 0.01
"""What one step of an int8 is worth here."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the emulator knows of one model; `sizes` are those that may be asked for."""

    dimensions: int
    max_input_tokens: int
    sizes: tuple[int, ...] = ()


MODELS: Mapping[str, Known] = {
    "embed-v5.0-pro": Known(2048, 128_000, (256, 512, 768, 1024, 1536, 2048)),
    "embed-v5.0-fast": Known(2048, 128_000, (256, 512, 768, 1024, 1536, 2048)),
    "embed-v4.0": Known(1536, 128_000, (256, 512, 1024, 1536)),
    "embed-english-v3.0": Known(1024, 512),
    "embed-multilingual-v3.0": Known(1024, 512),
    "embed-english-light-v3.0": Known(384, 512),
    "embed-multilingual-light-v3.0": Known(384, 512),
}


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> RefusalError:
    """A refusal in Cohere's flat envelope."""
    return RefusalError(status, {"id": "0f0e0d0c-emulator", "message": message}, headers)


class CohereEmulator(Emulator):
    """Cohere; see `Emulator`. Its vectors are `length` long: Cohere promises no unit length."""

    prefix = "/v2"
    length = 3.0

    # ── answering ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        self._authenticate(headers.get("authorization", ""))
        if target != "POST /v2/embed":
            raise refusal(404, "invalid request: no such path")
        given = parsed(body, refusal(400, "invalid request: the body is no JSON object"))
        model = _read_model(given)
        texts = _read_texts(given)
        _check_types(given)
        width = _read_width(given, model)
        counts = [self.count(text) for text in texts]
        most = _most_tokens(given, model)
        tokens = sum(min(count, most) for count in counts)
        self.note(Asked(given["model"], texts, tokens, width, given, headers))
        read = [_within(text, count, most, given.get("truncate")) for text, count in zip(texts, counts, strict=True)]
        await self.honour(wire, Asked(given["model"], read, tokens, width, given, headers))

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return MODELS[model].dimensions

    def vector(self, model: str, text: Text, width: int) -> npt.NDArray[np.float32]:
        """See `Emulator`."""
        return super().vector(model, text, width) * np.float32(self.length)

    def requests(self, asked: Asked) -> int:
        """Cohere counts inputs, not calls."""
        return len(asked.texts)

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`; the texts with every character escaped that may be, as some servers write JSON."""
        types = asked.body.get("embedding_types") or ["float"]
        vectors = [vector for _, vector in rows]
        by_type = [b'"%s":[%s]' % (kind.encode(), b",".join(map(_WRITERS[kind], vectors))) for kind in types]
        meta = {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": asked.tokens, "images": 0, "image_tokens": 0, "text_tokens": asked.tokens},
            "tokens": {"input_tokens": asked.tokens},
            "warnings": self._warnings(asked),
        }
        return (
            b'{"id":"0f0e0d0c-emulator","embeddings":{%s},"texts":%s,"images":[],"meta":%s,'
            b'"response_type":"embeddings_by_type"}'
            % (b",".join(by_type), json.dumps(asked.body["texts"]).encode(), orjson.dumps(meta))
        )

    def stamp(self, asked: Asked) -> dict[str, str]:
        """See `Emulator`."""
        warnings = self._warnings(asked)
        return {"x-api-warning": ", ".join(warnings)} if warnings else {}

    def _warnings(self, asked: Asked) -> list[str]:
        return [] if asked.texts == asked.body["texts"] else ["a text was cut"]

    # ── refusing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return refusal(422, "unprocessable entity")

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`."""
        reset = {} if math.isinf(over.wait_s) else {"x-ratelimit-reset": str(math.ceil(time.time() + over.wait_s))}
        if over.kind == "tokens":
            return refusal(429, f"trial token rate limit exceeded, limit is {over.limit} tokens per minute", reset)
        return refusal(429, "You are past the per minute request limit, please wait and try again later.", reset)

    def _authenticate(self, authorization: str) -> None:
        if self.api_key is None or authorization == f"Bearer {self.api_key}":
            return
        raise refusal(401, "invalid api token" if authorization else "no api key supplied")


def _read_model(given: dict[str, Any]) -> Known:
    if unknown := sorted(given.keys() - _FIELDS):
        raise refusal(422, f"unprocessable entity: unknown field {unknown[0]}")
    name = given.get("model")
    if not isinstance(name, str):
        raise refusal(400, "model is required")
    if name not in MODELS:
        whose = "make sure the correct model ID was used and that you have access to the model."
        raise refusal(404, f"model '{name}' not found, {whose}")
    return MODELS[name]


def _read_texts(given: dict[str, Any]) -> list[Text]:
    if sum(given.get(name) is not None for name in ("texts", "images", "inputs")) != 1:
        raise refusal(400, "invalid request: must provide exactly one of texts, images or inputs")
    texts = given.get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise refusal(422, "unprocessable entity: this emulator reads a list of texts only")
    if len(texts) > _MOST_TEXTS:
        count = f"must be at most {_MOST_TEXTS} - received {len(texts)}"
        raise refusal(400, f"invalid request: total number of texts {count}")
    if "" in texts:
        place = texts.index("")
        raise refusal(400, f"invalid request: inputs contains an element that is the empty string at index {place}")
    return list(texts)


def _check_types(given: dict[str, Any]) -> None:
    if given.get("input_type") not in _INPUT_TYPES:
        raise refusal(400, "invalid request: valid input_type must be provided with the provided model")
    types = given.get("embedding_types")
    if types is not None and not (isinstance(types, list) and types and set(types) <= _WRITERS.keys()):
        raise refusal(400, "invalid request: embedding_types must be a subset of " + ", ".join(_WRITERS))
    if given.get("truncate") not in (None, "NONE", "START", "END"):
        raise refusal(400, "invalid request: truncate must be one of NONE, START, END")


def _read_width(given: dict[str, Any], model: Known) -> int:
    width = given.get("output_dimension")
    if width is None:
        return model.dimensions
    if width not in model.sizes:
        sizes = f"must be one of {list(model.sizes)}" if model.sizes else "is not supported by this model"
        raise refusal(400, f"invalid request: output_dimension {sizes}")
    return int(width)


def _most_tokens(given: dict[str, Any], model: Known) -> int:
    most = given.get("max_tokens")
    return min(most, model.max_input_tokens) if type(most) is int and most > 0 else model.max_input_tokens


def _within(text: Text, tokens: int, most: int, truncate: str | None) -> Text:
    """What is read of a text of so many `tokens`."""
    if tokens <= most:
        return text
    if truncate == "NONE":
        raise refusal(400, f"too many tokens: total number of tokens cannot exceed {most} - received {tokens}")
    ids = vocabulary().encode_ordinary(str(text))
    return vocabulary().decode(ids[-most:] if truncate == "START" else ids[:most])


def _as_int8(vector: npt.NDArray[np.float32]) -> bytes:
    return orjson.dumps(np.clip(np.rint(vector / _STEP), -128, 127).astype(int).tolist())


def _as_uint8(vector: npt.NDArray[np.float32]) -> bytes:
    return orjson.dumps(np.clip(np.rint(vector / _STEP) + 128, 0, 255).astype(int).tolist())


def _as_ubinary(vector: npt.NDArray[np.float32]) -> bytes:
    return orjson.dumps(np.packbits(vector > 0).tolist())


def _as_binary(vector: npt.NDArray[np.float32]) -> bytes:
    return orjson.dumps((np.packbits(vector > 0).astype(int) - 128).tolist())


_WRITERS = {
    "float": as_numbers, "int8": _as_int8, "uint8": _as_uint8, "binary": _as_binary, "ubinary": _as_ubinary,
    "base64": as_base64,
}  # fmt: skip


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _message(text: str) -> dict[str, str]:
    return {"message": text}


_V3 = "embed-english-v3.0"
_TRIAL = "You are using a Trial key, which is limited to"

CASES = (
    Case(row="§1 exactly one of texts, images and inputs", status=400, body="exactly one of", means=InputRefused,
         asks={"inputs": [{"content": [{"type": "text", "text": "one"}]}]}),
    Case(row="§1 embedding types are six", status=400, body="embedding_types must be", means=InputRefused,
         asks={"embedding_types": ["float16"]}),
    Case(row="§1 v4 makes 256, 512, 1024 or 1536 dimensions", status=400, body="output_dimension must be",
         means=InputRefused, asks={"output_dimension": 768}),
    Case(row="§1 v5 makes 768 dimensions too", status=200, body="embeddings_by_type",
         asks={"model": "embed-v5.0-fast", "output_dimension": 768}),
    Case(row="§1 v3 makes one size only", status=400, body="output_dimension is not supported", means=InputRefused,
         asks={"model": _V3, "output_dimension": 512}),
    Case(row="§1 NONE refuses a long text", status=400, body="too many tokens", means=InputRefused, too_long=True,
         asks={"model": _V3, "texts": ["one", "word " * 600]}),
    Case(row="§1 END and nothing said cut a long text", status=200, body='"input_tokens":513',
         asks={"model": _V3, "texts": ["one", "word " * 600], "truncate": None}),
    Case(row="§1 max_tokens lowers the length of a text", status=400, body="too many tokens", means=InputRefused,
         too_long=True, asks={"texts": ["one two three four"], "max_tokens": 3}),
    Case(row="§1 warnings stand in X-API-Warning", status=200, headers={"x-api-warning": "a text was cut"},
         asks={"model": _V3, "texts": ["word " * 600], "truncate": "END"}),
    Case(row="§2 v4 and v5 read 128K tokens", status=400, body="cannot exceed 128000", means=InputRefused,
         too_long=True, asks={"texts": ["word " * 128_100]}),
    Case(row="§2 v3 reads 512 tokens", status=400, body="cannot exceed 512", means=InputRefused, too_long=True,
         asks={"model": "embed-multilingual-light-v3.0", "texts": ["word " * 600]}),
    Case(row="§2 96 texts", status=200, body="embeddings_by_type", asks={"texts": ["one"] * 96}),
    Case(row="§3 400 more than 96 texts", status=400, means=InputRefused, asks={"texts": ["one"] * 104},
         body="invalid request: total number of texts must be at most 96 - received 104"),
    Case(row="§3 400 an empty text, and which", status=400, means=InputRefused, position=1, asks={"texts": ["a", ""]},
         body="invalid request: inputs contains an element that is the empty string at index 1"),
    Case(row="§3 400 no input type", status=400, means=Misconfigured, asks={"input_type": None},
         body="invalid request: valid input_type must be provided with the provided model"),
    Case(row="§3 400 no embedding types", status=400, means=Misconfigured,
         body=_message("embedding_types parameter is required")),
    Case(row="§3 401 no key", status=401, body=_message("no api key supplied"), means=BadCredential),
    Case(row="§3 401 wrong key", status=401, body=_message("invalid api token"), means=BadCredential),
    Case(row="§3 402 billing limit", status=402, body=_message("billing limit reached"), means=QuotaExhausted),
    Case(row="§3 404 unknown model", status=404, means=Misconfigured, asks={"model": "xyz"},
         body="model 'xyz' not found, make sure the correct model ID was used and that you have access to the model."),
    Case(row="§3 422 unprocessable", status=422, body="unprocessable", means=InputRefused, asks={"texts": [7]}),
    Case(row="§3 429 2,000 inputs a minute", status=429, means=Throttled,
         body=_message("You are past the per minute request limit, please wait and try again later.")),
    Case(row="§3 429 calls of a trial key's minute", status=429, means=Throttled,
         body=_message(f"{_TRIAL} 40 API calls / minute. You can continue to use the Trial key for free.")),
    Case(row="§3 429 tokens of a trial key's minute", status=429, means=Throttled,
         body=_message("trial token rate limit exceeded, limit is 100000 tokens per minute")),
    Case(row="§3 429 without a reason", status=429, body=_message("Please wait and try again later"), means=Throttled),
    Case(row="§3 429 a trial key's month is used up", status=429, means=QuotaExhausted,
         body=_message(f"{_TRIAL} 1000 API calls / month. You can continue to use the Trial key for free.")),
    Case(row="§3 498 a key on the deny list", status=498, body=_message("invalid token"), means=BadCredential),
    Case(row="§3 499 cancelled", status=499, body=_message("request cancelled"), means=Transient),
    Case(row="§3 500 retryable", status=500, body=_message("internal server error"), means=Transient),
    Case(row="§3 501 not implemented", status=501, body=_message("not implemented"), means=Misconfigured),
    Case(row="§3 503 retryable", status=503, body=_message("service unavailable"), means=Transient),
    Case(row="§3 504 retryable", status=504, body=_message("gateway timeout"), means=Transient),
    Case(row="§3 retry-after-ms comes first", status=429, means=Throttled, wait_s=1.5,
         headers={"retry-after-ms": "1500", "retry-after": "9", "x-ratelimit-reset": "4102444800"}),
    Case(row="§3 then retry-after", status=429, means=Throttled, wait_s=9,
         headers={"retry-after": "9", "x-ratelimit-reset": "4102444800"}),
    Case(row="§3 then x-ratelimit-reset, a Unix time", status=429, means=Throttled, wait_s=120,
         headers={"x-ratelimit-reset": "4102444800"}),
)  # fmt: skip
