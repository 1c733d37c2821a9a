"""A vendor is one small file that says only what that vendor does."""

import ast
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.domain import Space, Text
from app.errors import Throttled
from app.providers import DIALECTS, SERVERS
from app.providers.cards import ModelCard
from app.providers.dialect import Ask, Dialect, Target
from app.providers.refusals import Answer
from tests.contract.adapters import ADAPTERS, PROXIED

WIRES = {**DIALECTS, **SERVERS}


def file_of(wire: type[Dialect]) -> Path:
    """Where it is written."""
    return Path(inspect.getfile(wire))


def test_the_smallest_vendor_needs_no_more_than_120_lines() -> None:
    """As the README says; and no vendor needs more than twice that."""
    lines = {name: len(file_of(wire).read_text().splitlines()) for name, wire in WIRES.items()}
    assert min(lines.values()) <= 120
    assert max(lines.values()) <= 240


@pytest.mark.parametrize("name", sorted(WIRES))
def test_a_vendor_knows_no_other_vendor(name: str) -> None:
    """Its file imports what all share, and OpenAI's where it speaks like OpenAI."""
    tree = ast.parse(file_of(WIRES[name]).read_text())
    ours = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    shared = {"cards", "dialect", "refusals", "openai"}
    assert {module.split(".")[2] for module in ours if module.startswith("app.providers.")} <= shared


@pytest.mark.parametrize("name", sorted(WIRES))
def test_every_vendor_has_a_sheet_and_stands_in_the_contract_suite(name: str) -> None:
    """None is skipped; embedgate needs no sheet of what it says, since it is there to be asked."""
    assert name in ADAPTERS
    assert name in PROXIED or (Path(__file__).parents[1] / "emulators" / "sheets" / f"{name}.txt").is_file()


def test_the_readmes_vendor_is_one() -> None:
    """The least that a vendor needs, as the README shows it, asks, reads and refuses."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [example] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "(Dialect)" in block]
    known: dict[str, Any] = {
        "Dialect": Dialect, "ModelCard": ModelCard, "Ask": Ask, "Space": Space, "Text": Text, "Sequence": Sequence,
    }  # fmt: skip
    exec(example, known)
    acme = known["Acme"](Target("acme-1", known["Acme"].models["acme-1"]))
    asked = acme.ask(["one"], Space("acme-1", 1024))
    assert (asked.path, asked.body) == ("embeddings", {"model": "acme-1", "input": ["one"], "truncate": False})
    said = acme.read(bytearray(b'{"data": [{"embedding": [0.5], "index": 0}], "usage": {"total_tokens": 1}}'))
    assert (said.places, said.tokens) == ([0], 1)
    assert type(acme.refusal(Answer(429, {}, bytearray()))) is Throttled
    assert acme.headers("key") == {"authorization": "Bearer key"}
