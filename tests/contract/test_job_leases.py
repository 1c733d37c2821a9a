"""Who works on what and whose word counts, on both kinds of database: what `JobStore` promises those who work."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from sqlalchemy import func, select

from app.job import Shard
from app.storage.sql.tables import job_pieces
from tests.contract.shop import FOR_S, Shop, open_shop, output, piece
from tests.contract.stored import scalars


@pytest_asyncio.fixture
async def shop(database_url: str) -> AsyncIterator[Shop]:
    """On each kind of database."""
    async with open_shop(database_url) as opened:
        yield opened


@pytest_asyncio.fixture
async def busy_shop(postgres_url: str) -> AsyncIterator[Shop]:
    """On the kind that takes many at once."""
    async with open_shop(postgres_url) as opened:
        yield opened


# ── whose word counts ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_task_is_one_holders_until_its_lease_ends(shop: Shop) -> None:
    """Then somebody else's; the number that says so goes up."""
    await shop.begin()
    first = await shop.take_one("one")
    assert await shop.take("two") == []
    await shop.run_out(first)
    second = await shop.take_one("two")
    assert (second.number, second.owner, second.fence) == (first.number, "two", first.fence + 1)
    assert await shop.take("one") == []


async def test_a_lease_that_ends_harms_nobody_until_somebody_comes(shop: Shop) -> None:
    """What the newest holder says counts, however late; and a lease can still be renewed."""
    job = await shop.begin()
    task = await shop.take_one()
    await shop.run_out(task)
    after = await shop.store.commit(task, piece(task, 4))
    assert after is not None
    assert len(await shop.store.renew([after], for_s=FOR_S)) == 1
    assert await shop.take("two") == []
    assert (await shop.look(job)).completed == 4


@pytest.mark.parametrize("again", ["one", "two"])
async def test_a_holder_who_wakes_late_is_not_heard(shop: Shop, again: str) -> None:
    """In nothing, though the task is held under the same name by now; the new one goes on where the old one was."""
    job = await shop.begin()
    first = await shop.take_one("one")
    stale = await shop.store.commit(first, piece(first, 4))
    assert stale is not None
    await shop.run_out(stale)
    fresh = await shop.take_one(again)
    assert (fresh.done_lines, fresh.next_piece) == (4, 1)
    assert await shop.store.commit(stale, piece(stale)) is None
    assert await shop.store.renew([stale], for_s=FOR_S) == []
    assert await shop.store.note(stale, b"mine") is None
    await shop.store.give_back(stale)
    await shop.store.pause(stale, "budget", for_s=FOR_S)
    assert await shop.take("three") == []
    assert (await shop.look(job)).pause == ""
    assert await shop.store.commit(fresh, piece(fresh)) is not None
    assert (await shop.look(job)).completed == 10
    assert [fence for _, fence, _ in await shop.store.pieces(job.id)] == [1, 2]


async def test_a_reader_and_a_joiner_who_wake_late_are_not_heard_either(shop: Shop) -> None:
    """Neither about the file nor about the end."""
    job = await shop.create()
    read = await shop.take_one("one")
    await shop.run_out(read)
    fresh = await shop.take_one("two")
    assert not await shop.store.refuse(read, [])
    assert not await shop.store.accept(read, model="m", total=1, shards=[Shard(0, 1, 0, 9)])
    assert await shop.store.accept(fresh, model="mini", total=1, shards=[Shard(0, 1, 0, 9)])
    assert not await shop.store.refuse(fresh, [])
    join = await shop.finish()
    await shop.run_out(join)
    newer = await shop.take_one("two")
    assert not await shop.store.close(join, output=output(job), errors=None)
    assert await shop.store.close(newer, output=output(job), errors=None)
    assert (await shop.look(job)).output_file_id == f"out-{job.id}"


async def test_who_has_not_heard_the_answer_may_say_it_again(shop: Shop) -> None:
    """A piece counts once, and stays counted though somebody else has the task by now; so does the end."""
    job = await shop.begin()
    task = await shop.take_one()
    half = piece(task, 4)
    after = await shop.store.commit(task, half)
    assert await shop.store.commit(task, half) == after
    await shop.run_out(task)
    await shop.take_one("two")
    again = await shop.store.commit(task, half)
    assert again is not None
    assert (again.next_piece, again.fence) == (1, task.fence)
    assert await shop.store.commit(again, piece(again)) is None
    assert (await shop.look(job)).completed == 4
    await shop.run_out(task)
    join = await shop.finish()
    for _ in range(2):
        assert await shop.store.close(join, output=output(job), errors=None)
    assert not await shop.store.close(join, output=output(job, "another"), errors=None)


