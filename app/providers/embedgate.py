"""Hides how another embedgate is asked: like OpenAI, with input types; and how it tells of a model that it serves."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, ClassVar

import msgspec

from app.domain import InputType, Space, Text
from app.providers.cards import ModelCard
from app.providers.dialect import Ask
from app.providers.openai import OpenAI

_SpaceId = Annotated[str, msgspec.Meta(pattern="^[!-~]{1,40}$")]
_Width = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
_Spans = Annotated[list[tuple[_Width, _Width]], msgspec.Meta(max_length=64)]


class Embedgate(OpenAI):
    """Another embedgate; what a name means, its operator has decided, so nothing is known of any model."""

    name = "embedgate"
    base_url = ""
    needs_key = False
    own_words = True
    models: ClassVar[Mapping[str, ModelCard]] = {}

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        path, body = super().ask(texts, space)
        return Ask(path, body if space.input_type is None else {**body, "input_type": space.input_type})


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What an embedgate tells of a model beside OpenAI's fields, so that a client has to try no text.

    `space` is the id of the Space in which a request lies that says nothing more, `input_types` that of each input type
    that is told apart. `sizes` are the widths that may be asked for, in spans with both ends (none: only `dimensions`).
    `long_input` is what becomes of texts beyond `max_input_tokens`, in the settings' words. `tokenizer` None: one that
    clients do not have. `usd_per_million_tokens` None: not known.
    """

    space: _SpaceId
    input_types: dict[InputType, _SpaceId]
    dimensions: _Width
    sizes: _Spans
    unit_length: bool
    max_input_tokens: Annotated[int, msgspec.Meta(ge=1)]
    long_input: str
    tokenizer: str | None
    usd_per_million_tokens: Annotated[float, msgspec.Meta(ge=0)] | None

    @property
    def identity(self) -> str:
        """What tells the model from every other: another one under its name, or in its prompts, has another."""
        return "+".join(dict.fromkeys([self.space, *self.input_types.values()]))

    @property
    def card(self) -> ModelCard:
        """The same as a vendor publishes it; the server itself cuts, vectors and texts alike."""
        exact = self.tokenizer == "cl100k_base" and self.long_input == "error"  # else it takes longer texts than we do
        price = self.usd_per_million_tokens
        return ModelCard(
            dimensions=self.dimensions,
            max_input_tokens=self.max_input_tokens,
            sizes=tuple(chain.from_iterable(range(least, most + 1) for least, most in self.sizes)),
            normalised="always" if self.unit_length else None,
            tokenizer="cl100k_base" if exact else "estimate",
            price=None if price is None else round(price * 1_000_000),
            prompts=tuple((kind, "") for kind in self.input_types),
        )
