"""Hides a stand-in for the Gemini API's embeddings: proto-JSON, silent cuts, a request per text, Google's errors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from app.errors import BadCredential, InputRefused, Misconfigured, QuotaExhausted, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire
from tests.emulators.gemini_batches import GeminiDesk
from tests.emulators.judge import OverLimit
from tests.emulators.server import Asked, Emulator, RefusalError, Row, Text, as_numbers, parsed, vocabulary

_CALL = re.compile(r"POST /(?P<version>v1|v1beta)/models/(?P<model>[^:/?]+):(?P<method>\w+)(?:\?key=(?P<key>.*))?")
_MOST_ITEMS = 100
_FIELDS = {"model", "content", "taskType", "title", "outputDimensionality"}
_SNAKES = {"task_type": "taskType", "output_dimensionality": "outputDimensionality"}
_TASKS = {
    "TASK_TYPE_UNSPECIFIED", "RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT", "SEMANTIC_SIMILARITY", "CLASSIFICATION",
    "CLUSTERING", "QUESTION_ANSWERING", "FACT_VERIFICATION", "CODE_RETRIEVAL_QUERY",
}  # fmt: skip
_QUOTAS = {  # the tokens' names are guessed after the requests'
    "requests": ("embed_content_free_tier_requests", "EmbedContentRequestsPerMinutePerUserPerProjectPerModel-FreeTier"),
    "tokens": ("embed_content_free_tier_tokens", "EmbedContentTokensPerMinutePerUserPerProjectPerModel-FreeTier"),
}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the emulator knows of one model; the newer one brings shorter vectors to unit length, and tells tokens."""

    max_input_tokens: int
    newer: bool = False


MODELS: Mapping[str, ModelCard] = {
    "gemini-embedding-001": ModelCard(2048),
    "gemini-embedding-2": ModelCard(8192, newer=True),
}


# ── what Google says ────────────────────────────────────────────────────────────────────────────────────────────────


def envelope(code: int, status: str, message: str, *details: Mapping[str, object]) -> dict[str, object]:
    """An error body; `details` may be none."""
    error: dict[str, object] = {"code": code, "message": message, "status": status}
    return {"error": {**error, "details": details} if details else error}


def over_quota(
    limit: int, delay: str, words: str, *, metric: str = _QUOTAS["requests"][0], quota_id: str = _QUOTAS["requests"][1]
) -> dict[str, object]:
    """A 429 in full; `delay` is when to come back for programs, `words` for people."""
    google = "generativelanguage.googleapis.com"
    message = (
        "You exceeded your current quota, please check your plan and billing details. For more information on this "
        f"error, head to: https://ai.google.dev/gemini-api/docs/rate-limits.\n* Quota exceeded for metric: "
        f"{google}/{metric}, limit: {limit}\n{words}"
    )
    links = [{"description": "Learn more about Gemini API quotas", "url": "https://ai.google.dev/gemini-api/docs"}]
    violation = {
        "quotaMetric": f"{google}/{metric}",
        "quotaId": quota_id,
        "quotaDimensions": {"location": "global", "model": "gemini-embedding-001"},
        "quotaValue": str(limit),
    }
    return envelope(
        429, "RESOURCE_EXHAUSTED", message, {**_kind("Help"), "links": links},
        {**_kind("QuotaFailure"), "violations": [violation]}, {**_kind("RetryInfo"), "retryDelay": delay},
    )  # fmt: skip


def _kind(name: str) -> dict[str, str]:
    return {"@type": f"type.googleapis.com/google.rpc.{name}"}


_WRONG_KEY = envelope(
    400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.",
    {**_kind("ErrorInfo"), "reason": "API_KEY_INVALID", "domain": "googleapis.com"},
)  # fmt: skip
_NO_KEY = envelope(
    403, "PERMISSION_DENIED",
    "Method doesn't allow unregistered callers (callers without established identity). "
    "Please use API Key or other form of API consumer identity to call this API.",
)  # fmt: skip
_WRONG_TOKEN = envelope(
    401, "UNAUTHENTICATED",
    "Request had invalid authentication credentials. "
    "Expected OAuth 2 access token, login cookie or other valid authentication credential.",
)  # fmt: skip
_EMPTY = "EmbedContentRequest.content contains an empty Part."
_TOO_MANY = "* BatchEmbedContentsRequest.requests: at most 100 requests can be in one batch\n"


