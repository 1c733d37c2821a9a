"""What embedgate speaks: one file per wire dialect, what the remote ones share, and the model on this machine."""

from collections.abc import Mapping
from types import MappingProxyType

from app.providers.azure import Azure
from app.providers.cohere import Cohere
from app.providers.dialect import Dialect
from app.providers.gemini import Gemini
from app.providers.jina import Jina
from app.providers.mistral import Mistral
from app.providers.openai import OpenAI
from app.providers.self_hosted import VLLM, Infinity, Ollama, TextEmbeddingsInference
from app.providers.voyage import Voyage

DIALECTS: Mapping[str, type[Dialect]] = MappingProxyType(
    {dialect.name: dialect for dialect in (OpenAI, Azure, Gemini, Voyage, Cohere, Mistral, Jina)}
)
"""The wires that a deployment may name as its `dialect`."""

SERVERS: Mapping[str, type[Dialect]] = MappingProxyType(
    {server.name: server for server in (TextEmbeddingsInference, Infinity, VLLM, Ollama)}
)
"""What a deployment of dialect `openai` may name as its `server`, because it speaks like OpenAI only nearly."""
