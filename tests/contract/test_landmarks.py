"""What every `Landmarks` promises, over a database of each kind that replicas share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from sqlalchemy import update

from app.ports import Landmarks
from app.storage.sql.database import Database
from app.storage.sql.landmarks import SqlLandmarks
from app.storage.sql.migrations import migrate
from app.storage.sql.tables import landmarks, leases, now_ms
from app.vectors import Matrix
from tests.contract.stored import change
from tests.identity import identifying_vectors

Replica = Callable[[], Landmarks]


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """One of each kind."""
    async with Database(database_url) as opened:
        await migrate(opened)
        yield opened


@pytest.fixture
def replica(database: Database) -> Replica:
    """Makes another replica's."""
    return lambda: SqlLandmarks(database)


def sung(model: str) -> Matrix:
    """What only `model` sings."""
    return identifying_vectors(["a", "b", "c"], model, 8)


async def test_what_one_replica_accepts_all_compare_with(replica: Replica) -> None:
    """Bit for bit, by place, and a later one takes the place of the first."""
    one, other = replica(), replica()
    assert await one.vectors("p") is None
    await one.accept("p", sung("m"))
    await one.accept("q", sung("n"))
    for each in (one, other):
        found = await each.vectors("p")
        assert found is not None
        np.testing.assert_array_equal(found, sung("m"))
    await other.accept("p", sung("later"))
    np.testing.assert_array_equal(await one.vectors("p"), sung("later"))


async def test_one_of_ten_that_come_at_once_probes(replica: Replica) -> None:
    """And one of each place."""
    replicas = [replica() for _ in range(10)]
    for place in ("p", "q"):
        won = await asyncio.gather(*(each.claim(place, 60.0) for each in replicas))
        assert sum(won) == 1


async def test_a_place_is_free_again_after_the_interval(replica: Replica, database: Database) -> None:
    """By the database's clock; one that went back does not hold it up."""
    one = replica()
    assert await one.claim("p", 60.0)
    for age_ms, free in ((59_000, False), (61_000, True), (-1_000_000, True)):
        moved = update(leases).values(taken_at_ms=now_ms - age_ms)
        await change(database, moved)
        assert await one.claim("p", 60.0) is free


async def test_a_released_place_is_free(replica: Replica) -> None:
    """For whoever asks next; what is released but was never taken does not matter."""
    one, other = replica(), replica()
    assert await one.claim("p", 60.0)
    await other.release("p")
    await other.release("never")
    assert await other.claim("p", 60.0)
    assert not await one.claim("p", 60.0)


async def test_damaged_vectors_count_as_none(replica: Replica, database: Database) -> None:
    """Whoever finds them may accept others."""
    await replica().accept("p", sung("m"))
    damaged = update(landmarks).values(vectors=b"x" * 13)
    await change(database, damaged)
    assert await replica().vectors("p") is None


async def test_without_its_database_a_replica_goes_by_what_it_knows(tmp_path: Path) -> None:
    """No error, no probes, and what it accepts lasts as long as the process."""
    async with Database(f"sqlite:///{tmp_path / 'x.db'}") as database:
        await migrate(database)
        one = SqlLandmarks(database)
        await one.accept("p", sung("m"))
    np.testing.assert_array_equal(await one.vectors("p"), sung("m"))
    assert await one.vectors("q") is None
    await one.accept("q", sung("n"))
    np.testing.assert_array_equal(await one.vectors("q"), sung("n"))
    assert not await one.claim("p", 60.0)
    await one.release("p")
