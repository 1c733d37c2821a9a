"""What embedgate speaks: one file per wire dialect, what the remote ones share, and the model on this machine."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from app.providers.azure import Azure
from app.providers.cohere import Cohere
from app.providers.dialect import Dialect
from app.providers.embedgate import Embedgate
from app.providers.gemini import Gemini
from app.providers.gemini_batch import GeminiBatches
from app.providers.http import Endpoint
from app.providers.jina import Jina
from app.providers.mistral import Mistral
from app.providers.openai import OpenAI
from app.providers.openai_batch import OpenAIBatches, VoyageBatches
from app.providers.self_hosted import VLLM, Infinity, Ollama, TextEmbeddingsInference
from app.providers.vendor_batches import VendorBatches
from app.providers.voyage import Voyage

DIALECTS: Mapping[str, type[Dialect]] = MappingProxyType(
    {dialect.name: dialect for dialect in (OpenAI, Azure, Gemini, Voyage, Cohere, Mistral, Jina, Embedgate)}
)
"""The wires that a deployment may name as its `dialect`."""

SERVERS: Mapping[str, type[Dialect]] = MappingProxyType(
    {server.name: server for server in (TextEmbeddingsInference, Infinity, VLLM, Ollama)}
)
"""What a deployment of dialect `openai` may name as its `server`, because it speaks like OpenAI only nearly."""

BATCHES: Mapping[type[Dialect], type[VendorBatches]] = MappingProxyType(
    {OpenAI: OpenAIBatches, Gemini: GeminiBatches, Voyage: VoyageBatches}
)
"""How the vendor's own batches are ordered, for those who have any."""


def batch_provider(dialect: Dialect, connect: Callable[[], Endpoint]) -> VendorBatches | None:
    """Who orders the vendor's own batches for a deployment of this very dialect; None: the vendor has none.

    The endpoint is theirs alone, and its `read_timeout_s` is all that ends a silent download. Whether the vendor is
    who answers there, and not somebody who speaks alike, is for the caller to know.
    """
    kind = BATCHES.get(type(dialect))
    return None if kind is None else kind(dialect, connect())
