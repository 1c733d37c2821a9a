"""Hides in what servers that speak like OpenAI differ from it: TEI, Infinity, vLLM, Ollama."""

from collections.abc import Mapping
from typing import ClassVar

from app.providers.cards import ModelCard
from app.providers.openai import OpenAI


class _Server(OpenAI):
    base_url = ""
    needs_key = False
    takes_token_ids = False
    models: ClassVar[Mapping[str, ModelCard]] = {}


class TextEmbeddingsInference(_Server):
    """See the module."""

    name = "tei"
    max_batch_items = 32
    cuts_silently = True


class Infinity(_Server):
    """See the module."""

    name = "infinity"


class VLLM(_Server):
    """See the module."""

    name = "vllm"


class Ollama(_Server):
    """See the module."""

    name = "ollama"
    cuts_silently = True
