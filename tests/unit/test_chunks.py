"""How files are cut: at what they define, never above the limit, with every word in it, and the same each time."""

import re
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.corpus.rows import DataError
from app.corpus.tree.chunks import Chunker
from app.corpus.tree.pieces import Chunk, SourceFile, passage
from app.tokens import Cl100k

COUNT = Cl100k().count
LANGUAGES = (
    *("bash", "c", "c#", "c++", "go", "java", "javascript", "php", "python", "ruby", "rust", "tsx", "typescript"),
    *("markdown", "restructuredtext", "text", ""),
)


def source(text: str, language: str = "python", path: str = "pkg/a.py") -> SourceFile:
    """A file of a tree."""
    return SourceFile(path, language, len(text.encode()), "0", text)


def cut(file: SourceFile, *, chunk_tokens: int = 256, overlap_tokens: int = 0) -> list[Chunk]:
    """Its chunks, counted as OpenAI does; whatever the file is, they keep their promises."""
    chunks = Chunker(chunk_tokens=chunk_tokens, overlap_tokens=overlap_tokens, count=COUNT).chunks(file)
    lines = file.text.split("\n")
    for chunk in chunks:
        there = "\n".join(lines[chunk.start_line - 1 : chunk.end_line])
        assert chunk.text == there or (chunk.start_line == chunk.end_line and chunk.text in there)
        assert chunk.tokens == COUNT(passage(file.path, chunk.symbol, chunk.text)) <= chunk_tokens
        assert re.search(r"\w", chunk.text)
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    assert [chunk.start_line for chunk in chunks] == sorted(chunk.start_line for chunk in chunks)
    return chunks


LAST = "".join(f"last_{number} = of_all({number})\n" for number in range(20))


def function(name: str, statements: int) -> str:
    """Of Python, with a statement a line."""
    return f"def {name}():\n" + "".join(f"    total_{number} = {name}_{number} + 1\n" for number in range(statements))


def test_what_stands_above_a_definition_belongs_to_it() -> None:
    """Comments and decorators are in the chunk of what they are about; a blank line before ends them."""
    text = f"{function('first', 12)}# About\n# second.\n@cache\n{function('second', 12)}\n# Of nothing.\n\n{LAST}"
    first, second, rest = cut(source(text))
    assert (first.symbol, second.symbol, rest.symbol) == ("first", "second", "")
    assert second.text.startswith("# About\n# second.\n@cache\ndef second")
    assert rest.text.startswith("# Of nothing.")


def test_small_neighbours_are_packed_together() -> None:
    """As long as they are not too many, and told by all their names; a large function is never cut for it."""
    text = function("a", 5) + function("b", 5) + function("large", 60) + function("c", 5)
    chunks = cut(source(text), chunk_tokens=2048)
    assert [chunk.symbol for chunk in chunks] == ["a, b", "large", "c"]


def test_a_class_that_is_too_large_is_cut_at_its_methods() -> None:
    """Its head is its own chunk, or goes with the first method; each method is told with the class."""
    methods = "".join(re.sub("^", "    ", function(name, 15), flags=re.MULTILINE).rstrip(" ") for name in "abc")
    chunks = cut(source(f"class Large(Base):\n{methods}"))
    assert [chunk.symbol for chunk in chunks] == ["Large.a", "Large.b", "Large.c"]
    assert chunks[0].text.startswith("class Large(Base):\n    def a")


def test_the_pieces_of_a_function_overlap_by_whole_lines() -> None:
    """So that each says where it begins; neighbours that are whole do not share a line."""
    chunks = cut(source(function("large", 60) + function("next", 20)), chunk_tokens=256, overlap_tokens=32)
    pieces = [chunk for chunk in chunks if chunk.symbol == "large"]
    assert len(pieces) > 1
    for before, after in pairwise(pieces):
        assert before.start_line < after.start_line <= before.end_line < after.end_line
        assert COUNT("\n".join(before.text.split("\n")[after.start_line - before.end_line - 1 :])) <= 32
    assert pieces[-1].end_line < next(chunk.start_line for chunk in chunks if chunk.symbol == "next")


def test_a_piece_begins_with_a_statement_that_is_far_out() -> None:
    """A block in a function is not cut in its middle, if it fits."""
    block = "    for item in everything:\n" + "        item.do(something, to=somebody)\n" * 6
    chunks = cut(source("def large():\n" + block * 8), chunk_tokens=128)
    assert all(chunk.text.startswith(("    for", "def")) for chunk in chunks)


