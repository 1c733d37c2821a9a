"""Hides the Voyage dialect."""

from collections.abc import Sequence

from app.domain import Space, Text
from app.providers.dialect import Ask, Dialect


class Voyage(Dialect):
    """See the module."""

    name = "voyage"
    base_url = "https://api.voyageai.com/v1"

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        raise NotImplementedError
