"""One quota over three replicas is used and never broken, whatever becomes of the Redis that they share."""

import asyncio
import io
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
import orjson
import pytest
import pytest_asyncio
import redis

from tests.bench.processes import read, server, upstream
from tests.books import calls_in
from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator
from tests.servers import HOST, PostgresProcess, ValkeyProcess
from tests.tcp_proxy import TcpProxy
from tests.trials.replicas import (
    Answer,
    Callers,
    Stage,
    ask,
    key,
    most_in_a_minute,
    per_minute,
    replicas,
    session,
    side_by_side,
    sized_texts,
    small_texts,
    stage,
    used_tokens,
)
from tests.trials.service import deployment

REQUESTS, TOKENS = 600, 60_000
DEMAND_PER_S = 3 * TOKENS / 60 / 263  # texts of up to 2,000 tokens, log-uniform, have 263 in the mean
MINUTES, LOSS_S = 3, 80.0
BEFORE, AFTERWARDS = 0.95, 0.90  # how much of the quota is used at least: while all is well, after a loss

# ── what may become of Redis ────────────────────────────────────────────────────────────────────────────────────────


async def nothing(on: Stage) -> None:
    """All is well."""


async def frozen(on: Stage) -> None:
    """Nothing is answered for half a minute."""
    on.valkey.freeze()
    await asyncio.sleep(30.0)
    on.valkey.thaw()


async def flushed(on: Stage) -> None:
    """Somebody empties it."""
    with redis.Redis.from_url(on.valkey.url) as client:
        client.flushall()


async def restarted(on: Stage) -> None:
    """It comes back empty."""
    await asyncio.to_thread(on.valkey.restart)


async def promoted(on: Stage) -> None:
    """It is gone, and a replica of it that is two seconds behind takes its place, at the same address."""
    async with AsyncExitStack() as stack:
        link = await stack.enter_async_context(TcpProxy(on.valkey.port))
        follower = ValkeyProcess({"replicaof": f"{HOST} {link.port}"})
        await asyncio.to_thread(on.stack.enter_context, follower)
        with redis.Redis.from_url(follower.url) as client:
            await asyncio.sleep(3.0)
            assert client.info("replication")["master_link_status"] == "up"
            link.latency_s = 2.0
            await asyncio.sleep(5.0)
            link.refuse()
            client.replicaof("NO", "ONE")
    await asyncio.to_thread(on.valkey.kill)
    on.to_valkey.refuse()
    successor = TcpProxy(follower.port)
    successor.port = on.to_valkey.port
    await on.stack.enter_async_context(successor)


Loss = Callable[[Stage], Coroutine[object, object, None]]
LOSSES: dict[Loss, int] = {nothing: 100, frozen: 100, flushed: 101, restarted: 101, promoted: 101}
"""And how much of the quota may be used: where memory was lost, 1 % more than all."""


# ── T1, T6, T7 ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Course:
    """What the judge saw of one stage, and what its callers got."""

    emulator: OpenAIEmulator
    answers: Sequence[Answer]
    began_s: float
    back_s: float
    least: float

    @property
    def used(self) -> Sequence[float]:
        """How much of the quota was used in every minute."""
        return [self.used_from(self.began_s + 60 * minute) for minute in range(MINUTES)]

    @property
    def used_again(self) -> float:
        """How much was in the minute that begins ten seconds after the loss."""
        return self.used_from(self.back_s + 10)

    def used_from(self, begin_s: float) -> float:
        """How much was in the minute that begins then."""
        return used_tokens(self.emulator, begin_s, begin_s + 60) / TOKENS

    @property
    def slow(self) -> str:
        """That less was used than had to be, if so: a machine that stands still for seconds uses nothing."""
        enough = min(self.used[1:]) >= self.least and self.used_again >= AFTERWARDS
        return "" if enough else f"{' '.join(f'{part:.1%}' for part in self.used)}, {self.used_again:.1%} after it"


@dataclass(frozen=True)
class Volleys:
    """What callers got who came all at once, and again a minute later."""

    answers: Sequence[Answer]

    @property
    def passed(self) -> Sequence[int]:
        """How many tokens were let in, each time."""
        return [sum(answer.tokens for answer in half) for half in (self.answers[:50], self.answers[50:])]

    @property
    def slow(self) -> str:
        """That it was less than one more text would have fitted into, if so."""
        return "" if min(self.passed) >= 50 else f"{self.passed} tokens"


async def take_place(loss: Loss, on: Stage) -> Course:
    """Three times the demand for some minutes; in the second of them Redis loses what it knew."""
    callers = Callers(on.urls, sized_texts(loss.__name__, 2000, seed=7), per_second=DEMAND_PER_S)
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(callers.run(60.0 * MINUTES + 2))
        await asyncio.sleep(LOSS_S)
        await loss(on)
        back_s = time.monotonic()
    return Course(on.emulator, callers.answers, began_s, back_s, BEFORE if loss is nothing else 0.0)


async def volleys(on: Stage) -> Volleys:
    """Fifty requests at one moment, and fifty more when all is free again."""
    answers = []
    await Callers(on.urls, small_texts("warm"), per_second=20).run(1.0)
    async with session() as http:
        for volley in range(2):
            await asyncio.sleep(61.0)
            texts = [
                f"{volley} {number}" + " word" * (size - 4)
                for number, size in enumerate(itertools.islice(itertools.cycle((58, 80, 175)), 50))
            ]
            answers += await asyncio.gather(
                *(ask(http, on.urls[number % 3], text, api_key="small") for number, text in enumerate(texts))
            )
    return Volleys(answers)


