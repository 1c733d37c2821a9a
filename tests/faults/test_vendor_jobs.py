"""What becomes of jobs in the vendor's own batches: ordered once whatever happens, and never waited for in vain."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import update

from app.api import bulk
from app.api.batch_wire import written
from app.job import Job
from app.jobs.vendor import CALLED_OFF_S
from app.storage.sql.tables import jobs
from tests.contract.stored import change
from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator
from tests.faults.test_job_faults import drop
from tests.faults.vendors import (
    BATCH_NANO_USD,
    BATCHES,
    FOR_EVER,
    LINES,
    NANO_USD,
    SHARD_LINES,
    Replica,
    alone,
    always,
    cost,
    free_all,
    heal,
    ledger,
    replica,
    text,
    vector_of,
)

ONCE = Counter(text(at) for at in range(LINES))


async def is_right(at: Replica, job: Job) -> None:
    """All lines are good, and each text was ordered once and bought nowhere else."""
    assert (job.status, job.failed) == ("completed", 0)
    assert await at.check(job) == {}
    assert at.ordered == ONCE
    assert not at.bought


# ── the plain way ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_text_is_ordered_once_at_the_batch_price(tmp_path: Path) -> None:
    """Nothing is bought the ordinary way, the ledger is the bill; and what is there by then is not ordered again."""
    async with alone(tmp_path) as at:
        job = await at.do()
        await is_right(at, job)
        owed = at.upstream.batch_bill.tokens * BATCH_NANO_USD
        assert len(at.orders) == BATCHES
        work = job.work
        assert (work.texts, work.cached, work.calls, work.nano_usd) == (LINES, 0, BATCHES, owed)
        again = await at.do(name="again")
        await is_right(at, again)
        assert (again.work.texts, again.work.cached, again.work.calls, again.work.nano_usd) == (LINES, LINES, 0, 0)
        assert at.upstream.bill.requests == 0
    calls = await ledger(tmp_path)
    assert {(call.state, call.texts) for call in calls} == {("billed", SHARD_LINES)}
    assert len(calls) == BATCHES
    assert cost(calls, "billed") == owed


async def test_what_is_kept_or_said_twice_is_not_ordered(tmp_path: Path) -> None:
    """Of a hundred lines with few texts only those are ordered that nobody bought, each once."""
    async with alone(tmp_path, shard_lines=100) as at:
        assert await at.ask(text(0)) == "ok"
        bodies = [at.body(text(line % 10)) for line in range(100)]
        job = await at.do(bodies)
        assert await at.check(job, bodies) == {}
        assert at.ordered == Counter(text(line) for line in range(1, 10))
        assert at.bought == Counter([text(0)])
        assert (job.work.texts, job.work.cached, job.work.calls) == (100, 91, 1)


async def test_a_line_with_many_texts_has_them_all(tmp_path: Path) -> None:
    """Whatever it is written as."""
    async with alone(tmp_path) as at:
        bodies = [at.body("one"), {**at.body(""), "input": ["one", "two", text(3)]}, {**at.body(""), "input": [[9, 8]]}]
        async with bulk.runner(at.runtime) as runner:
            await at.begin(bodies)
            job = await at.end(runner)
        found = await at.lines(job.output_file_id)
        assert [len(line["response"]["body"]["data"]) for line in found.values()] == [1, 3, 1]
        assert at.upstream.batch_bill.items == 4
        assert not at.bought


async def test_the_windows_of_a_long_text_are_ordered(tmp_path: Path) -> None:
    """Its vector is their mean, as it would have been online; nothing is bought for it."""
    long = " ".join(f"word{number}" for number in range(6000))
    async with alone(tmp_path, served='long_input = "mean"') as at:
        bodies = [at.body(text(0)), at.body(long), at.body(text(2))]
        async with bulk.runner(at.runtime) as runner:
            await at.begin(bodies)
            job = await at.end(runner)
        assert (job.completed, at.upstream.batch_bill.items, at.upstream.bill.items) == (3, 5, 0)
        shown = written(job)["embedgate"]
        assert (shown["texts"], shown["cached_texts"], shown["calls"]) == (3, 0, 1)
        online = await at.runtime.gateway.embed(at.request(long))
        good = await at.lines(job.output_file_id)
        assert vector_of(good[1]).tobytes() == online.vectors[0]
        assert at.upstream.bill.items == 0


# ── who orders dies ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["left", "killed"])
@pytest.mark.parametrize("stage", ["packed", "ordered", "running", "over"])
async def test_whoever_comes_next_goes_on(tmp_path: Path, stage: str, way: str) -> None:
    """Another replica on the same database finds what was ordered, whenever the first one left: nothing is twice."""
    async with OpenAIEmulator() as upstream:
        desk = upstream.batches
        desk.steps = FOR_EVER if stage == "running" else 1
        desk.most_open = 0 if stage == "packed" else 100
        if stage == "over":
            always(upstream, "content", faults.reset)
        async with replica(tmp_path, upstream) as first:
            happened = {
                "packed": lambda: len(packed) == BATCHES,
                "ordered": lambda: len(desk.batches) == BATCHES,
                "running": lambda: sum(batch.polls > 0 for batch in desk.batches.values()) == BATCHES,
                "over": lambda: [batch.status for batch in desk.batches.values()] == ["completed"] * BATCHES,
            }
            packed: list[bytes] = []
            async with bulk.runner(first.runtime) as runner:
                await first.begin()
                async with asyncio.timeout(20):
                    while not happened[stage]():
                        await first.hurry(runner)
                        packed = await first.notes()
                if way == "killed":
                    await drop(runner)
        desk.steps, desk.most_open = 1, 100
        heal(upstream)
        async with replica(tmp_path, upstream) as second, bulk.runner(second.runtime) as runner:
            await free_all(second.runtime)
            job = await second.end(runner)
            await is_right(second, job)
            owed = upstream.batch_bill.tokens * BATCH_NANO_USD
            work = job.work
            assert (work.texts, work.cached, work.calls, work.nano_usd) == (LINES, 0, BATCHES, owed)
    calls = await ledger(tmp_path)
    assert [call.state for call in calls] == ["billed"] * BATCHES
    assert cost(calls, "billed") == owed


# ── what is lost on the way ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lost", ["upload", "create"])
async def test_a_lost_answer_orders_nothing_twice(tmp_path: Path, lost: str) -> None:
    """What was created is found by its name, what was only uploaded is ordered by the next look."""
    async with alone(tmp_path) as at:
        at.upstream.batches.inject(lost, faults.reset)
        await is_right(at, await at.do())
    calls = await ledger(tmp_path)
    assert Counter(call.state for call in calls) == {"billed": BATCHES} | ({"failed": 1} if lost == "upload" else {})
    assert cost(calls, "billed") == at.upstream.batch_bill.tokens * BATCH_NANO_USD


@pytest.mark.parametrize("lost", ["upload", "create"])
async def test_nothing_is_ordered_again_before_it_can_be_searched(tmp_path: Path, lost: str) -> None:
    """While the vendor answers nonsense to whoever asks for its list there is no second order."""
    async with alone(tmp_path, shard_lines=LINES) as at:
        looks = 0

        async def nonsense(wire: faults.Wire, content: bytes) -> None:
            nonlocal looks
            looks += 1
            await faults.body(b"<html>")(wire, content)

        always(at.upstream, "list", nonsense)
        at.upstream.batches.inject(lost, faults.reset)
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: looks > 3)
            assert len(at.orders) == (lost == "create")
            assert len(at.upstream.batches.files) == 1
            heal(at.upstream)
            await is_right(at, await at.end(runner))


@pytest.mark.parametrize("operation", ["poll", "content"])
@pytest.mark.parametrize("fault", [faults.half_body, faults.status(503)], ids=["half", "503"])
async def test_what_broke_is_read_again(tmp_path: Path, operation: str, fault: faults.Fault) -> None:
    """Nothing is ordered for it, and nothing bought."""
    async with alone(tmp_path) as at:
        at.upstream.batches.inject(operation, fault)
        await is_right(at, await at.do())


# ── what the vendor does not do ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """What failed for want of room is ordered under a new name until it is taken, and costs nothing."""
    async with alone(tmp_path) as at:
        desk = at.upstream.batches
        desk.queue_full = True
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(
                runner, lambda: sum(batch.status == "failed" for batch in desk.batches.values()) > 2 * BATCHES
            )
            desk.queue_full = False
            await is_right(at, await at.end(runner))
        names = [batch.ordered["metadata"]["embedgate"] for batch in desk.batches.values()]
        assert len(names) == len(set(names)) > 3 * BATCHES
    calls = await ledger(tmp_path)
    assert Counter(call.state for call in calls) == {"failed": len(names) - BATCHES, "billed": BATCHES}
    assert cost(calls, "failed") == 0
    assert cost(calls, "billed") == at.upstream.batch_bill.tokens * BATCH_NANO_USD


async def test_what_the_vendor_did_not_get_to_is_bought_the_ordinary_way(tmp_path: Path) -> None:
    """Of a batch that expired what was done is used, each at its price; no text is paid for twice."""
    async with alone(tmp_path) as at:
        at.upstream.batches.lapses_after = 15
        job = await at.do()
        assert (job.status, await at.check(job)) == ("completed", {})
        assert at.upstream.batch_bill.items == 15 * BATCHES
        assert at.bought.total() == len(at.bought) == LINES - 15 * BATCHES
        wholesale, retail = at.upstream.batch_bill.tokens * BATCH_NANO_USD, at.upstream.bill.tokens * NANO_USD
        assert (job.work.cached, job.work.nano_usd) == (0, wholesale + retail)
    calls = await ledger(tmp_path)
    assert {call.state for call in calls} == {"billed"}
    assert cost(calls, "billed") == wholesale + retail


@pytest.mark.parametrize("done", [0, 12])
async def test_a_vendor_that_never_ends_is_left(tmp_path: Path, done: int) -> None:
    """After three quarters of the window the batches are cancelled there, and the rest goes the ordinary way."""
    async with alone(tmp_path) as at:
        desk = at.upstream.batches
        desk.steps, desk.lapses_after = FOR_EVER, done
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: sum(batch.polls > 2 for batch in desk.batches.values()) == BATCHES)
            await at.age(0.74)
            polls = sum(batch.polls for batch in desk.batches.values())
            await at.until(runner, lambda: sum(batch.polls for batch in desk.batches.values()) > polls + 9)
            assert {batch.status for batch in desk.batches.values()} == {"in_progress"}
            await at.age(0.76)
            job = await at.end(runner)
        assert (job.status, await at.check(job)) == ("completed", {})
        assert {batch.status for batch in desk.batches.values()} == {"cancelled"}
        assert at.upstream.batch_bill.items == done * BATCHES
        assert at.bought.total() == len(at.bought) == LINES - done * BATCHES
    calls = await ledger(tmp_path)
    assert {call.state for call in calls} == {"billed"} if done else {"billed", "failed"}
    assert cost(calls, "billed") == (
        at.upstream.batch_bill.tokens * BATCH_NANO_USD + at.upstream.bill.tokens * NANO_USD
    )


async def test_a_vendor_that_does_not_answer_is_left_too(tmp_path: Path) -> None:
    """A quarter of an hour after it should have been over; what it may have done stays unconfirmed."""
    async with alone(tmp_path) as at:
        desk = at.upstream.batches
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: len(desk.batches) == BATCHES)
            always(at.upstream, "poll", faults.status(503))
            await at.age(0.75 + (CALLED_OFF_S + 1) / 86_400)
            job = await at.end(runner)
        assert (job.status, await at.check(job)) == ("completed", {})
        assert at.bought == ONCE
    calls = await ledger(tmp_path)
    assert Counter(call.texts for call in calls if call.state == "unconfirmed") == {SHARD_LINES: BATCHES}


# ── a job that is over early ────────────────────────────────────────────────────────────────────────────────────────


async def end_early(at: Replica, how: str) -> None:
    """The job is called off, or its window is over."""
    if how == "cancelled":
        await at.runtime.stores.jobs.cancel("search", "batch_x")
    else:
        await change(at.runtime.stores.database, update(jobs).values(expires_at_ms=1))


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_a_job_that_is_over_early_ends_what_it_ordered(tmp_path: Path, how: str) -> None:
    """The batches are cancelled there; what they did is booked and kept, and the lines are in the error file."""
    async with alone(tmp_path) as at:
        desk = at.upstream.batches
        desk.steps, desk.lapses_after = FOR_EVER, 12
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: len(desk.batches) == BATCHES)
            always(at.upstream, "cancel", faults.status(503))
            await end_early(at, how)
            await asyncio.sleep(0.3)
            await at.hurry(runner)
            heal(at.upstream)
            desk.inject("content", faults.half_body)
            job = await at.end(runner)
        assert job.status == how
        bad = await at.check(job)
        assert {line["error"]["code"] for line in bad.values()} == {f"batch_{how}"}
        assert len(bad) == LINES
        assert {batch.status for batch in desk.batches.values()} == {"cancelled"}
        assert not at.bought
        online = await at.do(name="again", tier="online")
        assert (online.status, await at.check(online)) == ("completed", {})
        assert at.bought.total() == LINES - 12 * BATCHES
    calls = await ledger(tmp_path)
    assert {call.state for call in calls} == {"billed"}
    assert cost(calls, "billed") == (
        at.upstream.batch_bill.tokens * BATCH_NANO_USD + at.upstream.bill.tokens * NANO_USD
    )


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_a_job_that_is_over_early_finds_what_nobody_noted(tmp_path: Path, how: str) -> None:
    """The order went out and its answer was lost when the job ended: it is searched for, and cancelled."""
    async with alone(tmp_path) as at:
        desk = at.upstream.batches
        desk.steps = FOR_EVER
        always(at.upstream, "create", faults.reset)
        always(at.upstream, "list", faults.status(503))
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: len(desk.batches) == BATCHES)
            await end_early(at, how)
            heal(at.upstream)
            job = await at.end(runner)
        assert job.status == how
        assert {batch.status for batch in desk.batches.values()} == {"cancelled"}
    assert {call.state for call in await ledger(tmp_path)} == {"failed"}


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_a_vendor_that_is_out_does_not_keep_a_job_open(tmp_path: Path, how: str) -> None:
    """Not for longer than it may take a vendor to end a batch; what it may have done stays unconfirmed."""
    async with alone(tmp_path) as at:
        desk = at.upstream.batches
        desk.steps = FOR_EVER
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: len(desk.batches) == BATCHES)
            always(at.upstream, "poll", faults.status(503))
            await end_early(at, how)
            for _ in range(20):
                await at.hurry(runner)
            over = await at.look()
            assert over.status == ("cancelling" if how == "cancelled" else "finalizing")
            since = {f"{over.status}_at_ms": jobs.c[f"{over.status}_at_ms"] - int(CALLED_OFF_S * 1000)}
            await change(at.runtime.stores.database, update(jobs).values(since))
            job = await at.end(runner)
        assert job.status == how
        assert len(await at.check(job)) == LINES
    calls = await ledger(tmp_path)
    assert [(call.state, call.texts) for call in calls] == [("unconfirmed", SHARD_LINES)] * BATCHES
