"""Hides a stand-in for Hugging Face's text-embeddings-inference: its own route, the one like OpenAI's, flat errors."""

import orjson

from app.errors import BadCredential, InputRefused, Misconfigured, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire
from tests.emulators.judge import OverLimit
from tests.emulators.openai import as_list
from tests.emulators.self_hosted import SelfHosted, texts_of
from tests.emulators.server import Asked, RefusalError, Row, Text, as_numbers, parsed

_MOST_ITEMS = 32
_MOST_BYTES = 2_000_000
_TOO_LARGE = "Failed to buffer the request body: length limit exceeded"
_NO_INPUT = "Failed to deserialize the JSON body into the target type"
_STAMP = {
    "x-compute-type": "cpu", "x-compute-time": "2", "x-total-time": "3", "x-tokenization-time": "0",
    "x-queue-time": "0", "x-inference-time": "1",
}  # fmt: skip


def _said(path: str, status: int, kind: str, message: str) -> dict[str, object]:
    """An error body; the server's own route has another than the one like OpenAI's."""
    return {"error": message, "error_type": kind} if path == "/embed" else _flat(status, kind, message)


def _flat(status: int, kind: str, message: str) -> dict[str, object]:
    return {"message": message, "code": status, "type": kind}


class TEIEmulator(SelfHosted):
    """text-embeddings-inference; see `SelfHosted`. `auto_truncate` is its option: calls that do not say are cut."""

    auto_truncate = True

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        if not self.knows(headers):
            raise RefusalError(401, b"")
        path = target.removeprefix("POST ")
        if path not in ("/embed", "/embeddings", "/v1/embeddings"):
            raise RefusalError(404, b"")
        if len(body) > _MOST_BYTES:
            raise RefusalError(413, _TOO_LARGE.encode())
        given = parsed(body, RefusalError(400, b"Failed to parse the request body as JSON"))
        native = path == "/embed"
        value = given.get("inputs" if native else "input")
        texts = [] if value == [] else texts_of(value, ids=True)
        if texts is None:
            raise RefusalError(422, _NO_INPUT.encode())
        self._check(path, texts, given.get("dimensions"), truncate=given.get("truncate") if native else None)
        await self.embed(wire, given, texts, headers=headers, path=path)

    def _check(self, path: str, texts: list[Text], dimensions: int | None, *, truncate: bool | None) -> None:
        def refused(status: int, kind: str, message: str) -> RefusalError:
            return RefusalError(status, _said(path, status, kind, message))

        if dimensions == 0:
            raise refused(422, "Validation", "`dimensions` should be positive")
        if dimensions is not None and dimensions > self.width:
            message = "`dimensions` should be smaller than the maximum embedding dimension."
            raise refused(422, "Validation", message)
        if not texts or not all(texts):
            raise refused(400, "Empty", "Input validation error: `inputs` cannot be empty")
        if len(texts) > _MOST_ITEMS:
            message = f"batch size {len(texts)} > maximum allowed batch size {_MOST_ITEMS}"
            raise refused(422, "Validation", message)
        cuts = self.auto_truncate if truncate is None else truncate
        if not cuts and (tokens := self.first_too_long(texts)):
            most = f"must have less than {self.max_input_tokens} tokens. Given: {tokens}"
            raise refused(422, "Validation", f"Input validation error: `inputs` {most}")

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        if asked.path == "/embed":
            return b"[%s]" % b",".join(as_numbers(vector) for _, vector in rows)
        return as_list(asked, rows, {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens})

    def stamp(self, asked: Asked) -> dict[str, str]:
        """See `Emulator`."""
        characters = sum(len(text) for text in asked.texts)
        return {**_STAMP, "x-compute-characters": str(characters), "x-compute-tokens": str(asked.tokens)}

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return RefusalError(422, _said(asked.path, 422, "Validation", "Input validation error: poison"))

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`; it says not for how long."""
        return RefusalError(429, _said(asked.path, 429, "Overloaded", "Model is overloaded"))


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _native(kind: str, message: str) -> str:
    return orjson.dumps(_said("/embed", 0, kind, message)).decode()


_EMPTY = _native("Empty", "Input validation error: `inputs` cannot be empty")
_LONG = "word" + " word" * 533

CASES: tuple[Case, ...] = (
    Case(row="400 empty text", status=400, body=_EMPTY, asks={"inputs": ["a", ""]}, means=InputRefused),
    Case(row="400 empty list", status=400, body=_EMPTY, asks={"inputs": []}, means=InputRefused),
    Case(
        row="422 too long, auto-truncate off", status=422, means=InputRefused, asks={"inputs": [_LONG]}, too_long=True,
        body=_native("Validation", "Input validation error: `inputs` must have less than 512 tokens. Given: 534"),
    ),
    Case(
        row="422 too long, on the route like OpenAI's", status=422, means=InputRefused, too_long=True,
        body=_flat(422, "Validation", "Input validation error: `inputs` must have less than 512 tokens. Given: 534"),
    ),
    Case(row="cuts when it is asked to", status=200, asks={"inputs": [_LONG], "truncate": True}),
    Case(
        row="422 more than 32 texts", status=422, asks={"inputs": ["a"] * 64}, means=InputRefused,
        body=_native("Validation", "batch size 64 > maximum allowed batch size 32"),
    ),
    Case(row="413 more than 32 texts, as documented", status=413, means=InputRefused),
    Case(
        row="422 dimensions not positive", status=422, asks={"dimensions": 0}, means=Misconfigured,
        body=_native("Validation", "`dimensions` should be positive"),
    ),
    Case(
        row="422 dimensions too large", status=422, asks={"dimensions": 1537}, means=Misconfigured,
        body=_native("Validation", "`dimensions` should be smaller than the maximum embedding dimension."),
    ),
    Case(
        row="413 more than 2,000,000 bytes", status=413, body=_TOO_LARGE, asks={"inputs": ["x" * 2_000_000]},
        means=InputRefused,
    ),
    Case(row="422 no input", status=422, body=_NO_INPUT, asks={"inputs": 5}, means=InputRefused),
    Case(row="424 backend", status=424, body=_native("Backend", "inference failed"), means=Transient),
    Case(
        row="429 overloaded, without Retry-After", status=429, body=_native("Overloaded", "Model is overloaded"),
        means=Throttled,
    ),
    Case(row="503 unhealthy", status=503, body=_native("Unhealthy", "unhealthy"), means=Transient),
    Case(row="401 with an empty body", status=401, means=BadCredential),
    *(
        Case(row=f"header {name}", status=200, headers={name: value}, asks={})
        for name, value in {**_STAMP, "x-compute-characters": "3", "x-compute-tokens": "1"}.items()
    ),
)  # fmt: skip
