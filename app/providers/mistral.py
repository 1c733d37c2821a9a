"""Hides the Mistral dialect: small calls, two kinds of error bodies, and its own names for the limits in headers."""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from app.domain import Space, Text
from app.errors import InputRefused, Misconfigured, ProviderError, QuotaExhausted
from app.providers.cards import ModelCard
from app.providers.dialect import Ask, Dialect, Said, prompted
from app.providers.openai import error_said
from app.providers.refusals import Answer, by_status

# Unit vectors are what everybody says and nobody promises: "never" has us bring them to unit length, whatever comes.
_EMBED = ModelCard(
    dimensions=1024, max_input_tokens=8192, normalised="never", price=100_000, batch_price=50_000, owned_by="mistralai"
)  # fmt: skip
_CODESTRAL = ModelCard(
    dimensions=1536, max_input_tokens=8192, sizes=range(1, 3073), matryoshka=True, normalised="never", price=150_000,
    batch_price=75_000, owned_by="mistralai",
)  # fmt: skip
_RELEASE = re.compile(r"-\d{4}$")
_SPENT = re.compile(r"usage limit reached|month", re.IGNORECASE)


class Mistral(Dialect):
    """Mistral's La Plateforme."""

    name = "mistral"
    base_url = "https://api.mistral.ai/v1"
    max_batch_items = 256
    max_batch_tokens = 12_288  # of 16,384: its vocabulary is not public for these models, so ours is a guess
    judged_spans_s = (1.0, 60.0)  # requests are limited per second
    limit_headers = ("x-ratelimit-limit-req-minute", "x-ratelimit-limit-tokens-minute")
    models: ClassVar[Mapping[str, ModelCard]] = {
        "mistral-embed": _EMBED,
        "mistral-embed-2312": _EMBED,
        "codestral-embed": _CODESTRAL,
        "codestral-embed-2505": _CODESTRAL,
    }

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        body: dict[str, object] = {
            "model": self.target.model,
            "input": prompted(texts, space),
            "encoding_format": "base64",
        }
        if (size := self.size(space)) is not None:
            body["output_dimension"] = size
        return Ask("embeddings", body)

    def read(self, content: bytearray) -> Said:
        """See `Dialect`; a model and its release are one, whichever was asked for."""
        said = super().read(content)
        is_ours = isinstance(said.model, str) and _unreleased(said.model) == _unreleased(self.target.model)
        return said._replace(model=self.target.model) if is_ours else said

    def refusal(self, answer: Answer) -> ProviderError:
        """See `Dialect`; code 3210 refuses a call for its size, so that it is halved."""
        message, words = error_said(answer)
        status, detail = answer.status, f"HTTP {answer.status}"
        if status in (401, 403, 429) and (_SPENT.search(message) or _month_is_over(answer.headers)):
            return QuotaExhausted(detail)
        if "invalid_model" in words:
            return Misconfigured(f"{detail}: unknown model")
        if status == 400:
            return InputRefused(detail, too_long=message.startswith("Too many tokens"))
        if status == 422:
            return _invalid(answer.said().get("detail"))
        return by_status(answer)


def _unreleased(model: str) -> str:
    return _RELEASE.sub("", model)


def _month_is_over(headers: Mapping[str, str]) -> bool:
    """Whether a header says that nothing is left of a quota per month."""
    return any("-remaining-" in name and name.endswith("-month") and headers[name] == "0" for name in headers)


def _invalid(complaints: object) -> ProviderError:
    """What a validator means: each `loc` leads to a field, and within `input` maybe to a text."""
    position: int | None = None
    for complaint in complaints if isinstance(complaints, list) else ():
        match complaint:
            case {"loc": ["body", "input", *path]}:
                position = next((step for step in path if type(step) is int), position)
            case {"loc": ["body", str(), *_]}:
                return Misconfigured("HTTP 422: another field than the texts")
    return InputRefused("HTTP 422", position=position)
