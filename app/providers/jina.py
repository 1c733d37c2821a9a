"""Hides the Jina dialect."""

from collections.abc import Sequence

from app.domain import Space, Text
from app.providers.dialect import Ask, Dialect


class Jina(Dialect):
    """See the module."""

    name = "jina"
    base_url = "https://api.jina.ai/v1"

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        raise NotImplementedError
