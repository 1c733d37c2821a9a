"""Servers that we call although they stand in front of OpenAI: embedgate itself, and LiteLLM's proxy."""

import asyncio
import atexit
import functools
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from app.domain import InputType, Space
from app.providers.dialect import Dialect
from app.providers.embedgate import Embedgate
from app.providers.openai import OpenAI
from tests.api.conftest import serving
from tests.contract.subject import Subject
from tests.emulators.openai import OpenAIEmulator
from tests.remote import remote

LITELLM = os.environ.get("EMBEDGATE_TEST_LITELLM", "")
"""LiteLLM's command, where it is installed (`make trial-proxy`)."""

_MODEL, _WIDTH, _KEY = "text-embedding-3-small", 1536, "sk-proxy-key"

_EMBEDGATE = """
[deployments.inner]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
attempts = 1
[models.text-embedding-3-small]
deployments = ["inner"]
[tenants.outer]
api_key = "sk-proxy-key"
"""

_PROXY = """
model_list:
  - model_name: text-embedding-3-small
    litellm_params:
      model: openai/text-embedding-3-small
      api_base: http://127.0.0.1:{port}/v1
      api_key: sk-emulator-key
      max_retries: 0
general_settings:
  master_key: sk-proxy-key
litellm_settings:
  num_retries: 0
router_settings:
  num_retries: 0
  disable_cooldowns: true
"""


@asynccontextmanager
async def embedgate() -> AsyncIterator[Subject]:
    """One embedgate in front of another, in its own dialect."""
    with tempfile.TemporaryDirectory() as folder:
        async with OpenAIEmulator() as upstream:
            text = _EMBEDGATE.format(upstream=upstream.base_url)
            async with (
                serving(Path(folder), text) as (url, *_),
                _called(Embedgate, f"{url}/v1", upstream, input_type="query") as subject,
            ):
                yield subject


@asynccontextmanager
async def litellm() -> AsyncIterator[Subject]:
    """LiteLLM's proxy in front of the stand-in; it is started once."""
    url, port = await asyncio.to_thread(_proxy)
    upstream = OpenAIEmulator()
    upstream.port = port
    async with upstream, _called(OpenAI, url, upstream) as subject:
        yield subject


@asynccontextmanager
async def _called(
    wire: type[Dialect], base_url: str, upstream: OpenAIEmulator, *, input_type: InputType | None = None
) -> AsyncIterator[Subject]:
    provider = remote(wire, base_url, _KEY, _MODEL, max_in_flight=4)
    stranger = remote(wire, base_url, "another-key", _MODEL)
    try:
        yield Subject(provider, Space(_MODEL, _WIDTH, input_type=input_type), upstream, stranger)
    finally:
        await provider.aclose()
        await stranger.aclose()


@functools.cache
def _proxy() -> tuple[str, int]:
    """The running proxy's base URL, and the port on which it looks for OpenAI."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        own, upstream = one.getsockname()[1], other.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(_PROXY.format(port=upstream))
    command = [LITELLM, "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(own)]
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=folder)
    atexit.register(process.terminate)
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{own}/health/liveliness", trust_env=False, timeout=1).raise_for_status()
        except httpx.HTTPError:
            if process.poll() is not None:
                break
            time.sleep(0.2)
        else:
            return f"http://127.0.0.1:{own}/v1", upstream
    raise RuntimeError((folder / "log").read_text("utf-8", "replace")[-2000:])
