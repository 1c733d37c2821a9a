"""Every Provider there is, each before what it calls: one line here holds an implementation to the whole contract."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.domain import InputType, Space
from app.providers.azure import Azure
from app.providers.cohere import Cohere
from app.providers.dialect import Dialect
from app.providers.embedgate import Embedgate
from app.providers.gemini import Gemini
from app.providers.jina import Jina
from app.providers.local import LocalModel, default_model
from app.providers.mistral import Mistral
from app.providers.openai import OpenAI
from app.providers.self_hosted import VLLM, Infinity, Ollama, TextEmbeddingsInference
from app.providers.voyage import Voyage
from tests.contract import proxies
from tests.contract.subject import Adapter, Subject
from tests.emulators.azure import AzureEmulator, DatedAzureEmulator
from tests.emulators.cohere import CohereEmulator
from tests.emulators.gemini import GeminiEmulator
from tests.emulators.infinity import InfinityEmulator
from tests.emulators.jina import JinaEmulator
from tests.emulators.mistral import MistralEmulator
from tests.emulators.ollama import OllamaEmulator
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Emulator
from tests.emulators.tei import TEIEmulator
from tests.emulators.vllm import VLLMEmulator
from tests.emulators.voyage import VoyageEmulator
from tests.remote import remote


def vendor(
    wire: type[Dialect],
    emulator: type[Emulator],
    model: str,
    width: int,
    *,
    input_type: InputType | None = None,
    **options: str,
) -> Adapter:
    """The dialect `wire` at its emulator, for vectors of `width`."""

    @asynccontextmanager
    async def made() -> AsyncIterator[Subject]:
        async with emulator() as running:
            provider = remote(wire, running.base_url, running.api_key, model, options=options, max_in_flight=4)
            stranger = remote(wire, running.base_url, "another-key", model, options=options)
            try:
                yield Subject(provider, Space(model, width, input_type=input_type), running, stranger)
            finally:
                await provider.aclose()
                await stranger.aclose()

    return made


@asynccontextmanager
async def local() -> AsyncIterator[Subject]:
    """The packaged model, on this machine."""
    facts = default_model()
    provider = LocalModel(facts)
    try:
        yield Subject(provider, facts.space("all-MiniLM-L6-v2"))
    finally:
        await provider.aclose()


ADAPTERS: dict[str, Adapter] = {
    "local": local,
    "openai": vendor(OpenAI, OpenAIEmulator, "text-embedding-3-small", 1536),
    "embedgate alone": vendor(Embedgate, OpenAIEmulator, "text-embedding-3-small", 1536),
    "azure": vendor(Azure, AzureEmulator, "text-embedding-3-small", 1536),
    "azure dated": vendor(Azure, DatedAzureEmulator, "text-embedding-3-large", 256, api_version="2024-10-21"),
    "tei": vendor(TextEmbeddingsInference, TEIEmulator, TEIEmulator.model, 1536),
    "infinity": vendor(Infinity, InfinityEmulator, InfinityEmulator.model, 1536),
    "vllm": vendor(VLLM, VLLMEmulator, VLLMEmulator.model, 1536),
    "ollama": vendor(Ollama, OllamaEmulator, OllamaEmulator.model, 1536),
    "cohere": vendor(Cohere, CohereEmulator, "embed-v4.0", 1536),
    "cohere cut": vendor(Cohere, CohereEmulator, "embed-v5.0-fast", 256, input_type="query"),
    "jina": vendor(Jina, JinaEmulator, "jina-embeddings-v3", 1024, input_type="document"),
    "jina cut": vendor(Jina, JinaEmulator, "jina-embeddings-v5-text-small", 256),
    "gemini": vendor(Gemini, GeminiEmulator, "gemini-embedding-2", 3072),
    "gemini cut": vendor(Gemini, GeminiEmulator, "gemini-embedding-001", 768, input_type="document"),
    "voyage": vendor(Voyage, VoyageEmulator, "voyage-4", 1024, input_type="document"),
    "voyage cut": vendor(Voyage, VoyageEmulator, "voyage-3-large", 256),
    "mistral": vendor(Mistral, MistralEmulator, "mistral-embed", 1024),
    "mistral cut": vendor(Mistral, MistralEmulator, "codestral-embed", 256),
}

ALONE = frozenset({"local"})
"""Those that call nobody."""

PROXIED = {"embedgate": proxies.embedgate} | ({"litellm": proxies.litellm} if proxies.LITELLM else {})
"""Those whose stand-in is behind a server that treats its failures in its own way."""

ADAPTERS |= PROXIED
