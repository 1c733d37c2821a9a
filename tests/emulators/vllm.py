"""Hides a stand-in for vLLM's embeddings server: long texts refused in two wordings or cut on request, int codes."""

from typing import Any

from app.errors import BadCredential, InputRefused, Misconfigured, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire
from tests.emulators.openai import as_list
from tests.emulators.self_hosted import SelfHosted, texts_of
from tests.emulators.server import Asked, RefusalError, Row, Text, parsed

_UNAUTHORIZED = {"error": "Unauthorized"}
_NO_INPUT = "Input should be a valid string"
_NO_MATRYOSHKA = "does not support matryoshka representation, changing output dimensions will lead to poor results."
_OLDER = (
    "This model's maximum context length is 512 tokens. However, you requested 1451 tokens in the input for embedding "
    "generation. Please reduce the length of the input."
)


def _said(message: str, *, kind: str = "BadRequestError", param: str | None = None, code: int = 400) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _too_long(most: int, tokens: int) -> str:
    return (
        f"This model's maximum context length is {most} tokens. However, you requested 0 output tokens and your prompt "
        f"contains at least {tokens} input tokens, for a total of at least {tokens} tokens. Please reduce the length "
        f"of the input prompt or the number of requested output tokens. (parameter=input_tokens, value={tokens})"
    )


class VLLMEmulator(SelfHosted):
    """vLLM in its wording of 2026, with a model that was not declared Matryoshka; see `SelfHosted`."""

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        if not self.knows(headers):
            raise RefusalError(401, _UNAUTHORIZED)
        if target != "POST /v1/embeddings":
            raise RefusalError(404, {"detail": "Not Found"})
        given = parsed(body, RefusalError(400, _said("JSON decode error")))
        if (model := given.get("model", self.model)) != self.model:
            message = f"The model `{model}` does not exist."
            raise RefusalError(404, _said(message, kind="NotFoundError", param="model", code=404))
        texts = texts_of(given.get("input"), ids=True)
        if texts is None:
            raise RefusalError(400, _said(_NO_INPUT))
        self._check(given, texts)
        await self.embed(wire, given, texts, headers=headers, path="/v1/embeddings")

    def _check(self, given: dict[str, Any], texts: list[Text]) -> None:
        if given.get("dimensions") is not None:
            raise RefusalError(400, _said(f'Model "{self.model}" {_NO_MATRYOSHKA}'))
        kept = given.get("truncate_prompt_tokens")
        if kept is not None and kept < -1:
            raise RefusalError(400, _said("Input should be greater than or equal to -1"))
        if kept is None and (tokens := self.first_too_long(texts)):
            raise RefusalError(400, _said(_too_long(self.max_input_tokens, tokens), param="input_tokens"))

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        usage = {
            "prompt_tokens": asked.tokens, "total_tokens": asked.tokens, "completion_tokens": 0,
            "prompt_tokens_details": None,
        }  # fmt: skip
        return as_list(asked, rows, usage, id="embd-emulator", created=1_790_000_000)

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return RefusalError(400, _said("poison"))


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────

_LONG = "word" + " word" * 512

CASES: tuple[Case, ...] = (
    Case(
        row="400 too long, wording of 2026", status=400, body=_said(_too_long(512, 513), param="input_tokens"),
        asks={"input": _LONG}, means=InputRefused, too_long=True,
    ),
    Case(row="400 too long, wording of 2025", status=400, body=_said(_OLDER), means=InputRefused, too_long=True),
    Case(row="cuts when it is asked to", status=200, asks={"input": _LONG, "truncate_prompt_tokens": -1}),
    Case(
        row="400 truncate_prompt_tokens below -1", status=400, asks={"truncate_prompt_tokens": -2}, means=InputRefused,
        body=_said("Input should be greater than or equal to -1"),
    ),
    Case(
        row="400 dimensions of a model that is not Matryoshka", status=400, asks={"dimensions": 256},
        body=_said(f'Model "{VLLMEmulator.model}" {_NO_MATRYOSHKA}'), means=Misconfigured,
    ),
    Case(row="400 no input", status=400, body=_said(_NO_INPUT), asks={"input": None}, means=InputRefused),
    Case(row="unknown fields are ignored", status=200, asks={"unheard_of": 1}),
    Case(
        row="404 unknown model", status=404, asks={"model": "foo"}, means=Misconfigured,
        body=_said("The model `foo` does not exist.", kind="NotFoundError", param="model", code=404),
    ),
    Case(row="401 wrong key, a plain string", status=401, body=_UNAUTHORIZED, means=BadCredential),
    Case(row="429 of a proxy, without any header", status=429, body="<html>", means=Throttled),
    Case(
        row="500 internal", status=500, body=_said("boom", kind="InternalServerError", code=500), means=Transient
    ),
)  # fmt: skip