def _invalid(message: str) -> RefusalError:
    return RefusalError(400, envelope(400, "INVALID_ARGUMENT", message))


# ── answering ───────────────────────────────────────────────────────────────────────────────────────────────────────


class GeminiEmulator(Emulator):
    """The Gemini API; see `Emulator`. What a text counts beyond the model's limit is cut off without a word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.batches = GeminiDesk(self)

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        called = _CALL.fullmatch(target)
        if not self.batches.knows_upload(target):
            self._authenticate(headers, called["key"] if called else None)
        if await self.batches.answered(wire, target, headers, body):
            return
        if called is None or called["method"] not in ("batchEmbedContents", "countTokens"):
            raise RefusalError(404, envelope(404, "NOT_FOUND", "Method not found."))
        if called["model"] not in MODELS:
            message = (
                f"models/{called['model']} is not found for API version {called['version']}, or is not supported for "
                "embedContent. Call ListModels to see the list of available models and their supported methods."
            )
            raise RefusalError(404, envelope(404, "NOT_FOUND", message))
        given = parsed(body, _invalid("Invalid JSON payload received."))
        if called["method"] == "countTokens":
            tokens = sum(self.count(_text(content)) for content in _filled(given.get("contents")))
            await wire.answer(200, orjson.dumps({"totalTokens": tokens}), {})
        else:
            asked = self._read(called, given, headers)
            self.note(asked)
            await self.honour(wire, asked)

    def _read(self, called: re.Match[str], given: dict[str, Any], headers: dict[str, str]) -> Asked:
        model = called["model"]
        items = [_Item(item, model) for item in _filled(given.get("requests"))]
        if len(items) > _MOST_ITEMS:
            raise _invalid(_TOO_MANY)
        if len({item.width for item in items}) > 1:  # nobody says whether Google minds
            raise _invalid("Request contains an invalid argument.")
        texts: list[Text] = [self._cut(item.text, MODELS[model].max_input_tokens) for item in items]
        tokens = sum(map(self.count, texts))
        return Asked(model, texts, tokens, items[0].width, given, headers, called.group().removeprefix("POST "))

    def read_one(self, model: str, given: dict[str, Any]) -> Asked:
        """A single request of a batch."""
        one = _Item(given, model)
        text = self._cut(one.text, MODELS[model].max_input_tokens)
        return Asked(model, [text], self.count(text), one.width, given, {})

    def tells_tokens(self, model: str) -> bool:
        """Whether answers of this model say how much they cost."""
        return MODELS[model].newer

    def _cut(self, text: str, most_tokens: int) -> str:
        if self.constant or self.count(text) <= most_tokens:
            return text
        return vocabulary().decode(vocabulary().encode_ordinary(text)[:most_tokens])

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return 3072

    def vector(self, model: str, text: Text, width: int) -> npt.NDArray[np.float32]:
        """See `Emulator`; the older model leaves the head of a vector as it is."""
        if MODELS[model].newer:
            return super().vector(model, text, width)
        return super().vector(model, text, self.full_width(model))[:width]

    def requests(self, asked: Asked) -> int:
        """See `Emulator`; every text is one."""
        return len(asked.texts)

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        items = b",".join(b'{"values":%s}' % as_numbers(vector) for _, vector in rows)
        usage = b',"usageMetadata":{"promptTokenCount":%d}' % asked.tokens if MODELS[asked.model].newer else b""
        return b'{"embeddings":[%s]%s}' % (items, usage)

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return _invalid("Request contains an invalid argument.")

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`; no header says when to come back."""
        metric, quota_id = _QUOTAS[over.kind]
        wait_s = min(over.wait_s, 60.0)
        words = f"Please retry in {wait_s:.9f}s."
        return RefusalError(429, over_quota(over.limit, f"{int(wait_s)}s", words, metric=metric, quota_id=quota_id))

    def _authenticate(self, headers: Mapping[str, str], key_in_url: str | None) -> None:
        key = headers.get("x-goog-api-key", key_in_url)
        if self.api_key is None or key == self.api_key:
            return
        if key is not None:
            raise RefusalError(400, _WRONG_KEY)
        raise RefusalError(401, _WRONG_TOKEN) if "authorization" in headers else RefusalError(403, _NO_KEY)


