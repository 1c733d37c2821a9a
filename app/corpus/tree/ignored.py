"""Hides what Git ignores: how its patterns read, in which files they stand, and which of them has the last word."""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.corpus.rows import DataError

try:
    from pathspec import GitIgnoreSpec
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern
except ImportError:
    raise DataError("a source tree needs the package pathspec (embedgate[index])") from None


@dataclass(frozen=True, slots=True)
class Layer:
    """Patterns, and the directory that they are relative to: from the top of the repository, "" or with a slash."""

    base: str
    spec: GitIgnoreSpec


def is_ignored(layers: Iterable[Layer], path: str) -> bool:
    """The last pattern decides that matches; a directory's `path` ends with a slash."""
    for layer in reversed(tuple(layers)):
        verdict = layer.spec.check_file(path[len(layer.base) :]).include
        if verdict is not None:
            return verdict
    return False


def rules(name: str, patterns: Sequence[str]) -> GitIgnoreSpec:
    """Patterns that somebody has given. Raises DataError, which says where: in `name`."""
    try:
        return GitIgnoreSpec(map(_pattern, patterns), backend="simple")
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None


def ignore_file(path: Path, base: str) -> list[Layer]:
    """Its patterns as a layer, if there is such a file; as with Git, a line that is no pattern says nothing."""
    good = []
    for line in _said(path).split("\n"):
        with suppress(ValueError):
            good += [pattern for pattern in [_pattern(line.removesuffix("\r"))] if pattern.include is not None]
    return [Layer(base, GitIgnoreSpec(good, backend="simple"))] if good else []


# ── patterns ────────────────────────────────────────────────────────────────────────────────────────────────────────

_MOST_CHARS: Final = 4096  # no path has more
_HELD: Final = re.compile(r"\\[^/]|\[[!^]?\]?(?:\[:\w+:\]|\\.|[^\]/\\])*+\]|[^\S ]|[\U000f0000-\U000ffffd]")
_STANDING_IN: Final = re.compile(r"[\U000f0000-\U000ffffd]")
_ITEM: Final = re.compile(r"\[:(\w+):\]|(\\?.)(?:-(\\?.))?", re.DOTALL)
_NOTHING: Final = r"[^\s\S]"
_STAR: Final = "[^/]*"
_POSIX: Final = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "blank": r" \t", "cntrl": r"\x00-\x1f\x7f", "digit": "0-9",
    "graph": "!-.0-~", "lower": "a-z", "print": " -.0-~", "punct": r"!-.:-@\[-`{-~", "space": r"\t-\r ",
    "upper": "A-Z", "xdigit": "0-9A-Fa-f",
}  # fmt: skip


def named(pattern: str) -> tuple[str, bool]:
    """The paths of a pattern that somebody has given, as a regular expression; False: all but those.

    Raises DataError.
    """
    try:
        told = _regex(pattern)
    except ValueError:
        told = None
    if told is None:
        raise DataError(f"--path {pattern}: is no pattern of paths, as in a .gitignore")
    return told


def _regex(pattern: str) -> tuple[str, bool] | None:
    """What it matches, as Python and Rust read it, and whether that is ignored; None if it is no pattern.

    Classes, what is escaped and blanks but spaces are kept away from the library, which reads them otherwise than Git.
    """
    if len(pattern) > _MOST_CHARS:
        return None
    held = _HELD.findall(pattern)
    places = iter(range(0xF0000, 0xF0000 + len(held)))
    plain = _HELD.sub(lambda _: chr(next(places)), pattern)
    told, ignores = GitIgnoreSpecPattern.pattern_to_regex(re.sub(r"/\*\*/ *$", "/**/*/", plain))
    if told is None or ignores is None:
        return None
    return _STANDING_IN.sub(lambda found: _one(held[ord(found[0]) - 0xF0000]), str(told)), ignores


def _pattern(line: str) -> GitIgnoreSpecPattern:
    """Raises ValueError."""
    read = _regex(line)
    return GitIgnoreSpecPattern(None) if read is None else GitIgnoreSpecPattern(re.compile(_quick(read[0])), read[1])


def _quick(told: str) -> str:
    """The same: between two stars of a name, where a part is found first is as good a place as any other."""
    first, *parts = told.split(_STAR)
    for place, part in enumerate(parts, 1):
        is_between = place < len(parts) and "/" not in part.replace("[^/", "")
        first += f"(?>{_STAR}?{part})" if is_between and part else "" if is_between else _STAR + part
    return first


def _one(held: str) -> str:
    """What matches one character."""
    if not held.startswith("["):
        return _letter(held)
    is_negated = held[1] in "!^"
    told = "/" if is_negated else ""
    for name, first, last in _ITEM.findall(held[1 + is_negated : -1]):
        if name not in _POSIX and name:
            return _NOTHING
        told += _POSIX[name] if name else _span(first[-1], (last or first)[-1])
    return f"[{'^' if is_negated else ''}{told}]" if told else _NOTHING


def _span(first: str, last: str) -> str:
    """From letter to letter, the first in any case, but without the slash, which no class has."""
    last = max(first, last)
    parts = ((first, min(last, ".")), (max(first, "0"), last)) if first <= "/" <= last else ((first, last),)
    return "".join(f"{_letter(low)}-{_letter(high)}" for low, high in parts if low <= high)


def _letter(letter: str) -> str:
    return f"\\U{ord(letter[-1]):08x}"


# ── for everywhere, and for a copy ──────────────────────────────────────────────────────────────────────────────────

_SECTION: Final = re.compile(r'\s*\[\s*([\w.-]+)\s*("[^"]*")?\s*\]')
_EXCLUDES: Final = re.compile(r'\s*excludesfile\s*=\s*("[^"]*"|[^#;]*)', re.IGNORECASE)


def outside(top: Path) -> tuple[Layer, ...]:
    """What is ignored in a repository beside what its own files say: for this person, and in this copy."""
    git = _git(top / ".git")
    if not git.is_dir():
        return ()
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 — without one, Path raises
    of_user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "git"
    found = map(_excludes, (git / "config", home / ".gitconfig", of_user / "config"))
    file = next((top / os.path.expanduser(name) for name in found if name), of_user / "ignore")  # noqa: PTH111
    return (*ignore_file(file, ""), *ignore_file(git / "info" / "exclude", ""))


def _git(path: Path) -> Path:
    """Where all copies of a repository have what they share; `path` may be a file that says where that is."""
    if path.is_file():
        path = path.parent / _said(path).removeprefix("gitdir:").strip()
    return path / _said(path / "commondir").strip()


def _excludes(config: Path) -> str:
    """The file that it names for what is ignored; the last one counts. "" if it names none."""
    section = found = ""
    for line in _said(config).split("\n"):
        if begun := _SECTION.match(line):
            section = "" if begun[2] else begun[1].lower()
        excludes = _EXCLUDES.match(line, begun.end() if begun else 0)
        if excludes and section == "core":
            found = excludes[1].strip().strip('"')
    return found


def _said(path: Path) -> str:
    """By a file; "" where there is none, or something else."""
    try:
        return path.read_bytes().decode("utf-8-sig", "replace") if path.is_file() else ""
    except OSError:
        return ""
