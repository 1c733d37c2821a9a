"""Hides what the stand-ins for servers that one starts oneself share: one model, one length, no limits of their own."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tests.emulators.faults import Wire
from tests.emulators.judge import OverLimit
from tests.emulators.server import Asked, Emulator, RefusalError, Text, vocabulary
from tests.identity import identifying_vector


class SelfHosted(Emulator):
    """A server of one model; see `Emulator`. What it does not limit itself, a proxy in front of it may."""

    model: ClassVar[str] = "Alibaba-NLP/gte-Qwen2-1.5B-instruct"
    width: ClassVar[int] = 1536
    max_input_tokens: ClassVar[int] = 512

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return self.width

    def vector(self, model: str, text: Text, width: int) -> npt.NDArray[np.float32]:
        """See `Emulator`; token ids are read in the model's own vocabulary, so they are another text."""
        return super().vector(model, text, width) if isinstance(text, str) else identifying_vector(text, model, width)

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`; as a proxy says it."""
        return RefusalError(429, b"<html><h1>429 Too Many Requests</h1></html>", {"content-type": "text/html"})

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Whether the key is right, or none is asked for."""
        return self.api_key is None or headers.get("authorization") == f"Bearer {self.api_key}"

    def first_too_long(self, texts: list[Text]) -> int | None:
        """How many tokens the first text counts that is too long."""
        return next((tokens for tokens in map(self.count, texts) if tokens > self.max_input_tokens), None)

    def cut(self, text: Text) -> Text:
        """The head of a text that the model reads."""
        if not isinstance(text, str):
            return text[: self.max_input_tokens]
        return vocabulary().decode(vocabulary().encode_ordinary(text)[: self.max_input_tokens])

    async def embed(
        self, wire: Wire, given: dict[str, Any], texts: list[Text], *, headers: dict[str, str], path: str
    ) -> None:
        """Answers a legal call, each text cut to what the model reads."""
        read = [self.cut(text) for text in texts]
        tokens = sum(map(self.count, read))
        asked = Asked(self.model, read, tokens, given.get("dimensions") or self.width, given, headers, path)
        self.note(asked)
        await self.honour(wire, asked)


def texts_of(value: object, *, ids: bool) -> list[Text] | None:
    """The texts of an `input`; None for what is none, or for token ids where there are none."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(text, str) for text in value):
        return list(value)
    if ids and all(type(token) is int for token in value):
        return [tuple(value)]
    if ids and all(isinstance(text, list) and all(type(token) is int for token in text) for text in value):
        return [tuple(text) for text in value]
    return None