# ── side by side ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def course(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresProcess
) -> Callable[[str], Course | Volleys]:  # fmt: skip
    """What came of everything; it takes place in the same minutes, since it leaves the machine idle."""

    async def lost(loss: Loss, hundredths: int) -> Course:
        judge = Judge(REQUESTS * hundredths // 100, TOKENS * hundredths // 100)
        quota, off = per_minute(REQUESTS, TOKENS), "[cache]\nmemory_bytes = 0"
        path = tmp_path_factory.mktemp("quota") / loss.__name__
        async with stage(path, postgres.new_database(), judge, quota, more=off) as on:
            return await take_place(loss, on)

    async def burst() -> Volleys:
        small = "[tenants.small]\napi_key = 'small'\ntokens_per_minute = 100"
        path = tmp_path_factory.mktemp("quota") / "volleys"
        async with stage(path, postgres.new_database(), Judge(), more=small) as on:
            return await volleys(on)

    works: dict[str, Callable[[], Coroutine[object, object, Course | Volleys]]] = {
        loss.__name__: partial(lost, loss, hundredths) for loss, hundredths in LOSSES.items()
    }
    return await side_by_side({**works, "volleys": burst}, slow=lambda seen: seen.slow)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_quota_is_used_and_not_broken(course: Callable[[str], Course], loss: Loss) -> None:
    """Three times the demand for three minutes: no 429, and nearly all of it used in every minute but the first."""
    seen = course(loss.__name__)
    arrivals = [*seen.emulator.arrivals]
    tokens = most_in_a_minute(arrivals, lambda arrival: arrival.tokens)
    requests = most_in_a_minute(arrivals, lambda _: 1)
    print(
        f"\n{loss.__name__}: minutes used to {' '.join(f'{part:.1%}' for part in seen.used)}, {seen.used_again:.1%} in "
        f"the one that began 10 s after; at most {tokens} tokens and {requests} requests in any 60 s, "
        f"{seen.emulator.judge.refusals} refused"
    )
    assert seen.emulator.judge.refusals == 0
    assert all(answer.right for answer in seen.answers if answer.status == 200)
    assert {answer.status for answer in seen.answers} <= {200, 503, 504}
    assert seen.used_again >= AFTERWARDS
    assert min(seen.used[1:]) >= seen.least
    assert loss is nothing or tokens <= 1.01 * TOKENS


def test_no_burst_gets_through(course: Callable[[str], Volleys]) -> None:
    """T2: a hundred tokens a minute are just that for fifty requests at three replicas, and again a minute later."""
    seen = course("volleys")
    spread_s = max(answer.began_s for answer in seen.answers[:50]) - seen.answers[0].began_s
    first, second = seen.passed
    print(f"\n{first} tokens passed within {spread_s * 1000:.0f} ms, {second} a minute later, of 100 each")
    assert all(50 <= tokens <= 100 for tokens in seen.passed)
    assert all(answer.as_it_should_be for answer in seen.answers)


async def large_s(http: aiohttp.ClientSession, url: str, name: str) -> float:
    """How long 150 texts of 2,000 tokens take, which nobody asked for before."""
    texts = [f"{time.monotonic_ns()} {number}" + " the" * 1980 for number in range(150)]
    body = io.BytesIO(orjson.dumps({"model": name, "input": texts, "encoding_format": "base64"}))
    headers = {"authorization": f"Bearer {key(0)}", "content-type": "application/json"}
    started_s = time.perf_counter()
    async with http.post(f"{url}/v1/embeddings", data=body, headers=headers) as answer:
        assert (await answer.json())["usage"]["total_tokens"] > 295_000
    return time.perf_counter() - started_s


async def test_a_large_request_is_not_slowed(tmp_path: Path, postgres: PostgresProcess, valkey: ValkeyProcess) -> None:
    """300,000 tokens on an idle deployment of a million a minute take as long as on one without limits."""
    quotas = {"limited": per_minute(0, 1_000_000), "free": ""}
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(server(*upstream(50), cores=[]))
        served = [deployment(name, f"http://127.0.0.1:{stand_in.port}/v1", quota) for name, quota in quotas.items()]
        served += [f"[models.{name}]\ndeployments = ['{name}']\ncanary_interval_s = 0" for name in quotas]
        stores = {"redis_url": valkey.url, "database_url": postgres.new_database()}
        async with replicas(tmp_path / "large", "\n".join(served), **stores, count=1) as (url,), session() as http:
            await asyncio.sleep(30.0)  # a new limiter's quota is earned first: by now half a million is free
            took_s = {name: await large_s(http, url, name) for name in ("free", "limited", "free")}
        bill = (await read(stand_in, "/bill")).json()
    calls = await calls_in(stores["database_url"])
    print(f"\n300,000 tokens: {took_s['limited']:.2f} s, without limits {took_s['free']:.2f} s; bill: {bill}")
    assert (len(calls), sum(call.tokens for call in calls)) == (bill["requests"], bill["tokens"])
    assert took_s["limited"] <= 1.05 * took_s["free"] + 0.2
