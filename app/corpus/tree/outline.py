"""Hides how what a file defines is read from its syntax, or from its headings."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import thread_time
from typing import TYPE_CHECKING, Final, NamedTuple

from app.corpus.tree.languages import Grammar, grammar

if TYPE_CHECKING:
    from tree_sitter import Node

_MOST_DEEP: Final = 16  # definitions within definitions
_MOST_NODES: Final = 200_000  # a megabyte of good code has half of them
_MOST_PARSE_S: Final = 2.0  # of the processor's time: a megabyte of good code takes a quarter of it
_MOST_LINE_CHARS: Final = 300  # on average: beyond, nobody has written it
_MOST_NAME_CHARS: Final = 80
_MOST_READ_BYTES: Final = 512  # of what a name is in


@dataclass(frozen=True, slots=True)
class Definition:
    """Lines from `start` to before `end`, counted from 0, that define `symbol`, comments and decorators included.

    What is `inner` lies within, one after the other. `whole`: it says one thing, to be cut only where it must be.
    """

    start: int
    end: int
    symbol: str
    whole: bool
    inner: list["Definition"] = field(default_factory=list)


def outline(language: str, lines: Sequence[str]) -> list[Definition]:
    """What a file defines, from its beginning to its end; nothing if its language is not known.

    Never fails: of what is broken, or not written by people, there is what could be made out.
    """
    if language in _HEADINGS:
        return _nested(_sections(list(_HEADINGS[language](lines)), len(lines)), " > ")
    known = grammar(language)
    if known is None or sum(map(len, lines)) > _MOST_LINE_CHARS * len(lines):
        return []
    return _nested(_definitions(known, lines), ".")


class _Found(NamedTuple):
    """A definition, and its level: it lies in the nearest before it that has a lower one."""

    start: int
    end: int
    name: str
    whole: bool
    level: int


def _nested(found: Iterable[_Found], joint: str) -> list[Definition]:
    """A line that two share belongs to the first."""
    tops: list[Definition] = []
    around: list[tuple[int, Definition]] = []
    for each in found:
        while around and around[-1][0] >= each.level:
            around.pop()
        outer = around[-1][1] if around else None
        beside = outer.inner if outer else tops
        start = max(each.start, outer.start if outer else 0, beside[-1].end if beside else 0)
        if start < each.end:
            symbol = f"{outer.symbol}{joint}{each.name}" if outer else each.name
            beside.append(Definition(start, each.end, symbol, each.whole))
            around.append((each.level, beside[-1]))
    return tops


# ── syntax ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_ABOVE: Final = frozenset(("comment", "line_comment", "block_comment", "decorator", "attribute_item"))
_AROUND: Final = frozenset(
    ("export_statement", "lexical_declaration", "variable_declaration", "type_declaration", "template_declaration")
)
_WHOLE: Final = re.compile("func|method|constructor|destructor|arrow")
_VALUE: Final = re.compile("func|arrow|class|lambda")
_CALLED: Final = re.compile(r"((?:[\w~]+(?:<[^<>()]*>)?::)*(?:operator\s*(?:\(\)|[^(]+)|~?\w+))\s*\(")


def _definitions(known: Grammar, lines: Sequence[str]) -> Iterator[_Found]:
    """In the order of the file; without recursion, as what is not written by people may be deep."""
    source = "\n".join(lines).encode()
    waiting = [(root, 0)] if (root := _parsed(known, source)) else []
    above: set[int] = set()
    for _ in range(_MOST_NODES):
        if not waiting:
            return
        node, level = waiting.pop()
        (first, column), (last, columns) = node.start_point, node.end_point
        end = last + 1 if columns else last
        if node.type in _ABOVE:
            if not source[node.start_byte - min(column, _MOST_LINE_CHARS) : node.start_byte].strip():
                above.update(range(first, end))
        elif (rule := known.definitions.get(node.type)) and (named := _named(node, rule, source)):
            start = first
            while start - 1 in above:
                start -= 1
            yield _Found(start, end, *named, level)
            level += 1
        if level < _MOST_DEEP and (last > first or node.type in _AROUND):
            children = node.named_children
            if node.type in _AROUND and children:
                above.update(range(first, children[-1].start_point[0]))
            waiting += ((child, level) for child in reversed(children))


def _parsed(known: Grammar, source: bytes) -> "Node | None":
    """The root of its tree; None if there is hardly any sense in it."""
    from tree_sitter import Parser

    views: list[memoryview] = []

    def read(start: int, _: object) -> memoryview:
        views.append(memoryview(source)[start:])
        return views[-1]

    end = thread_time() + _MOST_PARSE_S
    try:
        # Only a parser that reads by a callback can be stopped; and it never lets go of what that has returned.
        tree = Parser(known.language).parse(read, progress_callback=lambda _, __: thread_time() > end)
        return tree.root_node
    except ValueError:
        return None
    finally:
        for view in views:
            view.release()


def _named(node: "Node", rule: str, source: bytes) -> tuple[str, bool] | None:
    """What a node defines, by the rule of its grammar, and whether it is one thing; None if it is no definition."""
    field_, _, condition = rule.partition("=")
    owner, _, field_ = field_.rpartition(".")
    kind = node.type
    if condition:
        value = node.child_by_field_name(condition)
        if value is None or (condition != "body" and not _VALUE.search(value.type)):
            return None
        kind = kind if condition == "body" else value.type
    name = _spelled(_text(node.child_by_field_name(field_), source))
    if owner and name:
        whose = re.findall(r"\w+", _text(node.child_by_field_name(owner), source).partition("[")[0])
        name = f"{whose[-1]}.{name}" if whose else name
    return (name, bool(_WHOLE.search(kind))) if name else None


def _spelled(text: str) -> str:
    """A name without its quotes, types and arguments, and with dots."""
    called = _CALLED.search(text)
    if called:
        text = re.sub(r"<[^<>()]*>(?=::)", "", called[1])
    elif "operator" not in text:
        text = text.partition("<")[0] or text
    return re.sub(r"\s+", " ", text.replace("::", ".")).strip("\"'`*& ()")[:_MOST_NAME_CHARS]


def _text(node: "Node | None", source: bytes) -> str:
    """Its beginning; not the node's own text: of a source that is read piece by piece that takes long."""
    if node is None:
        return ""
    return source[node.start_byte : min(node.end_byte, node.start_byte + _MOST_READ_BYTES)].decode(errors="replace")


