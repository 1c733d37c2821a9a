"""Hides where a value came from: the line of the file (which `tomllib` does not tell), the environment, an option."""

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

KeyPath: TypeAlias = tuple[str, ...]
"""A key from the root down: `("deployments", "openai-main", "dialect")`."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, on which each key of the valid TOML document `text` is first named.

    A statement ends where the lines since the last one parse by themselves, so `tomllib` is the only judge of syntax.
    """
    found: dict[KeyPath, int] = {}
    header: KeyPath = ()
    statement, first = "", 0
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        statement, first = (f"{statement}\n{line}", first) if statement else (line, number)
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        is_header = statement.lstrip(" \t").startswith("[")
        paths = list(_paths(parsed))
        if is_header:
            header = paths[-1]
        for path in paths:
            found.setdefault(path if is_header else header + path, first)
        statement = ""
    return found


def dotted(path: KeyPath) -> str:
    """The path as TOML writes it."""
    return ".".join(part if _BARE.fullmatch(part) else json.dumps(part) for part in path)


def _paths(table: dict[str, Any]) -> Iterator[KeyPath]:
    for key, value in table.items():
        yield (key,)
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if isinstance(inner, dict):
            for path in _paths(inner):
                yield (key, *path)


@dataclass
class Places:
    """Which file, and which names of the environment or the command line that took a key's place."""

    file: str = ""
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def message(self, path: KeyPath, text: str) -> tuple[int, str]:
        """A sort key and the whole message; a key that is missing is placed at the table that lacks it."""
        if path in self.overrides:
            return 0, f"{self.overrides[path]}: {dotted(path)}: {text}"
        line = next((self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), 0)
        place = ":".join(filter(None, (self.file, str(line or ""))))
        return line, ": ".join(filter(None, (place, dotted(path), text)))
