"""How a shard is embedded: every line once, in its order, committed as it goes, whatever the providers do meanwhile."""

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from app.domain import ANONYMOUS, Basket, EmbeddingRequest, EmbeddingResult, Priority, Tenant
from app.errors import (
    BudgetExhausted,
    EmbedgateError,
    InvalidRequest,
    RateLimited,
    Transient,
    Unreachable,
    UpstreamFailed,
)
from app.job import Job, Order, Piece, Shard, Task, file_blob, piece_blobs
from app.jobs.embedding import Paused, ShardWork, Window
from tests.identity import identifying_vector
from tests.rig import MODEL, WIDTH, Rig, ScriptedProvider, engine

pytestmark = pytest.mark.looptime(start=1000.0)

Embed = Callable[..., Awaitable[EmbeddingResult]]

ORDER = Order("batch_x", "anonymous", "", "", "file-x", 86_400, {})
_WINDOW = Window(16, 64)
JOB = Job(ORDER, "in_progress", 0, 86_400_000, MODEL)


class MemoryBlobs:
    """Blobs in a dictionary; `slow_s` is how long writing one takes."""

    def __init__(self, slow_s: float = 0.0) -> None:
        self.kept: dict[str, bytes] = {}
        self.slow_s = slow_s

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator[Any]:
        """See `Blobs`."""
        parts: list[bytes] = []

        class Writer:
            async def write(self, data: bytes) -> None:
                parts.append(data)

        yield Writer()
        await asyncio.sleep(self.slow_s)
        self.kept[name] = b"".join(parts)

    async def reading(self, name: str, *, offset_bytes: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """See `Blobs`, in pieces of seven bytes."""
        data = self.kept[name][offset_bytes:]
        data = data if size_bytes is None else data[:size_bytes]
        for at in range(0, len(data), 7):
            yield data[at : at + 7]

    async def delete(self, names: Collection[str]) -> None:
        """See `Blobs`."""
        for name in names:
            self.kept.pop(name, None)

    async def delete_under(self, prefix: str) -> None:
        """See `Blobs`."""
        await self.delete([name for name in self.kept if name.startswith(prefix + "/")])


class Words:
    """Lines in words of our own: a body's `input`, and what came of it."""

    def __init__(self, tenant: Tenant = ANONYMOUS) -> None:
        self.tenant = tenant

    def read(self, body: bytes, order: Order) -> tuple[EmbeddingRequest, Any]:
        """See `Wire`."""
        given = orjson.loads(body)["input"]
        if not given:
            raise InvalidRequest("empty", param="input")
        texts = (given,) if isinstance(given, str) else tuple(given)
        return EmbeddingRequest(self.tenant, MODEL, texts, math.inf, Priority.BULK, cause="bulk"), None

    def good(self, job: Job, custom_id: str, asked: Any, result: EmbeddingResult) -> bytes:
        """See `Wire`."""
        assert (job, asked) == (JOB, None)
        return orjson.dumps([custom_id, [data.hex() for data in result.vectors]]) + b"\n"

    def bad(self, job: Job, custom_id: str, error: EmbedgateError) -> bytes:
        """See `Wire`."""
        return orjson.dumps([custom_id, type(error).__name__]) + b"\n"

    def undone(self, job: Job, custom_id: str, code: str) -> bytes:
        """See `Wire`."""
        raise AssertionError


class Bench:
    """A shard of lines over an engine, and what is committed of it."""

    def __init__(self, rig: Rig, inputs: Sequence[Any], *, slow_s: float = 0.0) -> None:
        lines = [orjson.dumps({"custom_id": f"id{at}", "body": {"input": given}}) for at, given in enumerate(inputs)]
        self.inputs = inputs
        self.data = b"\n".join(lines) + b"\n\n"
        self.blobs = MemoryBlobs(slow_s)
        self.blobs.kept[file_blob("file-x")] = b"before" + self.data + b"after"
        self.rig = rig
        self.pieces: list[Piece] = []
        self.committed_at: list[float] = []
        self.holds = True

    def task(self, **more: Any) -> Task:
        """The task as it stands."""
        done = sum(piece.lines for piece in self.pieces)
        shard = Shard(0, len(self.inputs), len(b"before"), len(self.data))
        return Task(JOB, 3, "embed", 7, "me", shard, done, len(self.pieces), **more)

    async def commit(self, task: Task, piece: Piece) -> Task | None:
        """As the store has it."""
        if not self.holds:
            return None
        assert piece.number == task.next_piece == len(self.pieces)
        self.pieces.append(piece)
        self.committed_at.append(asyncio.get_running_loop().time())
        return self.task()

    def work(
        self, *, window: Window = _WINDOW, attempts: int = 3, tenant: Tenant = ANONYMOUS, embed: Embed | None = None
    ) -> ShardWork:  # fmt: skip
        """Somebody who does it."""
        return ShardWork(
            self.task(), self.blobs, Words(tenant), embed or self.rig.gateway.embed, self.commit,
            window=window, attempts=attempts, rng=random.Random(5),
        )  # fmt: skip

    def written(self, end: str) -> list[list[Any]]:
        """Every line of the committed pieces, in order."""
        blobs = [self.blobs.kept.get(piece_blobs("batch_x", 3, 7, piece.number)[end == "err"]) for piece in self.pieces]
        return [orjson.loads(line) for data in blobs if data for line in data.splitlines()]

    def check(self, failed: dict[int, str] | None = None) -> None:
        """Every line is there once, in order, with its own vectors."""
        failed = failed or {}
        good = [at for at in range(len(self.inputs)) if at not in failed]
        assert [custom_id for custom_id, _ in self.written("out")] == [f"id{at}" for at in good]
        assert self.written("err") == [[f"id{at}", failed[at]] for at in sorted(failed)]
        for at, (_, vectors) in zip(good, self.written("out"), strict=True):
            texts = [self.inputs[at]] if isinstance(self.inputs[at], str) else self.inputs[at]
            assert vectors == [identifying_vector(text, MODEL, WIDTH).tobytes().hex() for text in texts]
        assert sum(piece.completed for piece in self.pieces) == len(good)
        assert sum(piece.failed for piece in self.pieces) == len(failed)


async def test_every_line_is_done_once_and_in_its_order() -> None:
    """Lines of one text and of many, pieces as they come."""
    inputs = [f"text {at}" if at % 3 else [f"a {at}", f"b {at} c"] for at in range(100)]
    async with engine(ScriptedProvider()) as rig:
        bench = Bench(rig, inputs)
        assert await bench.work().run()
    bench.check()
    assert sum(piece.tokens for piece in bench.pieces) == sum(
        len(text.split()) for given in inputs for text in ([given] if isinstance(given, str) else given)
    )
    assert sum(piece.work.texts for piece in bench.pieces) == 134
    assert round(sum(piece.work.calls for piece in bench.pieces), 6) == len(rig.provider.calls)


async def test_a_line_that_is_wrong_fails_alone() -> None:
    """What nobody could embed is told, and its neighbours are done."""
    async with engine(ScriptedProvider()) as rig:
        bench = Bench(rig, ["a", "", "b", "w " * 101, "c"])
        assert await bench.work().run()
    bench.check({1: "InvalidRequest", 3: "InvalidRequest"})


async def test_whoever_takes_over_goes_on_where_the_last_piece_ended() -> None:
    """Nothing that was committed is done again."""
    async with engine(ScriptedProvider(latency_s=0.3)) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(60)])
        first = asyncio.create_task(bench.work(window=Window(4, 64)).run())
        await asyncio.sleep(3.0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert 0 < sum(piece.lines for piece in bench.pieces) < 60
        await bench.work().run()
        bench.check()
        assert len(set(rig.provider.texts)) == len(rig.provider.texts) == 60


async def test_who_no_longer_holds_it_stops() -> None:
    """At the first word that is not heard."""
    async with engine(ScriptedProvider(latency_s=0.3)) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(1000)])
        bench.holds = False
        assert not await bench.work().run()
        assert len(rig.provider.texts) <= 4 * 16


