"""Which jobs there are and what becomes of them, on both kinds of database: what `JobStore` promises."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from sqlalchemy import select, update

from app.errors import BatchLimitExceeded, Conflict, IdempotencyMismatch, NotFound
from app.job import LineError, Shard, Work
from app.storage.level import LevelDown
from app.storage.sql.erasure import erase
from app.storage.sql.jobs import SqlJobs
from app.storage.sql.tables import files, jobs
from tests.contract.shop import DAY_S, FOR_S, Shop, open_shop, output, piece
from tests.contract.stored import change, scalars


@pytest_asyncio.fixture
async def shop(database_url: str) -> AsyncIterator[Shop]:
    """On each kind of database."""
    async with open_shop(database_url) as opened:
        yield opened


# ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_ordered_is_kept_as_it_was(shop: Shop) -> None:
    """Every word of it; the window begins with the store's time."""
    order = shop.order(metadata={"k": "v\0", "ü": ""}, tier="vendor_batch", output_expires_after_s=3600, digest=b"\0d")
    made = await shop.store.create(order, most_open=0)
    assert made.order == order
    assert (made.status, made.total, made.errors, made.work) == ("validating", 0, (), Work())
    assert made.expires_at_ms == made.created_at_ms + 1000 * DAY_S
    assert await shop.look(made) == made
    assert await shop.store.job("b", made.id) is None


async def test_only_a_file_that_is_there_can_be_ordered(shop: Shop) -> None:
    """Somebody else's is as absent as one that never was, was deleted or has expired."""
    await shop.upload("foreign", "b")
    await shop.upload("old", created_at_s=100, expires_at_s=100)
    await shop.upload("deleted")
    await shop.store.delete_file("a", "deleted")
    for name in ("foreign", "old", "deleted", "absent"):
        with pytest.raises(NotFound, match=f"^No such File object: {name}$") as refused:
            await shop.create(input_file_id=name)
        assert (refused.value.param, refused.value.code) == ("input_file_id", None)


async def test_a_tenant_has_only_so_many_open_jobs(shop: Shop) -> None:
    """Those that are over have made room; others' do not count; 0 is no bound."""
    await shop.upload("theirs", "b")
    await shop.create("b", input_file_id="theirs")
    first = await shop.store.create(shop.order(), most_open=1)
    with pytest.raises(BatchLimitExceeded):
        await shop.store.create(shop.order(), most_open=1)
    await shop.store.cancel("a", first.id)
    await shop.store.create(shop.order(), most_open=1)
    await shop.store.create(shop.order(), most_open=0)


async def test_who_orders_twice_at_once_gets_one_job(shop: Shop) -> None:
    """Fifty times the same key and body; another body is refused, another tenant's key is another one."""
    orders = [shop.order(idempotency_key="once", digest=b"body") for _ in range(50)]
    made = await asyncio.gather(*(shop.store.create(order, most_open=1) for order in orders))
    assert len({job.id for job in made}) == 1
    with pytest.raises(IdempotencyMismatch):
        await shop.store.create(shop.order(idempotency_key="once", digest=b"other"), most_open=0)
    await shop.upload("theirs", "b")
    theirs = shop.order("b", idempotency_key="once", digest=b"other", input_file_id="theirs")
    assert (await shop.store.create(theirs, most_open=0)).id == theirs.id
    await shop.store.cancel("a", made[0].id)
    again = await shop.store.create(orders[7], most_open=1)
    assert (again.id, again.status) == (made[0].id, "cancelled")


async def test_jobs_come_in_pages(shop: Shop) -> None:
    """The newest first, from behind one; never those of others."""
    made = [(await shop.create()).id for _ in range(5)]
    await change(shop.database, update(jobs).values(created_at_ms=7))  # in the order of their ids, then
    await shop.upload("theirs", "b")
    foreign = await shop.create("b", input_file_id="theirs")
    seen: list[str] = []
    while (page := await shop.store.jobs("a", after=seen[-1] if seen else "", limit=2)) is not None:
        assert page.has_more == (len(seen) < 3)
        seen += [job.id for job in page.rows]
        if not page.has_more:
            break
    assert seen == made[::-1]
    assert await shop.store.jobs("a", after=foreign.id, limit=2) is None


