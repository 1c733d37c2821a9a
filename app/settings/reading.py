"""Hides how settings are found and put together: the file, what overrides it, and all that is wrong with it at once."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin

from pydantic import ValidationError

from app.errors import ConfigurationError
from app.settings.checks import contradictions
from app.settings.deployments import BUILT_IN_MODEL
from app.settings.grammar import FIELDS, NAMED, Settings
from app.settings.later import LATER
from app.settings.places import KeyPath, Places, key_lines
from app.settings.wording import NOT_YET, guess, in_words

FILE_NAME = "embedgate.toml"
FILE_VARIABLE = "EMBEDGATE_CONFIG"

_PATIENCE_S = 600.0
"""The deadline of the embedded default: what official clients wait, since a local model takes minutes for a book."""

_Tables: TypeAlias = dict[str, Any]
_Problem: TypeAlias = tuple[KeyPath, str]


def find(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The configuration file: `path`, else what EMBEDGATE_CONFIG names, else ./embedgate.toml if there is one."""
    if path is not None:
        return path
    if named := environ.get(FILE_VARIABLE):
        return Path(named)
    return Path(FILE_NAME) if Path(FILE_NAME).exists() else None


def load(path: Path | None, environ: Mapping[str, str], *, options: Mapping[str, object] | None = None) -> Settings:
    """The settings of the file `path` (None: the embedded default), overridden by `environ`, then by `options`.

    `options` are values for `[server]` that the command line names. Raises ConfigurationError with one line for each
    thing to mend, in the order of the file.
    """
    tables, places = _read(path)
    if not tables.get("deployments") and not tables.get("models"):
        tables["deployments"] = {"local": {"dialect": "local"}}
        tables["models"] = {BUILT_IN_MODEL: {"deployments": ["local"]}}
        if isinstance(server := tables.setdefault("server", {}), dict):
            server.setdefault("deadline_s", _PATIENCE_S)
    messages = [(0, message) for message in _override(tables, places, environ)]
    for name, value in (options or {}).items():
        _put(tables, places, ("server", name), value, f"--{name}")
    problems = list(_not_yet(tables))
    try:
        settings = Settings.model_validate(tables, context={"environ": environ})
    except ValidationError as error:
        problems += filter(None, map(in_words, error.errors(include_url=False)))
    else:
        problems += contradictions(settings)
    messages += [places.message(*problem) for problem in problems]
    if messages:
        raise ConfigurationError("\n".join(message for _, message in sorted(messages)))
    return settings


def _read(path: Path | None) -> tuple[_Tables, Places]:
    if path is None:
        return {}, Places()
    try:
        text = path.read_text("utf-8-sig")
        return tomllib.loads(text), Places(str(path), key_lines(text))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        said = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        line = (said and said[2]) or text.count("\n") + 1
        why = said[1] if said else "a value is too large or nested too deeply"
        raise ConfigurationError(f"{path}:{line}: is not TOML: {why}") from error


def _not_yet(tables: _Tables) -> Iterator[_Problem]:
    """Takes out what this version does not know yet; a value that would change nothing is no problem."""
    for section, later in LATER.items():
        for path, table in _entries(tables, section):
            for name in [name for name in table if name in later]:
                if table.pop(name) not in later[name]:
                    yield (*path, name), NOT_YET


def _entries(tables: _Tables, section: str) -> list[tuple[KeyPath, _Tables]]:
    """The tables in which the keys of `section` stand."""
    table = tables.get(section, {})
    if not isinstance(table, dict):
        return []
    if section not in NAMED:
        return [((section,), table)]
    return [((section, name), entry) for name, entry in table.items() if isinstance(entry, dict)]


# ── the environment ─────────────────────────────────────────────────────────────────────────────────────────────────


def _override(tables: _Tables, places: Places, environ: Mapping[str, str]) -> Iterator[str]:
    """Puts what EMBEDGATE_<SECTION>__<NAME> says over the file's values; yields what names nothing."""
    known = dict[str, list[KeyPath]]()
    for section in dict.fromkeys((*FIELDS, *LATER)):
        names = [*FIELDS.get(section, ()), *LATER.get(section, ())]
        for entry in [path for path, _ in _entries(tables, section)] or ([] if section in NAMED else [(section,)]):
            for name in names:
                known.setdefault(_variable((*entry, name)), []).append((*entry, name))
    for variable in sorted(environ):
        if not variable.startswith("EMBEDGATE_") or "__" not in variable:
            continue
        match known.get(variable, []):
            case [path]:
                _put(tables, places, path, _parsed(environ[variable], path), variable)
            case []:
                yield f"{variable}: names nothing in the configuration{guess(variable, known)}"
            case _:
                yield f"{variable}: names more than one thing in the configuration; rename one of them"


def _variable(path: KeyPath) -> str:
    return "EMBEDGATE_" + "__".join(re.sub(r"[^A-Za-z0-9]", "_", part).upper() for part in path)


def _parsed(text: str, path: KeyPath) -> object:
    """Text as it is where text may stand, else the number, truth value or list that it spells."""
    field = FIELDS.get(path[0], {}).get(path[-1])
    spelt = field is None or _holds(field.annotation, int, float, bool)
    listed = field is not None and _holds(field.annotation, tuple) and text.lstrip().startswith("[")
    if not (spelt or listed):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _holds(annotation: object, *kinds: type) -> bool:
    if annotation in kinds or get_origin(annotation) in kinds:
        return True
    return any(_holds(part, *kinds) for part in get_args(annotation))


def _put(tables: _Tables, places: Places, path: KeyPath, value: object, origin: str) -> None:
    table = tables
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):  # which is refused later, with its own line
            return
    table[path[-1]] = value
    places.overrides[path] = origin
