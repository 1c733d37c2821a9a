"""What the cache's level in SQL promises on both kinds of database, and what is told of invalidations."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import select, update

from app.domain import Space
from app.storage.level import Epoch, LevelDown
from app.storage.sql.cache import SqlLevel
from app.storage.sql.database import Database
from app.storage.sql.epochs import SqlEpochs
from app.storage.sql.leases import take
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import cache, now_s, today
from tests.contract.stored import SOON_S, change, scalars
from tests.identity import identifying_vector

SMALL, LARGE = Space("m", 8), Space("m", 16)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated one of each kind."""
    async with Database(database_url) as opened:
        await migrate(opened)
        yield opened


def entries(count: int, space: Space = SMALL, *, first: int = 0) -> list[tuple[bytes, bytes]]:
    """Keys, and values that only they have."""
    numbers = range(first, first + count)
    values = (identifying_vector(str(number), "m", space.dimensions).tobytes() for number in numbers)
    return [(number.to_bytes(32, "big"), value) for number, value in zip(numbers, values, strict=True)]


async def test_each_key_brings_back_its_own_value(database: Database) -> None:
    """Bit for bit, for one key, for none, for more than a piece, repeated and unknown ones."""
    level, kept = SqlLevel(database, within_s=SOON_S), entries(600)
    await level.write(SMALL, kept)
    keys = [key for key, _ in kept]
    assert await level.read(SMALL, [*keys, b"?" * 32, keys[0]]) == dict(kept)
    assert await level.read(SMALL, keys[7:8]) == dict(kept[7:8])
    assert await level.read(SMALL, []) == {}


async def test_the_last_value_written_under_a_key_counts(database: Database) -> None:
    """Also within one write."""
    level, ((key, first), (_, second), (_, third)) = SqlLevel(database, within_s=SOON_S), entries(3)
    await level.write(SMALL, [(key, first)])
    await level.write(SMALL, [(key, second), (key, third)])
    assert await level.read(SMALL, [key]) == {key: third}
    assert (await level.stats()).entries == 1


async def test_what_is_deleted_is_gone(database: Database) -> None:
    """And nothing else; keys that are not there do not matter."""
    level, kept = SqlLevel(database, within_s=SOON_S), entries(3)
    await level.write(SMALL, kept)
    await level.delete(SMALL, [kept[0][0], kept[2][0], b"?" * 32])
    await level.delete(SMALL, [])
    assert await level.read(SMALL, [key for key, _ in kept]) == dict(kept[1:2])


async def test_replicas_that_write_the_same_at_once_do_not_hinder_each_other(database: Database) -> None:
    """Many keys in opposite orders, with reads, last uses and deletions in between."""
    level, kept = SqlLevel(database, within_s=SOON_S), entries(200)
    keys = [key for key, _ in kept]
    await level.write(SMALL, kept)
    await change(database, update(cache).values(used_on_day=today - 1))
    async with asyncio.TaskGroup() as group:
        for turn in range(8):
            group.create_task(level.write(SMALL, kept[:: 1 if turn % 2 else -1]))
            group.create_task(level.read(SMALL, keys))
            group.create_task(level.delete(SMALL, keys[turn * 10 : turn * 10 + 10][::-1]))
    await level.write(SMALL, kept)
    assert await level.read(SMALL, keys) == dict(kept)


async def test_the_last_use_is_written_once_a_day(database: Database) -> None:
    """With the next write; a second read of the day writes nothing."""
    level, kept = SqlLevel(database, within_s=SOON_S), entries(2)
    await level.write(SMALL, kept)
    await change(database, update(cache).values(used_on_day=today - 3))
    await level.read(SMALL, [kept[0][0]])
    age = select(today - cache.c.used_on_day).order_by(cache.c.key)
    assert await scalars(database, age) == [3, 3]
    await level.write(SMALL, [])
    assert await scalars(database, age) == [0, 3]
    await level.read(SMALL, [kept[0][0]])
    await change(database, update(cache).values(used_on_day=today - 1))
    await level.write(SMALL, [])
    assert await scalars(database, age) == [1, 1]