# ── from the first status to the last ───────────────────────────────────────────────────────────────────────────────


async def test_a_job_is_read_embedded_and_joined(shop: Shop) -> None:
    """Each time there is exactly what comes next to take; what was done adds up, and what it leaves is told."""
    job = await shop.begin(lines=[10, 5])
    assert (job.status, job.model, job.total) == ("in_progress", "mini", 15)
    first, second = await shop.take(most=9)
    assert [task.shard for task in (first, second)] == [Shard(0, 10, 0, 999), Shard(10, 5, 1000, 999)]
    after = await shop.store.commit(first, piece(first, 4, failed=1))
    assert after is not None
    assert (after.done_lines, after.next_piece, after.fence) == (4, 1, first.fence)
    assert (after.job.completed, after.job.failed, after.job.tokens) == (3, 1, 12)
    assert await shop.store.commit(second, piece(second)) is not None
    assert [(task.number, task.done_lines) for task in await shop.store.tasks(job.id)] == [(1, 4), (2, 5)]
    assert await shop.take() == []
    ended = await shop.store.commit(after, piece(after))
    assert ended is not None
    assert (ended.done_lines, ended.job.status) == (10, "finalizing")
    join = await shop.take_one()
    assert (join.kind, join.shard, join.job.ending) == ("join", None, "completed")
    found = [(number, fence, each.number, each.lines) for number, fence, each in await shop.store.pieces(job.id)]
    assert found == [(1, 1, 0, 4), (1, 1, 1, 6), (2, 1, 0, 5)]
    assert await shop.store.gone_parts(9) == []
    assert await shop.store.close(join, output=output(job, expires_at_s=3600), errors=output(job, "err"))
    done = await shop.look(job)
    assert (done.status, done.completed, done.failed, done.tokens) == ("completed", 14, 1, 45)
    assert done.work == Work(texts=15, cached=3, calls=1.5, nano_usd=21)
    kept = await shop.store.file("a", done.output_file_id)
    assert kept is not None
    assert kept.expires_at_s == kept.created_at_s + 3600
    assert await shop.store.file("a", done.error_file_id) is not None
    moments = (done.created_at_ms, done.in_progress_at_ms, done.finalizing_at_ms, done.completed_at_ms)
    assert list(moments) == sorted(moment or 0 for moment in moments)
    assert await shop.take() == []
    assert [*await shop.store.pieces(job.id), *await shop.store.tasks(job.id)] == []
    assert await shop.store.gone_parts(9) == [job.id]
    await shop.store.forget_parts([job.id])
    assert await shop.store.gone_parts(9) == []


async def test_pieces_hold_what_was_committed(shop: Shop) -> None:
    """Every figure of it; a cost that is not known makes that of the job unknown."""
    job = await shop.begin()
    task = await shop.take_one()
    one = piece(task, 4, failed=2)
    after = await shop.store.commit(task, one)
    assert after is not None
    two = msgspec.structs.replace(piece(after), work=Work(texts=6, nano_usd=None))
    assert await shop.store.commit(after, two) is not None
    assert await shop.store.pieces(job.id) == [(1, 1, one), (1, 1, two)]
    assert (await shop.look(job)).work == Work(texts=10, cached=1, calls=0.5, nano_usd=None)


async def test_a_file_that_is_bad_fails_its_job(shop: Shop) -> None:
    """With all that is wrong with it; there is nothing left to do."""
    job = await shop.create()
    errors = [LineError("invalid_json_line", "This line \0 …", None, 3), LineError("empty_file", "Nothing.", "x")]
    assert await shop.store.refuse(await shop.take_one(), errors)
    failed = await shop.look(job)
    assert (failed.status, failed.errors) == ("failed", tuple(errors))
    assert failed.failed_at_ms is not None
    assert await shop.take() == []


async def test_a_job_without_output_completes_without_files(shop: Shop) -> None:
    """Nothing to tell of is no file."""
    job = await shop.begin()
    assert await shop.store.close(await shop.finish(), output=None, errors=None)
    done = await shop.look(job)
    assert (done.status, done.output_file_id, done.error_file_id) == ("completed", "", "")


