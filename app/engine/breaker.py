"""Hides when a deployment is left alone, who may try it first again, and how many retries may be spent on it."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from app.domain import BreakerPolicy

State: TypeAlias = Literal["closed", "open", "half_open", "credential", "quota"]
Reason: TypeAlias = Literal["", "failures", "ratio", "stall", "probe", "credential", "quota"]

CONDEMNED_S = 60.0
"""How long a deployment without credential or credit is left alone: only an operator can mend it."""

_JITTER = 0.1
_STALL_TIMES_P99 = 4.0
_REMEMBERED_DURATIONS = 128
_REMEMBERED_OUTCOMES = 1024
_NO_GENERATION = -1


@dataclass(slots=True, eq=False)
class Pass:
    """The right to make one call; goes back to its breaker through exactly one of four ways.

    `generation` is the breaker's at the start: what happened before the last change of state proves nothing now.
    """

    generation: int
    probe: bool
    started_s: float
    ended: bool = False


class CircuitBreaker:
    """One deployment's health: `admit` before a call, then `succeeded`, `failed`, `cut` or `neutral` after it.

    Opens on failures in a row, on a failure ratio, or when calls get no answer at all; then one probe at a time asks
    whether the deployment is back. A probe is a lease: one that never answers only holds its place for that long.
    Of several ends of one pass the first counts.
    """

    def __init__(
        self,
        policy: BreakerPolicy,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        on_change: Callable[[State, Reason], None],
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._on_change = on_change
        self._state: State = "closed"
        self._reason: Reason = ""
        self._until_s = 0.0  # the end of the pause when open, of the probe's lease when half-open
        self._generation = 0
        self._openings = 0  # since it was last closed
        self._failures_in_a_row = 0
        self._outcomes: deque[tuple[float, bool]] = deque()  # (when, failed), oldest first
        self._failed_outcomes = 0
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED_DURATIONS)
        self._unanswered: dict[Pass, None] = {}  # open passes begun since the last success, oldest first
        self._silence_s = 0.0  # how long calls that were cut short had waited since the last success
        self._silent_until_s = 0.0

    @property
    def state(self) -> State:
        """Half-open only while a probe is out; a probe that overstayed its lease counts as none."""
        overstayed = self._state == "half_open" and self._clock() >= self._until_s
        return "open" if overstayed else self._state

    @property
    def reason(self) -> Reason:
        """Why it is not closed; empty when it is."""
        return self._reason

    @property
    def is_unanswered(self) -> bool:
        """Whether calls have failed or brought nothing since one was answered, be it closed or not."""
        return self._state != "closed" or self._failures_in_a_row > 0 or self._silence_s > 0.0

    def retry_in_s(self) -> float:
        """Seconds until `admit` could say yes; 0 when it could now."""
        return 0.0 if self._state == "closed" else max(0.0, self._until_s - self._clock())

    def admit(self) -> Pass | None:
        """A pass for one call; None while the deployment is left alone or another probe is out."""
        self.check_stall()
        now = self._clock()
        if self._state == "closed":
            admitted = Pass(self._generation, probe=False, started_s=now)
            self._unanswered[admitted] = None
            return admitted
        if now < self._until_s:
            return None
        self._enter("half_open", self._reason, self._policy.probe_lease_s)
        return Pass(self._generation, probe=True, started_s=now)

    def unjudged(self) -> Pass:
        """A pass whose end changes nothing, for a call that is made although the deployment is left alone."""
        return Pass(_NO_GENERATION, probe=False, started_s=self._clock())

    def succeeded(self, ended: Pass) -> None:
        """The call brought a valid reply: a probe closes the breaker."""
        if not ended.ended:  # how long answers take is true whatever the state was
            self._durations_s.append(self._clock() - ended.started_s)
        if not self._end(ended):
            return
        self._unanswered.clear()
        self._silence_s = 0.0
        if ended.probe:
            self._openings = 0
            self._enter("closed", "", 0.0)
        else:
            self._failures_in_a_row = 0
            self._remember(failed=False)

    def failed(self, ended: Pass) -> None:
        """The deployment failed: a timeout, a reset, a 5xx, a malformed reply."""
        if not self._end(ended):
            return
        if ended.probe:
            self._open("probe")
            return
        self._failures_in_a_row += 1
        self._remember(failed=True)
        calls = len(self._outcomes)
        if self._failures_in_a_row >= self._policy.failures_in_a_row:
            self._open("failures")
        elif calls >= self._policy.ratio_min_calls and self._failed_outcomes >= self._policy.failure_ratio * calls:
            self._open("ratio")

    def cut(self, ended: Pass, whole_s: float) -> None:
        """The call had less time than answers may take, so its silence proves nothing; except that silences add up.

        When calls were silent for `whole_s`, as long as a whole one may take, and nothing succeeded, that is a stall.
        A probe has failed: the deployment was left alone for better reasons.
        """
        if ended.probe:
            self.failed(ended)
            return
        if not self._end(ended):
            return
        now = self._clock()
        self._silence_s += now - max(ended.started_s, self._silent_until_s)
        self._silent_until_s = now
        if self._silence_s >= whole_s:
            self._open("stall")

    def patience_s(self) -> float:
        """How long a call should be waited for before its silence says something: 99 of 100 answers took no longer."""
        return self._p99_s() if self._durations_s else self._policy.probe_lease_s

    def neutral(self, ended: Pass) -> None:
        """The call says nothing about health (cancelled, a 429, a caller's own 4xx); a probe's place is free again."""
        if self._end(ended) and ended.probe:
            self._enter("open", self._reason, 0.0)

    def condemn(self, kind: Literal["credential", "quota"]) -> None:
        """The deployment refused our key or has no credit: nobody tries it for `CONDEMNED_S`."""
        if self._state != kind:
            self._enter(kind, kind, CONDEMNED_S)

    def check_stall(self) -> None:
        """Opens when calls have been waiting too long while nothing succeeded."""
        if self.stall_in_s() == 0.0:
            self._open("stall")

    def stall_in_s(self) -> float | None:
        """Seconds until `check_stall` has to be asked again; None while no open call could become a stall."""
        if self._state != "closed" or not self._unanswered:
            return None
        age_s = self._clock() - next(iter(self._unanswered)).started_s
        if age_s < self._policy.stall_least_s:  # no need to sort the durations yet
            return self._policy.stall_least_s - age_s
        return max(0.0, self._stalled_after_s() - age_s)

    def _stalled_after_s(self) -> float:
        """How old an unanswered call may become; before any answer is known, as old as a probe."""
        if not self._durations_s:
            return max(self._policy.stall_least_s, self._policy.probe_lease_s)
        return max(self._policy.stall_least_s, _STALL_TIMES_P99 * self._p99_s())

    def _p99_s(self) -> float:
        ordered = sorted(self._durations_s)
        return ordered[(len(ordered) * 99 - 1) // 100]

    def _end(self, ended: Pass) -> bool:
        """Takes a pass back; whether its result may be judged."""
        if ended.ended:
            return False
        ended.ended = True
        self._unanswered.pop(ended, None)
        return ended.generation == self._generation

    def _remember(self, *, failed: bool) -> None:
        now = self._clock()
        self._outcomes.append((now, failed))
        self._failed_outcomes += failed
        oldest_s = now - self._policy.ratio_window_s
        while self._outcomes[0][0] <= oldest_s or len(self._outcomes) > _REMEMBERED_OUTCOMES:
            self._failed_outcomes -= self._outcomes.popleft()[1]

    def _open(self, reason: Reason) -> None:
        """Opens for a pause that doubles with every opening since the last success and, jittered, keeps to the cap."""
        longest_s = self._policy.open_cap_s / (1 + _JITTER)
        pause_s = min(self._policy.open_s * 2.0 ** min(self._openings, 32), longest_s)
        self._openings += 1
        self._enter("open", reason, pause_s * self._rng.uniform(1 - _JITTER, 1 + _JITTER))

    def _enter(self, state: State, reason: Reason, for_s: float) -> None:
        """Changes the state and begins a generation: whatever is in flight can no longer change it."""
        self._state, self._reason = state, reason
        self._until_s = self._clock() + for_s
        self._generation += 1
        self._failures_in_a_row = 0
        self._failed_outcomes = 0
        self._outcomes.clear()
        self._unanswered.clear()
        self._silence_s = 0.0
        self._on_change(state, reason)


class RetryBudget:
    """Keeps retries a small part of all attempts: never more than `ratio` of the first ones, plus `reserve`."""

    def __init__(self, ratio: float = 0.1, reserve: int = 10) -> None:
        self._earned_milli = round(ratio * 1000)
        self._most_milli = reserve * 1000
        self._saved_milli = self._most_milli

    def earn(self) -> None:
        """A first attempt was made; what is saved never exceeds the reserve."""
        self._saved_milli = min(self._most_milli, self._saved_milli + self._earned_milli)

    def spend(self) -> bool:
        """Whether one retry may be made; it then has been paid."""
        if self._saved_milli < 1000:
            return False
        self._saved_milli -= 1000
        return True
