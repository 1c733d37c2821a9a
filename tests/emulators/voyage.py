"""Hides a stand-in for Voyage's embeddings API: its validator, its prompts that cost tokens, cutting on request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from app.errors import BadCredential, InputRefused, Misconfigured, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire
from tests.emulators.judge import OverLimit
from tests.emulators.openai import as_list
from tests.emulators.server import Asked, Emulator, RefusalError, Row, parsed, vocabulary
from tests.emulators.voyage_batches import VoyageDesk

PROMPTS = {
    None: "",
    "query": "Represent the query for retrieving supporting documents: ",
    "document": "Represent the document for retrieval: ",
}
_UNREADABLE = (
    "The request body is not valid JSON, or some arguments were not specified properly. In particular, "
    "Error for argument "
)
_BAD_KEY = {"detail": "Provided API key is invalid."}
_NO_PAYMENT_METHOD = (
    "You have not yet added your payment method in the billing page and will have reduced rate limits of 3 RPM and "
    "10K TPM. Please add your payment method in the billing page to unlock our standard rate limits."
)


@dataclass(frozen=True, slots=True)
class _Model:
    most_tokens: int = 120_000
    dimensions: int = 1024
    sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    context: int = 32_000


MODELS: Mapping[str, _Model] = {
    "voyage-4-large": _Model(),
    "voyage-4": _Model(320_000),
    "voyage-4-lite": _Model(1_000_000),
    "voyage-code-4": _Model(),
    "voyage-3-large": _Model(),
    "voyage-3.5": _Model(320_000),
    "voyage-3.5-lite": _Model(1_000_000),
    "voyage-code-3": _Model(),
    "voyage-finance-2": _Model(sizes=(1024,)),
    "voyage-multilingual-2": _Model(sizes=(1024,)),
    "voyage-law-2": _Model(sizes=(1024,), context=16_000),
    "voyage-code-2": _Model(dimensions=1536, sizes=(1536,), context=16_000),
}


class _Body(BaseModel):
    """What may be asked; only floats are made here, the integer types are nothing that embedgate asks for."""

    model_config = ConfigDict(extra="forbid")
    model: str
    input: list[str] = Field(max_length=1000)
    input_type: Literal["query", "document"] | None = None
    truncation: bool = True
    output_dimension: int | None = None
    output_dtype: Literal["float"] | None = None
    encoding_format: Literal["base64"] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, given: object) -> object:
        return [given] if isinstance(given, str) else given

    @field_validator("input")
    @classmethod
    def _not_empty(cls, texts: list[str]) -> list[str]:
        if not texts or "" in texts:
            raise ValueError("Input cannot contain empty strings or empty lists")
        return texts


def _refused(detail: str, status: int = 400) -> RefusalError:
    return RefusalError(status, {"detail": detail})


class VoyageEmulator(Emulator):
    """Voyage; see `Emulator`. A text's vector is the same for each input type, what it costs is not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.batches = VoyageDesk(self)

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            raise RefusalError(401, _BAD_KEY)
        if await self.batches.answered(wire, target, headers, body):
            return
        if target != "POST /v1/embeddings":
            raise _refused("Not Found", 404)
        given = parsed(body, _refused(_UNREADABLE.partition(" In ")[0]))
        asked = self._read(given, headers, target)
        self.note(asked)
        await self.honour(wire, asked)

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return max(MODELS[model].sizes)

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        return as_list(asked, rows, {"total_tokens": asked.tokens})

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return _refused(f"{_UNREADABLE}'input': Value error, Input is not valid")

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`; Voyage says neither how long nor in headers."""
        return _refused("Rate limit reached.", 429)

    def _read(self, given: dict[str, Any], headers: dict[str, str], target: str) -> Asked:
        try:
            body = _Body.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise _refused(f"{_UNREADABLE}'{first['loc'][0]}': {first['msg']}") from None
        if body.model not in MODELS:
            raise _refused(f"Model {body.model} is not supported. Supported models are {list(MODELS)}.")
        card = MODELS[body.model]
        width = body.output_dimension or card.dimensions
        if width not in card.sizes:
            raise _refused(f"{_UNREADABLE}'output_dimension': accepted values are {list(card.sizes)}")
        prompt = PROMPTS[body.input_type]
        read = {text: self._fitted(text, prompt, card.context) for text in set(body.input)}
        if not body.truncation:
            _check_lengths(body, [tokens for text in body.input for _, tokens in [read[text]]], card)
        total = sum(min(read[text][1], card.context) for text in body.input)
        if total > card.most_tokens:
            most = f"The max allowed tokens per submitted batch is {card.most_tokens}."
            text = f"{most} Your batch has {total} tokens after truncation. Please lower the number of tokens"
            raise _refused(f"Request to model '{body.model}' failed. {text} in the batch.")
        return Asked(body.model, [read[text][0] for text in body.input], total, width, given, headers, target)

    def _fitted(self, text: str, prompt: str, context: int) -> tuple[str, int]:
        """The head of `text` that fits behind `prompt`, and how many tokens both would be uncut."""
        tokens = self.count(prompt) + self.count(text)
        if tokens <= context:
            return text, tokens
        return vocabulary().decode(vocabulary().encode_ordinary(text)[: context - self.count(prompt)]), tokens


def _check_lengths(body: _Body, counts: list[int], card: _Model) -> None:
    for place, tokens in enumerate(counts):
        if tokens > card.context:
            window = f"does not fit into the model's context window of {card.context} tokens"
            raise _refused(
                f"Request to model '{body.model}' failed. The example at index {place} in your batch has too many "
                f"tokens and {window}. Please lower the number of tokens in the listed example(s) or use truncation."
            )


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────

_LONG = "word " * 29_999 + "word"
_LONGER = "word " * 32_000 + "word"
_EMPTY = "Error for argument 'input': Value error, Input cannot contain empty strings or empty lists"
_BATCH = "The max allowed tokens per submitted batch is"
_WINDOW = "The example at index 1 in your batch has too many tokens and does not fit into the model's context window of"

CASES: tuple[Case, ...] = (
    Case(row="§1 1,000 texts in a call", asks={"input": ["word"] * 1000}, status=200),
    Case(
        row="§1 no more than 1,000 texts",
        asks={"input": ["word"] * 1001},
        status=400,
        body="Error for argument 'input'",
        means=InputRefused,
    ),
    Case(
        row="§1 no token arrays",
        asks={"input": [[1, 2]]},
        status=400,
        body="Error for argument 'input'",
        means=InputRefused,
    ),
    Case(
        row="§1 input_type is query, document or null",
        asks={"input_type": "passage"},
        status=400,
        body="Error for argument 'input_type'",
        means=Misconfigured,
    ),
    Case(
        row="§1 encoding_format is base64 or null",
        asks={"encoding_format": "float"},
        status=400,
        body="Error for argument 'encoding_format'",
        means=Misconfigured,
    ),
    Case(
        row="§1 truncation true cuts an over-long text",
        asks={"truncation": True, "input": ["word", _LONGER]},
        status=200,
        body='"total_tokens":32001',
    ),
    Case(
        row="§1 truncation false refuses an over-long text",
        asks={"truncation": False, "input": ["word", _LONGER]},
        status=400,
        body=_WINDOW,
        means=InputRefused,
        position=1,
        too_long=True,
    ),
    Case(
        row="§1 dimensions is no field",
        asks={"dimensions": 256},
        status=400,
        body="Error for argument 'dimensions'",
        means=Misconfigured,
    ),
    Case(row="§2 flexible models make 256, 512, 1024 and 2048", asks={"output_dimension": 2048}, status=200),
    Case(
        row="§2 flexible models make no other width",
        asks={"output_dimension": 300},
        status=400,
        body="Error for argument 'output_dimension'",
        means=Misconfigured,
    ),
    Case(
        row="§2 older models have one width",
        asks={"model": "voyage-law-2", "output_dimension": 256},
        status=400,
        body="Error for argument 'output_dimension'",
        means=Misconfigured,
    ),
    Case(
        row="§2 context of 32K",
        asks={"truncation": False, "input": ["word", _LONGER]},
        status=400,
        body=f"{_WINDOW} 32000",
        means=InputRefused,
        position=1,
        too_long=True,
    ),
    Case(
        row="§2 context of 16K of voyage-law-2 and voyage-code-2",
        asks={"model": "voyage-code-2", "truncation": False, "input": ["word", _LONG]},
        status=400,
        body=f"{_WINDOW} 16000",
        means=InputRefused,
        position=1,
        too_long=True,
    ),
    Case(row="§2 120K tokens in a call", asks={"input": [_LONG] * 4}, status=200),
    Case(
        row="§2 no more than 120K tokens",
        asks={"input": [*[_LONG] * 4, "word"]},
        status=400,
        body=f"{_BATCH} 120000",
        means=InputRefused,
        too_long=True,
    ),
    Case(
        row="§2 320K tokens for voyage-4 and voyage-3.5",
        asks={"model": "voyage-4", "input": [_LONG] * 11},
        status=400,
        body=f"{_BATCH} 320000",
        means=InputRefused,
        too_long=True,
    ),
    Case(
        row="§2 1M tokens for voyage-4-lite and voyage-3.5-lite",
        asks={"model": "voyage-4-lite", "input": [_LONG] * 34},
        status=400,
        body=f"{_BATCH} 1000000",
        means=InputRefused,
        too_long=True,
    ),
    Case(row="§2 no empty string", asks={"input": ["word", ""]}, status=400, body=_EMPTY, means=InputRefused),
    Case(row="§2 no empty list", asks={"input": []}, status=400, body=_EMPTY, means=InputRefused),
    Case(
        row="§3 400 unknown model",
        asks={"model": "voyage-foo"},
        status=400,
        body="Model voyage-foo is not supported. Supported models are [",
        means=Misconfigured,
    ),
    Case(row="§3 401 bad key", status=401, body=_BAD_KEY, means=BadCredential),
    Case(row="§3 403 address not allowed", status=403, body={"detail": "Forbidden"}, means=BadCredential),
    Case(row="§3 422 malformed request", status=422, body={"detail": "Malformed request"}, means=InputRefused),
    Case(
        row="§3 429 rate limit, and no header says until when",
        status=429,
        body={"detail": "Rate limit reached."},
        means=Throttled,
    ),
    Case(
        row="§3 429 no payment method: 3 requests a minute",
        status=429,
        body={"detail": _NO_PAYMENT_METHOD},
        means=Throttled,
        wait_s=20,
    ),
    *(
        Case(row=f"§3 {status}", status=status, body={"detail": "Sorry"}, means=Transient)
        for status in (500, 502, 503, 504)
    ),
)
