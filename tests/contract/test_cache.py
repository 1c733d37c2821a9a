"""What every `Cache` promises: each key its own vector or none, and in memory no more bytes than it was given."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Vector
from app.ports import Cache
from app.storage.memory import MemoryCache
from app.storage.sealing import Sealer
from app.storage.tiers import TieredCache
from tests.levels import SPACE, Seen, entries, entry, shared_level


@pytest.fixture(params=["memory", "tiers of memory", "memory, redis", "memory, sqlite", "memory, redis, postgres"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    """Every implementation of the port, with room for all."""
    memory = MemoryCache(1 << 20)
    if request.param == "memory":
        yield memory
        return
    async with AsyncExitStack() as stack:
        kinds = request.param.split(", ")[1:]
        levels = [await stack.enter_async_context(shared_level(kind, request)) for kind in kinds]
        tiers = TieredCache(memory, [(level, 1.0) for level in levels], Sealer(bytes(32)), Seen())
        yield await stack.enter_async_context(tiers)


async def test_each_key_gets_its_own_vector_in_the_order_asked(cache: Cache) -> None:
    """Hits, misses and repeated keys keep their places."""
    (a, of_a), (b, of_b) = entry("a"), entry("b")
    cache.put_many(SPACE, [(a, of_a), (b, of_b)])
    assert await cache.get_many(SPACE, [b, b"?" * 32, a, b, b"?" * 32]) == [of_b, None, of_a, of_b, None]
    assert await cache.get_many(SPACE, []) == []


async def test_the_last_vector_put_under_a_key_is_kept(cache: Cache) -> None:
    """A second put replaces the first."""
    (key, first), (_, second) = entry("a"), entry("b")
    cache.put_many(SPACE, [(key, first)])
    cache.put_many(SPACE, [(key, second)])
    assert await cache.get_many(SPACE, [key]) == [second]


async def test_a_generator_of_entries_is_as_good_as_a_list(cache: Cache) -> None:
    """It is read once."""
    kept = entries(["a", "b"])
    cache.put_many(SPACE, (item for item in kept.items()))
    assert await cache.get_many(SPACE, [*kept]) == [*kept.values()]


async def test_the_base_of_a_space_stays_while_nothing_is_invalidated(cache: Cache) -> None:
    """Else nothing would be found again."""
    assert cache.base(SPACE) == cache.base(SPACE)


# ── in memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_does_not_fit_is_dropped_without_an_error() -> None:
    """An entry larger than the whole cache leaves the others alone, but not an older vector under its key."""
    small, other, large = entry("a"), entry("b"), Vector(bytes(4000), 1)
    cache = MemoryCache(3000)
    cache.put_many(SPACE, [small, other])
    cache.put_many(SPACE, [(other[0], large)])
    assert await cache.get_many(SPACE, [small[0], other[0]]) == [small[1], None]


async def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    """Zero switches it off."""
    cache, one = MemoryCache(0), entry("a")
    cache.put_many(SPACE, [one])
    assert await cache.get_many(SPACE, [one[0]]) == [None]
    assert cache.stats().used_bytes == 0


async def test_what_is_wanted_again_outlives_what_comes_once() -> None:
    """However much passes by."""
    cache, wanted, last = MemoryCache(100_000), entry("wanted"), entry("once 9999")
    cache.put_many(SPACE, [wanted])
    cache.recall([wanted[0], wanted[0]])
    for number in range(10_000):
        cache.put_many(SPACE, [entry(f"once {number}")])
    assert cache.recall([wanted[0], entry("once 0")[0], last[0]]) == [wanted[1], None, last[1]]


async def test_what_comes_back_soon_after_it_was_given_up_is_kept() -> None:
    """Its key is remembered a little longer than its vector."""
    cache, late = MemoryCache(100_000), entry("late")

    def pass_by(start: int, stop: int) -> None:
        cache.put_many(SPACE, entries([f"once {number}" for number in range(start, stop)]).items())

    cache.put_many(SPACE, [late])
    pass_by(0, 300)
    assert cache.recall([late[0]]) == [None]
    cache.put_many(SPACE, [late])
    pass_by(300, 10_000)
    assert cache.recall([late[0]]) == [late[1]]


async def test_a_cleared_cache_is_empty_and_goes_on() -> None:
    """No byte of what was there counts any more."""
    cache, one = MemoryCache(5000), entry("a")
    cache.put_many(SPACE, entries([str(number) for number in range(100)]).items())
    cache.clear()
    assert (cache.stats().entries, cache.stats().used_bytes) == (0, 0)
    cache.put_many(SPACE, [one])
    assert cache.recall([one[0]]) == [one[1]]


@contextmanager
def memory_against_a_model(max_bytes: int) -> Iterator[tuple[MemoryCache, dict[bytes, Vector]]]:
    """A cache and what was last put under each key; on leaving it holds nothing else, and no more than it may."""
    cache, last = MemoryCache(max_bytes), dict[bytes, Vector]()
    yield cache, last
    found = [(got, want) for got, want in zip(cache.recall([*last]), last.values(), strict=True) if got is not None]
    stats = cache.stats()
    assert all(got == want for got, want in found)
    assert stats.entries == len(found)
    assert sum(len(got.data) for got, _ in found) <= stats.used_bytes <= stats.max_bytes == max_bytes
    assert cache.recall([b"stranger"]) == [None]


@given(
    max_bytes=st.integers(0, 20_000),
    steps=st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([1, 8, 384, 3000]), st.integers(0, 4)), max_size=60
    ),
)
def test_nothing_comes_back_that_was_not_put_and_the_bytes_stay_bounded(
    max_bytes: int, steps: list[tuple[str, int, int]]
) -> None:
    """Whatever is put and asked for in whatever order; and what fits is there at least until the next is put."""

    async def check_each_step() -> None:
        with memory_against_a_model(max_bytes) as (cache, last):
            for text, dimensions, times in steps:
                key, vector = text.encode(), Vector(entry(text)[1].data[:4] * dimensions, dimensions)
                cache.put_many(SPACE, [(key, vector)])
                last[key] = vector
                fits = len(vector.data) + 400 <= max_bytes
                asked = await cache.get_many(SPACE, [key] * times)
                assert all(got == vector or (got is None and not fits) for got in asked)
                assert cache.stats().used_bytes <= max_bytes

    asyncio.run(check_each_step())
