"""Hides the Jina dialect: a task's word for each family of models, and what its machine words ask for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from app.domain import InputType, Space, Text
from app.errors import InputRefused, Misconfigured, ProviderError, QuotaExhausted
from app.providers.cards import ModelCard, Quota
from app.providers.dialect import Ask, Dialect
from app.providers.refusals import Answer, by_status

_TIERS = {"free": Quota(500, 1_000_000, 5), "1": Quota(500, 10_000_000, 50), "2": Quota(5_000, 100_000_000, 500)}
_TASKS: Mapping[InputType, str] = {"query": "query", "document": "passage"}
_BOTH: tuple[tuple[InputType, str], ...] = (("query", ""), ("document", ""))
_TOO_LONG = re.compile(r"cannot exceed \d+ tokens")


def _card(
    max_input_tokens: int,
    *sizes: int,
    prompts: tuple[tuple[InputType, str], ...] = _BOTH,
    max_batch_items: int | None = None,
) -> ModelCard:
    """The largest of `sizes` comes without asking; Jina shows its prices to its customers only."""
    return ModelCard(
        dimensions=sizes[-1], max_input_tokens=max_input_tokens, sizes=sizes, matryoshka=True, prompts=prompts,
        max_batch_items=max_batch_items, tiers=_TIERS, owned_by="jina",
    )  # fmt: skip


class Jina(Dialect):
    """Jina AI's own API; always asked for unit vectors, so that others are malformed."""

    name = "jina"
    base_url = "https://api.jina.ai/v1"
    cuts = True
    own_words = True
    models: ClassVar[Mapping[str, ModelCard]] = {
        "jina-embeddings-v5-text-small": _card(32_768, 32, 64, 128, 256, 512, 1024),
        "jina-embeddings-v5-text-nano": _card(8192, 32, 64, 128, 256, 512, 768),
        # Refuses more than 512 texts, whatever the documents say of 2,048.
        "jina-embeddings-v4": _card(32_768, 128, 256, 512, 1024, 2048, max_batch_items=512),
        "jina-embeddings-v3": _card(8192, 32, 64, 128, 256, 512, 768, 1024),
        "jina-clip-v2": _card(8192, 64, 128, 256, 512, 768, 1024, prompts=()),
        "jina-code-embeddings-0.5b": _card(32_768, 64, 128, 256, 512, 896),
        "jina-code-embeddings-1.5b": _card(32_768, 128, 256, 512, 1024, 1536),
    }

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`; without an input type no task is named, and the model's own way of reading is meant."""
        body: dict[str, object] = {
            "model": self.target.model,
            "input": texts,
            "embedding_type": "base64",
            "normalized": True,
            "truncate": space.truncation == "end",
        }
        if space.input_type is not None:
            family = "nl2code" if self.target.model.startswith("jina-code") else "retrieval"
            body["task"] = f"{family}.{_TASKS[space.input_type]}"
        if (size := self.size(space)) is not None:
            body["dimensions"] = size
        return Ask("embeddings", body)

    def refusal(self, answer: Answer) -> ProviderError:
        """See `Dialect`; the machine word stands in `code`, or before or in what `message` or `detail` say."""
        said = answer.said()
        words = " ".join(word for name in ("code", "message", "detail") if isinstance(word := said.get(name), str))
        status, detail = answer.status, f"HTTP {answer.status}"
        if status == 403 and re.search("INSUFFICIENT_BALANCE|RESOURCE_LIMIT|[Ii]nsufficient account balance", words):
            return QuotaExhausted(f"{detail}: no balance left")
        if status == 400 and "INPUT_MODEL_NOT_FOUND" in words:
            return Misconfigured(f"{detail}: no such model")
        if status in (400, 422):
            too_long = _TOO_LONG.search(words) is not None
            return InputRefused(detail, position=_position(said.get("detail")), too_long=too_long)
        return by_status(answer)


def _position(detail: Any) -> int | None:
    """The text that a validation error is about: the first `{"loc": ["body", "input", 3, …]}`."""
    first = detail[0] if isinstance(detail, list) and detail else None
    where = first.get("loc") if isinstance(first, dict) else None
    if not isinstance(where, list) or len(where) < 3 or where[:2] != ["body", "input"]:
        return None
    return where[2] if type(where[2]) is int and where[2] >= 0 else None
