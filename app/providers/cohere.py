"""Hides the Cohere dialect."""

from collections.abc import Sequence

from app.domain import Space, Text
from app.providers.dialect import Ask, Dialect


class Cohere(Dialect):
    """See the module."""

    name = "cohere"
    base_url = "https://api.cohere.com/v2"

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        raise NotImplementedError
