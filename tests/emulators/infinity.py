"""Hides a stand-in for michaelfeil/infinity: no prefix, silent cuts, usage in characters, FastAPI's own refusals."""

import numpy as np
import numpy.typing as npt

from app.errors import BadCredential, InputRefused, Misconfigured, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire
from tests.emulators.judge import OverLimit
from tests.emulators.openai import as_list
from tests.emulators.self_hosted import SelfHosted, texts_of
from tests.emulators.server import Asked, RefusalError, Row, Text, parsed
from tests.identity import identifying_vector

_MOST_ITEMS = 2048
_MOST_CHARACTERS = 122_880
_UNAUTHORIZED = {"detail": "Unauthorized"}


def _said(status: int, message: str) -> dict[str, object]:
    return {"error": {"message": message, "type": None, "param": None, "code": status}}


def _flaw(kind: str, message: str) -> dict[str, object]:
    return {"detail": [{"type": kind, "loc": ["body", "input"], "msg": message}]}


_NO_STRING = _flaw("string_type", "Input should be a valid string")
_TOO_MANY = _flaw("too_long", f"List should have at most {_MOST_ITEMS} items after validation")
_TOO_FEW = _flaw("too_short", "List should have at least 1 item after validation, not 0")
_TOO_LONG = _flaw("string_too_long", f"String should have at most {_MOST_CHARACTERS} characters")


class InfinityEmulator(SelfHosted):
    """Infinity as it starts by itself, its usage in characters; see `SelfHosted`."""

    prefix = ""

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        if not self.knows(headers):
            raise RefusalError(401, _UNAUTHORIZED)
        if target != "POST /embeddings":
            raise RefusalError(404, {"detail": "Not Found"})
        given = parsed(body, RefusalError(422, _flaw("json_invalid", "JSON decode error")))
        texts = self._read(given.get("input"))
        if given.get("model", "default/not-specified") not in (self.model, "default/not-specified"):
            raise RefusalError(400, _said(400, f"Invalid model: {given['model']}"))
        await self.embed(wire, given, texts, headers=headers, path="/embeddings")

    def _read(self, value: object) -> list[Text]:
        if value == []:
            raise RefusalError(422, _TOO_FEW)
        texts = texts_of(value, ids=False)
        if texts is None:
            raise RefusalError(422, _NO_STRING)
        if len(texts) > _MOST_ITEMS:
            raise RefusalError(422, _TOO_MANY)
        if any(len(text) > _MOST_CHARACTERS for text in texts):
            raise RefusalError(422, _TOO_LONG)
        return [text.strip() for text in texts if isinstance(text, str)]

    def vector(self, model: str, text: Text, width: int) -> npt.NDArray[np.float32]:
        """See `Emulator`; what is cut is not brought back to unit length."""
        return identifying_vector(text, model, self.width)[:width]

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        characters = sum(len(text) for text in asked.texts)
        usage = {"prompt_tokens": characters, "total_tokens": characters}
        return as_list(asked, rows, usage, id="infinity-00000000-0000-0000-0000-000000000000", created=1_790_000_000)

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return RefusalError(422, _NO_STRING)

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`."""
        return RefusalError(429, _said(429, f"model {self.model} is currently overloaded"))


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────

_OVERLOADED = f"model {InfinityEmulator.model} is currently overloaded"

CASES: tuple[Case, ...] = (
    Case(row="422 more than 2,048 texts", status=422, body=_TOO_MANY, asks={"input": ["a"] * 2049}, means=InputRefused),
    Case(row="422 empty list", status=422, body=_TOO_FEW, asks={"input": []}, means=InputRefused),
    Case(
        row="422 more than 122,880 characters", status=422, body=_TOO_LONG, asks={"input": "x" * 122_881},
        means=InputRefused,
    ),
    Case(row="422 token ids", status=422, body=_NO_STRING, asks={"input": [[1, 2]]}, means=InputRefused),
    Case(row="cuts without a word", status=200, asks={"input": "word " * 600}),
    Case(row="usage counts characters", status=200, body='"usage":{"prompt_tokens":3,"total_tokens":3}', asks={}),
    Case(
        row="400 unknown model", status=400, body=_said(400, "Invalid model: foo"), asks={"model": "foo"},
        means=Misconfigured,
    ),
    Case(row="404 without the prefix", status=404, body={"detail": "Not Found"}, means=Misconfigured),
    Case(row="401 wrong key", status=401, body=_UNAUTHORIZED, means=BadCredential),
    Case(row="429 overloaded", status=429, body=_said(429, _OVERLOADED), means=Throttled),
    Case(row="500 internal", status=500, body=_said(500, "InternalServerError: x"), means=Transient),
)  # fmt: skip
