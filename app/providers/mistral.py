"""Hides the Mistral dialect."""

from collections.abc import Sequence

from app.domain import Space, Text
from app.providers.dialect import Ask, Dialect


class Mistral(Dialect):
    """See the module."""

    name = "mistral"
    base_url = "https://api.mistral.ai/v1"

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        raise NotImplementedError
