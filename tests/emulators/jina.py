"""Hides a stand-in for Jina AI's embeddings API: tasks, machine words in errors, unit vectors only where asked."""

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
from tests.emulators.server import Asked, Emulator, RefusalError, Row, Text, as_base64, as_numbers, parsed, vocabulary

_FIELDS = {
    "model", "input", "embedding_type", "task", "dimensions", "normalized", "late_chunking", "truncate",
    "return_multivector",
}  # fmt: skip
_RAW_LENGTH = np.float32(3)
"""How long a vector is that nobody asked to be of unit length."""
_RETRIEVAL = ("retrieval.query", "retrieval.passage", "text-matching")
_V5 = (*_RETRIEVAL, "classification", "clustering")
_V4 = (*_RETRIEVAL, "code.query", "code.passage")
_CODE = ("nl2code.query", "nl2code.passage")


@dataclass(frozen=True, slots=True)
class Known:
    """What the emulator knows of one model."""

    dimensions: int
    max_input_tokens: int
    tasks: tuple[str, ...]
    most_texts: int = 2048


MODELS: Mapping[str, Known] = {
    "jina-embeddings-v5-text-small": Known(1024, 32_768, _V5),
    "jina-embeddings-v5-text-nano": Known(768, 8192, _V5),
    "jina-embeddings-v4": Known(2048, 32_768, _V4, most_texts=512),
    "jina-embeddings-v3": Known(1024, 8192, (*_V5, "separation")),
    "jina-clip-v2": Known(1024, 8192, ()),
    "jina-code-embeddings-0.5b": Known(896, 32_768, _CODE),
    "jina-code-embeddings-1.5b": Known(1536, 32_768, _CODE),
}


def refusal(status: int, code: str, message: str) -> RefusalError:
    """A refusal in Jina's envelope, as far as that is known."""
    return RefusalError(status, {"code": code, "message": message, "detail": message})


def invalid(message: str, *where: str | int) -> RefusalError:
    """A validation error, as FastAPI writes it."""
    return RefusalError(422, {"detail": [{"loc": ["body", *where], "msg": message, "type": "value_error"}]})


