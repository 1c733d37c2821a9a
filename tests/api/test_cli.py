"""The command line as an operator meets it: in a process of its own, by exit code and output."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import __version__
from app.providers.cards import KNOWN_ON
from app.settings import CATALOG
from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator

COMMAND = (sys.executable, "-m", "app")
ROOT = Path(__file__).parents[2]
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDGATE_")}
ENVIRON["PYTHONPATH"] = str(ROOT)


def embedgate(*arguments: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end in `folder`."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=ENVIRON | {"EMBEDGATE_STORES__DATA_DIR": str(folder / "data")} | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        encoding="utf-8",
    )


def test_help_teaches_with_examples(tmp_path: Path) -> None:
    """The first screen names every command and has lines to copy."""
    shown = embedgate("--help", folder=tmp_path)
    assert shown.returncode == 0
    for said in ("serve", "check", "models", "curl http://127.0.0.1:8080/v1/embeddings", "EMBEDGATE_SERVER__PORT"):
        assert said in shown.stdout
    assert embedgate("serve", "--help", folder=tmp_path).returncode == 0
    assert "embedgate check --live --json | jq" in embedgate("check", "--help", folder=tmp_path).stdout
    assert "embedgate models --json | jq" in embedgate("models", "--help", folder=tmp_path).stdout


@pytest.mark.parametrize("command", ["embed", "index", "search"])
def test_every_option_is_shown_in_use(tmp_path: Path, command: str) -> None:
    """By an example in the command's own help."""
    told, _, options = embedgate(command, "--help", folder=tmp_path, COLUMNS="200").stdout.partition("\nOptions:\n")
    known = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", options, re.MULTILINE)
    assert len(known) > 5
    lines = "".join(line for line in told.splitlines() if line.startswith("      "))
    shown = re.findall(r"--[a-z-]+", lines) + re.findall(r" -\w ", lines)
    assert {*known} - {"--help", *shown} == set()


def test_a_terminal_without_unicode_shows_what_it_can(tmp_path: Path) -> None:
    """A prompt in another script is printed as TOML may spell it."""
    prompt = "\N{CJK UNIFIED IDEOGRAPH-554F}: "
    text = '[deployments.main]\ndialect = "openai"\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "bge"\n'
    text += f'[models.bge]\ndeployments = ["main"]\ndimensions = 384\nquery_prompt = "{prompt}"\n'
    (tmp_path / "embedgate.toml").write_text(text, "utf-8")
    shown = embedgate("check", folder=tmp_path, PYTHONIOENCODING="latin-1")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert 'query_prompt = "\\u554f: "' in shown.stdout


def test_version_is_one_line(tmp_path: Path) -> None:
    """`--version` needs no command."""
    shown = embedgate("--version", folder=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, f"embedgate {__version__}\n")


def test_check_prints_what_was_understood_with_keys_masked(tmp_path: Path) -> None:
    """A good configuration is shown whole, defaults included, without its keys."""
    (tmp_path / "embedgate.toml").write_text('[tenants.search]\napi_key = "env:SEARCH_KEY"\n')
    shown = embedgate("check", folder=tmp_path, SEARCH_KEY="sk-very-secret", EMBEDGATE_SERVER__PORT="9000")
    assert (shown.returncode, shown.stderr) == (0, "")
    for said in ("# embedgate.toml", "port = 9000", "[deployments.local]", "[tenants.search]", 'api_key = ["***"]'):
        assert said in shown.stdout
    assert "sk-very-secret" not in shown.stdout


@pytest.mark.parametrize("command", ["check", "models", "serve"])
def test_a_bad_configuration_is_told_line_by_line_and_ends_with_2(tmp_path: Path, command: str) -> None:
    """No command shows a traceback for what the operator must mend."""
    (tmp_path / "my.toml").write_text("[server]\nprot = 1\nport = -1\n")
    shown = embedgate(command, "--config", "my.toml", folder=tmp_path)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == (
        "embedgate: my.toml:2: server.prot: unknown key; did you mean 'port'?\n"
        "embedgate: my.toml:3: server.port: must be at least 0, not -1\n"
    )


