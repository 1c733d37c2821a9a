"""Which files of a tree are read: what people have written, in order, as Git sees it, and nothing twice."""

import os
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import pytest

from app.corpus.rows import DataError
from app.corpus.tree.languages import language_of
from app.corpus.tree.pieces import SourceFile
from app.corpus.tree.walk import Omitted, Skipped, walk

MOST_BYTES = 1000


def plant(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """A tree with these files."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(root: Path, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    """The paths of what was read."""
    found = walk(root, max_file_bytes=MOST_BYTES, include=include, exclude=exclude)
    return [each.path for each in found if isinstance(each, SourceFile)]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of somebody who has told Git nothing."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return home


def only(root: Path) -> SourceFile | Skipped | Omitted:
    """What became of the only file."""
    (found,) = walk(root, max_file_bytes=MOST_BYTES)
    return found


def test_a_file_is_told_by_path_language_size_and_hash(tmp_path: Path) -> None:
    """All that an index has to know of it."""
    text = "x = 1\n"
    plant(tmp_path, {"pkg/a.py": text})
    digest = blake2b(text.encode(), digest_size=16).hexdigest()
    assert only(tmp_path) == SourceFile("pkg/a.py", "python", 6, digest, text)


def test_files_are_sorted_by_path(tmp_path: Path) -> None:
    """As strings, slashes included: so an index that is sorted can be compared while walking."""
    plant(tmp_path, dict.fromkeys(["b.py", "a/z.py", "a-b/c.py", "a.py", "a/b/c.py", "B.py"], "x"))
    found = read(tmp_path)
    assert found == sorted(found)
    assert len(found) == 6


def test_what_git_ignores_is_left_out(tmp_path: Path) -> None:
    """At every level, the deeper and the later pattern first, with exceptions, and with those of this copy alone."""
    plant(
        tmp_path,
        {
            ".git/config": "x", ".git/info/exclude": "private.txt\n",
            ".gitignore": "*.log\n/build/\n!keep.log\ndoc/*\n",
            "a.log": "x", "keep.log": "x", "build/a.py": "x", "src/build/a.py": "x", "private.txt": "x",
            "src/.gitignore": "!deep.log\n*.tmp\n[\n", "src/deep.log": "x", "src/other.log": "x", "src/a.tmp": "x",
            "a.tmp": "x", "doc/a.md": "x", "src/doc/a.md": "x",
        },
    )  # fmt: skip
    assert read(tmp_path) == [
        ".gitignore", "a.tmp", "keep.log", "src/.gitignore", "src/build/a.py", "src/deep.log", "src/doc/a.md",
    ]  # fmt: skip


def test_a_part_of_a_repository_is_walked_as_in_it(tmp_path: Path) -> None:
    """What is above the root says what is ignored, too; but not, where it ignores the root itself."""
    plant(
        tmp_path,
        {".git/config": "x", ".gitignore": "*.log\n/env/\nsrc/gen/\n", "src/a.py": "x", "src/a.log": "x",
         "src/gen/b.py": "x", "env/lib/a.py": "x", "env/lib/a.log": "x"},
    )  # fmt: skip
    assert read(tmp_path) == [".gitignore", "src/a.py"]
    assert read(tmp_path / "src") == ["a.py"]
    assert read(tmp_path / "env" / "lib") == ["a.log", "a.py"]


PATTERNS = [
    ("\ufeff*.log", "a.log", "b"), ("a\x0cb", "a\x0cb", "b"), ("*.log\r\n*.tmp\r\n", "a.log", "a.logr"),
    ("[[:digit:]]*", "7.py", "a7.py"), ("[![:alpha:]_]*", "7.py", "_7.py"), ("[[:lower:][:digit:]]x", "ax", "Ax"),
    ("[[:strange:]]", "", "s"), ("[[:digit:]", "", "7"), ("[z-a]", "z", "a"), ("[+-9]", "5", "z"),
    ("[[]]", "[]", "a"), ("[a\\]]", "]", "b"), ("x\t", "x\t", "x"), ("x  ", "x", "x "), ("x\\  ", "x ", "x"),
    ("src/**/", "src/a/b", "src/c"), ("a[!b]c", "adc", "a/c"), ("\U000f0000[b]", "\U000f0000b", "b"),
    ("*a*a*c", "babac", "bac"), ("a**?", "ab", "a"),
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("pattern", "ignored", "read_"), PATTERNS, ids=range(len(PATTERNS)))
def test_patterns_mean_what_they_mean_to_git(tmp_path: Path, pattern: str, ignored: str, read_: str) -> None:
    """Marks at the beginning, classes with names, blanks and what is escaped; without a warning."""
    plant(tmp_path, {".gitignore": pattern, read_: "x"} | ({ignored: "x"} if ignored else {}))
    assert set(read(tmp_path)) - {".gitignore"} == {read_}


@pytest.mark.parametrize("pattern", ["*a" * 20 + "b", "*?" * 20 + "b", "*" * 40 + "b", "[" * 4000, "[a" * 100_000])
def test_no_pattern_takes_long(tmp_path: Path, pattern: str) -> None:
    """However many ways there are for a name to have its parts."""
    plant(tmp_path, {".gitignore": pattern, "a" * 200: "x"})
    start = time.process_time()
    assert "a" * 200 in read(tmp_path)
    assert time.process_time() - start < 1


CONFIGURED = [
    ({".config/git/ignore": "*.log"}, "", "*.log"),
    ({".gitconfig": "[user]\n\tname = x\n[core]\n\tx = y\n\texcludesFile = ~/my # why\n", "my": "*.log"}, "", "*.log"),
    ({".config/git/config": '[Core] ExcludesFile="~/a b"', "a b": "*.log", ".config/git/ignore": "*.py"}, "", "*.log"),
    ({".gitconfig": "[core]\nexcludesfile = ~/a", "a": "*.py", "b": "*.log"}, "[core]\nexcludesfile = ~/b", "*.log"),
    ({".gitconfig": '[core "x"]\nexcludesfile = ~/mine\n[other]\nexcludesfile = ~/mine', "mine": "*.log"}, "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("files", "config", "ignored"), CONFIGURED, ids=range(len(CONFIGURED)))
def test_what_somebody_ignores_everywhere_is_left_out(
    tmp_path: Path, home: Path, files: dict[str, str], config: str, ignored: str
) -> None:
    """By the file that Git's configuration names, the repository's own first, or by the usual one; in repositories."""
    plant(home, files)
    plant(tmp_path, {".git/config": config, "a.log": "x", "b.py": "x", ".gitignore": "!keep.log", "keep.log": "x"})
    expected = [".gitignore", *([] if ignored == "*.log" else ["a.log"]), "b.py", "keep.log"]
    assert read(tmp_path) == expected
    assert read(plant(home, {"plain/a.log": "x"}) / "plain") == ["a.log"]


def test_a_second_copy_of_a_repository_ignores_what_the_first_does(tmp_path: Path) -> None:
    """Where `.git` is a file that names a folder, which names another one."""
    plant(
        tmp_path,
        {"main/.git/info/exclude": "*.log", "main/.git/worktrees/w/commondir": "../..\n", "w/a.log": "x", "w/b.py": "x",
         "w/.git": "gitdir: ../main/.git/worktrees/w\n"},
    )  # fmt: skip
    assert read(tmp_path / "w") == ["b.py"]


def test_dependencies_and_caches_are_left_out(tmp_path: Path) -> None:
    """Unless they are the root, or asked for: what nobody here has written would hide what was."""
    plant(
        tmp_path,
        {"a.py": "x", "node_modules/x/index.js": "x", "env/pyvenv.cfg": "x", "env/lib/b.py": "x", "uv.lock": "x",
         "target/CACHEDIR.TAG": "x", "target/c.rs": "x", ".git/hooks/d.sh": "x", "lib/a.min.js": "x"},
    )  # fmt: skip
    assert read(tmp_path) == ["a.py"]
    assert read(tmp_path / "env") == ["lib/b.py", "pyvenv.cfg"]
    assert read(tmp_path / "node_modules") == ["x/index.js"]
    assert read(tmp_path, exclude=("!node_modules/", "!*.lock")) == ["a.py", "node_modules/x/index.js", "uv.lock"]
    assert read(tmp_path, exclude=("!.git/",)) == ["a.py"]


def test_patterns_choose(tmp_path: Path) -> None:
    """`include` narrows, `exclude` has the last word."""
    plant(tmp_path, dict.fromkeys(["a.py", "b.md", "src/c.py", "src/d.rs", "test/e.py"], "x"))
    assert read(tmp_path, include=("*.py",)) == ["a.py", "src/c.py", "test/e.py"]
    assert read(tmp_path, include=("src/", "*.md")) == ["b.md", "src/c.py", "src/d.rs"]
    assert read(tmp_path, include=("*.py",), exclude=("/test/",)) == ["a.py", "src/c.py"]
    with pytest.raises(DataError, match="--exclude"):
        read(tmp_path, exclude=("!",))


def test_links_are_not_followed(tmp_path: Path) -> None:
    """What they point to is read once, where it lies, and nothing outside of the tree is; pipes are not waited for."""
    inside = plant(tmp_path / "tree", {"a/b.py": "x"})
    plant(tmp_path / "outside", {"secret.txt": "x"})
    (inside / "loop").symlink_to(inside)
    (inside / "out").symlink_to(tmp_path / "outside")
    (inside / "again.py").symlink_to(inside / "a" / "b.py")
    (inside / "gone.py").symlink_to(inside / "nothing")
    os.mkfifo(inside / "pipe")
    os.mkfifo(inside / "a" / ".gitignore")
    assert read(inside) == ["a/b.py"]
    (tmp_path / "link").symlink_to(inside)
    assert read(tmp_path / "link") == ["a/b.py"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfname = 1", "name = 1"),
        ("größer".encode("utf-16"), "größer"),
        ("größer".encode("utf-32"), "größer"),
        ("größer".encode("latin-1"), "größer"),
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (b"\x1b[1mbold\x0c", "\x1b[1mbold\x0c"),
        (b"", ""),
    ],
)
def test_texts_are_read_in_what_they_are_written_in(tmp_path: Path, data: bytes, text: str) -> None:
    """UTF-8, what a mark says, or Latin-1; and with one kind of line ends."""
    plant(tmp_path, {"a.txt": data})
    found = only(tmp_path)
    assert isinstance(found, SourceFile)
    assert found.text == text
    assert found.size_bytes == len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "binary"),
        (b"text, and then\0", "binary"),
        (b"\x01\x02\xff\xfe", "binary"),
        (b"\xff\xfea", "binary"),
        (b"x" * (MOST_BYTES + 1), "too large"),
        (b"\0" * (MOST_BYTES + 1), "binary"),
    ],
)
def test_what_is_no_text_is_counted(tmp_path: Path, data: bytes, reason: str) -> None:
    """Nobody would search for it: it is told apart from what failed."""
    plant(tmp_path, {"a": data})
    assert only(tmp_path) == Omitted("a", reason)  # type: ignore[arg-type]


def test_what_vanishes_meanwhile_is_skipped(tmp_path: Path) -> None:
    """A file and a directory that cannot be read stop nothing; the rest is read."""
    plant(tmp_path, {"a.py": "x", "b/c.py": "x", "d.py": "x", "e.py": "x"})
    found = walk(tmp_path, max_file_bytes=MOST_BYTES)
    first = next(found)
    (tmp_path / "b" / "c.py").unlink()
    (tmp_path / "b").rmdir()
    (tmp_path / "d.py").unlink()
    (tmp_path / "d.py").mkdir()
    rest = [(type(each), each.path) for each in found]
    assert first.path == "a.py"
    assert rest == [(Skipped, "b/"), (Skipped, "d.py"), (SourceFile, "e.py")]


def test_a_name_that_no_table_can_hold_is_skipped(tmp_path: Path) -> None:
    """It is told, with what can be read of it."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.py")).write_text("x")
    assert only(tmp_path) == Skipped("bad\ufffd.py", "its name is no UTF-8")


