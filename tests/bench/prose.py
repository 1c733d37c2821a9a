"""Hides where realistic text comes from: Python's own language reference, which every interpreter carries."""

import functools
from collections.abc import Iterable
from pydoc_data.topics import topics

from app.ports import TokenCounter


@functools.cache
def prose() -> str:
    """About 700 kB of English, the same in every run."""
    return " ".join(" ".join(topics.values()).split())


def passages(counter: TokenCounter, lengths: Iterable[int], label: int = 0) -> list[str]:
    """One text for each length in tokens, all different; each begins with `label` in three digits."""
    text, texts = prose(), []
    for number, tokens in enumerate(lengths):
        start = number * 997 % (len(text) - 8 * tokens)
        texts.append(counter.cut(f"{label:03d}.{number:05d} {text[start : start + 8 * tokens]}", tokens))
    return texts


def relabelled(texts: Iterable[str], label: int) -> list[str]:
    """The same `passages`, of as many tokens in cl100k, but with another label."""
    return [f"{label:03d}{text[3:]}" for text in texts]
