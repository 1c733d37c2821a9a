"""What a wire dialect is: how one vendor is asked, how its answer reads, what its refusals mean, what it is known for.

Everything that only one vendor does stands in that vendor's file; `remote.py` does the rest for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

import msgspec

from app.domain import Space, Text
from app.errors import ProviderError
from app.providers.cards import ModelCard
from app.providers.refusals import Answer, by_status

Post: TypeAlias = Callable[["Ask"], Awaitable[Answer]]
"""One more exchange with the vendor, within the call's time."""


class Ask(NamedTuple):
    """A call: where below the base URL, and its JSON body."""

    path: str
    body: Mapping[str, object]


class Said(NamedTuple):
    """What a 2xx says, unchecked.

    An embedding is the JSON of a list of numbers or of a base64 string, not read yet; `places[i]` is the text that
    `embeddings[i]` answers (None: its position). `tokens` is what the vendor says it counted, `model` what it says
    answered.
    """

    embeddings: Sequence[msgspec.Raw]
    places: Sequence[int | None]
    tokens: object = None
    model: object = None


@dataclass(frozen=True, slots=True)
class Target:
    """What one deployment calls: the model's name on the wire, and the options that its dialect has in the settings.

    `card` is what is known of the model, None if nothing is. `names`: what a reply may call it (none: anything).
    """

    model: str
    card: ModelCard | None = None
    names: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)


class Dialect(ABC):
    """One vendor's wire; a subclass is the whole of what embedgate knows of it.

    `base_url` "": the operator has to say it. `max_batch_*` and `judged_spans_s` are how it is called unless the
    operator says otherwise. `counts_texts`: every text of a call counts as a request. `takes_token_ids`: ids of
    cl100k_base are understood as they are. `cuts`: it cuts long texts at the end when it is asked to. `cuts_silently`:
    it may do so unasked, without a word. `own_words`: input types have a field of their own, nothing stands in front
    of the text. `limit_headers` name requests and tokens per minute in an answer.
    """

    name: ClassVar[str]
    base_url: ClassVar[str] = ""
    needs_key: ClassVar[bool] = True
    models: ClassVar[Mapping[str, ModelCard]] = {}
    max_batch_items: ClassVar[int] = 2048
    max_batch_tokens: ClassVar[int] = 300_000
    judged_spans_s: ClassVar[tuple[float, ...]] = (60.0,)
    counts_texts: ClassVar[bool] = False
    takes_token_ids: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    cuts_silently: ClassVar[bool] = False
    own_words: ClassVar[bool] = False
    limit_headers: ClassVar[tuple[str, str]] = ("x-ratelimit-limit-requests", "x-ratelimit-limit-tokens")

    def __init__(self, target: Target) -> None:
        self.target = target

    @classmethod
    def terms(cls, model: str) -> ModelCard | None:
        """The card by whose prices, tiers and shutdown date a model is bought here: its own, unless it is resold."""
        return cls.models.get(model)

    def headers(self, key: str) -> dict[str, str]:
        """What carries the key."""
        return {"authorization": f"Bearer {key}"}

    def size(self, space: Space) -> int | None:
        """The width to ask for; None: not to be mentioned, since it is the model's own, or not known to be a choice."""
        card = self.target.card
        return None if card is None or space.dimensions == card.dimensions else space.dimensions

    async def check(self, texts: Sequence[Text], space: Space, post: Post) -> None:  # noqa: B027 — most need not
        """Asks what must be known before the call; raises InputRefused for what would be cut silently."""

    @abstractmethod
    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """The call for `texts`, which are all strings (the Space's prompt not added) or all token ids."""

    def read(self, content: bytearray) -> Said:
        """What a 2xx says; whatever msgspec raises means that it is malformed. Here: OpenAI's list."""
        return read_list(content)

    def refusal(self, answer: Answer) -> ProviderError:
        """What an answer that is no 2xx asks for."""
        return by_status(answer)


def prompted(texts: Sequence[Text], space: Space) -> list[Text]:
    """The texts with the Space's prompt in front, for models whose vendor does not add it."""
    return [space.prompt + text if isinstance(text, str) else text for text in texts]


# ── OpenAI's list of embeddings, which most vendors send ────────────────────────────────────────────────────────────


class _Item(msgspec.Struct):
    embedding: msgspec.Raw  # a view into the reply, so that reading it can wait for its slice
    index: int | None = None


class _List(msgspec.Struct):
    data: list[_Item]
    model: Any = None
    usage: Any = None


_list_decoder = msgspec.json.Decoder(_List)


def read_list(content: bytearray) -> Said:
    """`{"data": [{"embedding", "index"}], "model", "usage": {"prompt_tokens" or "total_tokens"}}`."""
    said = _list_decoder.decode(content)
    usage = said.usage if isinstance(said.usage, dict) else {}
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return Said([item.embedding for item in said.data], [item.index for item in said.data], tokens, said.model)
