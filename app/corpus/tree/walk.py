"""Hides which files of a tree are words worth reading."""

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from app.corpus.rows import DataError
from app.corpus.tree.ignored import Layer, ignore_file, is_ignored, outside, rules
from app.corpus.tree.languages import language_of
from app.corpus.tree.pieces import SourceFile

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec


class Skipped(NamedTuple):
    """What would have been read, but cannot be: a file, or a directory and all below it, if it ends with a slash."""

    path: str
    reason: str


class Omitted(NamedTuple):
    """A file that has no words, or too many."""

    path: str
    reason: Literal["binary", "too large"]


def walk(
    root: Path, *, max_file_bytes: int, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Iterator[SourceFile | Skipped | Omitted]:
    """Each file below `root`, or `root` alone if it is a file; sorted by path, one in memory at a time. Blocks.

    What Git ignores is left out without a word, and so are its own directory, dependencies, caches and lock files; a
    root is read even where its own repository ignores it. Links are not followed: what they point to in the tree is
    read where it lies. `include` and `exclude` are patterns as in a .gitignore: of what is left only that which
    `include` names is read, if it names anything; `exclude` has the last word, and with `!` it has back what is left
    out by itself. Lines of texts end with a line feed, whatever they end with. Raises DataError.
    """
    tree = _Tree(root.resolve(), max_file_bytes, rules("--include", include), rules("--exclude", exclude))
    if root.is_file():
        yield tree.read(root.name, root)
    elif root.is_dir():
        yield from tree.files()
    else:
        raise DataError(f"{root}: there is no such file or directory")


# ── what is left out ────────────────────────────────────────────────────────────────────────────────────────────────

_NEVER: Final = frozenset({".git", ".hg", ".svn", ".jj"})
_MARKS: Final = frozenset({"CACHEDIR.TAG", "pyvenv.cfg"})  # what lies in the directory of a cache, or an environment
_SELDOM: Final = """
    node_modules/ bower_components/ __pycache__/ .venv/ .tox/ .nox/ .eggs/ .terraform/ .gradle/ .next/ .nuxt/
    *.lock package-lock.json npm-shrinkwrap.json pnpm-lock.yaml go.sum *.min.js *.min.css *.map *.svg
""".split()  # noqa: SIM905 — easier to read and to add to


# ── the walk ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Entry(NamedTuple):
    path: str
    """From the root, with slashes; "" is the root itself."""
    is_directory: bool
    layers: tuple[Layer, ...]


class _Tree:
    def __init__(self, root: Path, most_bytes: int, include: "GitIgnoreSpec", exclude: "GitIgnoreSpec") -> None:
        self._root = root
        self._most_bytes = most_bytes
        self._include = include
        self._top = next((each for each in (root, *root.parents) if (each / ".git").exists()), root)
        inside = root.relative_to(self._top).as_posix()
        self._base = "" if inside == "." else inside + "/"
        self._last = Layer(self._base, exclude)

    def files(self) -> Iterator[SourceFile | Skipped | Omitted]:
        """See walk; without recursion, as trees may be deep."""
        waiting = [_Entry("", True, self._outer())]
        while waiting:
            path, is_directory, layers = waiting.pop()
            try:
                path.encode()
            except UnicodeEncodeError:
                yield Skipped(os.fsencode(path).decode(errors="replace"), "its name is no UTF-8")
                continue
            if not is_directory:
                yield self.read(path, self._root / path)
                continue
            try:
                waiting += reversed(self._entries(path, layers))
            except OSError as error:
                yield Skipped(path or "/", error.strerror or str(error))

    def _outer(self) -> tuple[Layer, ...]:
        """What is ignored from outside of the root; nothing of it counts where it ignores the root itself."""
        seldom = Layer(self._base, rules("", _SELDOM))
        outer = outside(self._top)
        done = ""
        for part in self._base.split("/")[:-1]:
            outer = (*outer, *ignore_file(self._top / done / ".gitignore", done))
            done += part + "/"
            if is_ignored(outer, done):
                return (seldom,)
        return (seldom, *outer)

    def _entries(self, path: str, layers: tuple[Layer, ...]) -> list[_Entry]:
        """What is to be read of a directory, sorted as its paths are."""
        with os.scandir(self._root / path) as found:
            entries = {each.name: each for each in found if not each.is_symlink()}
        if path and _MARKS & entries.keys():
            return []
        if ".gitignore" in entries:
            layers = (*layers, *ignore_file(self._root / path / ".gitignore", self._base + path))
        here = []
        for name, each in entries.items():
            is_directory = each.is_dir(follow_symlinks=False)
            whole = path + name + "/" * is_directory
            if (is_directory or each.is_file(follow_symlinks=False)) and self._wants(whole, layers):
                here.append(_Entry(whole, is_directory, layers))
        return sorted(here)

    def _wants(self, path: str, layers: tuple[Layer, ...]) -> bool:
        if path.rstrip("/").rpartition("/")[2] in _NEVER or is_ignored((*layers, self._last), self._base + path):
            return False
        return path.endswith("/") or not self._include.patterns or self._include.match_file(path)

    def read(self, path: str, file: Path) -> SourceFile | Skipped | Omitted:
        """What the file says."""
        try:
            with file.open("rb") as stream:
                data = stream.read(self._most_bytes + 1)
        except OSError as error:
            return Skipped(path, error.strerror or str(error))
        if len(data) > self._most_bytes:
            return Omitted(path, "binary" if b"\0" in data[:_HEAD_BYTES] else "too large")
        text = _decoded(data)
        if text is None:
            return Omitted(path, "binary")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        digest = blake2b(data, digest_size=16).hexdigest()
        return SourceFile(path, language_of(path, text), len(data), digest, text)


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_HEAD_BYTES: Final = 8192
_MARKED: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_NO_TEXT: Final = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def _decoded(data: bytes) -> str | None:
    """UTF-8, what a mark at the beginning says, or old Latin-1; None if it is no text."""
    encoding = next((name for mark, name in _MARKED if data.startswith(mark)), "")
    try:
        if encoding or b"\0" not in data:
            return data.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        pass
    return None if encoding or _NO_TEXT.search(data) else data.decode("latin-1")
