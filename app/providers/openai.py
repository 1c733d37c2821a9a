"""Hides the OpenAI dialect: how a batch is asked for, what its errors mean, which models it has."""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from app.domain import Space, Text
from app.errors import BadCredential, InputRefused, Misconfigured, ProviderError, QuotaExhausted, Throttled
from app.providers.cards import ModelCard, Quota
from app.providers.dialect import Ask, Dialect, prompted
from app.providers.refusals import Answer, by_status, retry_after_s

_TIERS = {
    "free": Quota(100, 40_000),
    "1": Quota(3_000, 1_000_000),
    "2": Quota(5_000, 1_000_000),
    "3": Quota(5_000, 5_000_000),
    "4": Quota(10_000, 5_000_000),
    "5": Quota(10_000, 10_000_000),
}
_WHICH = re.compile(r"Invalid 'input\[(\d{1,4})\]'")


def _card(dimensions: int, price: int, *, cuts: bool, created: int, owned_by: str = "system") -> ModelCard:
    return ModelCard(
        dimensions=dimensions, max_input_tokens=8192, sizes=range(1, dimensions + 1) if cuts else (), matryoshka=cuts,
        tokenizer="cl100k_base", price=price, batch_price=price // 2, tiers=_TIERS, created=created, owned_by=owned_by,
    )  # fmt: skip


class OpenAI(Dialect):
    """OpenAI itself, and what speaks like it.

    `too_long` is how a refusal says that a text is, `misconfigured` how it says that no text is at fault.
    """

    name = "openai"
    base_url = "https://api.openai.com/v1"
    takes_token_ids = True
    too_long: ClassVar[re.Pattern[str]] = re.compile(r"maximum (?:context|input) length")
    misconfigured: ClassVar[re.Pattern[str]] = re.compile(
        r"not allowed to generate embeddings from|specifying dimensions|'dimensions'|provide a model parameter"
    )
    models: ClassVar[Mapping[str, ModelCard]] = {
        "text-embedding-3-small": _card(1536, 20_000, cuts=True, created=1_705_948_997),
        "text-embedding-3-large": _card(3072, 130_000, cuts=True, created=1_705_953_180),
        "text-embedding-ada-002": _card(
            1536, 100_000, cuts=False, created=1_671_217_299, owned_by="openai-internal"
        ),
    }  # fmt: skip

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`; a lone "" is embedded when it stands alone and refused in a list."""
        said = prompted(texts, space)
        alone = len(said) == 1 and isinstance(said[0], str)
        body: dict[str, object] = {
            "model": self.target.model,
            "encoding_format": "base64",
            "input": said[0] if alone else said,
        }
        if (size := self.size(space)) is not None:
            body["dimensions"] = size
        return Ask("embeddings", body)

    def refusal(self, answer: Answer) -> ProviderError:
        """See `Dialect`; also for the flat errors of servers that only speak alike."""
        message, words = error_said(answer)
        status, detail = answer.status, f"HTTP {answer.status}"
        if words & {"insufficient_quota", "billing_hard_limit_reached"}:
            return QuotaExhausted(detail)
        if "no_db_connection" in words:  # how LiteLLM's proxy without a database answers a key that it does not know
            return BadCredential(detail)
        if status == 429 and message.startswith("Request too large"):
            return InputRefused(f"{detail}: larger than the whole quota")
        if status == 429:
            return Throttled(detail, retry_after_s(answer.headers, next(iter(words & {"requests", "tokens"}), "")))
        if status in (400, 403, 422) and self.misconfigured.search(message):
            return Misconfigured(f"{detail}: the model or its dimensions")
        if status in (400, 422):
            which = _WHICH.match(message)
            return InputRefused(
                detail, position=int(which[1]) if which else None, too_long=self.too_long.search(message) is not None
            )
        return by_status(answer)


def error_said(answer: Answer) -> tuple[str, set[str]]:
    """The message of an error body, and its machine words (`type`, `code`); OpenAI's envelope, a flat one or a text."""
    said = answer.said()
    error = said.get("error", said)
    if not isinstance(error, dict):
        return _text(error), set()
    return _text(error.get("message")), {_text(error.get("type")), _text(error.get("code"))}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
