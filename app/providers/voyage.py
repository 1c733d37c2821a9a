"""Hides the Voyage dialect: its own field names, prompts that it writes and bills itself, errors in plain words."""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from app.domain import Space, Text
from app.errors import InputRefused, Misconfigured, ProviderError
from app.providers.cards import ModelCard, Quota
from app.providers.dialect import Ask, Dialect
from app.providers.refusals import Answer, by_status, retry_after_s

_NO_CARD_WAIT_S = 20.0
"""Accounts without a payment method have 3 requests a minute."""
_OURS = re.compile(r"^Model .+ is not supported|[Aa]rgument '(?!input')")
_WHICH = re.compile(r"example at index (\d{1,4}) in your batch has too many tokens")


def _card(
    price: int | None, tokens_per_minute: int, *, batch_price: int | None = None, dimensions: int = 1024,
    flexible: bool = True, max_input_tokens: int = 32_000,
) -> ModelCard:  # fmt: skip
    """Voyage puts the prompts in front itself, and bills them."""
    tiers = {str(tier): Quota(2000 * tier, tokens_per_minute * tier) for tier in (1, 2, 3)}
    return ModelCard(
        dimensions=dimensions,
        max_input_tokens=max_input_tokens,
        sizes=(256, 512, 1024, 2048) if flexible else (),
        matryoshka=flexible,
        price=price,
        batch_price=batch_price,
        prompts=(
            ("query", "Represent the query for retrieving supporting documents: "),
            ("document", "Represent the document for retrieval: "),
        ),
        tiers={"free": Quota(3, 10_000), **tiers},
        owned_by="voyageai",
    )


class Voyage(Dialect):
    """Voyage AI; keys of MongoDB Atlas (`al-…`) have https://ai.mongodb.com/v1 as their base URL."""

    name = "voyage"
    base_url = "https://api.voyageai.com/v1"
    max_batch_items = 128
    max_batch_tokens = 120_000  # what every model takes; some take more
    cuts = True
    own_words = True
    models: ClassVar[Mapping[str, ModelCard]] = {
        "voyage-4-large": _card(120_000, 3_000_000, batch_price=80_000),
        "voyage-4": _card(60_000, 8_000_000, batch_price=40_000),
        "voyage-4-lite": _card(20_000, 16_000_000, batch_price=13_400),
        "voyage-code-4": _card(120_000, 3_000_000),
        "voyage-3-large": _card(180_000, 3_000_000, batch_price=120_000),
        "voyage-3.5": _card(60_000, 8_000_000, batch_price=40_000),
        "voyage-3.5-lite": _card(20_000, 16_000_000, batch_price=13_400),
        "voyage-code-3": _card(180_000, 3_000_000, batch_price=120_000),
        "voyage-finance-2": _card(120_000, 3_000_000, flexible=False),
        "voyage-multilingual-2": _card(120_000, 3_000_000, flexible=False),
        "voyage-law-2": _card(120_000, 3_000_000, flexible=False, max_input_tokens=16_000),
        "voyage-code-2": _card(None, 0, dimensions=1536, flexible=False, max_input_tokens=16_000),
    }

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`; texts that are too long are cut unless that is forbidden."""
        body: dict[str, object] = {
            "model": self.target.model,
            "input": texts,
            "truncation": space.truncation == "end",
            "encoding_format": "base64",
        }
        if space.input_type is not None:
            body["input_type"] = space.input_type
        if (size := self.size(space)) is not None:
            body["output_dimension"] = size
        return Ask("embeddings", body)

    def refusal(self, answer: Answer) -> ProviderError:
        """See `Dialect`."""
        words = answer.said().get("detail")
        words = words if isinstance(words, str) else ""
        status, detail = answer.status, f"HTTP {answer.status}"
        if status == 429 and "payment method" in words and retry_after_s(answer.headers) is None:
            return by_status(answer, wait_s=_NO_CARD_WAIT_S)
        if status in (400, 422) and _OURS.search(words):
            return Misconfigured(f"{detail}: the model, or an argument that is no text")
        if status == 400:
            which = _WHICH.search(words)
            too_long = which is not None or "max allowed tokens" in words
            return InputRefused(detail, position=int(which[1]) if which else None, too_long=too_long)
        return by_status(answer)
