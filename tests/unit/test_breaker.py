"""When a deployment is left alone, who probes it, and what its retries may cost; on a clock that the test holds."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import BreakerPolicy
from app.engine.breaker import CONDEMNED_S, CircuitBreaker, Pass, RetryBudget

POLICY = BreakerPolicy()


@dataclass
class Rig:
    """A breaker with its clock and what it told of its changes."""

    policy: BreakerPolicy = POLICY
    seed: int = 1
    now_s: float = 1000.0
    changes: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaker = CircuitBreaker(
            self.policy,
            clock=lambda: self.now_s,
            rng=random.Random(self.seed),
            on_change=lambda state, reason: self.changes.append((state, reason)),
        )

    @property
    def state(self) -> str:
        """The breaker's state now."""
        return self.breaker.state

    def begin(self) -> Pass:
        """A pass that must be given."""
        admitted = self.breaker.admit()
        assert admitted is not None
        return admitted

    def succeed(self, *, in_s: float = 0.0) -> None:
        """One whole good call."""
        call = self.begin()
        self.now_s += in_s
        self.breaker.succeeded(call)

    def fail(self) -> None:
        """One whole failed call."""
        self.breaker.failed(self.begin())

    def open(self) -> None:
        """As many failures as open it."""
        for _ in range(self.policy.failures_in_a_row):
            self.fail()
        assert self.state == "open"

    def await_probe(self) -> Pass:
        """The first probe after the pause."""
        self.now_s += self.breaker.retry_in_s()
        probe = self.begin()
        assert probe.probe
        return probe


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_five_failures_in_a_row_open_it() -> None:
    """Not four, and a success in between starts the row anew."""
    rig = Rig()
    for _ in range(4):
        rig.fail()
    rig.succeed()
    for _ in range(4):
        rig.fail()
    assert rig.state == "closed"
    rig.fail()
    assert (rig.state, rig.breaker.reason) == ("open", "failures")
    assert rig.breaker.admit() is None
    assert rig.changes == [("open", "failures")]


def test_half_of_ten_calls_failing_opens_it() -> None:
    """The ratio counts from ten calls on, however they are mixed."""
    rig = Rig()
    for _ in range(4):
        rig.fail()
        rig.succeed()
    rig.succeed()
    assert rig.state == "closed"
    rig.fail()
    assert (rig.state, rig.breaker.reason) == ("open", "ratio")


def test_failures_older_than_the_window_are_forgotten() -> None:
    """Half of the calls of the last 30 s count, not those before."""
    rig = Rig()
    for _ in range(4):
        rig.fail()
    rig.succeed()
    rig.now_s += POLICY.ratio_window_s
    for _ in range(8):
        rig.succeed()
    rig.fail()
    assert rig.state == "closed"


def test_neutral_ends_never_move_it() -> None:
    """Cancelled calls, 429s and the caller's own errors say nothing about health."""
    rig = Rig()
    for _ in range(100):
        rig.breaker.neutral(rig.begin())
    assert (rig.state, rig.changes) == ("closed", [])


def test_calls_without_any_answer_are_a_stall() -> None:
    """A call older than a second and 4 × p99, with nothing succeeded since it began, opens it without a timeout."""
    rig = Rig()
    for _ in range(20):
        rig.succeed(in_s=0.1)
    assert rig.breaker.stall_in_s() is None
    rig.begin()
    assert rig.breaker.stall_in_s() == pytest.approx(1.0)
    rig.now_s += 0.999
    rig.breaker.check_stall()
    assert rig.state == "closed"
    rig.now_s += 0.002
    assert rig.breaker.admit() is None
    assert (rig.state, rig.breaker.reason) == ("open", "stall")


def test_a_deployment_that_is_always_slow_is_not_stalled() -> None:
    """What is normal is learned from its own calls."""
    rig = Rig()
    for _ in range(20):
        rig.succeed(in_s=3.0)
    rig.begin()
    assert rig.breaker.stall_in_s() == pytest.approx(1.0)
    rig.now_s += 11.9
    assert rig.breaker.stall_in_s() == pytest.approx(0.1)
    rig.breaker.check_stall()
    assert rig.state == "closed"