def test_check_opens_what_serve_would_open(tmp_path: Path) -> None:
    """A directory that is no model is found by `check`, not at the first start."""
    (tmp_path / "embedgate.toml").write_text(
        '[deployments.mine]\ndialect = "local"\npath = "nothing"\n[models.mine]\ndeployments = ["mine"]\n'
    )
    shown = embedgate("check", folder=tmp_path)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert len(shown.stderr.splitlines()) == 1
    assert "nothing is no model" in shown.stderr


def test_models_are_listed_for_people_and_for_programs(tmp_path: Path) -> None:
    """What is served, deployments in order, then the dated catalog: as tables or as one JSON object per line."""
    (tmp_path / "embedgate.toml").write_text(
        '[deployments.local]\ndialect = "local"\n[deployments.a]\ndialect = "openai"\napi_key = "k"\n'
        'model = "text-embedding-3-small"\n[deployments.b]\ndialect = "openai"\napi_key = "k"\n'
        'usd_per_million_tokens = 0.019\nmodel = "text-embedding-3-small"\n[models.mini]\ndeployments = ["local"]\n'
        '[models.small]\ndeployments = ["b", "a"]\n'
    )
    shown = embedgate("models", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    served, title, catalog = shown.stdout.rstrip().split("\n\n")
    assert [re.split(r"  +", line) for line in served.splitlines()] == [
        ["MODEL", "DIMENSIONS", "MAX INPUT TOKENS", "DEPLOYMENTS", "USD PER MILLION", "PRICES FROM"],
        ["mini", "384", "256", "local", "0", "local"],
        ["small", "1536", "8192", "b, a", "0.019, 0.02", f"configured, catalog of {KNOWN_ON}"],
    ]
    assert title == f"The catalog as of {KNOWN_ON}:"
    assert len(catalog.splitlines()) == len(CATALOG) + 1
    listed = [json.loads(line) for line in embedgate("models", "--json", folder=tmp_path).stdout.splitlines()]
    assert [row for row in listed if "deployments" in row] == [
        {"model": "mini", "dimensions": 384, "max_input_tokens": 256, "deployments": ["local"],
         "usd_per_million": [0.0], "prices_from": ["local"]},
        {"model": "small", "dimensions": 1536, "max_input_tokens": 8192, "deployments": ["b", "a"],
         "usd_per_million": [0.019, 0.02], "prices_from": ["configured", f"catalog of {KNOWN_ON}"]},
    ]  # fmt: skip
    assert [(row["dialect"], row["model"]) for row in listed if "dialect" in row] == list(CATALOG)


def test_check_warns_of_what_can_be_served_but_deserves_a_look(tmp_path: Path) -> None:
    """On the standard error, one line each; the configuration is good all the same."""
    (tmp_path / "embedgate.toml").write_text(
        '[deployments.d]\ndialect = "openai"\napi_key = "k"\nmodel = "text-embedding-3-small"\n'
        '[models.m]\ndeployments = ["d"]\n'
    )
    shown = embedgate("check", folder=tmp_path)
    assert shown.returncode == 0
    assert shown.stdout.startswith("# embedgate.toml")
    (warning,) = shown.stderr.splitlines()
    assert warning.startswith("embedgate: warning: deployments.d.tier: no limits are set")


# ── deployments that are called ─────────────────────────────────────────────────────────────────────────────────────


async def live(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`embedgate check --live`, while the emulators of this process answer."""
    return await asyncio.to_thread(embedgate, "check", "--live", *arguments, folder=folder)


def configure(folder: Path, base_url: str, *, key: str = "sk-emulator-key", tokens_per_minute: int = 20_000) -> None:
    """One deployment that is believed to take so many tokens."""
    (folder / "embedgate.toml").write_text(
        f'[deployments.main]\ndialect = "openai"\nbase_url = "{base_url}"\napi_key = "{key}"\n'
        f'model = "text-embedding-3-small"\ntokens_per_minute = {tokens_per_minute}\n'
        '[models.small]\ndeployments = ["main"]\n'
    )


async def test_a_live_check_calls_every_deployment_and_compares_with_what_was_accepted(tmp_path: Path) -> None:
    """The first answer is accepted, the second one compared with it; the log stays out of both."""
    async with OpenAIEmulator() as emulator:
        configure(tmp_path, emulator.base_url)
        shown = await live(tmp_path)
        assert (shown.returncode, shown.stderr) == (0, "")
        head, row = (re.split(r"  +", line) for line in shown.stdout.splitlines())
        assert head[:5] == ["MODEL", "DEPLOYMENT", "LATENCY MS", "DIMENSIONS", "COSINE"]
        assert (row[:2], row[3:5]) == (["small", "main"], ["1536", "-"])
        told = await live(tmp_path, "--json")
        (found,) = [json.loads(line) for line in told.stdout.splitlines()]
        assert told.returncode == 0
        assert (found["cosine"], found["dimensions"], found["usd_per_million"]) == (1.0, 1536, 0.02)
        assert (found["tokens_configured"], found["wrong"]) == (20_000, [])
        assert found["latency_ms"] >= 0
        again = json.loads((await live(tmp_path, "--json", "--accept")).stdout)
        assert (again["cosine"], again["wrong"]) == (None, [])
    assert len(emulator.arrivals) == 3


async def test_a_live_check_ends_with_1_when_something_is_wrong(tmp_path: Path) -> None:
    """A key that is not accepted, or a smaller quota than configured, in our words; as a table or as JSON."""
    async with OpenAIEmulator(judge=Judge(tokens_per_minute=30_000)) as emulator:
        configure(tmp_path, emulator.base_url, key="sk-another-key")
        shown = await live(tmp_path)
        configure(tmp_path, emulator.base_url, tokens_per_minute=50_000)
        told = await live(tmp_path, "--json")
    assert (shown.returncode, told.returncode) == (1, 1)
    assert "BadCredential: HTTP 401" in shown.stdout
    assert "sk-another-key" not in f"{shown}{told}"
    assert json.loads(told.stdout)["wrong"] == ["the account has 30000 tokens per minute, 50000 are configured"]


def test_options_of_a_live_check_need_it(tmp_path: Path) -> None:
    """`--accept` alone would accept nothing."""
    for option in ("--accept", "--json"):
        shown = embedgate("check", option, folder=tmp_path)
        assert (shown.returncode, shown.stdout) == (2, "")
        assert "belong to --live" in shown.stderr


def test_a_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    """Exit code 2, and the port is named."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        shown = embedgate("serve", "--port", str(port), folder=tmp_path)
    assert shown.returncode == 2
    (line,) = [line for line in shown.stderr.splitlines() if not line.startswith("{")]
    assert str(port) in line


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A service on any free port, and the lines with which it announced itself."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0"],
        cwd=folder,
        env=ENVIRON | {"EMBEDGATE_STORES__DATA_DIR": str(folder / "data")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, [process.stdout.readline() for _ in range(3)]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_announces_itself_answers_and_leaves_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """What it serves, the base URL, and a line to try that works; Ctrl-C and SIGTERM end with exit code 0."""
    with serving(tmp_path) as (process, (serves, base, attempt)):
        assert "all-MiniLM-L6-v2" in serves
        url = base.split()[-1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
        assert f"curl {url}/embeddings" in attempt
        body = re.search(r"-d '(.*)'", attempt)
        assert body is not None
        asked = urllib.request.Request(
            f"{url}/embeddings", body[1].encode(), headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert len(json.load(answer)["data"][0]["embedding"]) == 384
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
