"""Hides the Gemini dialect."""

from collections.abc import Sequence

from app.domain import Space, Text
from app.providers.dialect import Ask, Dialect


class Gemini(Dialect):
    """See the module."""

    name = "gemini"
    base_url = "https://generativelanguage.googleapis.com/v1beta"

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        raise NotImplementedError
