"""Hides the Cohere dialect: v2/embed, errors that only their words tell apart, texts that count one by one."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from app.domain import InputType, Space, Text
from app.errors import BadCredential, InputRefused, Misconfigured, ProviderError, QuotaExhausted, Transient
from app.providers.cards import ModelCard, Quota
from app.providers.dialect import Ask, Dialect, Said
from app.providers.refusals import Answer, by_status, retry_after_s

_WORDS: Mapping[InputType, str] = {"query": "search_query", "document": "search_document"}
_TIERS = {"trial": Quota(2_000, 100_000), "production": Quota(2_000)}
_EMPTY = re.compile(r"invalid request: inputs contains an element that is the empty string at index (\d{1,4})")
_MONTHLY = re.compile(r"(?:/|per) month|monthly", re.IGNORECASE)
_OUR_FAULT = re.compile(r"invalid request: valid input_type must be|embedding_types parameter is required")


def _card(dimensions: int, max_input_tokens: int, price: int, *, sizes: Sequence[int] = ()) -> ModelCard:
    return ModelCard(
        dimensions=dimensions, max_input_tokens=max_input_tokens, sizes=sizes, normalised="never", price=price,
        prompts=(("query", ""), ("document", "")), default_input_type="document", tiers=_TIERS, owned_by="cohere",
    )  # fmt: skip


_V5_SIZES = (256, 512, 768, 1024, 1536, 2048)
_V4_SIZES = (256, 512, 1024, 1536)


class Cohere(Dialect):
    """Cohere's own API; a call for 96 texts is 96 of the 2,000 that it allows a minute.

    Nobody publishes how much one call may hold in all: `max_batch_tokens` is the least that anybody names.
    """

    name = "cohere"
    base_url = "https://api.cohere.com/v2"
    max_batch_items = 96
    max_batch_tokens = 128_000
    counts_texts = True
    cuts = True
    own_words = True
    models: ClassVar[Mapping[str, ModelCard]] = {
        "embed-v5.0-pro": _card(2048, 128_000, 120_000, sizes=_V5_SIZES),
        "embed-v5.0-fast": _card(2048, 128_000, 80_000, sizes=_V5_SIZES),
        "embed-v4.0": _card(1536, 128_000, 120_000, sizes=_V4_SIZES),
        "embed-english-v3.0": _card(1024, 512, 100_000),
        "embed-multilingual-v3.0": _card(1024, 512, 100_000),
        "embed-english-light-v3.0": _card(384, 512, 100_000),
        "embed-multilingual-light-v3.0": _card(384, 512, 100_000),
    }

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`; the vectors as plain numbers."""
        # Of its base64 Cohere says no more than that it holds "the float embedding bytes". In an order of bytes that
        # we do not expect they would be other vectors, and nothing would show it: no unit length is promised.
        body: dict[str, object] = {
            "model": self.target.model,
            "texts": texts,
            "input_type": _WORDS[space.input_type or "document"],
            "embedding_types": ["float"],
            "truncate": "END" if space.truncation == "end" else "NONE",
        }
        if (size := self.size(space)) is not None:
            body["output_dimension"] = size
        return Ask("embed", body)

    def read(self, content: bytearray) -> Said:
        """See `Dialect`; what is there as int8 or binary is not what was asked for, and `texts` is not looked at."""
        said = _decoder.decode(content)
        billed = said.meta.get("billed_units") if isinstance(said.meta, dict) else None
        tokens = billed.get("input_tokens") if isinstance(billed, dict) else None
        return Said(said.embeddings.floats, [None] * len(said.embeddings.floats), tokens)

    def refusal(self, answer: Answer) -> ProviderError:
        """See `Dialect`."""
        message = answer.said().get("message")
        message = message if isinstance(message, str) else ""
        status, detail = answer.status, f"HTTP {answer.status}"
        if status == 400 and _OUR_FAULT.match(message):
            return Misconfigured(f"{detail}: a call that this model does not understand")
        if status == 400:
            empty = _EMPTY.match(message)
            return InputRefused(
                detail, position=int(empty[1]) if empty else None, too_long=message.startswith("too many tokens")
            )
        if status == 429 and _MONTHLY.search(message):
            return QuotaExhausted(f"{detail}: the month's calls are used up")
        if status == 429:
            return by_status(answer, wait_s=_until_reset_s(answer.headers))
        if status == 498:
            return BadCredential(f"{detail}: a revoked key")
        return Transient(f"{detail}: cancelled") if status == 499 else by_status(answer)


class _ByType(msgspec.Struct):
    floats: list[msgspec.Raw] = msgspec.field(name="float")


class _Reply(msgspec.Struct):
    embeddings: _ByType
    meta: Any = None


_decoder = msgspec.json.Decoder(_Reply)


def _until_reset_s(headers: Mapping[str, str]) -> float | None:
    """What `x-ratelimit-reset`, a Unix time, leaves to wait, where no `retry-after` says it better."""
    reset = headers.get("x-ratelimit-reset", "")
    if retry_after_s(headers) is not None or not (reset.isdecimal() and len(reset) < 16):
        return None
    left_s = int(reset) - time.time()
    return left_s if left_s > 0 else None