def test_prose_is_cut_between_paragraphs() -> None:
    """A chunk begins where a paragraph does."""
    paragraph = "".join(f"This is line {number} of what somebody has written about something.\n" for number in range(5))
    chunks = cut(source("\n".join([paragraph] * 12), "text", "a.txt"))
    assert len(chunks) > 2
    assert all(chunk.text.startswith("This is line 0") for chunk in chunks)


def test_an_id_stays_when_lines_move() -> None:
    """The same words are the same chunk; the second of two that are alike is another one."""
    text = function("a", 15) + "\n" + function("b", 15) + "\n" + function("a", 15)
    before = cut(source(text))
    after = cut(source(LAST + "\n" + text))
    assert {chunk.id for chunk in before} == {chunk.id for chunk in after if chunk.symbol in {"a", "b"}}
    assert len(before) == 3
    assert before[0].text == before[2].text


def test_the_hash_is_of_the_whole_passage() -> None:
    """The same words in a class of another name are the same chunk, but have to be embedded again."""
    methods = "".join(re.sub("^", "    ", function(name, 15), flags=re.MULTILINE).rstrip(" ") for name in "ab")
    before, after = (cut(source(f"class {name}:\n{methods}"))[1] for name in ("One", "Two"))
    assert before.id == after.id
    assert before.hash != after.hash


@pytest.mark.parametrize("text", ["", "\n\n \t\n", "}\n})\n;"])
def test_a_file_without_words_has_no_chunks(text: str) -> None:
    """Nothing is embedded that says nothing."""
    assert cut(source(text)) == []


def test_a_path_that_leaves_no_room_is_told() -> None:
    """One clear line instead of chunks above the limit."""
    with pytest.raises(DataError, match="no room for words in 32 tokens"):
        cut(source("a = 1", path="directory/" * 16 + "a.py"), chunk_tokens=32)


LINES = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.sampled_from(
            ["def f(a):", "    x = 1", "class A:", "}", "", "function f() {", "/*", '"""', "# head", "---"]
        ),
        st.text("ab {};", min_size=100, max_size=2000),
    ),
    max_size=60,
)


@given(lines=LINES, language=st.sampled_from(LANGUAGES), chunk_tokens=st.integers(40, 120))
@example(lines=["# a", "b"], language="markdown", chunk_tokens=40)
@example(lines=["🦜" * 500, "ﷺ" * 300, "x"], language="", chunk_tokens=40)
def test_no_word_is_lost(lines: list[str], language: str, chunk_tokens: int) -> None:
    """Whatever a file says, each line with a word is in a chunk, whole or in parts."""
    text = "\n".join(lines)
    chunks = cut(source(text, language, "a"), chunk_tokens=chunk_tokens, overlap_tokens=16)
    for number, line in enumerate(text.split("\n"), 1):
        there = [chunk for chunk in chunks if chunk.start_line <= number <= chunk.end_line]
        said = "".join(chunk.text for chunk in there)
        assert all(said.count(letter) >= line.count(letter) for letter in set(re.findall(r"\w", line)))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("javascript", "function a(b,c){return b+c*[1,2,3].map(x=>x)};" * 20_000),
        ("javascript", "function f(){\n" * 20_000),
        ("python", "(a\n" * 50_000),
        ("c", "0x12, 0x34, 0x56,\n" * 5_000),
        ("c++", "a<b<\n" * 10_000),
        ("markdown", "# a\n" * 20_000),
        ("markdown", f"# a{' ' * 100_000}b\n"),
        ("markdown", f"# a{'#' * 100_000}b\n"),
        ("c", "/**/" * 100_000 + "\n" * 2_000 + "int f(void) {\n}\n"),
        ("javascript", f'x = {{\n"{"a" * 100_000}": function() {{\n}}\n}}\n' + "\n" * 1_000),
        ("json", '{"a":\n' * 50_000),
    ],
)
def test_what_nobody_has_written_is_cut_soon(language: str, text: str) -> None:
    """Minified, broken or deeply nested: neither the time nor the depth runs away."""
    start = time.process_time()
    assert cut(source(text, language), chunk_tokens=2048, overlap_tokens=200)
    assert time.process_time() - start < 5
