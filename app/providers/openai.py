"""Hides the OpenAI dialect: how a batch is asked for, how a long reply is read in slices, what its errors mean."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import orjson

from app.domain import Space, Text
from app.errors import (
    BadCredential,
    InputRefused,
    MalformedReply,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    Throttled,
    Transient,
)
from app.ports import Reply
from app.providers.http import Answer, Endpoint, retry_after_s
from app.vectors import Matrix, decode_base64

_MOST_ITEMS = 2048
_MOST_FLOATS = 256 * 1536
"""Numbers written as text that one reply may bring: finding where each vector ends takes about 10 ms at once."""
_SLICE_FLOATS = 32 * 1536
"""Numbers that are read before the loop gets its turn: about 3 ms."""
_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}")


class OpenAIProvider:
    """OpenAI itself, and what speaks like it: vLLM, TEI, Infinity, Ollama, another gateway.

    `dimensions` is asked for; None does not send the field. The reply must name `model`, a dated release of it, or
    none at all; with `any_model_name` it may name anything, since compatible servers answer with paths and aliases.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        model: str,
        *,
        dimensions: int | None = None,
        max_in_flight: int = 8,
        any_model_name: bool = False,
    ) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._endpoint = Endpoint(base_url, headers, max_connections=max_in_flight)
        self._fields: dict[str, object] = {"model": model, "encoding_format": "base64"}
        if dimensions is not None:
            self._fields["dimensions"] = dimensions
        self._model = model
        self._any_model_name = any_model_name
        self._max_items = _MOST_FLOATS // (dimensions or 1536)

    @property
    def max_items(self) -> int:
        """See `ports.Provider`: few until the deployment has shown that it answers base64."""
        return self._max_items

    async def embed(self, texts: Sequence[Text], space: Space, *, timeout_s: float) -> Reply:
        """See `ports.Provider`; `texts` are all strings or all token ids."""
        body = orjson.dumps({**self._fields, "input": _input(texts)})
        most_bytes = len(texts) * (space.dimensions * 32 + 256) + 65_536  # numbers with 17 digits, and an envelope
        answer = await self._endpoint.post("embeddings", body, most_bytes=most_bytes, timeout_s=timeout_s)
        if not 200 <= answer.status < 300:
            raise _refusal(answer)
        said = _decode(answer.content)
        self._check_model(said.model)
        vectors = await self._vectors(said.data, len(texts), space.dimensions)
        return Reply(vectors, _tokens_billed(said.usage, len(body)))

    async def aclose(self) -> None:
        """See `ports.Provider`."""
        await self._endpoint.aclose()

    def _check_model(self, named: object) -> None:
        if self._any_model_name or named is None or named == self._model:
            return
        if isinstance(named, str) and named.startswith(self._model) and _DATED.fullmatch(named[len(self._model) :]):
            return
        raise MalformedReply("a reply that names another model")

    async def _vectors(self, items: list["_Item"], count: int, dimensions: int) -> Matrix:
        places = _places(items, count)
        vectors = np.empty((count, dimensions), dtype=np.float32)
        step = max(1, _SLICE_FLOATS // dimensions)
        as_base64 = True
        for start in range(0, count, step):
            for place, item in zip(places[start : start + step], items[start : start + step], strict=True):
                embedding = _embedding(item.embedding)
                as_base64 = as_base64 and isinstance(embedding, str)
                vectors[place] = _row(embedding, dimensions)
            await asyncio.sleep(0)
        self._max_items = _MOST_ITEMS if as_base64 else max(1, _MOST_FLOATS // dimensions)
        return vectors


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _input(texts: Sequence[Text]) -> str | Sequence[Text]:
    if len({type(text) for text in texts}) > 1:
        raise RuntimeError("This is a bug: a batch mixes strings and token ids.")
    # A lone "" is embedded when it stands alone and refused in a list.
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else texts


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Item(msgspec.Struct):
    embedding: msgspec.Raw  # a view into the reply, so that reading it can wait for its slice
    index: int | None = None


class _Said(msgspec.Struct):
    data: list[_Item]
    model: Any = None
    usage: Any = None


_said_decoder = msgspec.json.Decoder(_Said)
_embedding_decoder: msgspec.json.Decoder[str | list[float]] = msgspec.json.Decoder(str | list[float])


def _decode(content: bytearray) -> _Said:
    try:
        return _said_decoder.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise MalformedReply("a body that is no list of embeddings") from None


def _embedding(raw: msgspec.Raw) -> str | list[float]:
    try:
        return _embedding_decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # NaN, 1e400, null, "0.5", a list of lists
        raise MalformedReply("an embedding that is neither base64 nor numbers") from None


def _row(embedding: str | list[float], dimensions: int) -> Matrix:
    if isinstance(embedding, str):
        row = decode_base64(embedding)
    else:
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused by who checks
            row = np.array(embedding, dtype=np.float32)
    if row.size != dimensions:
        raise MalformedReply(f"a vector of {row.size} dimensions instead of {dimensions}")
    return row


def _places(items: list[_Item], count: int) -> Sequence[int]:
    """Whose vector each item is: its `index`, or its position where no item has one."""
    if len(items) != count:
        raise MalformedReply(f"{len(items)} vectors for {count} texts")
    places = [item.index for item in items if item.index is not None]
    if not places:
        return range(count)
    if sorted(places) != list(range(count)):
        raise MalformedReply("indices that are not one for each text")
    return places


def _tokens_billed(usage: object, most_tokens: int) -> int | None:
    """The tokens that `usage` names, if it may be true: no token is shorter than a byte of the request."""
    if not isinstance(usage, dict):
        return None
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return tokens if type(tokens) is int and 0 <= tokens <= most_tokens else None


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _refusal(answer: Answer) -> ProviderError:
    """What an answer that is no 2xx asks for; see the classes in `errors.py`."""
    status = answer.status
    message, words = _error_said(answer.content)
    detail = f"HTTP {status}"
    if status == 402 or words & {"insufficient_quota", "billing_hard_limit_reached"}:
        return QuotaExhausted(detail)
    if status == 429 and message.startswith("Request too large"):
        return InputRefused(f"{detail}: larger than the whole quota")
    if status == 429:
        return Throttled(detail, retry_after_s(answer.headers, next(iter(words & {"requests", "tokens"}), "")))
    if status == 403 and "not allowed to generate embeddings from this model" in message:
        return Misconfigured(f"{detail}: no embedding model")
    if status in (401, 403):
        return BadCredential(detail)
    if 300 <= status < 400 or status in (404, 405, 501):
        return Misconfigured(detail)
    if status in (400, 413, 422):
        return InputRefused(detail)
    if status in (408, 409, 424) or status >= 500:
        return Transient(detail)
    return MalformedReply(detail)


def _error_said(content: bytearray) -> tuple[str, set[str]]:
    """The message of an error body, and its machine words (`type`, `code`); OpenAI's envelope, TEI's flat one, any."""
    try:
        said = orjson.loads(content)
    except orjson.JSONDecodeError:
        return "", set()
    error = said.get("error", said) if isinstance(said, dict) else None
    if not isinstance(error, dict):
        return "", set()
    return str(error.get("message", "")), {str(error.get("type")), str(error.get("code"))}