# ── headings ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Heading(NamedTuple):
    line: int
    level: int
    name: str


_ATX: Final = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_FENCE: Final = re.compile(r" {0,3}(```+|~~~+)")
_SETEXT: Final = re.compile(r" {0,3}(=+|--+)[ \t]*$")
_UNDERLINE: Final = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}[ \t]*$")


def _markdown(lines: Sequence[str]) -> Iterator[_Heading]:
    fence = "---" if lines[0].rstrip() == "---" else ""  # what stands before the text is no text, either
    for number, line in enumerate(lines[1:] if fence else lines, 1 if fence else 0):
        if fence:
            fence = "" if line.strip().startswith(fence) else fence
        elif opened := _FENCE.match(line):
            fence = opened[1]
        elif atx := _ATX.match(line):
            yield _Heading(number, len(atx[1]), _unclosed(atx[2]))
        elif number and (under := _SETEXT.match(line)) and re.match(r" {0,3}[^\s#>*+`~|-]", lines[number - 1]):
            yield _Heading(number - 1, 1 if under[1][0] == "=" else 2, lines[number - 1].strip())


def _unclosed(heading: str) -> str:
    """Without the hashes behind it, unless they are part of a word."""
    name = heading.rstrip()
    bare = name.rstrip("#")
    return bare.rstrip() if not bare or bare[-1].isspace() else name


def _underlined(lines: Sequence[str]) -> Iterator[_Heading]:
    """As in reStructuredText, where the first kind of line that is seen is the highest."""
    levels: dict[tuple[str, bool], int] = {}
    for number, (line, below) in enumerate(pairwise(lines)):
        under = _UNDERLINE.match(below)
        if under and line.strip() and not _UNDERLINE.match(line) and len(below.rstrip()) >= len(line.rstrip()):
            over = number > 0 and lines[number - 1].rstrip() == below.rstrip()
            level = levels.setdefault((under[1], over), len(levels) + 1)
            yield _Heading(number - over, level, line.strip())


_HEADINGS: Final = {"markdown": _markdown, "restructuredtext": _underlined}


def _sections(headings: Sequence[_Heading], lines: int) -> Iterator[_Found]:
    """Each reaches to the next that is as high, or higher."""
    for place, each in enumerate(headings):
        behind = (headings[at] for at in range(place + 1, len(headings)))
        end = next((other.line for other in behind if other.level <= each.level), lines)
        yield _Found(each.line, end, each.name[:_MOST_NAME_CHARS] or "#", False, each.level)
