"""The store of jobs against a plain model of the diagram of their statuses, in any order of what can happen."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, func, select, update

from app.errors import Conflict
from app.job import ENDED, Kind, LineError, Order, Piece, Shard, Status, StoredFile, Task
from app.storage.sql.database import Database
from app.storage.sql.jobs import SqlJobs
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import files, job_pieces, job_tasks, jobs
from tests.contract.stored import SOON_S, change

TENANTS = ("a", "b")
OPEN_JOBS = 4
FOR_S = 100_000.0

DIAGRAM: set[tuple[Status, Status]] = {
    ("validating", "failed"), ("validating", "in_progress"), ("validating", "expired"), ("validating", "cancelling"),
    ("validating", "cancelled"), ("in_progress", "finalizing"), ("in_progress", "cancelling"),
    ("finalizing", "completed"), ("finalizing", "expired"), ("finalizing", "cancelling"), ("cancelling", "cancelled"),
}  # fmt: skip

T = TypeVar("T")

_COUNTED = (
    select(jobs, *(func.coalesce(func.sum(column), 0).label(name) for name, column in
                   (("good", job_pieces.c.completed), ("bad", job_pieces.c.failed))))
    .outerjoin(job_pieces, job_pieces.c.job == jobs.c.id)
    .group_by(jobs.c.id)
)  # fmt: skip


@dataclass
class Part:
    """A task as the model keeps it; `held` until somebody says otherwise, `leased` until its time is over.

    While it is `resting` nobody holds it, and nobody may.
    """

    kind: Kind
    lines: int = 0
    done: int = 0
    pieces: int = 0
    fence: int = 0
    held: bool = False
    leased: bool = False
    resting: bool = False
    over: bool = False

    @property
    def busy(self) -> bool:
        """Whether somebody works on it."""
        return self.held and self.leased

    @property
    def free(self) -> bool:
        """Whether it can be taken."""
        return not (self.over or self.busy or self.resting)


@dataclass
class Model:
    """A job as the model keeps it; parts by number."""

    tenant: str
    id: str
    created_at_ms: int
    status: Status = "validating"
    ending: Status = "completed"
    late: bool = False
    paused: bool = False
    pause_over: bool = False
    accepted: bool = False
    completed: int = 0
    failed: int = 0
    parts: dict[int, Part] = field(default_factory=lambda: {0: Part("read")})
    pieces: set[tuple[int, int, Piece]] = field(default_factory=set)

    def turn(self, status: Status, ending: Status | None = None) -> None:
        """Every change of status."""
        JobsMachine.seen.add((self.status, status))
        self.status, self.ending = status, ending or self.ending
        self.paused = self.pause_over = False
        if status in ENDED:
            self.parts, self.pieces = {}, set()

    def move_on(self) -> None:
        """What happens by itself."""
        if self.status == "validating" and self.late:
            self.turn("expired", "expired")
        elif self.status == "in_progress" and self.late:
            self.turn("finalizing", "expired")
        elif self.status == "cancelling" and not self.accepted and not self.busy:
            self.turn("cancelled")
        elif self.paused and self.pause_over:
            self.paused = self.pause_over = False

    @property
    def busy(self) -> int:
        """How many of its parts somebody works on."""
        return sum(part.busy for part in self.parts.values())

    def free(self) -> list[int]:
        """What could be taken, in order."""
        kind: Kind = {"validating": "read", "in_progress": "embed"}.get(self.status, "join")  # type: ignore[assignment]
        if self.paused or (kind == "join" and self.busy):
            return []
        return [n for n, part in self.parts.items() if part.kind == kind and part.free]

    def held(self, task: Task) -> Part | None:
        """What a holder means, if it is heard."""
        part = self.parts.get(task.number)
        return part if part is not None and part.held and part.fence == task.fence else None

    def wants(self, part: Part) -> bool:
        """Whether somebody should work on it."""
        wanted = {"read": {"validating"}, "embed": {"in_progress"}, "join": {"finalizing", "cancelling"}}
        return self.status in wanted[part.kind]

    def give_back(self, part: Part) -> None:
        """Its holder is not heard any more."""
        part.held = False
        self.move_on()


class JobsMachine(RuleBasedStateMachine):
    """Two tenants with few jobs each; whoever ever held a task may say anything about it at any time."""

    seen: ClassVar[set[tuple[Status, Status]]] = set()
    run: ClassVar[Callable[[Coroutine[Any, Any, Any]], Any]]
    database: ClassVar[Database]

    def __init__(self) -> None:
        super().__init__()
        self.store = SqlJobs(self.database)
        for table in (job_pieces, job_tasks, jobs, files):
            self.change(delete(table))
        for tenant in TENANTS:
            self.do(self.store.add_file(StoredFile(f"in-{tenant}", tenant, "batch", "x", 1, 0), most_bytes=0))
        self.models: dict[str, Model] = {}
        self.tasks: list[Task] = []
        self.counted: Counter[str] = Counter()

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What comes of it."""
        done: T = type(self).run(coroutine)
        return done

    def change(self, statement: Any) -> None:
        """What only time would do."""
        self.do(change(self.database, statement))

    def handed_out(self, *kinds: Kind) -> list[Task]:
        """All of these kinds that there ever were, the oldest first."""
        return [task for task in self.tasks if not kinds or task.kind in kinds]

    def task(self, back: int, *kinds: Kind) -> tuple[Task, Model]:
        """One of them, so many before the last one."""
        tasks = self.handed_out(*kinds)
        task = tasks[-1 - back % len(tasks)]
        return task, self.models[task.job.id]

    def open(self, at: int) -> Model:
        """One of the jobs that are not over; where all are, any."""
        choice = [model for model in self.models.values() if model.status not in ENDED] or [*self.models.values()]
        return choice[at % len(choice)]

    @initialize(far=st.integers(0, 3), more=st.booleans())
    def begin(self, far: int, more: bool) -> None:
        """With a job that is to be read, is being read, is worked on, or is to be joined."""
        self.create("a")
        if far > 0:
            self.take("one", 1)
        if far > 1:
            self.say_what_the_file_is(0, [1, 2] if more and far == 2 else [1], True)
        if far > 2:
            self.take("one", 1)
            self.commit(0, 1, more, 0)

    # ── callers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: sum(model.status not in ENDED for model in self.models.values()) < OPEN_JOBS)
    @rule(tenant=st.sampled_from(TENANTS))
    def create(self, tenant: str) -> None:
        """A new job."""
        order = Order(f"job-{len(self.models):03}", tenant, "", "", f"in-{tenant}", 86_400, {})
        job = self.do(self.store.create(order, most_open=0))
        self.models[job.id] = Model(tenant, job.id, job.created_at_ms)

    @precondition(lambda self: self.models)
    @rule(at=st.integers(0, 9))
    def cancel(self, at: int) -> None:
        """Mostly one that is not over."""
        model = self.open(at)
        if model.status in ENDED:
            with pytest.raises(Conflict):
                self.do(self.store.cancel(model.tenant, model.id))
            return
        self.do(self.store.cancel(model.tenant, model.id))
        if model.status == "validating" and not model.busy:
            model.turn("cancelled", "cancelled")
        elif model.status != "cancelling":
            model.turn("cancelling", "cancelled")
            for part in model.parts.values():
                if part.kind == "join":
                    part.held = part.resting = False

    # ── who works ───────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(owner=st.sampled_from(["one", "two"]), most=st.integers(1, 3))
    def take(self, owner: str, most: int) -> None:
        """Exactly those whose turn it is."""
        taken = [*self.do(self.store.take(owner, most=most, for_s=FOR_S))]
        for model in self.models.values():
            model.move_on()
        expected: list[tuple[Any, ...]] = []
        while len(expected) < most and (place := self.next()) is not None:
            model, number = place
            part = model.parts[number]
            part.fence, part.held, part.leased = part.fence + 1, True, True
            expected.append((model.id, number, part.kind, part.fence, part.done, part.pieces, model.ending))
        told = [
            (t.job.id, t.number, t.kind, t.fence, t.done_lines, t.next_piece, t.job.ending) for t in taken
        ]  # fmt: skip
        assert told == expected
        self.tasks += taken

    def next(self) -> tuple[Model, int] | None:
        """Whose turn it is, said as plainly as can be."""
        busy: Counter[str] = Counter()
        for model in self.models.values():
            busy[model.tenant] += model.busy
        takeable = [model for model in self.models.values() if model.free()]
        if not takeable:
            return None
        first = min(takeable, key=lambda m: (busy[m.tenant], m.busy, m.created_at_ms, m.id))
        return first, first.free()[0]

    @precondition(lambda self: self.handed_out("read"))
    @rule(back=st.integers(0, 2), shards=st.lists(st.integers(1, 2), min_size=1, max_size=2), good=st.booleans())
    def say_what_the_file_is(self, back: int, shards: list[int], good: bool) -> None:
        """Sound, or not."""
        task, model = self.task(back, "read")
        part = model.held(task)
        if good:
            cut = [Shard(3 * n, lines, 3 * n, 3) for n, lines in enumerate(shards)]
            heard = self.do(self.store.accept(task, model="m", total=sum(shards), shards=cut))
        else:
            heard = self.do(self.store.refuse(task, [LineError("empty_file", "Nothing.")]))
        assert heard == (part is not None and model.status == "validating")
        if heard and good:
            model.accepted = True
            model.turn("in_progress")
            model.parts = {n: Part("embed", lines) for n, lines in enumerate(shards, 1)}
            model.parts[len(shards) + 1] = Part("join")
        elif heard:
            model.turn("failed")
        elif part is not None:
            model.give_back(part)

    @precondition(lambda self: self.handed_out("embed"))
    @rule(back=st.integers(0, 3), lines=st.integers(1, 2), failed=st.booleans(), ahead=st.sampled_from([0, 0, 0, 1]))
    def commit(self, back: int, lines: int, failed: bool, ahead: int) -> None:
        """The next piece, or one that is not; its holder may be late, and said so before."""
        task, model = self.task(back, "embed")
        piece = Piece(task.next_piece + ahead, lines, lines - failed, int(failed), lines, 9, 9)
        after = self.do(self.store.commit(task, piece))
        part = model.held(task)
        fits = part is not None and part.pieces == piece.number and part.done + lines <= part.lines and not part.over
        counts, said = fits and model.status == "in_progress", (task.number, task.fence, piece) in model.pieces
        assert (after is not None) == (counts or said)
        if part is None or not counts:
            return
        model.pieces.add((task.number, task.fence, piece))
        part.done, part.pieces = part.done + lines, part.pieces + 1
        model.completed, model.failed = model.completed + lines - failed, model.failed + failed
        assert after is not None
        assert (after.done_lines, after.next_piece) == (part.done, part.pieces)
        self.tasks.append(after)
        if part.done == part.lines:
            part.over, part.held = True, False
            if all(other.over for other in model.parts.values() if other.kind == "embed"):
                model.turn("finalizing")

    @precondition(lambda self: self.tasks)
    @rule(backs=st.sets(st.integers(0, 5), min_size=1, max_size=3))
    def renew(self, backs: set[int]) -> None:
        """Those that are held and wanted."""
        chosen = {(t.job.id, t.number, t.fence): t for t, _ in map(self.task, sorted(backs))}
        renewed = self.do(self.store.renew([*chosen.values()], for_s=FOR_S))
        expected = []
        for key in sorted(chosen):
            model = self.models[key[0]]
            part = model.held(chosen[key])
            if part is not None and model.wants(part):
                part.leased = True
                expected.append(key)
            elif part is not None:
                model.give_back(part)
        assert [(task.job.id, task.number, task.fence) for task in renewed] == expected

    @precondition(lambda self: self.tasks)
    @rule(back=st.integers(0, 5), note=st.binary(max_size=2))
    def note(self, back: int, note: bytes) -> None:
        """Is kept if it is heard."""
        task, model = self.task(back)
        noted = self.do(self.store.note(task, note))
        assert (noted.note if noted is not None else None) == (note if model.held(task) else None)

    @precondition(lambda self: self.tasks)
    @rule(back=st.integers(0, 5), how=st.sampled_from(["gives back", "gives back", "pauses", "pauses", "rests"]))
    def let_go(self, back: int, how: str) -> None:
        """Of a task; with it for a time of its job, or nobody takes that task for a time."""
        task, model = self.task(back)
        match how:
            case "pauses":
                self.do(self.store.pause(task, "budget", for_s=FOR_S))
            case "rests":
                self.do(self.store.rest(task, for_s=FOR_S))
            case _:
                self.do(self.store.give_back(task))
        if (part := model.held(task)) is not None:
            if how == "pauses" and model.status == "in_progress":
                model.paused, model.pause_over = True, False
            part.resting = how == "rests"
            model.give_back(part)

    @precondition(lambda self: self.handed_out("join"))
    @rule(back=st.integers(0, 1))
    def close(self, back: int) -> None:
        """The parts are put together."""
        task, model = self.task(back, "join")
        output = StoredFile(f"out-{task.job.id}-{task.fence}", model.tenant, "batch_output", "o", 1, 0)
        part = model.held(task)
        closed = self.do(self.store.close(task, output=output, errors=None))
        file_id = self.do(self.store.job(model.tenant, model.id)).output_file_id  # type: ignore[union-attr]
        assert closed == (file_id == output.id)
        if part is not None:
            assert closed
            model.turn(model.ending)

    # ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.tasks)
    @rule(back=st.integers(0, 5))
    def lease_runs_out(self, back: int) -> None:
        """Nobody has said anything for long; and what rested has done so for long enough."""
        task, model = self.task(back)
        ours = (job_tasks.c.job == task.job.id) & (job_tasks.c.number == task.number)
        self.change(update(job_tasks).where(ours).values(held_until_ms=1))
        if (part := model.parts.get(task.number)) is not None:
            part.leased = part.resting = False

    @precondition(lambda self: self.models)
    @rule(at=st.integers(0, 9))
    def window_passes(self, at: int) -> None:
        """Mostly of one that is not over."""
        model = self.open(at)
        self.change(update(jobs).where(jobs.c.id == model.id).values(expires_at_ms=1))
        model.late = True

    @precondition(lambda self: any(model.paused for model in self.models.values()))
    @rule()
    def pauses_end(self) -> None:
        """All that there are."""
        self.change(update(jobs).where(jobs.c.paused_until_ms.is_not(None)).values(paused_until_ms=1))
        for model in self.models.values():
            model.pause_over = model.paused

    # ── at the end ──────────────────────────────────────────────────────────────────────────────────────────────────

    def teardown(self) -> None:
        """Whatever has happened, whoever goes on gets every job to its end, though one more is to end early."""
        if not self.models:
            return  # it was not even begun
        match len(self.tasks) % 3:
            case 1:
                self.window_passes(len(self.tasks))
            case 2:
                self.cancel(len(self.tasks))
            case _:
                pass
        self.change(update(job_tasks).values(held_until_ms=1))
        for part in (part for model in self.models.values() for part in model.parts.values()):
            part.leased = part.resting = False
        for _ in range(12):  # rounds that four jobs of two shards need, with room
            self.pauses_end()
            before = len(self.tasks)
            self.take("last", 3)
            for task in self.tasks[before:]:
                back = self.handed_out(task.kind)[::-1].index(task)
                if task.kind == "read":
                    self.say_what_the_file_is(back, [1], True)
                elif task.kind == "join":
                    self.close(back)
                elif task.shard is not None:
                    self.commit(back, task.shard.lines - task.done_lines, False, 0)
        self.everything_is_as_the_model_has_it()
        assert {model.status for model in self.models.values()} <= ENDED

    # ── what always holds ───────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def everything_is_as_the_model_has_it(self) -> None:
        """Statuses and counts; these never go back, and are the sums of the pieces."""
        for job in self.do(self.database.fetch(_COUNTED, {}, within_s=SOON_S)):
            model = self.models[job.id]
            told = (job.status, job.completed, job.failed, bool(job.pause))
            assert told == (model.status, model.completed, model.failed, model.paused)
            assert job.completed + job.failed >= self.counted[job.id]
            self.counted[job.id] = job.completed + job.failed
            assert job.status in ENDED or (job.completed, job.failed) == (job.good, job.bad)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[type[JobsMachine]]:
    """With a database that it may empty."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        JobsMachine.database = runner.run(stack.enter_async_context(Database(f"sqlite:///{tmp_path / 'jobs.db'}")))
        JobsMachine.run = runner.run
        JobsMachine.seen.clear()
        runner.run(migrate(JobsMachine.database))
        yield JobsMachine
        runner.run(stack.aclose())


def test_jobs_go_the_ways_of_the_diagram_and_no_others(machine: type[JobsMachine]) -> None:
    """And all of these are gone."""
    for examples in (50, 100, 200):  # which ones they are depends on what else ran in this process
        quick = settings(max_examples=examples, stateful_step_count=25, phases=[Phase.generate])  # to shrink is slow
        run_state_machine_as_test(machine, settings=quick)
        if machine.seen == DIAGRAM:
            break
    assert DIAGRAM - machine.seen == machine.seen - DIAGRAM == set()