async def test_no_more_is_under_way_than_the_window_has() -> None:
    """Of lines, and of their texts."""
    for window, most in ((Window(5, 1000), 5), (Window(1000, 6), 8)):
        async with engine(ScriptedProvider(latency_s=1.0)) as rig:
            bench = Bench(rig, [[f"a {at}", f"b {at}"] if window.texts == 6 else f"a {at}" for at in range(30)])
            running = asyncio.create_task(bench.work(window=window).run())
            seen = 0
            while not running.done():
                seen = max(seen, sum(len(batcher) for batcher in rig.gateway._batchers.values()))
                await asyncio.sleep(0.1)
            bench.check()
            assert 0 < seen <= most


async def test_what_is_done_is_committed_while_the_rest_is_under_way() -> None:
    """At most a little more than a second after it is done."""
    async with engine(ScriptedProvider(latency_s=0.5)) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(64)])
        await bench.work(window=Window(4, 64)).run()
    gaps = [after - before for before, after in zip(bench.committed_at, bench.committed_at[1:], strict=False)]
    assert max(gaps) <= 1.6


async def test_a_provider_that_is_out_for_ten_minutes_fails_no_line() -> None:
    """The job waits, asks now and then, and goes on by itself."""
    provider = ScriptedProvider(always=Unreachable("refused"))
    async with engine(provider) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(50)])
        running = asyncio.create_task(bench.work().run())
        await asyncio.sleep(600.0)
        assert not running.done()
        asked = len(provider.calls)
        provider.always = None
        back = asyncio.get_running_loop().time()
        assert await running
        bench.check()
        assert asyncio.get_running_loop().time() - back <= 300.0
    assert asked <= 400