# ── what ends early ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_job_that_nobody_reads_is_cancelled_at_once(shop: Shop) -> None:
    """And there is nothing to do for it; who cancels again is told that it is over."""
    job = await shop.create()
    cancelled = await shop.store.cancel("a", job.id)
    assert cancelled is not None
    assert (cancelled.status, cancelled.output_file_id) == ("cancelled", "")
    assert None not in {cancelled.cancelling_at_ms, cancelled.cancelled_at_ms}
    assert await shop.take() == []
    with pytest.raises(Conflict, match=r"^Cannot cancel a batch with status 'cancelled'\.$"):
        await shop.store.cancel("a", job.id)


async def test_only_its_tenant_cancels_a_job(shop: Shop) -> None:
    """To others it is not there."""
    job = await shop.create()
    assert await shop.store.cancel("b", job.id) is None
    assert await shop.store.cancel("a", "absent") is None
    assert (await shop.look(job)).status == "validating"


@pytest.mark.parametrize("how", ["accepts", "refuses", "gives back", "renews", "is gone"])
async def test_a_job_that_is_being_read_is_cancelled_with_its_reader(shop: Shop, how: str) -> None:
    """Who then says whatever it is, or nothing any more."""
    job = await shop.create()
    read = await shop.take_one()
    cancelling = await shop.store.cancel("a", job.id)
    assert cancelling is not None
    assert cancelling.status == "cancelling"
    assert await shop.take("two") == []
    match how:
        case "accepts":
            assert not await shop.store.accept(read, model="m", total=1, shards=[Shard(0, 1, 0, 9)])
        case "refuses":
            assert not await shop.store.refuse(read, [])
        case "gives back":
            await shop.store.give_back(read)
        case "renews":
            assert await shop.store.renew([read], for_s=FOR_S) == []
        case _:
            await shop.run_out(read)
            assert await shop.take("two") == []
    assert (await shop.look(job)).status == "cancelled"


async def test_a_job_that_is_cancelled_keeps_what_was_committed(shop: Shop) -> None:
    """Who works on it is told so; when nobody does any more it is joined, with what is missing known."""
    job = await shop.begin(lines=[10, 10, 10])
    one, two = await shop.take(most=2)
    after = await shop.store.commit(one, piece(one, 4))
    assert after is not None
    cancelling = await shop.store.cancel("a", job.id)
    assert cancelling == await shop.store.cancel("a", job.id)
    assert await shop.store.commit(after, piece(after)) is None
    assert await shop.take("three") == []
    assert await shop.store.renew([after], for_s=FOR_S) == []
    assert await shop.take("three") == []
    await shop.run_out(two)
    join = await shop.take_one("three")
    assert (join.kind, join.job.ending) == ("join", "cancelled")
    assert await shop.store.commit(two, piece(two)) is None
    assert [task.done_lines for task in await shop.store.tasks(job.id)] == [4, 0, 0]
    assert await shop.store.close(join, output=output(job), errors=output(job, "err"))
    done = await shop.look(job)
    assert (done.status, done.completed, done.output_file_id) == ("cancelled", 4, f"out-{job.id}")


async def test_who_joins_for_another_ending_is_not_heard(shop: Shop) -> None:
    """A job that expired and is then cancelled is joined anew."""
    job = await shop.begin()
    await shop.set_job(job, expires_at_ms=1)
    expired = await shop.take_one()
    assert (expired.kind, expired.job.ending) == ("join", "expired")
    await shop.store.cancel("a", job.id)
    assert not await shop.store.close(expired, output=None, errors=None)
    join = await shop.take_one()
    assert (join.kind, join.job.ending) == ("join", "cancelled")
    assert await shop.store.close(join, output=None, errors=None)
    assert (await shop.look(job)).status == "cancelled"