def test_one_call_that_hangs_is_no_stall_while_others_succeed() -> None:
    """A success proves that the deployment answers; only calls begun after it can show a stall."""
    rig = Rig()
    rig.begin()
    for _ in range(50):
        rig.succeed(in_s=0.2)
    assert rig.breaker.stall_in_s() is None
    rig.begin()
    rig.now_s += 1.001
    rig.breaker.check_stall()
    assert rig.state == "open"


def test_ended_calls_cannot_stall() -> None:
    """Failed and cancelled calls are no longer waited for."""
    rig = Rig()
    for end in (rig.breaker.failed, rig.breaker.neutral):
        end(rig.begin())
    assert rig.breaker.stall_in_s() is None


def test_before_any_answer_is_known_a_call_may_take_as_long_as_a_probe() -> None:
    """A cold deployment's first call is slow."""
    rig = Rig()
    rig.begin()
    rig.now_s += POLICY.probe_lease_s - 0.01
    rig.breaker.check_stall()
    assert rig.state == "closed"
    rig.now_s += 0.02
    rig.breaker.check_stall()
    assert rig.state == "open"


# ── opening again and closing ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(10))
def test_the_pause_doubles_up_to_the_cap_and_is_jittered(seed: int) -> None:
    """1, 2 s and then somewhat less than 4 s, each within 10 %, never above the cap; a success starts anew."""
    rig = Rig(seed=seed)
    rig.open()
    for middle_s in (1.0, 2.0, POLICY.open_cap_s / 1.1, POLICY.open_cap_s / 1.1):
        assert 0.899 * middle_s <= rig.breaker.retry_in_s() <= 1.1001 * middle_s
        rig.breaker.failed(rig.await_probe())
        assert rig.breaker.reason == "probe"
    rig.breaker.succeeded(rig.await_probe())
    assert (rig.state, rig.breaker.reason, rig.breaker.retry_in_s()) == ("closed", "", 0.0)
    rig.open()
    assert 0.899 <= rig.breaker.retry_in_s() <= 1.101


def test_replicas_do_not_probe_in_step() -> None:
    """Two breakers opened at one moment wait differently."""
    rigs = [Rig(seed=seed) for seed in (1, 2)]
    for rig in rigs:
        rig.open()
    assert rigs[0].breaker.retry_in_s() != rigs[1].breaker.retry_in_s()


def test_only_one_probe_is_out_at_a_time() -> None:
    """While the probe flies nobody else is admitted; its success closes."""
    rig = Rig()
    rig.open()
    probe = rig.await_probe()
    assert rig.state == "half_open"
    assert rig.breaker.admit() is None
    assert rig.breaker.retry_in_s() == pytest.approx(POLICY.probe_lease_s)
    rig.breaker.succeeded(probe)
    assert rig.state == "closed"
    assert [state for state, _ in rig.changes] == ["open", "half_open", "closed"]


def test_a_probe_that_never_answers_holds_its_place_for_its_lease_only() -> None:
    """The next probe may go when the lease is over, and the late answer of the first is ignored."""
    rig = Rig()
    rig.open()
    hung = rig.await_probe()
    rig.now_s += POLICY.probe_lease_s
    assert (rig.state, rig.breaker.retry_in_s()) == ("open", 0.0)
    second = rig.begin()
    assert second.probe
    rig.breaker.failed(hung)
    assert rig.state == "half_open"
    rig.breaker.succeeded(second)
    assert rig.state == "closed"


def test_a_cancelled_probe_frees_its_place_at_once() -> None:
    """It neither closes nor lengthens the pause."""
    rig = Rig()
    rig.open()
    rig.breaker.neutral(rig.await_probe())
    assert (rig.state, rig.breaker.retry_in_s()) == ("open", 0.0)
    assert rig.begin().probe