async def test_pieces_come_one_after_the_other(shop: Shop) -> None:
    """Neither twice with something else in it, nor before their turn, nor with more lines than there are."""
    job = await shop.begin()
    task = await shop.take_one()
    after = await shop.store.commit(task, piece(task, 4))
    assert after is not None
    assert await shop.store.commit(task, piece(task, 5)) is None
    assert await shop.store.commit(after, piece(after, 1, number=2)) is None
    assert await shop.store.commit(after, piece(after, 7)) is None
    assert (await shop.look(job)).completed == 4
    ended = await shop.store.commit(after, piece(after, 6))
    assert ended is not None
    assert await shop.store.commit(ended, piece(ended, 0)) is None


async def test_what_is_given_back_somebody_else_takes_at_once(shop: Shop) -> None:
    """With what was done and what was noted."""
    await shop.begin()
    task = await shop.take_one()
    after = await shop.store.commit(task, piece(task, 4))
    assert after is not None
    noted = await shop.store.note(after, b"\0vendor")
    assert noted == msgspec.structs.replace(after, note=b"\0vendor")
    await shop.store.give_back(after)
    assert await shop.store.renew([after], for_s=FOR_S) == []
    fresh = await shop.take_one("two")
    assert (fresh.done_lines, fresh.note, fresh.fence) == (4, b"\0vendor", task.fence + 1)


async def test_what_rests_nobody_takes_before_its_time(shop: Shop) -> None:
    """Others are taken meanwhile; then whoever comes goes on with what was done and what was noted."""
    job = await shop.begin(lines=[10, 10])
    first, second = await shop.take(most=2)
    after = await shop.store.commit(first, piece(first, 4))
    assert after is not None
    assert await shop.store.note(after, b"vendor") is not None
    await shop.store.rest(after, for_s=FOR_S)
    await shop.store.give_back(second)
    assert [task.number for task in await shop.take("two", most=9)] == [second.number]
    await shop.run_out(after)
    (fresh,) = await shop.take("three", most=9)
    assert (fresh.number, fresh.fence, fresh.owner) == (first.number, first.fence + 1, "three")
    assert (fresh.done_lines, fresh.next_piece, fresh.note) == (4, 1, b"vendor")
    assert (await shop.look(job)).status == "in_progress"


async def test_what_rests_for_no_time_is_taken_at_once(shop: Shop) -> None:
    """As if it had been given back."""
    await shop.begin()
    await shop.store.rest(await shop.take_one(), for_s=0.0)
    assert (await shop.take_one("two")).fence == 2


async def test_who_rested_is_not_heard_any_more(shop: Shop) -> None:
    """Nor does who lost a task keep it from others by resting."""
    job = await shop.begin()
    task = await shop.take_one()
    await shop.store.rest(task, for_s=FOR_S)
    assert await shop.store.commit(task, piece(task)) is None
    assert await shop.store.note(task, b"mine") is None
    assert await shop.store.renew([task], for_s=FOR_S) == []
    await shop.store.give_back(task)
    await shop.store.pause(task, "budget", for_s=FOR_S)
    assert await shop.take("two") == []
    await shop.run_out(task)
    fresh = await shop.take_one("two")
    await shop.store.rest(task, for_s=FOR_S)
    assert await shop.store.commit(fresh, piece(fresh)) is not None
    assert ((await shop.look(job)).completed, (await shop.look(job)).pause) == (10, "")


async def test_what_rests_counts_for_nobodys_turn(shop: Shop) -> None:
    """Nobody works on it, so its tenant is served no later for it."""
    await shop.upload("theirs", "b")
    await shop.begin(lines=[1] * 4)
    for task in await shop.take(most=2):
        await shop.store.rest(task, for_s=FOR_S)
    await shop.begin("b", lines=[1] * 4, input_file_id="theirs")
    assert [task.job.order.tenant for task in await shop.take("two", most=3)] == ["a", "b", "a"]


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_what_rests_does_not_keep_a_job_open(shop: Shop, how: str) -> None:
    """One that is over is joined at once; and it is found by whoever joins, with what was noted."""
    job = await shop.begin(lines=[10, 10])
    first, second = await shop.take(most=2)
    assert await shop.store.note(first, b"vendor") is not None
    await shop.store.rest(first, for_s=FOR_S)
    if how == "cancelled":
        await shop.store.cancel("a", job.id)
        await shop.store.give_back(second)
    else:
        await shop.set_job(job, expires_at_ms=1)
        await shop.store.rest(second, for_s=FOR_S)
    join = await shop.take_one("two")
    assert (join.kind, join.job.ending) == ("join", how)
    assert [task.note for task in await shop.store.tasks(job.id)] == [b"vendor", b""]
    assert await shop.store.close(join, output=None, errors=None)
    assert (await shop.look(job)).status == how


