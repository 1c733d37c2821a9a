"""The catalog: every model that some vendor's file knows, by dialect and name."""

from collections.abc import Mapping
from types import MappingProxyType

from app.providers import DIALECTS
from app.providers.cards import ModelCard

CATALOG: Mapping[tuple[str, str], ModelCard] = MappingProxyType(
    {(name, model): card for name, dialect in DIALECTS.items() for model, card in dialect.models.items()}
)
