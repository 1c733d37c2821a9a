"""Whose money buys what from which vendor's own batches, and that no kill makes anybody buy twice."""

import asyncio
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from app.api import bulk
from app.storage.sql.tables import jobs
from tests.contract.stored import change
from tests.emulators import faults, server
from tests.emulators.openai import OpenAIEmulator
from tests.faults.test_job_faults import drop
from tests.faults.vendors import (
    BATCH_NANO_USD,
    BATCHES,
    FOR_EVER,
    GEMINI,
    LINES,
    NANO_USD,
    OPENAI,
    VOYAGE,
    Replica,
    Vendor,
    alone,
    always,
    cost,
    free_all,
    heal,
    ledger,
    replica,
    text,
)

KILLS = 15
TOKENS = 6 * LINES
"""What the usual job takes."""

WORKS_UNTIL_KILLED = """
import asyncio, os, random, signal, sys, time
from pathlib import Path
from app.runtime import Runtime
from app.serving import Menu
from app.settings import load
from tests.faults.vendors import free_all, work_until_killed

settings, kills = load(Path(sys.argv[1]), {}), int(sys.argv[2])
rng = random.Random(41)
Menu(settings).models["text-embedding-3-small"].counter.count("what takes long to load is loaded once")

async def live():
    async with Runtime(settings) as runtime:
        await free_all(runtime)
        os.write(ready, b"x")
        await work_until_killed(runtime)

for _ in range(kills):
    heard, ready = os.pipe()
    child = os.fork()
    if child == 0:
        asyncio.run(live())
        os._exit(0)
    os.close(ready)
    assert os.read(heard, 1)
    time.sleep(rng.uniform(0.02, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard)
"""


