"""What every `Cache` promises, in memory so far: bounded, and never another text's vector."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Vector
from app.ports import Cache
from app.storage.cache import MemoryCache
from tests.identity import identifying_vector

MakeCache = Callable[[int], Cache]


@pytest.fixture(params=["memory"])
def make_cache(request: pytest.FixtureRequest) -> MakeCache:
    """Every implementation of the port, bounded by bytes."""
    return {"memory": MemoryCache}[request.param]


def entry(name: str, dimensions: int = 8) -> tuple[bytes, Vector]:
    """The one entry that only `name` has."""
    return name.encode(), Vector(identifying_vector(name, "m", dimensions).tobytes(), len(name))


async def test_each_key_gets_its_own_vector_in_the_order_asked(make_cache: MakeCache) -> None:
    """Hits, misses and repeated keys keep their places."""
    cache, (a, of_a), (b, of_b) = make_cache(10**6), entry("a"), entry("b")
    cache.put_many([(a, of_a), (b, of_b)])
    assert await cache.get_many([b, b"?", a, b]) == [of_b, None, of_a, of_b]
    assert await cache.get_many([]) == []


async def test_the_last_vector_put_under_a_key_is_kept(make_cache: MakeCache) -> None:
    """A second put replaces the first."""
    cache, (key, first), (_, second) = make_cache(10**6), entry("a"), entry("b")
    cache.put_many([(key, first)])
    cache.put_many([(key, second)])
    assert await cache.get_many([key]) == [second]


async def test_what_does_not_fit_is_dropped_without_an_error(make_cache: MakeCache) -> None:
    """An entry larger than the whole cache leaves the others alone, but not an older vector under its key."""
    cache, small, large = make_cache(3000), entry("a"), entry("b", 1000)
    cache.put_many([small, (large[0], small[1])])
    cache.put_many([large])
    assert await cache.get_many([small[0], large[0]]) == [small[1], None]


async def test_a_cache_of_no_bytes_keeps_nothing(make_cache: MakeCache) -> None:
    """Zero switches it off."""
    cache, one = make_cache(0), entry("a")
    cache.put_many([one])
    assert await cache.get_many([one[0]]) == [None]


async def test_the_least_recently_used_is_forgotten_first() -> None:
    """Asking for an entry keeps it."""
    names = [entry(name) for name in "abcd"]
    cache = MemoryCache(3 * (1 + 32 + 512))
    cache.put_many(names[:3])
    await cache.get_many([b"a"])
    cache.put_many(names[3:])
    assert [found is not None for found in await cache.get_many([b"a", b"b", b"c", b"d"])] == [True, False, True, True]


@given(
    max_bytes=st.integers(0, 20_000),
    puts=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([1, 8, 384, 3000])), max_size=40),
)
def test_nothing_comes_back_that_was_not_put_and_the_bytes_stay_bounded(
    max_bytes: int, puts: list[tuple[str, int]]
) -> None:
    """Whatever is put in whatever order: a key's answer is the last vector put under it, or a miss."""

    async def check_after_each_put() -> None:
        cache, last = MemoryCache(max_bytes), dict[bytes, Vector]()
        for name, dimensions in puts:
            key, vector = entry(name, dimensions)
            cache.put_many([(key, vector)])
            last[key] = vector
            stranger, *found = await cache.get_many([b"stranger", *last])
            held = [got for got in found if got is not None]
            stats = cache.stats()
            assert stranger is None
            assert all(got is None or got == want for got, want in zip(found, last.values(), strict=True))
            assert stats.entries == len(held)
            assert sum(len(got.data) for got in held) <= stats.used_bytes <= stats.max_bytes == max_bytes

    asyncio.run(check_after_each_put())