@pytest.mark.parametrize("end", [CircuitBreaker.succeeded, CircuitBreaker.failed, CircuitBreaker.neutral])
def test_results_from_before_a_change_are_ignored(end: Callable[[CircuitBreaker, Pass], None]) -> None:
    """A call begun while closed neither closes an open breaker, nor decides over the probe, nor counts afterwards."""
    rig = Rig()
    old = [rig.begin() for _ in range(30)]
    rig.open()
    end(rig.breaker, old.pop())
    assert rig.state == "open"
    probe = rig.await_probe()
    end(rig.breaker, old.pop())
    assert rig.state == "half_open"
    rig.breaker.succeeded(probe)
    for late in old:
        end(rig.breaker, late)
    assert rig.state == "closed"
    assert rig.breaker.stall_in_s() is None


def test_a_pass_ends_once() -> None:
    """Of several ends the first counts."""
    rig = Rig()
    call = rig.begin()
    rig.breaker.succeeded(call)
    for _ in range(10):
        rig.breaker.failed(call)
    assert rig.state == "closed"


@pytest.mark.parametrize("kind", ["credential", "quota"])
def test_a_refused_key_or_an_empty_account_opens_it_at_once_for_long(kind: str) -> None:
    """One observation is enough, the same one again changes nothing, and a success closes."""
    rig = Rig()
    rig.begin()
    for _ in range(3):
        rig.breaker.condemn("credential" if kind == "credential" else "quota")
    assert (rig.state, rig.breaker.reason, rig.changes) == (kind, kind, [(kind, kind)])
    assert rig.breaker.retry_in_s() == pytest.approx(CONDEMNED_S)
    assert rig.breaker.admit() is None
    rig.breaker.succeeded(rig.await_probe())
    assert rig.state == "closed"


def test_a_probe_with_a_refused_key_condemns_again() -> None:
    """The pause starts anew, and the probe's pass means nothing any more."""
    rig = Rig()
    rig.breaker.condemn("credential")
    probe = rig.await_probe()
    rig.breaker.condemn("credential")
    rig.breaker.neutral(probe)
    assert rig.state == "credential"
    assert rig.breaker.retry_in_s() == pytest.approx(CONDEMNED_S)


@given(st.lists(st.tuples(st.sampled_from(["begin", "ok", "bad", "neutral", "condemn", "wait"]), st.integers(0, 7))))
def test_whatever_happens_a_probe_is_always_possible_again(steps: list[tuple[str, int]]) -> None:
    """No sequence of calls wedges it: after its longest pause somebody is admitted, and a success then closes it."""
    rig, flying = Rig(), list[Pass]()
    ends = {"ok": rig.breaker.succeeded, "bad": rig.breaker.failed, "neutral": rig.breaker.neutral}
    for step, number in steps:
        if step == "begin" and (admitted := rig.breaker.admit()) is not None:
            flying.append(admitted)
        elif step in ends and flying:
            ends[step](flying[number % len(flying)])
        elif step == "condemn":
            rig.breaker.condemn("quota")
        elif step == "wait":
            rig.now_s += number
    assert rig.breaker.retry_in_s() <= CONDEMNED_S
    rig.now_s += rig.breaker.retry_in_s()
    if (admitted := rig.breaker.admit()) is None:  # it was found to be stalled by this very call
        admitted = rig.await_probe()
    rig.breaker.succeeded(admitted)
    assert rig.state == "closed"


# ── retries ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.booleans(), max_size=500))
def test_attempts_never_exceed_a_tenth_more_than_requests_plus_ten(retries: list[bool]) -> None:
    """At every moment, whatever the order of first attempts and retries."""
    budget, first, again = RetryBudget(), 0, 0
    for is_retry in retries:
        if is_retry:
            again += budget.spend()
        else:
            first += 1
            budget.earn()
        assert 10 * (first + again) <= 11 * first + 100


def test_the_budget_pays_a_tenth_of_all_requests() -> None:
    """When everything fails, one in ten is tried again, after the reserve."""
    budget, again = RetryBudget(), 0
    for _ in range(1000):
        budget.earn()
        again += budget.spend()
    assert again == 109


def test_long_calm_saves_no_more_than_the_reserve() -> None:
    """A million good requests do not pay for a storm."""
    budget = RetryBudget()
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10