class JinaEmulator(Emulator):
    """Jina; see `Emulator`."""

    # ── answering ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        self._authenticate(headers.get("authorization", ""))
        if target != "POST /v1/embeddings":
            raise refusal(404, "RESOURCE_NOT_FOUND", "Not found")
        given = parsed(body, invalid("JSON decode error"))
        model = _read_model(given)
        texts = _read_texts(given, model)
        _check_words(given, model)
        width = _read_width(given, model)
        counts = [self.count(text) for text in texts]
        tokens = sum(min(count, model.max_input_tokens) for count in counts)
        self.note(Asked(given["model"], texts, tokens, width, given, headers))
        cut = given.get("truncate", False)
        read = [_within(text, count, model, cut=cut) for text, count in zip(texts, counts, strict=True)]
        await self.honour(wire, Asked(given["model"], read, tokens, width, given, headers))

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return MODELS[model].dimensions

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        length = np.float32(1) if asked.body.get("normalized", False) else _RAW_LENGTH
        write = _WRITERS[asked.body.get("embedding_type", "float")]
        items = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%s}' % (place, write(vector * length))
            for place, vector in rows
        )
        usage = orjson.dumps({"total_tokens": asked.tokens, "prompt_tokens": asked.tokens})
        return b'{"model":%s,"object":"list","usage":%s,"data":[%s]}' % (orjson.dumps(asked.model), usage, items)

    def stamp(self, asked: Asked) -> dict[str, str]:
        """See `Emulator`."""
        return {f"x-ratelimit-remaining-{kind}": str(level.left) for kind, level in self.judge.levels().items()}

    # ── refusing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return invalid("Input should be a valid text", "input", place)

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`."""
        message = f"Rate limit exceeded: {over.limit} {over.kind} per minute"
        return RefusalError(429, {"detail": message}, {f"x-ratelimit-remaining-{over.kind}": "0"})

    def _authenticate(self, authorization: str) -> None:
        if self.api_key is None or authorization == f"Bearer {self.api_key}":
            return
        if not authorization:
            raise refusal(401, "AUTH_MISSING_API_KEY", "No API key was given")
        if not authorization.startswith("Bearer "):
            raise refusal(401, "AUTH_INVALID_FORMAT", "The Authorization header must be a bearer token")
        raise refusal(401, "AUTH_INVALID_API_KEY", "This API key is not valid")


def _read_model(given: dict[str, Any]) -> Known:
    if unknown := sorted(given.keys() - _FIELDS):
        raise invalid("Extra inputs are not permitted", unknown[0])
    name = given.get("model")
    if not isinstance(name, str):
        raise invalid("Field required", "model")
    if name not in MODELS:
        raise refusal(400, "INPUT_MODEL_NOT_FOUND", f"Model {name} not found")
    return MODELS[name]


def _read_texts(given: dict[str, Any], model: Known) -> list[Text]:
    value = given.get("input")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise invalid("Input should be a valid list", "input")
    if len(texts) > model.most_texts:
        message = f"input length is larger than the largest allowed size {model.most_texts}"
        raise refusal(400, "INPUT_TOO_MANY", message)
    said: list[Text] = []
    for place, text in enumerate(texts):
        words = text.get("text") if isinstance(text, dict) else text
        if not isinstance(words, str):
            raise invalid("Input should be a valid string", "input", place)
        said.append(words)
    return said


def _check_words(given: dict[str, Any], model: Known) -> None:
    if "task" in given and given["task"] not in model.tasks:
        raise invalid(f"Input should be one of {', '.join(model.tasks)}", "task")
    if str(given.get("embedding_type", "float")) not in _WRITERS:
        raise invalid(f"Input should be one of {', '.join(_WRITERS)}", "embedding_type")
    for name in ("normalized", "truncate"):
        if not isinstance(given.get(name, False), bool):
            raise invalid("Input should be a valid boolean", name)


def _read_width(given: dict[str, Any], model: Known) -> int:
    width = given.get("dimensions", model.dimensions)
    if type(width) is not int or not 1 <= width <= model.dimensions:
        raise invalid(f"Input should be less than or equal to {model.dimensions}", "dimensions")
    return width


def _within(text: Text, tokens: int, model: Known, *, cut: bool) -> Text:
    """What is read of a text of so many `tokens`."""
    if tokens <= model.max_input_tokens:
        return text
    if not cut:
        message = f"Single text cannot exceed {model.max_input_tokens} tokens. {tokens} tokens given."
        raise refusal(400, "INPUT_TOO_LONG", message)
    return vocabulary().decode(vocabulary().encode_ordinary(str(text))[: model.max_input_tokens])


def _as_ubinary(vector: npt.NDArray[np.float32]) -> bytes:
    return orjson.dumps(np.packbits(vector > 0).tolist())


def _as_binary(vector: npt.NDArray[np.float32]) -> bytes:
    return orjson.dumps((np.packbits(vector > 0).astype(int) - 128).tolist())


_WRITERS = {"float": as_numbers, "base64": as_base64, "binary": _as_binary, "ubinary": _as_ubinary}


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _coded(code: str, message: str) -> dict[str, str]:
    return {"code": code, "message": message}


_NANO, _V3 = "jina-embeddings-v5-text-nano", "jina-embeddings-v3"
_LONG = {"input": ["one", "word " * 8200]}

CASES = (
    Case(row="§1 four embedding types", status=422, body='"embedding_type"', means=InputRefused,
         asks={"embedding_type": "int8"}),
    Case(row="§1 v5 knows five tasks", status=422, body='"task"', means=InputRefused, asks={"task": "separation"}),
    Case(row="§1 v3 knows separation too", status=200, body='"usage"', asks={"model": _V3, "task": "separation"}),
    Case(row="§1 v4 knows code but no clusters", status=422, body='"task"', means=InputRefused,
         asks={"model": "jina-embeddings-v4", "task": "clustering"}),
    Case(row="§1 code models have tasks of their own", status=422, body='"task"', means=InputRefused,
         asks={"model": "jina-code-embeddings-0.5b", "task": "retrieval.query"}),
    Case(row="§1 a long text is refused", status=400, body="cannot exceed 8192 tokens", means=InputRefused,
         too_long=True, asks={**_LONG, "model": _NANO}),
    Case(row="§1 a long text is cut where asked", status=200, body='"prompt_tokens":8193',
         asks={**_LONG, "model": _NANO, "truncate": True}),
    Case(row="§2 v5-text-small makes 1024 dimensions at most", status=422, body='"dimensions"', means=InputRefused,
         asks={"dimensions": 1025}),
    Case(row="§2 v5-text-nano makes 768 dimensions at most", status=422, body='"dimensions"', means=InputRefused,
         asks={"model": _NANO, "dimensions": 769}),
    Case(row="§2 v4 makes 2048 dimensions", status=200, body='"usage"',
         asks={"model": "jina-embeddings-v4", "dimensions": 2048}),
    Case(row="§2 v5-text-small reads 32K tokens", status=400, body="cannot exceed 32768 tokens", means=InputRefused,
         too_long=True, asks={"input": ["word " * 33_000]}),
    Case(row="§2 v3 reads 8K tokens", status=400, body="cannot exceed 8192 tokens", means=InputRefused,
         too_long=True, asks={**_LONG, "model": _V3}),
    Case(row="§2 v4 reads 32K tokens", status=400, body="cannot exceed 32768 tokens", means=InputRefused,
         too_long=True, asks={"model": "jina-embeddings-v4", "input": ["word " * 33_000]}),
    Case(row="§2 v3 makes 1024 dimensions at most", status=422, body='"dimensions"', means=InputRefused,
         asks={"model": _V3, "dimensions": 1025}),
    Case(row="§2 clip-v2 makes 1024 dimensions at most", status=422, body='"dimensions"', means=InputRefused,
         asks={"model": "jina-clip-v2", "dimensions": 1025}),
    Case(row="§2 clip-v2 reads 8K tokens", status=400, body="cannot exceed 8192 tokens", means=InputRefused,
         too_long=True, asks={**_LONG, "model": "jina-clip-v2"}),
    Case(row="§2 code-0.5b makes 896 dimensions at most", status=422, body='"dimensions"', means=InputRefused,
         asks={"model": "jina-code-embeddings-0.5b", "dimensions": 897}),
    Case(row="§2 code-1.5b makes 1536 dimensions at most", status=422, body='"dimensions"', means=InputRefused,
         asks={"model": "jina-code-embeddings-1.5b", "dimensions": 1537}),
    Case(row="§2 code models read 32K tokens", status=400, body="cannot exceed 32768 tokens", means=InputRefused,
         too_long=True, asks={"model": "jina-code-embeddings-0.5b", "input": ["word " * 33_000]}),
    Case(row="§2 v4 takes 512 texts, though the sheet says 2,048", status=400, body="size 512", means=InputRefused,
         asks={"model": "jina-embeddings-v4", "input": ["one"] * 513}),
    Case(row="§2 2,048 texts", status=400, means=InputRefused, asks={"input": ["one"] * 2049},
         body="input length is larger than the largest allowed size 2048"),
    Case(row="§3 400 unknown model", status=400, body="INPUT_MODEL_NOT_FOUND", means=Misconfigured,
         asks={"model": "xyz"}),
    Case(row="§3 400 another INPUT word", status=400, body=_coded("INPUT_INVALID", "no"), means=InputRefused),
    Case(row="§3 401 no key", status=401, body=_coded("AUTH_MISSING_API_KEY", "no"), means=BadCredential),
    Case(row="§3 401 wrong key", status=401, body=_coded("AUTH_INVALID_API_KEY", "no"), means=BadCredential),
    Case(row="§3 401 wrong header", status=401, body=_coded("AUTH_INVALID_FORMAT", "no"), means=BadCredential),
    Case(row="§3 403 no balance", status=403, body=_coded("AUTHZ_INSUFFICIENT_BALANCE", "no"), means=QuotaExhausted),
    Case(row="§3 403 no balance, in a detail only", status=403, means=QuotaExhausted,
         body={"detail": "Insufficient account balance. Please recharge."}),
    Case(row="§3 403 limit of a resource", status=403, body=_coded("AUTHZ_RESOURCE_LIMIT_EXCEEDED", "no"),
         means=QuotaExhausted),
    Case(row="§3 404 unknown path", status=404, body=_coded("RESOURCE_NOT_FOUND", "no"), means=Misconfigured),
    Case(row="§3 409 busy", status=409, body=_coded("CONFLICT_RESOURCE_BUSY", "no"), means=Transient),
    Case(row="§3 422 which text", status=422, body='["body","input",1]', means=InputRefused, position=1,
         asks={"input": ["one", 2]}),
    Case(row="§3 429 rate or concurrency", status=429, body={"detail": "Rate limit exceeded"}, means=Throttled),
    Case(row="§3 headers say what remains", status=429, means=Throttled,
         headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-remaining-tokens": "12"}),
)  # fmt: skip
