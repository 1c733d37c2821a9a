"""Hides how a file becomes chunks that each say one thing and fit the model."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

from app.corpus.rows import DataError
from app.corpus.tree.outline import Definition, outline
from app.corpus.tree.page import MOST_CHARS, Page
from app.corpus.tree.pieces import Chunk, SourceFile, passage

_GOOD_TOKENS: Final = 512  # as much as small neighbours are put together to: with more, they would say too many things
_SMALL_PART: Final = 8
_LEAST_ROOM_TOKENS: Final = 16
_MOST_SYMBOL_CHARS: Final = 160
_WORD: Final = re.compile(r"\w")
_SAYS: Final = re.compile(r"\b(?!(?:end|endif|fi|done|esac)\b)\w")
_SEAMS: Final = " \t;,})]>"


class Chunker:
    """Cuts files at their definitions and headings: the same file always gives the same chunks.

    `count` tells the tokens of a text; no chunk's passage has more than `chunk_tokens`. Where a function, or anything
    else, does not fit into one chunk, the next begins with up to `overlap_tokens` of whole lines of the one before.
    """

    def __init__(self, *, chunk_tokens: int, overlap_tokens: int, count: Callable[[str], int]) -> None:
        self._chunk_tokens = chunk_tokens
        self._overlap_tokens = overlap_tokens
        self._count = count

    def chunks(self, file: SourceFile) -> list[Chunk]:
        """In the order of the file; none of a file without words. Raises DataError where its path leaves no room."""
        if not _WORD.search(file.text):
            return []
        room = self._chunk_tokens - self._count(passage(file.path, "", ""))
        if room < _LEAST_ROOM_TOKENS:
            raise DataError(f"{file.path}: beside it there is no room for words in {self._chunk_tokens} tokens")
        page = Page(file.text, self._count, room)
        seen: Counter[str] = Counter()
        found = []
        for span in _Plan(page, room).spans(outline(file.language, page.lines)):
            symbol = self._symbol(span.symbols, room)
            for start, end in page.cuts(span.start, span.end, span.limit, self._overlap_tokens):
                for piece in self._pieces(file.path, symbol, page, start, end):
                    seen[piece.text] += 1
                    found.append(_chunk(file, symbol, piece, seen[piece.text]))
        return found

    def _symbol(self, symbols: Sequence[str], room: int) -> str:
        """One name for all, without those that the others begin with; what is too long says too little."""
        inmost = [
            each for each in dict.fromkeys(symbols) if each and not any(_is_within(other, each) for other in symbols)
        ]
        symbol = ", ".join(inmost)
        while symbol and (len(symbol) > _MOST_SYMBOL_CHARS or self._count(symbol) > room // 2):
            symbol = symbol.rpartition(", ")[0]
        return symbol

    def _pieces(self, path: str, symbol: str, page: Page, start: int, end: int) -> Iterator["_Piece"]:
        """The lines as one, or as several where they were more tokens than they seemed to be."""
        start, end = page.trimmed(start, end)
        text = page.text(start, end)
        if not _WORD.search(text):
            return
        cost = page.cost(start, end)
        too_long = cost > 2 * self._chunk_tokens  # a single line, and it is not worth counting
        tokens = cost if too_long else self._count(passage(path, symbol, text))
        if tokens <= self._chunk_tokens:
            yield _Piece(start, end, text, tokens)
        elif end - start == 1:
            yield from (_Piece(start, end, *part) for part in self._parts(path, symbol, text))
        else:
            limit = max(1, cost * self._chunk_tokens * 9 // (tokens * 10))
            for part in page.cuts(start, end, limit, self._overlap_tokens):
                yield from self._pieces(path, symbol, page, *part)

    def _parts(self, path: str, symbol: str, line: str) -> Iterator[tuple[str, int]]:
        """A line that is too long, by its characters; at best between two words."""
        beside = self._count(passage(path, symbol, ""))
        room = self._chunk_tokens - beside
        at, size = 0, min(4 * room, MOST_CHARS)
        while at < len(line):
            part = _headed(line, at, size)
            tokens = self._count(passage(path, symbol, part)) if _WORD.search(part) else 0
            if tokens <= self._chunk_tokens:
                if tokens:
                    yield part, tokens
                at += len(part)
                size = min(2 * size, MOST_CHARS, max(len(part), len(part) * room * 9 // (10 * max(1, tokens - beside))))
            elif len(part) > 1:
                size = max(1, min(len(part) - 1, len(part) * room * 9 // (10 * (tokens - beside))))
            else:
                raise DataError(f"{path}: beside it there is no room for words in {self._chunk_tokens} tokens")


class _Piece(NamedTuple):
    """Lines from `start` to before `end`, counted from 0, or of one line a part."""

    start: int
    end: int
    text: str
    tokens: int


def _chunk(file: SourceFile, symbol: str, piece: _Piece, repetition: int) -> Chunk:
    return Chunk(
        id=_digest(file.path, piece.text, str(repetition)), path=file.path, language=file.language, symbol=symbol,
        start_line=piece.start + 1, end_line=piece.end, text=piece.text, tokens=piece.tokens,
        hash=_digest(passage(file.path, symbol, piece.text)),
    )  # fmt: skip


def _digest(*words: str) -> str:
    return blake2b("\0".join(words).encode(), digest_size=16).hexdigest()


def _is_within(symbol: str, other: str) -> bool:
    return symbol.startswith((f"{other}.", f"{other} > "))


def _headed(line: str, at: int, size: int) -> str:
    """At most `size` characters; if more follow, the last fifth of them may be left, to end with a word."""
    part = line[at : at + size]
    if at + size >= len(line):
        return part
    kept = len(part) * 4 // 5
    seam = max(part.rfind(each, kept) for each in _SEAMS)
    return part[: seam + 1] if seam >= 0 else part


# ── what belongs together ───────────────────────────────────────────────────────────────────────────────────────────


class _Span(NamedTuple):
    """Lines that are one chunk, if they cost no more than the `limit`; `scope` is the symbol that they are part of."""

    start: int
    end: int
    symbols: tuple[str, ...]
    scope: str
    limit: int


class _Plan:
    """What of a page goes into one chunk, from its beginning to its end."""

    def __init__(self, page: Page, room: int) -> None:
        self._page = page
        self._room = room
        self._good = min(_GOOD_TOKENS, room)

    def spans(self, definitions: Sequence[Definition]) -> list[_Span]:
        """Neighbours that are small, together."""
        spans: list[_Span] = []
        for span in self._split(definitions, 0, len(self._page.lines), ""):
            if spans and self._belong(spans[-1], span):
                before = spans.pop()
                limit = max(before.limit, span.limit)
                spans.append(_Span(before.start, span.end, before.symbols + span.symbols, span.scope, limit))
            else:
                spans.append(span)
        return spans

    def _split(self, definitions: Sequence[Definition], start: int, end: int, scope: str) -> Iterator[_Span]:
        """The definitions, those that are too large by what is in them, and the lines between them."""
        for each in definitions:
            if start < each.start:
                yield _Span(start, each.start, (scope,), scope, self._good)
            limit = self._room if each.whole else self._good
            if each.inner and self._page.cost(each.start, each.end) > limit:
                yield from self._split(each.inner, each.start, each.end, each.symbol)
            else:
                yield _Span(each.start, each.end, (each.symbol,), scope, limit)
            start = each.end
        if start < end:
            yield _Span(start, end, (scope,), scope, self._good)

    def _belong(self, before: _Span, span: _Span) -> bool:
        """Of one scope up to a good size; what is hardly anything also with what is of another, or is large."""
        if not self._says(before) or not self._says(span):
            return True
        together = self._page.cost(before.start, span.end)
        small = self._good // _SMALL_PART
        is_head = self._page.cost(before.start, before.end) < small
        if together > self._good:
            return is_head and together <= span.limit
        return is_head or before.scope == span.scope or self._page.cost(span.start, span.end) < small

    def _says(self, span: _Span) -> bool:
        return any(map(_SAYS.search, self._page.lines[span.start : span.end]))
