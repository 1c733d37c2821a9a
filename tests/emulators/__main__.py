"""Runs an emulator as its own process: `python -m tests.emulators openai --port 9000 --latency-ms 50`."""

import argparse

import uvicorn

from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator


def main() -> None:
    """Serves on loopback until a signal."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulators")
    parser.add_argument("emulator", choices=["openai"])
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--api-key", default=None, help="none: every key is accepted")
    parser.add_argument("--constant", action="store_true", help="one vector for every text, for load")
    parser.add_argument("--floats", action="store_true", help="never answer base64")
    parser.add_argument("--rpm", type=int, default=0)
    parser.add_argument("--tpm", type=int, default=0)
    given = parser.parse_args()
    emulator = OpenAIEmulator(
        api_key=given.api_key,
        latency_s=given.latency_ms / 1000,
        constant=given.constant,
        base64=not given.floats,
        judge=Judge(given.rpm, given.tpm),
    )
    uvicorn.run(emulator, port=given.port, log_level="warning", access_log=False, lifespan="off", interface="asgi3")


main()
