"""What replicas hear of whom the others served: everything, once, and nothing of their own; on a real server."""

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import redis

from app.ports import Served
from app.storage.redis_server import RedisServer
from app.storage.redis_shares import RedisShares
from tests.faults.test_sql_faults import until
from tests.servers import ValkeyProcess
from tests.tcp_proxy import TcpProxy

QUEUE = "queue/DEFAULT"


def served(**tokens: float) -> dict[str, Served]:
    """What one replica says."""
    return {QUEUE: Served(tokens, level=7.0, waiting=True)}


def total(heard: Sequence[dict[str, Served]] | None) -> Counter[str]:
    """All tokens in what was heard, by tenant."""
    assert heard is not None
    tokens: Counter[str] = Counter()
    for news in heard:
        for each in news.values():
            tokens.update(each.tokens)
    return tokens


@asynccontextmanager
async def replicas(url: str, count: int) -> AsyncIterator[list[RedisShares]]:
    """So many, each with connections of its own, that have all begun to listen."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(RedisServer(url, timeout_s=5.0)) for _ in range(count)]
        found = [RedisShares(server, f"r{number}") for number, server in enumerate(servers)]
        for each in found:
            assert await each.exchange({}) == []
        for each in found:
            await each.exchange({})
        yield found


@pytest.mark.parametrize("count", [2, 3])
async def test_everybody_hears_the_others_exactly_once(redis_url: str, count: int) -> None:
    """Whoever speaks in whatever order: each hears all that the others said, as it was said, and nothing of its own."""
    rng, said = random.Random(count), [Counter[str]() for _ in range(count)]
    async with replicas(redis_url, count) as shares:
        heard = [Counter[str]() for _ in range(count)]
        for turn in range(60):
            who = rng.randrange(count)
            news = {f"t{who}": turn, "all": 1} if rng.random() < 0.7 else {}
            heard[who] += total(await shares[who].exchange(served(**news) if news else {}))
            said[who] += Counter(news)
        for who in range(count):
            heard[who] += total(await shares[who].exchange({}))
            assert heard[who] == sum((said[other] for other in range(count) if other != who), Counter[str]())
            assert await shares[who].exchange({}) == []


async def test_news_arrive_as_they_were_told(redis_url: str) -> None:
    """With every queue, level and fraction of a token."""
    news = {QUEUE: Served({"a": 0.1 + 0.2}, 12.5, True), "other/BULK": Served({}, 3.0, False)}
    async with replicas(redis_url, 2) as (one, other):
        await one.exchange(news)
        assert await other.exchange({}) == [news]


async def test_who_comes_late_hears_nothing_old(redis_url: str) -> None:
    """What was served before a replica was there has nothing to do with what it knows."""
    async with replicas(redis_url, 1) as (one,), RedisServer(redis_url) as server:
        await one.exchange(served(a=5))
        late = RedisShares(server, "late")
        assert await late.exchange(served(b=1)) == []
        assert await late.exchange({}) == []
        await one.exchange(served(a=7))
        assert await late.exchange({}) == [served(a=7)]
        assert total(await one.exchange({})) == Counter()


async def test_nothing_is_lost_while_the_server_is_gone(own_valkey: ValkeyProcess) -> None:
    """Meanwhile nobody is told and nothing heard; then all is told, also to a server that lost its memory."""
    async with replicas(own_valkey.url, 2) as (one, other):
        own_valkey.kill()
        assert await one.exchange(served(a=5)) is None
        assert await other.exchange(served(b=2)) is None
        own_valkey.start()
        await until(lambda: one._server.up and other._server.up)
        assert total(await one.exchange(served(a=9))) == Counter()
        assert await other.exchange(served(b=3)) == [served(a=9)]
        assert await one.exchange({}) == [served(b=3)]


async def test_what_was_told_without_a_reply_is_heard_once(valkey: ValkeyProcess) -> None:
    """Nobody can tell whether it arrived, so it is told again, with what came since; the others count the rest."""
    async with (
        TcpProxy(valkey.port) as proxy,
        replicas(valkey.url, 1) as (other,),
        RedisServer(f"redis://127.0.0.1:{proxy.port}") as server,
    ):
        one = RedisShares(server, "one")
        await one.exchange({})
        await other.exchange({})
        proxy.drop_reply(every=1)
        assert await one.exchange(served(a=5)) is None
        assert await other.exchange({}) == [served(a=5)]
        proxy.drop_reply(every=0)
        assert await one.exchange(served(a=8, b=1)) == []
        assert await other.exchange({}) == [served(a=3, b=1)]
        await one.exchange(served(a=4))
        assert await other.exchange({}) == [served(a=4)]


async def test_the_stream_stays_short(redis_url: str) -> None:
    """However long they talk, what is kept is bounded, and goes when nobody talks any more."""
    with redis.Redis.from_url(redis_url) as client:
        async with replicas(redis_url, 2) as (one, other):
            for number in range(1500):
                await one.exchange(served(a=number))
                if number % 400 == 0:
                    await other.exchange({})
        (stream,) = client.keys("*")
        assert 1000 <= client.xlen(stream) <= 1200
        assert 0 < client.ttl(stream) <= 600


async def test_the_living_are_counted(redis_url: str) -> None:
    """Whoever spoke within five seconds of one's own clock, whatever the others' clocks say."""
    now_s = 100.0

    def clock(number: int) -> float:
        return now_s + 3600.0 * number

    async with RedisServer(redis_url) as server:
        found = [RedisShares(server, f"r{number}", clock=partial(clock, number)) for number in range(3)]
        assert [each.replicas for each in found] == [1, 1, 1]
        for each in (*found, *found, *found[:2]):
            await each.exchange({})
        assert [each.replicas for each in found] == [3, 3, 3]
        now_s += 5.0
        for each in (*found[:2], found[0]):
            await each.exchange({})
        assert [each.replicas for each in found[:2]] == [2, 2]
        now_s += 5.0
        assert found[1].replicas == 1