class _Item:
    """One of the `requests`, read; what is wrong with it is said in Google's manner, its sheet has not all words."""

    def __init__(self, given: object, model: str) -> None:
        if not isinstance(given, dict):
            raise _invalid("Invalid value at 'requests'.")
        fields: dict[str, Any] = {_SNAKES.get(str(name), str(name)): value for name, value in given.items()}
        if unknown := sorted(fields.keys() - _FIELDS):
            raise _invalid(f"Invalid JSON payload received. Unknown name \"{unknown[0]}\" at 'requests[0]'")
        if fields.get("model") != f"models/{model}":
            raise _invalid("* BatchEmbedContentsRequest.requests[0].model: must match the model of the batch\n")
        task = fields.get("taskType") or "TASK_TYPE_UNSPECIFIED"
        if task not in _TASKS:
            raise _invalid("Invalid value at 'requests[0].task_type' (TaskType)")
        if fields.get("title") is not None and task != "RETRIEVAL_DOCUMENT":
            raise _invalid("* EmbedContentRequest.title: only with task type RETRIEVAL_DOCUMENT\n")
        self.width = fields.get("outputDimensionality") or 3072
        if type(self.width) is not int or not 128 <= self.width <= 3072:
            raise _invalid("* EmbedContentRequest.output_dimensionality: must be between 128 and 3072\n")
        self.text = _text(fields.get("content"))


def _filled(value: object) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    raise _invalid("Request contains an invalid argument.")


def _text(content: object) -> str:
    """All parts of a content are one text."""
    parts = content.get("parts") if isinstance(content, dict) else None
    texts = [part.get("text") for part in _filled(parts) if isinstance(part, dict)]
    if not all(isinstance(text, str) and text for text in texts):
        raise _invalid(_EMPTY)
    return "".join(map(str, texts))


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


def item(text: str, model: str = "gemini-embedding-001", **fields: object) -> dict[str, object]:
    """One honest element of `requests`."""
    return {"model": f"models/{model}", "content": {"parts": [{"text": text}], "role": "user"}, **fields}


def _served(row: str, body: str, *items: Mapping[str, object]) -> Case:
    return Case(row=row, status=200, body=body, asks={"requests": items})


def _refused(row: str, body: str, *items: Mapping[str, object]) -> Case:
    return Case(row=row, status=400, body=body, asks={"requests": items}, means=InputRefused)


def _failed(row: str, code: int, status: str) -> Case:
    return Case(row=row, status=code, body=envelope(code, status, "Please try again later."), means=Transient)


def _throttled(row: str, body: Mapping[str, object], wait_s: float | None = None) -> Case:
    return Case(row=row, status=429, body=body, means=Throttled, wait_s=wait_s)


def _exhausted(row: str, body: Mapping[str, object]) -> Case:
    return Case(row=row, status=429, body=body, means=QuotaExhausted)


def _without_details(body: Mapping[str, Any]) -> dict[str, object]:
    return {"error": {name: value for name, value in body["error"].items() if name != "details"}}


_NEW = "gemini-embedding-2"
_TWO_PARTS = {"parts": [{"text": "a"}, {"text": "b"}]}
_VALUES = '{"embeddings":[{"values":['
_WIDTH = "must be between 128 and 3072"
_SOON = "Please retry in 47.43s."
_SHORT = envelope(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota).")
_A_DAY = "EmbedContentRequestsPerDayPerUserPerProjectPerModel-FreeTier"
_NOT_FROM_HERE = envelope(400, "FAILED_PRECONDITION", "User location is not supported for the API use.")
_NO_BILLING = envelope(
    400, "FAILED_PRECONDITION",
    "Gemini API free tier is not available in your country. Please enable billing on your project.",
)  # fmt: skip