async def test_a_window_that_passes_ends_a_job(shop: Shop) -> None:
    """While it is read without files; while it is worked on with what was committed."""
    job = await shop.begin(lines=[10, 10])
    unread = await shop.create()
    embed, read = await shop.take(most=2)
    assert (read.kind, embed.kind) == ("read", "embed")
    after = await shop.store.commit(embed, piece(embed, 4))
    assert after is not None
    for late in (job, unread):
        await shop.set_job(late, expires_at_ms=1)
    assert await shop.take("two") == []
    assert (await shop.look(unread)).status == "expired"
    assert not await shop.store.accept(read, model="m", total=1, shards=[Shard(0, 1, 0, 9)])
    finalizing = await shop.look(job)
    assert (finalizing.status, finalizing.ending) == ("finalizing", "expired")
    assert await shop.store.commit(after, piece(after)) is None
    await shop.store.give_back(after)
    join = await shop.take_one("two")
    assert await shop.store.close(join, output=output(job), errors=None)
    done = await shop.look(job)
    assert (done.status, done.completed, done.cancelled_at_ms) == ("expired", 4, None)


async def test_a_job_that_is_all_done_does_not_expire(shop: Shop) -> None:
    """Its parts are only to be put together."""
    job = await shop.begin()
    task = await shop.take_one()
    await shop.store.commit(task, piece(task))
    await shop.set_job(job, expires_at_ms=1)
    assert (await shop.take_one()).job.ending == "completed"


async def test_a_pause_keeps_a_job_back_until_it_is_over(shop: Shop) -> None:
    """And no other one; a shorter one does not end it, and what is committed meanwhile counts."""
    job = await shop.begin(lines=[10, 10, 10])
    one, two, three = await shop.take(most=3)
    await shop.store.pause(one, "budget", for_s=FOR_S)
    until_ms = await scalars(shop.database, select(jobs.c.paused_until_ms))
    await shop.store.pause(two, "budget", for_s=0)
    assert await scalars(shop.database, select(jobs.c.paused_until_ms)) == until_ms
    assert await shop.store.commit(three, piece(three)) is not None
    assert (await shop.look(job)).pause == "budget"
    assert await shop.take() == []
    other = await shop.begin()
    assert (await shop.take_one()).job.id == other.id
    await shop.set_job(job, paused_until_ms=1)
    assert [task.number for task in await shop.take(most=9)] == [1, 2]
    assert (await shop.look(job)).pause == ""


async def test_a_paused_job_can_end(shop: Shop) -> None:
    """By cancelling or by its window; then it waits for nothing."""
    for ends in ("cancelled", "expired"):
        job = await shop.begin()
        await shop.store.pause(await shop.take_one(), "budget", for_s=FOR_S)
        if ends == "cancelled":
            await shop.store.cancel("a", job.id)
        else:
            await shop.set_job(job, expires_at_ms=1)
        join = await shop.take_one()
        assert (join.kind, join.job.pause, join.job.ending) == ("join", "", ends)
        assert await shop.store.close(join, output=None, errors=None)


# ── who leaves ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_tenant_that_is_deleted_leaves_nothing(shop: Shop) -> None:
    """Neither jobs nor files, nor its name; its blobs are told of; who works for it is not heard. May be again."""
    await shop.upload("theirs", "b")
    mine, other = await shop.begin(), await shop.create("b", input_file_id="theirs")
    task = next(task for task in await shop.take(most=2) if task.kind == "embed")
    after = await shop.store.commit(task, piece(task, 4))
    assert after is not None
    for _ in range(2):
        await erase(shop.database, "a")
    assert await shop.store.job("a", mine.id) is None
    assert await shop.store.commit(after, piece(after)) is None
    assert await shop.store.commit(task, piece(task, 4)) is None
    assert await shop.store.renew([after], for_s=FOR_S) == []
    assert await shop.store.gone_files(9) == ["in"]
    assert await shop.store.gone_parts(9) == [mine.id]
    assert await shop.store.pieces(mine.id) == []
    names = [
        *await scalars(shop.database, select(files.c.tenant)),
        *await scalars(shop.database, select(jobs.c.tenant)),
    ]
    assert "a" not in names
    assert (await shop.look(other)).status == "validating"
    assert await shop.store.file("b", "theirs") is not None


async def test_nothing_is_asked_of_a_database_that_is_not_prepared(shop: Shop) -> None:
    """It may still lack the tables."""
    early = SqlJobs(shop.database, ready=lambda: False)
    with pytest.raises(LevelDown):
        await early.take("one", most=1, for_s=FOR_S)
    with pytest.raises(LevelDown):
        await early.file("a", "in")
