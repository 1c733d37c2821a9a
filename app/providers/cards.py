"""What a vendor publishes about a model: the card that stands in the vendor's file, and that the catalog collects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Literal, TypeAlias

from app.domain import InputType

KNOWN_ON = date(2026, 11, 21)
"""The day for which all cards hold: models, limits, prices."""

Tokenizer: TypeAlias = Literal["cl100k_base", "estimate"]


@dataclass(frozen=True, slots=True)
class Quota:
    """What a vendor allows one account per minute; 0: not limited, or not known. `max_in_flight` None: not said."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_in_flight: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One model of one vendor. Prices are pico-USD per token (20,000: 0.02 USD a million); None: not known.

    `dimensions` is the width without asking, `sizes` are those that may be asked for (none: only that one).
    `matryoshka`: a head of the vector, brought back to unit length, is the vendor's own smaller vector.
    `normalised`: at which widths the vendor sends unit vectors; embedgate makes the others so. None: nobody says, and
    they stay as they are.
    `prompts`: what a text of an input type is told apart by, "" where only the vendor knows; no entry: not at all.
    `default_input_type`: what a text is that comes without one. `tiers` are quotas by the account's tier.
    """

    dimensions: int
    max_input_tokens: int
    sizes: Sequence[int] = ()
    matryoshka: bool = False
    normalised: Literal["always", "full width", "never"] | None = "always"
    tokenizer: Tokenizer = "estimate"
    price: int | None = None
    batch_price: int | None = None
    max_batch_items: int | None = None
    max_batch_tokens: int | None = None
    prompts: tuple[tuple[InputType, str], ...] = ()
    default_input_type: InputType | None = None
    tiers: Mapping[str, Quota] = field(default_factory=dict)
    shutdown: date | None = None
    created: int = 0
    owned_by: str = ""

    def offers(self, dimensions: int) -> bool:
        """Whether the vendor makes vectors of this width."""
        return dimensions == self.dimensions or dimensions in self.sizes