async def test_ten_minutes_without_a_provider_and_a_restart_in_between_lose_nothing() -> None:
    """Whoever comes after four minutes knows nothing of them; what was committed before the outage stays so."""
    provider = ScriptedProvider()
    async with engine(provider) as before:
        bench = Bench(before, [f"text {at}" for at in range(50)])
        running = asyncio.create_task(bench.work().run())
        while not bench.pieces:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        provider.always = Unreachable("refused")
        await asyncio.sleep(240.0)
        running.cancel()
        await asyncio.wait([running])
    done = sum(piece.lines for piece in bench.pieces)
    async with engine(provider) as bench.rig:
        running = asyncio.create_task(bench.work().run())
        await asyncio.sleep(360.0)
        assert not running.done()
        assert sum(piece.lines for piece in bench.pieces) == done
        provider.always = None
        assert await running
    bench.check()
    assert 0 < done < 50


async def test_a_line_that_fails_again_and_again_is_given_up() -> None:
    """After as many tries as it has, if another text is answered; where nothing is answered it never is."""
    async with engine(ScriptedProvider()) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(200)])
        tried = 0

        async def embed(request: EmbeddingRequest, basket: Basket | None = None) -> EmbeddingResult:
            nonlocal tried
            if request.texts == ("text 3",):
                tried += 1
                await asyncio.sleep(0.2)
                raise UpstreamFailed
            return await rig.gateway.embed(request, basket)

        running = asyncio.create_task(bench.work(attempts=3, embed=embed).run())
        await asyncio.wait((running,), timeout=60.0)
        assert running.result()
        bench.check({3: "UpstreamFailed"})
        assert tried == 3
    async with engine(ScriptedProvider(always=Transient("500"))) as rig:
        bench = Bench(rig, ["a", "b"])
        running = asyncio.create_task(bench.work(attempts=2).run())
        await asyncio.wait((running,), timeout=7 * 3600.0)
        assert not running.done()
        rig.provider.always = None
        await asyncio.wait((running,), timeout=301.0)
        assert running.result()
        bench.check()


async def test_a_budget_that_is_gone_pauses_and_fails_nothing() -> None:
    """What was done before is committed; who comes later does the rest."""
    provider = ScriptedProvider()
    async with engine(provider) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(40)])
        left = 10

        async def embed(request: EmbeddingRequest, basket: Basket | None = None) -> EmbeddingResult:
            nonlocal left
            if left <= 0:
                raise BudgetExhausted("tenant x", "2026-11")
            left -= 1
            return await rig.gateway.embed(request, basket)

        with pytest.raises(Paused):
            await bench.work(embed=embed).run()
        assert sum(piece.lines for piece in bench.pieces) == 10
        assert await bench.work().run()
        bench.check()


async def test_a_tenant_over_its_limits_only_waits() -> None:
    """Told to come again it does, at the time that it was told."""
    async with engine(ScriptedProvider()) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(20)])
        refusals = deque([RateLimited("slow", kind="tokens", retry_after_s=20.0)])

        async def embed(request: EmbeddingRequest, basket: Basket | None = None) -> EmbeddingResult:
            if refusals:
                raise refusals.popleft()
            return await rig.gateway.embed(request, basket)

        began = asyncio.get_running_loop().time()
        assert await bench.work(embed=embed).run()
        assert 20.0 <= asyncio.get_running_loop().time() - began <= 25.0
        bench.check()


async def test_slow_disks_hold_up_nobody() -> None:
    """Lines go on while a piece is being written."""
    async with engine(ScriptedProvider(latency_s=0.01)) as rig:
        bench = Bench(rig, [f"text {at}" for at in range(400)], slow_s=0.5)
        began = asyncio.get_running_loop().time()
        assert await bench.work(window=Window(128, 1000)).run()
        assert asyncio.get_running_loop().time() - began <= 5.0
        bench.check()