# ── kills ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_kill_makes_anybody_order_twice(tmp_path: Path) -> None:
    """Fifteen at random moments of whoever packs, orders, looks and fetches: each line once, each text in one batch."""
    lines, pause_s = 300, 0.03

    async def slowly(wire: faults.Wire, content: bytes) -> None:
        await asyncio.sleep(pause_s)
        await wire.answer(200, content, {})

    async with OpenAIEmulator() as upstream:
        for operation in ("upload", "create", "list", "poll", "content"):
            always(upstream, operation, slowly)
        async with replica(tmp_path, upstream, shard_lines=10) as at:
            bodies = at.bodies(lines)
            await at.begin(bodies)
        buyer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKS_UNTIL_KILLED, tmp_path / "embedgate.toml", str(KILLS)
        )
        assert await buyer.wait() == 0
        heal(upstream)
        ordered_before = len(upstream.batches.batches)
        async with replica(tmp_path, upstream, shard_lines=10) as at, bulk.runner(at.runtime) as runner:
            before = await at.look()
            await free_all(at.runtime)
            job = await at.end(runner)
            assert (job.status, await at.check(job, bodies)) == ("completed", {})
            assert at.ordered == Counter(text(line) for line in range(lines))
            assert not at.bought
        print(f"after {KILLS} kills {ordered_before} batches were ordered, {before.completed} lines were done")
    calls = await ledger(tmp_path)
    assert Counter(call.state for call in calls) == {"billed": lines // 10}
    assert cost(calls, "billed") == upstream.batch_bill.tokens * BATCH_NANO_USD


# ── budgets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def budget(tokens: float) -> str:
    """For so many tokens in batches."""
    return f"budget_usd_per_month = {tokens * BATCH_NANO_USD / 10**9:.9f}"


async def paused(at: Replica) -> None:
    """The job waits for money."""
    async with asyncio.timeout(20):
        while (job := await at.look()).pause != "budget":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (job.status, job.failed) == ("in_progress", 0)


async def test_what_nobody_can_pay_is_not_ordered(tmp_path: Path) -> None:
    """The job pauses until there is more money; then it goes on by itself, and pays to the nano-dollar."""
    async with OpenAIEmulator() as upstream:
        poor, rich = (budget(tokens) for tokens in (TOKENS - 1, TOKENS))
        async with replica(tmp_path, upstream, tenant=poor, shard_lines=LINES) as at, bulk.runner(at.runtime):
            await at.begin()
            await paused(at)
            assert not upstream.batches.files
            assert (await at.look()).completed == 0
        async with replica(tmp_path, upstream, tenant=rich, shard_lines=LINES) as at:
            await change(at.runtime.stores.database, update(jobs).values(paused_until_ms=1))
            async with bulk.runner(at.runtime) as runner:
                job = await at.end(runner)
            assert (job.status, await at.check(job)) == ("completed", {})
            assert (len(at.orders), at.bought.total()) == (1, 0)
            assert await at.ask("one") == "BudgetExhausted"
    assert cost(await ledger(tmp_path), "billed") == TOKENS * BATCH_NANO_USD


async def test_what_fits_is_ordered_and_the_rest_waits(tmp_path: Path) -> None:
    """Of three batches two; with more money the third, and neither of the others again."""
    async with OpenAIEmulator() as upstream:
        async with replica(tmp_path, upstream, tenant=budget(TOKENS - 1)) as at, bulk.runner(at.runtime):
            await at.begin()
            await paused(at)
            assert 0 < len(at.orders) < BATCHES
        async with replica(tmp_path, upstream, tenant=budget(TOKENS)) as at, bulk.runner(at.runtime) as runner:
            await change(at.runtime.stores.database, update(jobs).values(paused_until_ms=1))
            job = await at.end(runner)
            assert (job.status, await at.check(job)) == ("completed", {})
            assert (len(at.orders), at.bought.total()) == (BATCHES, 0)


@pytest.mark.parametrize("lost", [False, True], ids=["heard", "unheard"])
async def test_what_is_ordered_counts_as_spent(tmp_path: Path, lost: bool) -> None:
    """While it runs, and while nobody knows whether it does, others of the tenant have only what is left."""
    long, short = "word " * 15, "word"
    async with alone(tmp_path, tenant=budget(TOKENS + 20), shard_lines=LINES) as at:
        desk = at.upstream.batches
        desk.steps = FOR_EVER

        async def unheard(wire: faults.Wire, content: bytes) -> None:
            always(at.upstream, "list", faults.status(503))
            await faults.reset(wire, content)

        if lost:
            desk.inject("create", unheard)
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: bool(desk.batches))
            for _ in range(5):
                await at.hurry(runner)
            assert await at.ask(long) == "BudgetExhausted"
            assert await at.ask(short) == "ok"
            desk.steps = 1
            heal(at.upstream)
            job = await at.end(runner)
        assert (job.status, await at.check(job)) == ("completed", {})
        assert len(at.orders) == 1
    calls = await ledger(tmp_path)
    assert cost(calls, "billed") == TOKENS * BATCH_NANO_USD + at.upstream.bill.tokens * NANO_USD
    assert cost(calls, "unconfirmed") == 0


async def test_what_was_never_ordered_is_not_spent(tmp_path: Path) -> None:
    """When it is known that an order whose answer was lost is none, and no other one follows."""
    async with alone(tmp_path, shard_lines=LINES) as at:
        always(at.upstream, "upload", faults.reset)
        async with bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: len(at.upstream.batches.files) > 2)
            await at.age(0.76)
            job = await at.end(runner)
        assert (job.status, await at.check(job)) == ("completed", {})
        assert not at.orders
    calls = await ledger(tmp_path)
    assert cost(calls, "billed", "unconfirmed", "estimated") == at.upstream.bill.tokens * NANO_USD


# ── vendors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vendor", [OPENAI, GEMINI, VOYAGE], ids=lambda vendor: vendor.dialect)
async def test_each_vendor_sells(tmp_path: Path, vendor: Vendor) -> None:
    """Each in its own words; what does not name its tokens is estimated."""
    async with alone(tmp_path, vendor) as at:
        job = await at.do()
        assert (job.status, await at.check(job)) == ("completed", {})
        assert at.ordered == Counter(text(line) for line in range(LINES))
        assert not at.bought
        assert at.upstream.bill.requests == 0
        assert (job.work.texts, job.work.cached, job.work.calls) == (LINES, 0, BATCHES)
        tokens = at.upstream.batch_bill.tokens
    calls = await ledger(tmp_path)
    assert {call.state for call in calls} == {"estimated" if vendor is GEMINI else "billed"}
    assert cost(calls, "billed", "estimated") == job.work.nano_usd
    assert vendor is GEMINI or job.work.nano_usd == tokens * BATCH_NANO_USD


