"""Hides what the lines of a file cost, and before which of them it is best cut."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate
from typing import Final

MOST_CHARS: Final = 2**16
"""Of a line nobody reads more at once: a run of a million blanks is more than some counters survive."""

_LONG_CHARS_PER_TOKEN: Final = 32
_OVERLAP_PART: Final = 8


class Page:
    """A text by its lines, counted from 0. What they cost is about their tokens: none is counted again.

    A line of more than some characters per token of the `room` is not counted: it is too long in any case.
    """

    def __init__(self, text: str, count: Callable[[str], int], room: int) -> None:
        self.lines = text.split("\n")
        nothing = count("")
        most_chars = min(_LONG_CHARS_PER_TOKEN * room, MOST_CHARS)

        def cost(line: str) -> int:
            if len(line) > most_chars:
                return len(line)
            return max(1, count(line + "\n") - nothing) if line.strip() else 1

        self._sums = list(accumulate(map(cache(cost), self.lines), initial=0))

    def cost(self, start: int, end: int) -> int:
        """Of the lines from `start` to before `end`."""
        return self._sums[end] - self._sums[start]

    def text(self, start: int, end: int) -> str:
        """The lines from `start` to before `end`."""
        return "\n".join(self.lines[start:end])

    def trimmed(self, start: int, end: int) -> tuple[int, int]:
        """The same without blank lines at both ends."""
        while start < end and not self.lines[start].strip():
            start += 1
        while start < end and not self.lines[end - 1].strip():
            end -= 1
        return start, end

    def cuts(self, start: int, end: int, limit: int, overlap: int) -> Iterator[tuple[int, int]]:
        """From where to before where each piece reaches, all about as large; above `limit` only if it is one line.

        Each begins with the last lines of the one before, if they cost at most `overlap` and an eighth of the limit.
        """
        overlap = min(overlap, limit // _OVERLAP_PART)
        at, done = start, start  # a piece begins at `at`; what stands before `done` is in others
        while self.cost(at, end) > limit and end - done > 1:
            share = self.cost(at, end) / -(-self.cost(at, end) // limit)
            last = self._reach(at, limit)
            if last <= done:
                at, last = done, max(self._reach(done, limit), done + 1)
            first = max(done + 1, min(self._reach(at, int(share / 2)), last))
            ideal = self._sums[at] + share
            cut = min(range(first, last + 1), key=lambda line: (*self._seam(line), abs(self._sums[line] - ideal)))
            yield at, cut
            at, done = max(at + 1, bisect_left(self._sums, self._sums[cut] - overlap)), cut
        yield (at if self.cost(at, end) <= limit else done), end

    def _reach(self, start: int, limit: int) -> int:
        """Before which line those from `start` on cost more than `limit`."""
        return bisect_right(self._sums, self._sums[start] + limit) - 1

    def _seam(self, line: int) -> tuple[bool, int, bool]:
        """How bad it is to begin with it: blanks and closing brackets never, then by how far it stands in."""
        text = self.lines[line]
        bare = text.lstrip()
        starts = bool(bare) and (bare[0].isalnum() or bare[0] not in ")]}>")
        return not starts, len(text) - len(bare), bool(self.lines[line - 1].strip())