async def test_what_is_too_old_is_swept(database: Database) -> None:
    """By when it was made, however often it was used."""
    level, kept = SqlLevel(database, max_age_days=7, within_s=SOON_S), entries(3)
    await level.write(SMALL, kept)
    old = update(cache).where(cache.c.key == kept[1][0]).values(made_at_s=now_s - 7 * 86_400 - 10)
    young = update(cache).where(cache.c.key == kept[2][0]).values(made_at_s=now_s - 7 * 86_400 + 600)
    await change(database, old)
    await change(database, young)
    assert await level.sweep() == 1
    assert await level.read(SMALL, [key for key, _ in kept]) == dict([kept[0], kept[2]])


async def test_what_is_too_much_is_swept_the_least_recently_used_first(database: Database) -> None:
    """A use that no write has taken along yet counts, too; and no more goes than must."""
    unbounded, kept = SqlLevel(database, within_s=SOON_S), entries(2500)
    await unbounded.write(SMALL, kept)
    one_bytes = (await unbounded.stats()).used_bytes // 2500
    await change(database, update(cache).values(used_on_day=today - 2))
    await change(database, update(cache).where(cache.c.key >= kept[2000][0]).values(used_on_day=today - 5))
    level = SqlLevel(database, max_bytes=1000 * one_bytes, within_s=SOON_S)
    used = [key for key, _ in kept[2100:2200]]
    await level.read(SMALL, used)
    assert await level.sweep() == 1500
    stats = await level.stats()
    assert (stats.entries, stats.used_bytes, stats.max_bytes) == (1000, 1000 * one_bytes, 1000 * one_bytes)
    left = await scalars(database, select(cache.c.key).where(cache.c.key >= kept[2000][0]).order_by(cache.c.key))
    assert left == used
    assert await level.sweep() == 0


async def test_one_replica_of_all_sweeps(database: Database) -> None:
    """The others leave it to whoever has begun."""
    level = SqlLevel(database, max_bytes=1, within_s=SOON_S)
    await level.write(SMALL, entries(5))
    assert await database.write(lambda c: take(c, "cache.sweep", 60), within_s=SOON_S)
    assert await level.sweep() == 0
    assert (await level.stats()).entries == 5


async def test_what_was_invalidated_is_forgotten(database: Database) -> None:
    """Of some spaces, of before some time, or all of it."""
    level = SqlLevel(database, within_s=SOON_S)
    await level.write(SMALL, entries(1200))
    await level.write(LARGE, entries(10, LARGE, first=2000))
    await change(database, update(cache).where(cache.c.key < entries(1, first=100)[0][0]).values(made_at_s=500))
    assert await level.forget([]) == 0
    assert await level.forget([LARGE.id], made_before_s=1000) == 0
    assert await level.forget(made_before_s=501) == 100
    assert await level.forget([SMALL.id]) == 1100
    assert (await level.stats()).entries == 10
    assert await level.forget() == 10


async def test_what_was_invalidated_is_known_to_all(database: Database) -> None:
    """Numbers only grow, each raise counts, and a time never goes back."""
    epochs, others = SqlEpochs(database), SqlEpochs(database)
    assert await epochs.read() == {}
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(epochs.raise_epoch(["a", "*"]))
            group.create_task(others.raise_epoch(["*", "a"]))
    await epochs.raise_not_before("a", 700)
    await others.raise_not_before("a", 500)
    await others.raise_not_before("b", 300)
    await others.raise_epoch([])
    expected = {"*": Epoch(10, 0), "a": Epoch(10, 700), "b": Epoch(0, 300)}
    assert await epochs.read() == expected == await others.read()


async def test_a_database_that_is_closed_fails_at_once(database_url: str) -> None:
    """Whatever is asked of it, and always with the error that the cache knows."""
    async with Database(database_url) as database:
        await migrate(database)
    level, epochs = SqlLevel(database, max_bytes=1), SqlEpochs(database)
    asked: list[Callable[[], Any]] = [
        lambda: level.read(SMALL, [b"k"]), lambda: level.write(SMALL, entries(1)), lambda: level.delete(SMALL, [b"k"]),
        level.stats, level.sweep, level.forget, epochs.read, lambda: epochs.raise_epoch(["*"]),
        lambda: epochs.raise_not_before("*", 1),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(LevelDown):
            await ask()