@pytest.mark.parametrize("vendor", [GEMINI, VOYAGE], ids=lambda vendor: vendor.dialect)
async def test_each_vendor_may_stop_half_way(tmp_path: Path, vendor: Vendor) -> None:
    """What is left goes the ordinary way."""
    async with alone(tmp_path, vendor) as at:
        at.upstream.batches.lapses_after = 5
        at.upstream.batches.inject("create", faults.reset)
        job = await at.do()
        assert (job.status, await at.check(job)) == ("completed", {})
        assert at.upstream.batch_bill.items == 5 * BATCHES
        assert at.upstream.bill.items == LINES - 5 * BATCHES


async def test_a_text_that_must_not_go_keeps_nobody_back(tmp_path: Path) -> None:
    """Google would cut it without a word: the rest is ordered without it, once, though whoever did so is killed."""
    long = 7
    async with GEMINI.emulator() as upstream:
        async with replica(tmp_path, upstream, GEMINI, shard_lines=LINES) as at:
            bodies = at.bodies()
            bodies[long] = at.body("word " * 2500)
            upstream.batches.inject("create", faults.hang)
            async with bulk.runner(at.runtime) as runner:
                await at.begin(bodies)
                await at.until(runner, lambda: bool(at.orders))
                await drop(runner)
        async with replica(tmp_path, upstream, GEMINI, shard_lines=LINES) as at, bulk.runner(at.runtime) as runner:
            await free_all(at.runtime)
            job = await at.end(runner)
            assert [*await at.check(job, bodies)] == [long]
            assert at.ordered == Counter(text(line) for line in range(LINES) if line != long)
    (call,) = [call for call in await ledger(tmp_path) if call.parts[0].call.startswith("batch_x-")]
    assert (call.state, call.texts, call.nano_usd) == ("estimated", LINES - 1, job.work.nano_usd)


