"""Hides how large a deployment's calls may become before they take too long."""

from collections import deque

_CALLS = 10
_SLOW_CALLS = 2  # of ten: more than one means that the ninth of ten is too slow
_CUT = 0.7


class BatchCeiling:
    """Keeps nine calls of ten below `target_s` by the tokens that a call may carry, from `least` to `most`.

    It starts at the least and doubles while calls are full and quick; after the first slow ones it grows by the least
    and shrinks by a part, as TCP does. Calls that are not nearly full say nothing about larger ones.
    """

    def __init__(self, least: int, most: int, target_s: float) -> None:
        self._least = min(least, most)
        self._most = most
        self._target_s = target_s
        self._tokens = float(self._least)
        self._doubles = True
        self._calls: deque[tuple[bool, bool]] = deque(maxlen=_CALLS)  # (slow, nearly full) since the last change

    @property
    def tokens(self) -> int:
        """What a call may carry now."""
        return int(self._tokens)

    def landed(self, tokens: int, duration_s: float) -> None:
        """A call of so many tokens was answered after `duration_s`."""
        self._calls.append((duration_s > self._target_s, tokens >= 0.8 * self._tokens))
        slow = sum(was_slow for was_slow, _ in self._calls)
        if slow >= _SLOW_CALLS:
            self._doubles = False
            self._change(self._tokens * _CUT)
        elif len(self._calls) == _CALLS and sum(full for _, full in self._calls) > _CALLS // 2:
            self._change(self._tokens * 2 if self._doubles else self._tokens + self._least)

    def _change(self, tokens: float) -> None:
        self._tokens = min(max(tokens, self._least), self._most)
        self._calls.clear()
