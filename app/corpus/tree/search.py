"""Hides how a question finds its place in a tree: by meaning and by words, and which lines are shown of it."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from app.corpus.tree.names import asked, parts
from app.corpus.tree.stored import Match
from app.corpus.tree.tables import Only, Tables

Mode: TypeAlias = Literal["hybrid", "vector", "text"]

SNIPPET_LINES: Final = 5
_RANK = 60.0  # of reciprocal rank fusion: how little the first places differ
_LOOKED_AT = 10  # times what is wanted: who is well placed in one ranking may be far behind in the other
_LEAST_LOOKED_AT = 100


class Hit(NamedTuple):
    """A place that answers, or a file and its best place: then lines are 0 where none stands out.

    `score` is from 0 to 1 where ranks were fused (1: the first in each), else the cosine, or BM25. The snippet begins
    at `snippet_line`.
    """

    path: str
    start_line: int
    end_line: int
    language: str
    symbol: str
    score: float
    snippet_line: int
    snippet: str


def search(
    tables: Tables, query: str, vector: bytes | None, *, mode: Mode, limit: int, only: Only, files: bool = False
) -> list[Hit]:
    """At most `limit` chunks, the best first; or `files` with their best chunk. Blocks; raises DataError.

    `vector` is that of the query, not needed for `text`.
    """
    deep = max(_LEAST_LOOKED_AT, _LOOKED_AT * limit)
    rankings = [tables.matching(asked(query), deep, only)] if mode != "vector" else []
    rankings += [tables.nearest(vector, deep, only)] if mode != "text" and vector is not None else []
    best: dict[str, Match] = {}
    named = []
    for ranking in rankings:
        names = [match.path if files else f"{match.path}:{match.start_line}-{match.end_line}" for match in ranking]
        for name, match in zip(names, ranking, strict=True):
            best.setdefault(name, match)
        named.append(list(dict.fromkeys(names)))
    if files and mode != "text" and vector is not None:
        named.append(tables.nearest_files(vector, deep, only))
    scores = _fused([each for each in named if each]) if len(named) > 1 else {name: best[name].score for name in best}
    first = sorted(scores, key=lambda name: -scores[name])[:limit]
    return [_hit(name, best.get(name), scores[name], query) for name in first]


def _fused(rankings: Sequence[Sequence[str]]) -> dict[str, float]:
    """Reciprocal rank fusion, 1.0 for who is the first everywhere."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for place, name in enumerate(ranking):
            scores[name] = scores.get(name, 0.0) + (_RANK + 1) / (_RANK + 1 + place) / len(rankings)
    return scores


def _hit(name: str, match: Match | None, score: float, query: str) -> Hit:
    if match is None:
        return Hit(name, 0, 0, "", "", score, 0, "")
    at, lines = _best_lines(match.text.split("\n"), set(parts(asked(query))))
    return Hit(
        match.path, match.start_line, match.end_line, match.language, match.symbol, score, match.start_line + at,
        "\n".join(lines),
    )  # fmt: skip


def _best_lines(lines: Sequence[str], wanted: set[str]) -> tuple[int, Sequence[str]]:
    """Neighbouring lines with as many different words that are asked for as can be; the first of the best."""
    found = [wanted.intersection(parts(line)) for line in lines]
    spans = [found[at : at + SNIPPET_LINES] for at in range(max(1, len(lines) - SNIPPET_LINES + 1))]
    worth = [(len(set[str]().union(*span)), sum(map(len, span)), any(span[:1])) for span in spans]
    at = max(range(len(spans)), key=worth.__getitem__)
    return at, lines[at : at + SNIPPET_LINES]