CASES: tuple[Case, ...] = (
    _served("§1 key in the header x-goog-api-key", _VALUES, item("a")),
    _refused("§1.2 an item of another model", "must match the model", item("a"), item("b", _NEW)),
    _refused("§1.2 an item's model without models/", "must match", {**item("a"), "model": "gemini-embedding-001"}),
    _refused("§1.3 400 unknown task type", "task_type", item("a", taskType="QUERY")),
    _served("§1.3 title with RETRIEVAL_DOCUMENT", _VALUES, item("a", taskType="RETRIEVAL_DOCUMENT", title="t")),
    _refused("§1.3 400 title with another task", "title", item("a", taskType="RETRIEVAL_QUERY", title="t")),
    _served("§1.3 names in snake case", _VALUES, item("a", task_type="CLUSTERING", output_dimensionality=128)),
    _served("§1.4 -2: all parts of an item share a vector", "]}],", {**item("", _NEW), "content": _TWO_PARTS}),
    _served("§1.4 -2: task type ignored", _VALUES, item("a", _NEW, taskType="RETRIEVAL_QUERY")),
    _served("§2 -001: more than 2048 tokens cut silently", _VALUES, item("word " * 2100)),
    _served("§2 -2: more than 8192 tokens cut silently", '"promptTokenCount":8192', item("word " * 8300, _NEW)),
    _served("§2 3072 dimensions unless asked", _VALUES, item("a")),
    _refused("§2 at least 128 dimensions", _WIDTH, item("a", outputDimensionality=127)),
    _refused("§2 at most 3072 dimensions", _WIDTH, item("a", outputDimensionality=3073)),
    _served("§2 100 texts", _VALUES, *[item("a")] * 100),
    _refused("§2 at most 100 texts", "at most 100 requests can be in one batch", *[item("a")] * 101),
    _refused("§2 400 empty text", _EMPTY, item("")),
    _refused("§2 one bad text refuses its batch", _EMPTY, item("a"), item("")),
    _served("§2 -001: no count of tokens", "]}]}", item("a")),
    _throttled("§3 429 RetryInfo before the text, no Retry-After", over_quota(100, "47s", _SOON), 47.0),
    _throttled("§3 429 RetryInfo with decimals", over_quota(100, "47.43s", ""), 47.43),
    _throttled("§3 429 delay in the text only", _without_details(over_quota(100, "", _SOON)), 47.43),
    _throttled("§3 429 short, without details", _SHORT),
    Case(
        row="§3 an error in a list of one", status=429, means=Throttled, wait_s=47.0,
        body=orjson.dumps([over_quota(100, "47s", _SOON)]).decode(),
    ),
    _exhausted("§3 429 a day's quota", over_quota(1000, "47s", _SOON, quota_id=_A_DAY)),
    _exhausted("§3 429 limit 0: not in the free tier", over_quota(0, "47s", _SOON)),
    _refused("§3 400 unknown field", "Unknown name", item("a", encoding_format="base64")),
    Case(row="§3 400 wrong key", status=400, body=_WRONG_KEY, means=BadCredential),
    Case(row="§3 400 region", status=400, body=_NOT_FROM_HERE, means=Misconfigured),
    Case(row="§3 400 billing", status=400, body=_NO_BILLING, means=QuotaExhausted),
    Case(row="§3 401 wrong token", status=401, body=_WRONG_TOKEN, means=BadCredential),
    Case(row="§3 403 key without access", status=403, body=_NO_KEY, means=BadCredential),
    Case(
        row="§3 404 unknown model", status=404, body="models/no-model is not found for API version v1, or is not",
        asks={"requests": [item("a", "no-model")]}, means=Misconfigured,
    ),
    _failed("§3 500", 500, "INTERNAL"),
    _failed("§3 503", 503, "UNAVAILABLE"),
    _failed("§3 504", 504, "DEADLINE_EXCEEDED"),
    _throttled("§4 100 texts a minute in the free tier", over_quota(100, "12s", "Please retry in 12.5s."), 12.0),
)  # fmt: skip