async def test_each_space_has_an_order_of_its_own(tmp_path: Path) -> None:
    """Queries and documents; of widths that are cut from the full one there is one order."""
    async with alone(tmp_path, VOYAGE, shard_lines=LINES) as at:
        ways: list[dict[str, Any]] = [
            {},
            {"dimensions": 512},
            {"input_type": "query"},
            {"input_type": "document", "dimensions": 256},
        ]
        bodies = [at.body(text(line % 20), **ways[line // 15]) for line in range(LINES)]
        job = await at.do(bodies)
        assert (job.status, await at.check(job, bodies)) == ("completed", {})
        asked = [batch.ordered["request_params"].get("input_type") for batch in at.orders]
        assert sorted(map(str, asked)) == sorted({str(way.get("input_type")) for way in ways})
        assert at.upstream.batch_bill.items == 20 + 15 + 15
        assert not at.bought
        assert (job.work.texts, job.work.cached, job.work.calls) == (LINES, LINES - 50, 3)
    assert cost(await ledger(tmp_path), "billed") == at.upstream.batch_bill.tokens * BATCH_NANO_USD


async def test_each_user_has_a_row_in_the_ledger(tmp_path: Path) -> None:
    """One order for all, split over those who asked; who asks for what another one ordered pays nothing."""
    async with alone(tmp_path, shard_lines=LINES) as at:
        users = ["ada", "bob", None]
        bodies = [at.body(text(line)) | ({"user": users[line % 3]} if line % 3 < 2 else {}) for line in range(LINES)]
        bodies[4] = at.body(text(0), user="bob")
        job = await at.do(bodies)
        assert (job.status, await at.check(job, bodies)) == ("completed", {})
    (call,) = await ledger(tmp_path)
    assert len({part.user for part in call.parts}) == 3
    paid = {(part.texts, part.nano_usd) for part in call.parts}
    assert paid == {(texts, texts * 6 * BATCH_NANO_USD) for texts in (20, 19)}
    assert call.tokens == at.upstream.batch_bill.tokens


# ── what is spoilt ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_bad_text_fails_alone(tmp_path: Path) -> None:
    """Its line is in the error file; of the others none is bought again."""
    async with alone(tmp_path) as at:
        at.upstream.poison = {text(3), text(25)}
        job = await at.do()
        bad = await at.check(job)
        assert [*bad] == [3, 25]
        assert {line["response"]["status_code"] for line in bad.values()} == {400}
        assert at.ordered == Counter(map(text, range(LINES)))
        assert at.bought.keys() - {"hello"} == at.upstream.poison  # the engine asks whether it is the provider
    calls = [call for call in await ledger(tmp_path) if call.state != "failed"]
    assert cost(calls, "billed") == cost(calls, "billed", "unconfirmed", "estimated")
    assert cost(calls, "billed") == (
        at.upstream.batch_bill.tokens * BATCH_NANO_USD + at.upstream.bill.tokens * NANO_USD
    )


async def test_of_a_spoilt_batch_nothing_is_believed(tmp_path: Path) -> None:
    """Two answers to one text: all of it is bought the ordinary way, and what it cost stays unconfirmed."""
    async with alone(tmp_path) as at:
        at.upstream.batches.damage = server.one_place_twice
        job = await at.do()
        assert (job.status, await at.check(job)) == ("completed", {})
        assert at.bought == Counter(map(text, range(LINES)))
    calls = await ledger(tmp_path)
    assert cost(calls, "unconfirmed") == at.upstream.batch_bill.tokens * BATCH_NANO_USD
    assert cost(calls, "billed") == at.upstream.bill.tokens * NANO_USD


@pytest.mark.parametrize("damage", ["one_short", "not_a_number", "narrower"])
async def test_of_a_spoilt_answer_only_its_text_is_bought_again(tmp_path: Path, damage: str) -> None:
    """What it cost is counted."""
    async with alone(tmp_path) as at:
        at.upstream.batches.damage = getattr(server, damage)
        job = await at.do()
        assert (job.status, await at.check(job)) == ("completed", {})
        assert at.bought.total() == BATCHES
    calls = await ledger(tmp_path)
    assert cost(calls, "estimated") == at.upstream.batch_bill.tokens * BATCH_NANO_USD


# ── nobody sells ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_asks_for_batches_where_there_are_none_is_told(tmp_path: Path) -> None:
    """The job fails with what to do about it; one that only its tenant would rather have there is done all the same."""
    async with alone(tmp_path, priced="") as at:
        job = await at.do(metadata={"embedgate_tier": "vendor_batch"})
        assert job.status == "failed"
        (error,) = job.errors
        assert (error.code, error.param) == ("unsupported_value", "body.model")
        assert "no deployment whose vendor takes batches: leave out 'embedgate_tier'" in error.message
        assert at.upstream.bill.requests == 0
        usual = await at.do(name="usual")
        assert (usual.status, await at.check(usual)) == ("completed", {})
        assert at.bought.total() == LINES
        assert not at.upstream.batches.files


async def test_who_no_longer_sells_is_not_waited_for(tmp_path: Path) -> None:
    """The operator took the deployment's batches away while some were under way: all goes the ordinary way."""
    async with OpenAIEmulator() as upstream:
        upstream.batches.steps = FOR_EVER
        async with replica(tmp_path, upstream) as at, bulk.runner(at.runtime) as runner:
            await at.begin()
            await at.until(runner, lambda: len(at.orders) == BATCHES)
        async with replica(tmp_path, upstream, priced="") as at, bulk.runner(at.runtime) as runner:
            job = await at.end(runner)
            assert (job.status, await at.check(job)) == ("completed", {})
            assert at.bought.total() == LINES
    assert cost(await ledger(tmp_path), "unconfirmed") == TOKENS * BATCH_NANO_USD
