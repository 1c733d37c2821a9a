"""Hides a stand-in for Ollama: its own route, the one like OpenAI's, silent cuts, no keys."""

import orjson

from app.errors import BadCredential, InputRefused, Misconfigured, Throttled, Transient
from tests.emulators.cases import Case
from tests.emulators.faults import Wire, error_body
from tests.emulators.judge import Judge
from tests.emulators.openai import as_list
from tests.emulators.self_hosted import SelfHosted, texts_of
from tests.emulators.server import Asked, RefusalError, Row, as_numbers, parsed

_TOO_LONG = "input length exceeds maximum context length"
_NO_INPUT = "invalid input"
_NO_TEXT = "invalid input type"
_NO_EMBEDDER = "this model does not support embeddings"
_NO_MODEL = 'model "foo" not found, try pulling it first'
_CHAT_MODEL = "llama3.2"
_KINDS = {400: "invalid_request_error", 404: "not_found_error"}


def _alike(status: int, message: str) -> str:
    """An error body on the route that is like OpenAI's."""
    return error_body(message, _KINDS.get(status, "api_error")).decode()


def _refusal(path: str, status: int, message: str) -> RefusalError:
    return RefusalError(status, {"error": message} if path == "/api/embed" else _alike(status, message).encode())


class OllamaEmulator(SelfHosted):
    """Ollama; see `SelfHosted`. It asks for no key; when there is one, a proxy in front of it does."""

    model = "gte-qwen2:1.5b"

    def __init__(self, *, api_key: str | None = None, judge: Judge | None = None) -> None:
        super().__init__(api_key=api_key, judge=judge)

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        if not self.knows(headers):
            raise RefusalError(401, b"<html><h1>401 Authorization Required</h1></html>", {"content-type": "text/html"})
        path = target.removeprefix("POST ")
        if path not in ("/api/embed", "/v1/embeddings"):
            raise RefusalError(404, b"404 page not found")
        native = path == "/api/embed"
        given = parsed(body, _refusal(path, 400, "invalid JSON"))
        value = given.get("input")
        if not native and (value is None or value == []):
            raise _refusal(path, 400, _NO_INPUT)
        if not native and (wanted := given.get("encoding_format", "float")).lower() not in ("float", "base64"):
            message = f"Invalid value for 'encoding_format' = {wanted}. Supported values: ['float', 'base64']."
            raise _refusal(path, 400, message)
        texts = texts_of(value, ids=False)
        if texts is None:
            raise _refusal(path, 400, _NO_TEXT)
        if (model := given.get("model")) == _CHAT_MODEL:
            raise _refusal(path, 501, _NO_EMBEDDER)
        if model != self.model:
            raise _refusal(path, 404, f'model "{model}" not found, try pulling it first')
        if native and given.get("truncate") is False and self.first_too_long(texts):
            raise _refusal(path, 400, _TOO_LONG)
        await self.embed(wire, given, texts, headers=headers, path=path)

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`."""
        if asked.path == "/v1/embeddings":
            return as_list(asked, rows, {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens})
        said = {"model": asked.model, "total_duration": 1, "load_duration": 1, "prompt_eval_count": asked.tokens}
        return b'{"embeddings":[%s],%s' % (b",".join(as_numbers(vector) for _, vector in rows), orjson.dumps(said)[1:])

    def poisoned(self, asked: Asked, place: int) -> RefusalError:
        """See `Emulator`."""
        return RefusalError(
            400, {"error": _NO_INPUT} if asked.path == "/api/embed" else _alike(400, _NO_INPUT).encode()
        )


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────

_LONG = "word " * 600
_ENCODING = "Invalid value for 'encoding_format' = X. Supported values: ['float', 'base64']."

CASES: tuple[Case, ...] = (
    Case(row="400 null or empty list", status=400, body=_alike(400, _NO_INPUT), means=InputRefused),
    Case(
        row="400 token ids and other types", status=400, body={"error": _NO_TEXT}, asks={"input": [[1, 2]]},
        means=InputRefused,
    ),
    Case(row="400 unknown encoding_format", status=400, body=_alike(400, _ENCODING), means=InputRefused),
    Case(
        row="400 too long, when it must not cut", status=400, body={"error": _TOO_LONG}, asks={"input": _LONG},
        means=InputRefused, too_long=True,
    ),
    Case(
        row="400 too long, later wording", status=400, body={"error": "the input length exceeds the context length"},
        means=InputRefused, too_long=True,
    ),
    Case(row="cuts when it is asked to", status=200, asks={"input": _LONG, "truncate": True}),
    Case(
        row="404 unknown model", status=404, body={"error": _NO_MODEL}, asks={"model": "foo"}, means=Misconfigured
    ),
    Case(
        row="501 no embedding model", status=501, body={"error": _NO_EMBEDDER}, asks={"model": _CHAT_MODEL},
        means=Misconfigured,
    ),
    Case(row="400 no embedding model", status=400, body=_alike(400, _NO_EMBEDDER), means=Misconfigured),
    Case(row="401 of a proxy", status=401, body="<html>", means=BadCredential),
    Case(row="429 of a proxy", status=429, body="<html>", headers={"retry-after": "5"}, means=Throttled, wait_s=5),
    Case(row="500 api_error", status=500, body=_alike(500, "model runner has unexpectedly stopped"), means=Transient),
)  # fmt: skip
