"""Hides what OpenAI publishes about its embedding models, as of 2026-11-21 (its API reference and model pages)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One vendor model: full width, longest input, whether a cut of its vector is the vendor's own smaller vector.

    `unit_norm`: the vendor promises unit vectors. `created` is a Unix time.
    """

    dimensions: int
    cuts_dimensions: bool
    created: int
    owned_by: str
    max_input_tokens: int = 8192
    unit_norm: bool = True


CATALOG: Mapping[str, CatalogModel] = MappingProxyType(
    {
        "text-embedding-3-small": CatalogModel(1536, True, 1705948997, "system"),
        "text-embedding-3-large": CatalogModel(3072, True, 1705953180, "system"),
        "text-embedding-ada-002": CatalogModel(1536, False, 1671217299, "openai-internal"),
    }
)
