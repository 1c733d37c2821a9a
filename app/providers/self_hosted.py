"""Hides in what servers that speak like OpenAI differ from it: TEI, Infinity, vLLM, Ollama."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from app.domain import Space, Text
from app.providers.cards import ModelCard
from app.providers.dialect import Ask, Said, prompted
from app.providers.openai import OpenAI


class _Server(OpenAI):
    base_url = ""
    needs_key = False
    takes_token_ids = False  # they would read ids in their own model's vocabulary, without a word
    cuts = True
    models: ClassVar[Mapping[str, ModelCard]] = {}


_rows_decoder = msgspec.json.Decoder(list[msgspec.Raw])


class TextEmbeddingsInference(_Server):
    """TEI by its own route: on the one that is like OpenAI's it cuts long texts and cannot be told not to."""

    name = "tei"
    max_batch_items = 32
    too_long = re.compile(r"must have less than \d+ tokens")
    misconfigured = re.compile(r"`dimensions` should be")

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        body: dict[str, object] = {"inputs": prompted(texts, space), "truncate": space.truncation == "end"}
        return Ask("../embed", body)

    def read(self, content: bytearray) -> Said:
        """See `Dialect`; vectors and nothing else."""
        rows = _rows_decoder.decode(content)
        return Said(rows, [None] * len(rows))


class Infinity(_Server):
    """Infinity, which cuts long texts whatever it is told, and whose usage counts characters."""

    name = "infinity"
    cuts_silently = True
    misconfigured = re.compile(r"^Invalid model")

    def read(self, content: bytearray) -> Said:
        """See `Dialect`."""
        return super().read(content)._replace(tokens=None)


class VLLM(_Server):
    """vLLM, which refuses long texts unless it is told to cut them."""

    name = "vllm"
    misconfigured = re.compile(r"matryoshka", re.IGNORECASE)

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        path, body = super().ask(texts, space)
        return Ask(path, {**body, "truncate_prompt_tokens": -1} if space.truncation == "end" else body)


class _OllamaReply(msgspec.Struct):
    embeddings: list[msgspec.Raw]
    model: Any = None
    prompt_eval_count: Any = None


_ollama_decoder = msgspec.json.Decoder(_OllamaReply)


class Ollama(_Server):
    """Ollama by its own route: on the one that is like OpenAI's it cuts long texts and cannot be told not to."""

    name = "ollama"
    too_long = re.compile(r"exceeds (?:the |maximum )?context length")
    misconfigured = re.compile(r"does not support embeddings")

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`."""
        body: dict[str, object] = {
            "model": self.target.model,
            "input": prompted(texts, space),
            "truncate": space.truncation == "end",
        }
        return Ask("../api/embed", body)

    def read(self, content: bytearray) -> Said:
        """See `Dialect`."""
        said = _ollama_decoder.decode(content)
        return Said(said.embeddings, [None] * len(said.embeddings), said.prompt_eval_count, said.model)
