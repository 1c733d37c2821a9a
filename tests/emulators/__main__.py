"""Runs an emulator as its own process: `python -m tests.emulators voyage --port 9000 --latency-ms 50`."""

import argparse

import uvicorn

from tests.emulators.azure import AzureEmulator, DatedAzureEmulator
from tests.emulators.cohere import CohereEmulator
from tests.emulators.gemini import GeminiEmulator
from tests.emulators.infinity import InfinityEmulator
from tests.emulators.jina import JinaEmulator
from tests.emulators.judge import Judge
from tests.emulators.mistral import MistralEmulator
from tests.emulators.ollama import OllamaEmulator
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Emulator
from tests.emulators.tei import TEIEmulator
from tests.emulators.vllm import VLLMEmulator
from tests.emulators.voyage import VoyageEmulator

EMULATORS: dict[str, type[Emulator]] = {
    "openai": OpenAIEmulator,
    "azure": AzureEmulator,
    "azure-dated": DatedAzureEmulator,
    "gemini": GeminiEmulator,
    "voyage": VoyageEmulator,
    "cohere": CohereEmulator,
    "mistral": MistralEmulator,
    "jina": JinaEmulator,
    "tei": TEIEmulator,
    "infinity": InfinityEmulator,
    "vllm": VLLMEmulator,
    "ollama": OllamaEmulator,
}


def main() -> None:
    """Serves on loopback until a signal."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulators")
    parser.add_argument("emulator", choices=EMULATORS)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--api-key", default=None, help="none: every key is accepted")
    parser.add_argument("--constant", action="store_true", help="one vector for every text, for load")
    parser.add_argument("--floats", action="store_true", help="openai only: never answer base64")
    parser.add_argument("--rpm", type=int, default=0, help="requests per minute that its judge allows; 0: any")
    parser.add_argument("--tpm", type=int, default=0, help="tokens per minute")
    given = parser.parse_args()
    emulator = EMULATORS[given.emulator](api_key=given.api_key, judge=Judge(given.rpm, given.tpm))
    emulator.latency_s = given.latency_ms / 1000
    emulator.constant = given.constant
    if isinstance(emulator, OpenAIEmulator):
        emulator.base64 = not given.floats
    print(f"base URL  http://127.0.0.1:{given.port}{emulator.prefix}", flush=True)
    uvicorn.run(emulator, port=given.port, log_level="warning", access_log=False, lifespan="off", interface="asgi3")


main()
