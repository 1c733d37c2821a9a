"""The catalog: every model that some vendor's file knows, by dialect and name, on what terms."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from app.providers import DIALECTS
from app.providers.cards import ModelCard
from app.settings.tables import Row

CATALOG: Mapping[tuple[str, str], ModelCard] = MappingProxyType(
    {(name, model): card for name, dialect in DIALECTS.items() for model, card in dialect.models.items()}
)

_UNIT_VECTORS: Final = {"always": "vendor", "full width": "vendor if uncut", "never": "embedgate"}


def catalog_rows() -> list[Row]:
    """A row per known model; `sizes` are those that may be asked for, prices are per million tokens."""
    return [_row(dialect, model, card) for (dialect, model), card in CATALOG.items()]


def _row(dialect: str, model: str, card: ModelCard) -> Row:
    wire = DIALECTS[dialect]
    terms = wire.terms(model) or card
    sizes = card.sizes
    return {
        "dialect": dialect,
        "model": model,
        "dimensions": card.dimensions,
        "sizes": f"{min(sizes)}-{max(sizes)}" if isinstance(sizes, range) and sizes else list(sizes),
        "matryoshka": card.matryoshka,
        "max_input_tokens": card.max_input_tokens,
        "tokenizer": card.tokenizer,
        "usd_per_million": usd_per_million(terms.price),
        "batch_usd_per_million": usd_per_million(terms.batch_price),
        "items_per_call": card.max_batch_items or wire.max_batch_items,
        "unit_vectors_by": card.normalised and _UNIT_VECTORS[card.normalised],
        "tiers": list(terms.tiers),
        "shutdown": terms.shutdown and terms.shutdown.isoformat(),
    }


def usd_per_million(pico_usd_per_token: int | None) -> float | None:
    """A price as vendors print it; None: not known."""
    return None if pico_usd_per_token is None else pico_usd_per_token / 1_000_000
