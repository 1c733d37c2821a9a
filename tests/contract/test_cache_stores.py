"""A cache over real stores: what lies there, what a round trip holds, and what happens when one freezes or dies."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import redis

from app.storage.level import Level
from app.storage.redis_level import RedisLevel
from app.storage.redis_server import RedisServer
from app.storage.sealing import Sealer
from app.storage.tiers import TieredCache
from tests.levels import (
    BUDGET_S,
    SECRET,
    SPACE,
    WIDE,
    Seen,
    cache,
    entries,
    entry,
    fill,
    level_at,
    poisons,
    shared_level,
    timed,
)
from tests.servers import ServerProcess, ValkeyProcess


async def until(holds: Callable[[], Awaitable[bool]], most_s: float = 5.0) -> None:
    """Returns once it holds."""
    async with asyncio.timeout(most_s):
        while not await holds():  # noqa: ASYNC110 — what another process does cannot be awaited
            await asyncio.sleep(0.005)


@pytest.fixture(params=["redis", "sqlite", "postgres"])
async def level(request: pytest.FixtureRequest) -> AsyncIterator[Level]:
    """Every kind of level, empty."""
    async with shared_level(request.param, request) as one:
        yield one


async def test_what_one_process_put_another_finds(level: Level) -> None:
    """More texts than go at once, in the order asked; what nobody put is missing."""
    kept, wide = entries([str(number) for number in range(600)]), entries(["wide"], WIDE)
    await fill(level, kept)
    await fill(level, wide, WIDE)
    async with cache(level, budget_s=2.0) as other:
        asked = [*reversed(kept), b"?" * 32, *kept]
        assert await other.get_many(SPACE, asked) == [kept.get(key) for key in asked]
        assert await other.get_many(WIDE, [*wide]) == [*wide.values()]


async def test_what_was_put_last_replaces_what_was_there(level: Level) -> None:
    """For a process that finds it in the store."""
    key, other = entry("a")[0], entry("b")[1]
    await fill(level, entries(["a"]))
    await fill(level, {key: other})
    async with cache(level, budget_s=2.0) as tiers:
        assert await tiers.get_many(SPACE, [key]) == [other]


async def test_poison_in_a_store_is_a_miss_and_is_deleted(level: Level) -> None:
    """Whatever lies there."""
    (key, _), seen = entry("poisoned"), Seen()
    for poison in poisons().values():
        await level.write(SPACE, [(key, poison)])
        async with cache(level, seen=seen, budget_s=2.0) as tiers:
            assert await tiers.get_many(SPACE, [key]) == [None]
        assert await level.read(SPACE, [key]) == {}
    assert seen.rejected == {level.name: len(poisons())}


def calls(client: redis.Redis, command: str) -> int:
    """How often a server was sent it."""
    stats = client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})
    return int(stats["calls"])


async def test_256_texts_are_one_round_trip_each_way(redis_url: str) -> None:
    """One MGET finds them; what is written lives as long as it was told to."""
    kept = entries([str(number) for number in range(256)], WIDE)
    with redis.Redis.from_url(redis_url) as client:
        async with level_at("redis", redis_url) as level:
            await fill(level, kept, WIDE)
            client.config_resetstat()
            async with cache(level) as tiers:
                assert await tiers.get_many(WIDE, [*kept]) == [*kept.values()]
                assert calls(client, "mget") == 1
                assert await tiers.get_many(WIDE, [*kept, *entries([str(n) for n in range(256, 600)])])
                assert calls(client, "mget") == 3
            assert (await level.stats()).entries == 256
        lives_s = client.ttl(b"eg:v:" + next(iter(kept)))
        assert isinstance(lives_s, int)
        assert 590 <= lives_s <= 600


async def test_a_cluster_holds_the_same(valkey_cluster: ValkeyProcess) -> None:
    """Found, deleted and counted over all slots."""
    kept = entries([str(number) for number in range(40)])
    async with RedisServer(valkey_cluster.url.replace("redis://", "redis+cluster://")) as server:
        level = RedisLevel(server, ttl_s=600)
        await fill(level, kept)
        first = next(iter(kept))
        assert Sealer(SECRET).open_many(await level.read(SPACE, [*kept, b"?" * 32]), SPACE) == kept
        await level.delete(SPACE, [first])
        assert (await level.read(SPACE, [*kept])).keys() == kept.keys() - {first}
        stats = await level.stats()
        assert stats.entries >= 39
        assert stats.used_bytes > 0
        assert await level.maxmemory_warning(holds_limiter=True) is None


async def ask_for_a_while(tiers: TieredCache, keys: Sequence[bytes]) -> list[float]:
    """How long each of 100 a second had to wait, in order."""
    took = []
    for key in keys:
        took.append((await timed(tiers.get_many(SPACE, [key])))[1])
        await asyncio.sleep(0.01)
    return took


@pytest.mark.parametrize(("kind", "back_within_s"), [("redis", 3.0), ("postgres", 5.0)])
async def test_requests_go_on_while_a_server_is_frozen_and_use_it_soon_after(
    request: pytest.FixtureRequest, kind: str, back_within_s: float
) -> None:
    """A few wait for the budget, nobody after them; writes too are dropped or late; it is soon used again."""
    server: ServerProcess = request.getfixturevalue("own_valkey" if kind == "redis" else "own_postgres")
    kept, seen = entries([str(number) for number in range(200)]), Seen()
    key, vector = entry("there")
    async with level_at(kind, server.url) as level:
        await fill(level, {key: vector})
        async with cache(level, seen=seen) as tiers:
            server.freeze()
            took = await ask_for_a_while(tiers, [*kept][:150])
            tiers.put_many(SPACE, kept.items())
            assert sum(seconds > BUDGET_S / 2 for seconds in took) <= 5
            assert max(took) <= 4 * BUDGET_S
            server.thaw()

            async def found() -> bool:
                return await tiers.get_many(SPACE, [key]) == [vector]

            _, back_s = await timed(until(found, most_s=10.0))
            assert back_s <= back_within_s
        written = (await level.stats()).entries - 1
    assert written + seen.dropped[level.name, "down"] == len(kept)
    assert [up for _, up, _ in seen.changes] == [False, True]


async def test_a_server_that_is_killed_and_comes_back_empty_is_filled_again(own_valkey: ValkeyProcess) -> None:
    """Requests go on without it meanwhile."""
    kept = entries([str(number) for number in range(20)])
    async with level_at("redis", own_valkey.url) as level, cache(level) as tiers, cache(level) as other:
        await fill(level, kept)
        own_valkey.kill()
        assert await tiers.get_many(SPACE, [*kept]) == [None] * len(kept)
        own_valkey.start()

        async def found() -> bool:
            tiers.put_many(SPACE, kept.items())
            return await other.get_many(SPACE, [*kept]) == [*kept.values()]

        await until(found)


@pytest.mark.parametrize(
    ("policy", "alone", "with_limiter"),
    [
        ("noeviction", True, True), ("allkeys-lru", False, True), ("allkeys-lfu", False, True),
        ("allkeys-random", False, True), ("volatile-lru", False, False), ("volatile-lfu", False, False),
        ("volatile-ttl", False, True), ("volatile-random", False, True),
    ],
)  # fmt: skip
async def test_a_policy_that_suits_no_cache_or_no_limiter_is_told(
    valkey: ValkeyProcess, policy: str, alone: bool, with_limiter: bool
) -> None:
    """But only where the server has a bound at all."""
    with redis.Redis.from_url(valkey.url) as client:
        async with RedisServer(valkey.url) as server:
            level = RedisLevel(server, ttl_s=600)
            try:
                client.config_set("maxmemory-policy", policy)
                assert await level.maxmemory_warning(holds_limiter=True) is None
                client.config_set("maxmemory", "100mb")
                told = [await level.maxmemory_warning(holds_limiter=shared) for shared in (False, True)]
            finally:
                client.config_set("maxmemory", "0")
                client.config_set("maxmemory-policy", "noeviction")
    assert [warning is not None and policy in warning for warning in told] == [alone, with_limiter]


async def test_a_full_server_that_evicts_nothing_still_answers(own_valkey: ValkeyProcess) -> None:
    """Writes are dropped; reads go on, and whoever else uses the server does not take it for down."""
    (key, vector), seen = entry("there"), Seen()
    with redis.Redis.from_url(own_valkey.url) as client:
        async with RedisServer(own_valkey.url) as server:
            level = RedisLevel(server, ttl_s=600)
            await fill(level, {key: vector})
            client.config_set("maxmemory", "1mb")
            async with cache(level, seen=seen) as tiers:
                for number in range(5):
                    tiers.put_many(SPACE, [entry(str(number))])
                    await asyncio.sleep(0.01)
                assert await tiers.get_many(SPACE, [key]) == [vector]
            assert server.up
    assert seen.dropped == {("redis", "down"): 5}
