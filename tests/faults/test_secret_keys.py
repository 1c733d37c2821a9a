"""A provider's key goes into a header of its calls, and nowhere else that anybody can look."""

import asyncio
import traceback
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from app.domain import ANONYMOUS, EmbeddingRequest
from app.errors import ConfigurationError, EmbedgateError
from app.runtime import Runtime
from app.settings import load
from tests.emulators import faults
from tests.emulators.azure import AzureEmulator
from tests.emulators.cohere import CohereEmulator
from tests.emulators.faults import Fault
from tests.emulators.gemini import GeminiEmulator
from tests.emulators.jina import JinaEmulator
from tests.emulators.mistral import MistralEmulator
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Emulator
from tests.emulators.voyage import VoyageEmulator

KEY = "sk-shown-to-nobody-5f2c81"
ECHO = faults.error_body(f"Look at this: {KEY}", KEY, param=KEY, code=KEY)
VENDORS: dict[str, tuple[type[Emulator], str]] = {
    "openai": (OpenAIEmulator, "text-embedding-3-small"),
    "azure": (AzureEmulator, "text-embedding-3-small"),
    "cohere": (CohereEmulator, "embed-v4.0"),
    "gemini": (GeminiEmulator, "gemini-embedding-001"),
    "jina": (JinaEmulator, "jina-embeddings-v3"),
    "mistral": (MistralEmulator, "mistral-embed"),
    "voyage": (VoyageEmulator, "voyage-4"),
}
FAULTS: dict[str, Fault] = {
    "hang": faults.hang,
    "reset": faults.reset,
    "half": faults.half_body,
    "malformed": faults.body(ECHO),
    "full": faults.status(429, ECHO, {"retry-after": "60"}),
    "refused": faults.status(400, ECHO),
    "forbidden": faults.status(403, ECHO),
    "unknown": faults.status(404, ECHO),
    "broken": faults.status(500, ECHO, {"x-request-id": KEY}),
    "elsewhere": faults.status(307, ECHO, {"location": f"/{KEY}"}),
}


def configuration(vendor: str, model: str, emulators: dict[str, Emulator], log: Path) -> str:
    """A deployment, and a model of the same name, for each emulator."""
    parts = [f"[server]\nlog_file = '{log}'"]
    for name, emulator in emulators.items():
        timeout_s = 0.1 if name == "hang" else 10
        parts.append(
            f"[deployments.{name}]\ndialect = '{vendor}'\nbase_url = '{emulator.base_url}'\napi_key = '{KEY}'\n"
            f"model = '{model}'\nattempts = 1\ntimeout_s = {timeout_s}\n[models.{name}]\ndeployments = ['{name}']"
        )
    return "\n".join(parts)


def everything(error: BaseException) -> str:
    """All that an exception and those behind it could be made to say."""
    said = "".join(traceback.format_exception(error))
    behind: BaseException | None = error
    while behind is not None:
        said += f"{behind} {behind!r} {vars(behind)}"
        behind = behind.__cause__ or behind.__context__
    return said


@pytest.mark.parametrize("vendor", list(VENDORS))
async def test_whatever_a_provider_does_its_key_stays_hidden(
    vendor: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No error, log line, metric, URL or body holds it, even where the provider itself repeats it."""
    caplog.set_level("DEBUG")
    kind, model = VENDORS[vendor]
    path, log = tmp_path / "embedgate.toml", tmp_path / "log"
    async with AsyncExitStack() as stack:
        emulators = {name: await stack.enter_async_context(kind(api_key=KEY)) for name in ("sound", "wrong", *FAULTS)}
        emulators["wrong"].api_key = "another-key"
        for name, fault in FAULTS.items():
            emulators[name].inject(fault)
        path.write_text(configuration(vendor, model, emulators, log))
        runtime = await stack.enter_async_context(Runtime(load(path, {})))

        async def ask(name: str) -> EmbedgateError | None:
            deadline_s = asyncio.get_running_loop().time() + 30
            try:
                await runtime.gateway.embed(EmbeddingRequest(ANONYMOUS, name, (f"a text for {name}",), deadline_s))
            except EmbedgateError as error:
                return error
            return None

        failed = dict(zip(emulators, await asyncio.gather(*map(ask, emulators)), strict=True))
        scraped = generate_latest(runtime.telemetry.registry).decode()
        shown = repr(runtime.settings) + repr(vars(runtime))
    assert [name for name, error in failed.items() if error is None] == ["sound"]
    for place in (*(everything(error) for error in failed.values() if error), scraped, shown, caplog.text):
        assert KEY not in place
    written = log.read_text() + "".join(capfd.readouterr())
    assert all(f'"{name}"' in written for name in failed)
    assert KEY not in written
    arrivals = [arrival for emulator in emulators.values() for arrival in emulator.arrivals]
    assert arrivals
    for arrival in arrivals:
        assert KEY not in f"{arrival.path} {arrival.body}"
        assert sum(KEY in value for value in arrival.headers.values()) == 1


@pytest.mark.parametrize(
    "line",
    [
        f"api_key = '{KEY}\u00e9'",
        f"api_key = '{KEY} {KEY}'",
        f"api_key = ['{KEY}']",
        f"api_key = {{ key = '{KEY}' }}",
        f"api_key = {KEY}",
        f"api_key = '{KEY}",
        f"api_kye = '{KEY}'",
        f"timeout_s = '{KEY}'",
        f"base_url = 'https://me:{KEY}@provider.example/v1'",
        f"base_url = 'https://provider.example/v1?key={KEY}'",
        f"api_key = 'file:/nowhere'\ntier = 'none'\nmax_in_flight = '{KEY}'",
    ],
)
def test_a_configuration_is_refused_without_its_key(line: str, tmp_path: Path) -> None:
    """However a key was written wrong, the error says where and not what."""
    path = tmp_path / "embedgate.toml"
    path.write_text(
        f"[deployments.main]\ndialect = 'openai'\nmodel = 'text-embedding-3-small'\n{line}\n"
        "[models.small]\ndeployments = ['main']\n"
    )
    with pytest.raises(ConfigurationError) as refused:
        load(path, {})
    assert "embedgate.toml" in str(refused.value)
    assert KEY not in everything(refused.value)
