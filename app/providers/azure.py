"""Hides the Azure dialect: OpenAI's models as deployments, two paths, two kinds of key, own terms and waits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from urllib.parse import quote

from app.domain import Space, Text
from app.errors import ProviderError, Throttled
from app.providers.cards import ModelCard, Quota
from app.providers.dialect import Ask
from app.providers.openai import OpenAI, error_said
from app.providers.refusals import Answer, bounded

_RETIRED = date(2028, 2, 9)
_THOUSANDS = {"1": 1, "2": 2, "3": 4, "4": 7, "5": 10, "6": 15}
_TIERS: Mapping[str, Quota] = {
    **{tier: Quota(6_000 * most, 1_000_000 * most) for tier, most in _THOUSANDS.items()},  # published per 10 s
    **{f"datazone-{tier}": Quota(1_000 * most, 1_000_000 * most) for tier, most in _THOUSANDS.items()},
}
_WAIT = re.compile(r"retry after ([0-9]{1,9}) seconds?")


def _terms(name: str, price: int, tiers: Mapping[str, Quota], shutdown: date | None) -> ModelCard:
    return replace(OpenAI.models[name], price=price, batch_price=None, tiers=tiers, shutdown=shutdown)


_TERMS: Mapping[str, ModelCard] = {
    "text-embedding-3-small": _terms("text-embedding-3-small", 22_000, _TIERS, _RETIRED),
    "text-embedding-3-large": _terms("text-embedding-3-large", 143_000, _TIERS, _RETIRED),
    "text-embedding-ada-002": _terms("text-embedding-ada-002", 110_000, {}, None),
}


class Azure(OpenAI):
    """Azure OpenAI: OpenAI's very models, so that a deployment here and one there are of one Space.

    The target's model is the name of the Azure deployment. Options: `api_version`, where it is a date, asks by the
    deployment's own path (the base URL ends in `/openai`), else by the v1 path (it ends in `/openai/v1`); `auth` is
    `bearer` for Entra tokens.
    """

    name = "azure"
    base_url = ""
    judged_spans_s = (1.0, 10.0, 60.0)

    @classmethod
    def terms(cls, model: str) -> ModelCard | None:
        """See `Dialect`; what Azure takes for OpenAI's models, which Azure's batches do not have."""
        return _TERMS.get(model)

    def headers(self, key: str) -> dict[str, str]:
        """See `Dialect`."""
        return super().headers(key) if self.target.options.get("auth") == "bearer" else {"api-key": key}

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        path, body = super().ask(texts, space)
        version = self.target.options.get("api_version", "")
        if version[:1].isdigit():
            path = f"deployments/{quote(self.target.model, safe='')}/{path}"
        return Ask(f"{path}?api-version={quote(version)}" if version else path, body)

    def refusal(self, answer: Answer) -> ProviderError:
        """See `Dialect`; a wait may stand in the message only, and may be a day where the quota is back in a minute."""
        refusal = super().refusal(answer)
        if isinstance(refusal, Throttled) and refusal.retry_after_s is None:
            wait = _WAIT.search(error_said(answer)[0])
            return Throttled(str(refusal), bounded(float(wait[1])) if wait else None)
        return refusal