async def test_a_join_that_rests_is_taken_when_its_job_is_called_off(shop: Shop) -> None:
    """Until then it waits, and whoever would have joined for another ending is not heard."""
    job = await shop.begin()
    join = await shop.finish()
    await shop.store.rest(join, for_s=FOR_S)
    assert await shop.take("two") == []
    await shop.store.cancel("a", job.id)
    assert not await shop.store.close(join, output=None, errors=None)
    fresh = await shop.take_one("two")
    assert (fresh.kind, fresh.job.ending) == ("join", "cancelled")


async def test_ten_at_once_never_get_the_same(busy_shop: Shop) -> None:
    """A hundred tasks of four jobs, all done by ten who are at it at once: each once, and all of them count."""
    await busy_shop.upload("theirs", "b")
    made = [await busy_shop.begin(lines=[2] * 25) for _ in range(3)]
    made.append(await busy_shop.begin("b", lines=[2] * 25, input_file_id="theirs"))
    done: list[tuple[str, int]] = []

    async def work(owner: str) -> None:
        while tasks := await busy_shop.store.take(owner, most=3, for_s=FOR_S):
            await busy_shop.store.renew(tasks, for_s=FOR_S)
            for task in tasks:
                assert task.fence == 1
                if task.kind == "join":
                    assert await busy_shop.store.close(task, output=output(task.job), errors=None)
                    continue
                half = await busy_shop.store.commit(task, piece(task, 1))
                assert half is not None
                assert await busy_shop.store.commit(half, piece(half)) is not None
                done.append((task.job.id, task.number))

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(work(f"owner {number}"))
    assert sorted(done) == [(job.id, number) for job in made for number in range(1, 26)]
    assert [(await busy_shop.look(job)).completed for job in made] == [50] * 4
    await work("last")
    assert {(await busy_shop.look(job)).status for job in made} == {"completed"}


async def test_many_who_hold_the_same_tasks_do_not_lock_each_other_up(busy_shop: Shop) -> None:
    """They take, renew, commit, pause, cancel and give back at once while leases run out: nothing surfaces."""
    made = [await busy_shop.begin(lines=[50] * 5) for _ in range(4)]

    async def work(owner: str) -> None:
        for turn in range(6):
            tasks = await busy_shop.store.take(owner, most=6, for_s=0.002)
            await busy_shop.store.renew(tasks[::-1], for_s=0.002)
            for task in tasks:
                if task.kind == "embed" and (after := await busy_shop.store.commit(task, piece(task, 1))) is not None:
                    await busy_shop.store.give_back(after)
                elif task.kind == "join":
                    await busy_shop.store.close(task, output=None, errors=None)
                elif turn % 3 == 2:
                    await busy_shop.store.pause(task, "budget", for_s=0.001)

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(work(f"owner {number}"))
        group.create_task(busy_shop.store.cancel("a", made[0].id))
    for job in made:
        sums = select(func.coalesce(func.sum(job_pieces.c.completed), 0)).where(job_pieces.c.job == job.id)
        now = await busy_shop.look(job)
        assert now.status == "cancelled" or [now.completed] == await scalars(busy_shop.database, sums)


# ── whose turn it is ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_tenant_and_then_every_job_has_its_turn(shop: Shop) -> None:
    """Of each one task before a second one, the older first; what is held already counts."""
    await shop.upload("theirs", "b")
    a1, a2 = (await shop.begin(lines=[1] * 3)).id, (await shop.begin(lines=[1] * 3)).id
    b1 = (await shop.begin("b", lines=[1] * 2, input_file_id="theirs")).id
    turns = [(task.job.id, task.number) for task in await shop.take(most=4)]
    assert turns == [(a1, 1), (b1, 1), (a2, 1), (b1, 2)]
    turns = [(task.job.id, task.number) for owner in ("two", "three") for task in await shop.take(owner)]
    assert turns == [(a1, 2), (a2, 2)]


async def test_twenty_jobs_of_one_do_not_keep_another_waiting(shop: Shop) -> None:
    """A tenant who comes last is served next."""
    await shop.upload("theirs", "b")
    for _ in range(20):
        await shop.create()
    assert {task.job.order.tenant for task in await shop.take(most=4)} == {"a"}
    last = await shop.create("b", input_file_id="theirs")
    assert (await shop.take_one()).job.id == last.id