def test_a_root_may_be_a_file(tmp_path: Path) -> None:
    """Then it is all there is; a root that is not there is one clear line."""
    plant(tmp_path, {"a.go": "package a\n"})
    assert read(tmp_path / "a.go") == ["a.go"]
    with pytest.raises(DataError, match=r"b\.go: there is no such file or directory"):
        read(tmp_path / "b.go")


@pytest.mark.parametrize(
    ("path", "text", "language"),
    [
        ("a/b.py", "", "python"), ("A.PYI", "", "python"), ("a.tsx", "", "tsx"), ("x.cpp", "", "c++"),
        ("a.h", "int f(void);\n", "c"), ("a.h", "namespace a {\n", "c++"), ("Dockerfile", "", "dockerfile"),
        ("Makefile", "", "make"), ("run", "#!/usr/bin/env -S python3 -u\n", "python"), ("run", "#!/bin/sh\n", "bash"),
        ("run", "words", ""), ("a.unheard", "", ""), (".bashrc", "", "bash"), ("README", "", "text"),
    ],
)  # fmt: skip
def test_a_language_is_told_by_name_and_first_line(path: str, text: str, language: str) -> None:
    """By the whole name, what is behind the last dot, or the interpreter."""
    assert language_of(path, text) == language


@pytest.mark.parametrize("blank", ["\n", " ", "\f\n"])
def test_blanks_take_no_time(blank: str) -> None:
    """However many there are before what tells the language."""
    start = time.process_time()
    assert language_of("a.h", blank * 200_000 + "class A;") == "c++"
    assert language_of("a", "#!" + blank * 200_000) == ""
    assert time.process_time() - start < 1
