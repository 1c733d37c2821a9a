"""The composition root: what the configuration names is what serves."""

import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from app.domain import ANONYMOUS, EmbeddingRequest
from app.runtime import Runtime
from app.settings import load
from tests.emulators.openai import OpenAIEmulator

CONFIGURATION = """
[deployments.cheap]
dialect = "openai"
base_url = "{cheap}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
[deployments.dear]
dialect = "openai"
base_url = "{dear}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
[models.batch]
deployments = ["cheap"]
[models.search]
deployments = ["dear"]
"""
BOTH = CONFIGURATION.replace('["dear"]', '["dear", "cheap"]')
STATED = CONFIGURATION.replace("[models.batch]", "breaker_failures_in_a_row = 3\n[models.batch]")


async def test_two_names_for_one_space_keep_to_their_own_deployments(tmp_path: Path) -> None:
    """They share what was bought, but each buys where the operator said."""
    async with OpenAIEmulator() as cheap, OpenAIEmulator() as dear:
        path = tmp_path / "embedgate.toml"
        path.write_text(CONFIGURATION.format(cheap=cheap.base_url, dear=dear.base_url))
        async with Runtime(load(path, {})) as runtime:

            async def ask(model: str, text: str) -> tuple[str, ...]:
                request = EmbeddingRequest(ANONYMOUS, model, (text,), time.monotonic() + 10)
                return (await runtime.gateway.embed(request)).deployments

            assert await ask("batch", "first") == ("cheap",)
            assert await ask("search", "second") == ("dear",)
            assert await ask("search", "first") == ()
            scraped = generate_latest(runtime.telemetry.registry).decode()
            assert "embedgate_cache_bytes 1" in scraped  # two vectors of 6,144 bytes, and their keys
    assert (len(cheap.arrivals), len(dear.arrivals)) == (1, 1)


@pytest.mark.parametrize(
    ("text", "cheap", "dear"),
    [
        (CONFIGURATION, (20, 1.0), (20, 1.0)),
        (BOTH, (5, 0.5), (5, 0.5)),
        (STATED, (20, 1.0), (3, 1.0)),
    ],
    ids=["alone", "together", "stated"],
)
async def test_a_lone_deployment_is_left_alone_later(
    tmp_path: Path, text: str, cheap: tuple[int, float], dear: tuple[int, float]
) -> None:
    """Where nobody stands in, half of the answers are better than none; what the file says holds in any case."""
    path = tmp_path / "embedgate.toml"
    path.write_text(text.format(cheap="http://127.0.0.1:9/v1", dear="http://127.0.0.1:9/v1"))
    async with Runtime(load(path, {})) as runtime:
        policies = {name: gate.deployment.breaker for name, gate in runtime.gateway._parts.gates.items()}
    for name, expected in (("cheap", cheap), ("dear", dear)):
        assert (policies[name].failures_in_a_row, policies[name].failure_ratio) == expected
