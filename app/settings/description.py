"""Hides how settings are shown to their operator: in their own grammar, with every key masked."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, SecretStr

from app.settings.grammar import Settings
from app.settings.places import dotted

# Shown as they are served, whether the file, the catalog or nobody yet says them.
_FACTS = ("dimensions", "max_input_tokens", "tokenizer", "cuts_dimensions")


def describe(settings: Settings) -> str:
    """What was understood, defaults included, as the `embedgate.toml` that says the same; keys are `***`."""
    blocks = [_table(section, getattr(settings, section)) for section in ("server", "queue", "cache")]
    blocks += [_table(dotted(("deployments", name)), entry) for name, entry in settings.deployments.items()]
    for name, model in settings.models.items():
        facts = settings.facts(name)
        known = {field: getattr(facts, field) for field in _FACTS}
        blocks.append(_table(dotted(("models", name)), model.model_copy(update=known)))
    blocks += [_table(dotted(("tenants", name)), entry) for name, entry in settings.tenants.items()]
    return "\n\n".join(blocks)


def _table(name: str, section: BaseModel) -> str:
    return "\n".join([f"[{name}]", *_lines(section)])


def _lines(section: BaseModel) -> Iterator[str]:
    for key, value in section:
        yield f"# {key}: not set" if value is None else f"{key} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps("***" if isinstance(value, SecretStr) else value, ensure_ascii=False)
