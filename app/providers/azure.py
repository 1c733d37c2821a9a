"""Hides the Azure dialect."""

from collections.abc import Sequence

from app.domain import Space, Text
from app.providers.dialect import Ask, Dialect


class Azure(Dialect):
    """See the module."""

    name = "azure"
    base_url = ""

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        raise NotImplementedError
