"""What bulk work makes of a quota: nearly all of it when alone, and nothing that others would have wanted."""

import asyncio
import random

import numpy as np
import pytest

from app.domain import Limits, Priority
from app.engine.workqueue import QueueBound
from app.jobs.embedding import Window
from tests.rig import Rig, ScriptedProvider, engine
from tests.unit.test_shard_work import Bench

pytestmark = pytest.mark.looptime(start=1000.0)

QUOTA = Limits(tokens_per_minute=60_000, max_in_flight=8, max_batch_tokens=8000)
WINDOW = Window(256, 4096)


def words(rng: random.Random, number: int) -> str:
    """A text of some 50 words, and no other like it."""
    return f"{number} " + "word " * rng.randint(10, 90)


def used(rig: Rig, start_s: float, minutes: int) -> list[float]:
    """Which part of the quota each minute used."""
    sums = [0] * minutes
    for at, texts in rig.provider.calls:
        minute = int((at - start_s) // 60)
        if 0 <= minute < minutes:
            sums[minute] += sum(len(str(text).split()) for text in texts)
    return [tokens / 60_000 for tokens in sums]


async def test_a_job_alone_uses_nearly_all_of_a_quota() -> None:
    """In every minute but the first; and hardly a call is small."""
    rng = random.Random(6)
    async with engine(ScriptedProvider(latency_s=0.2), limits=QUOTA, bound=QueueBound(), bulk_min_tokens=1000) as rig:
        bench = Bench(rig, [words(rng, number) for number in range(10_000)])
        began = asyncio.get_running_loop().time()
        work = asyncio.create_task(bench.work(window=WINDOW).run())
        await asyncio.sleep(330.0)
        parts = used(rig, began, 5)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    print("minutes: " + " ".join(f"{part:.1%}" for part in parts))
    assert min(parts[1:]) >= 0.95
    sizes = [sum(len(str(text).split()) for text in texts) for _, texts in rig.provider.calls]
    small = sum(size < 1000 for size in sizes) / len(sizes)
    print(f"{len(sizes)} calls, {small:.1%} of fewer than 1,000 tokens")
    assert small <= 0.05


async def interactive(rig: Rig, seconds: float) -> list[float]:
    """How long each of four requests a second took, of ten words."""
    loop, took = asyncio.get_running_loop(), []

    async def one(number: int) -> None:
        began = loop.time()
        await rig.ask(f"interactive {number} " + "word " * 8, priority=Priority.INTERACTIVE)
        took.append(loop.time() - began)

    async with asyncio.TaskGroup() as group:
        for number in range(int(4 * seconds)):
            group.create_task(one(number))
            await asyncio.sleep(0.25)
    return took


async def test_interactive_callers_hardly_notice_a_job() -> None:
    """Their 99th percentile rises by a tenth at most, while the job has the rest."""
    rng = random.Random(8)
    async with engine(ScriptedProvider(latency_s=0.2), limits=QUOTA, bulk_min_tokens=1000) as rig:
        alone = await interactive(rig, 120.0)
    async with engine(ScriptedProvider(latency_s=0.2), limits=QUOTA, bulk_min_tokens=1000) as rig:
        bench = Bench(rig, [words(rng, number) for number in range(10_000)])
        work = asyncio.create_task(bench.work(window=WINDOW).run())
        await asyncio.sleep(60.0)
        began = asyncio.get_running_loop().time()
        beside = await interactive(rig, 120.0)
        parts = used(rig, began, 2)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    before_s, with_s = (float(np.quantile(took, 0.99)) for took in (alone, beside))
    print(f"p99 {before_s * 1000:.0f} ms alone, {with_s * 1000:.0f} ms beside a job; quota used {parts}")
    assert with_s <= 1.1 * before_s
    assert min(parts) >= 0.9
