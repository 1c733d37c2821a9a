"""A cache of several levels: each is used for what it is good for, and none can hold a request up or lie to it."""

import asyncio
from dataclasses import replace
from hashlib import blake2b

import pytest

from app.domain import Space
from app.storage.level import Epoch
from app.storage.sealing import Sealer
from tests.levels import (
    BUDGET_S,
    SECRET,
    SPACE,
    WIDE,
    DictEpochs,
    DictLevel,
    Seen,
    cache,
    entries,
    entry,
    fill,
    poisons,
    timed,
)

virtual_time = pytest.mark.looptime


# ── who is asked, who is told ───────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_is_awaited_while_all_is_in_memory() -> None:
    """A hit is as quick as without any level below."""
    async with cache(DictLevel()) as tiers:
        key, vector = entry("a")
        tiers.put_many(SPACE, [(key, vector)])
        asking = tiers.get_many(SPACE, [key, key])
        with pytest.raises(StopIteration) as found:
            asking.send(None)
        assert found.value.value == [vector, vector]


@virtual_time
async def test_only_what_a_level_misses_is_asked_for_further_down_and_found_things_move_up() -> None:
    """Per text: one in memory, one in each level, one nowhere; the next time all are in memory and above."""
    near, far, kept = DictLevel("redis"), DictLevel("sql"), entries(["memory", "near", "far"])
    in_memory, in_near, in_far = kept
    await fill(near, {in_near: kept[in_near]})
    await fill(far, {in_far: kept[in_far]})
    async with cache(near, far) as tiers:
        tiers.put_many(SPACE, [(in_memory, kept[in_memory])])
        asked = [in_far, b"?" * 32, in_memory, in_near, in_far]
        found = await tiers.get_many(SPACE, asked)
        assert found == [kept.get(key) for key in asked]
        assert near.asked == [[in_far, b"?" * 32, in_near]]
        assert far.asked == [[in_far, b"?" * 32]]
        assert await tiers.get_many(SPACE, [*kept]) == [*kept.values()]
        assert len(near.asked) == len(far.asked) == 1
    assert near.values.keys() == kept.keys()
    assert near.values[in_far] == far.values[in_far]
    assert far.values.keys() == {in_memory, in_far}


@virtual_time
async def test_what_is_put_reaches_every_level_in_bulk() -> None:
    """In pieces of 256 at most, whoever put it; the last vector for a key."""
    level, kept = DictLevel(), entries([str(number) for number in range(300)])
    async with cache(level) as tiers:
        for item in kept.items():
            tiers.put_many(SPACE, [(item[0], entry("older")[1])])
            tiers.put_many(SPACE, [item])
    assert [len(written) for written in level.written] == [256, 44]
    assert Sealer(SECRET).open_many(level.values, SPACE) == kept


@virtual_time
async def test_spaces_do_not_mix_in_bulk() -> None:
    """Each level is told of which Space it gets what."""
    level, narrow, wide = DictLevel(), entries(["a", "b"]), entries(["c"], WIDE)
    async with cache(level) as tiers:
        tiers.put_many(SPACE, narrow.items())
        tiers.put_many(WIDE, wide.items())
    assert sorted(map(len, level.written)) == [1, 2]


@virtual_time
async def test_what_was_bought_meanwhile_is_not_missing() -> None:
    """A vector that lands while the levels are asked for it is found, so that nobody buys it again."""
    level, (key, vector) = DictLevel(), entry("a")
    level.slow_s = 0.04
    async with cache(level) as tiers:
        asking = asyncio.ensure_future(tiers.get_many(SPACE, [key]))
        await asyncio.sleep(0.02)
        tiers.put_many(SPACE, [(key, vector)])
        assert await asking == [vector]


def versions() -> list[Space]:
    """One space, and what becomes of it when anything that matters changes."""
    return [
        SPACE, replace(SPACE, revision="2"), replace(SPACE, dimensions=16), replace(SPACE, normalised=False),
        replace(SPACE, pooling="cls"), replace(SPACE, prompt="query: "),
    ]  # fmt: skip


@virtual_time
async def test_a_changed_model_never_finds_what_the_old_one_made() -> None:
    """Another revision, width, normalisation, pooling or prompt is another key; no stale answers."""
    level = DictLevel()
    async with cache(level) as old:
        key = blake2b(SPACE.id.encode() + old.base(SPACE) + b"a", digest_size=32).digest()
        old.put_many(SPACE, [(key, entry("a")[1])])
    async with cache(level) as new:
        keys = [blake2b(space.id.encode() + new.base(space) + b"a", digest_size=32).digest() for space in versions()]
        found = [await new.get_many(space, [key]) for space, key in zip(versions(), keys, strict=True)]
    assert found == [[entry("a")[1]], [None], [None], [None], [None], [None]]


# ── absent, slow, wrong ─────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_slow_level_is_waited_for_three_times_and_then_left_alone() -> None:
    """Each time for its budget; then one try a second that nobody waits for, until one is quick enough."""
    near, far, kept, seen = DictLevel("redis"), DictLevel("sql"), entries([str(n) for n in range(20)]), Seen()
    await fill(far, kept)
    near.slow_s = 0.08
    async with cache(near, far, seen=seen) as tiers:
        took = [(await timed(tiers.get_many(SPACE, [key])))[1] for key in [*kept][:6]]
        assert took == pytest.approx([BUDGET_S] * 3 + [0.0] * 3)
        assert len(near.asked) == 3
        await asyncio.sleep(1.0)
        for key in [*kept][6:9]:
            found, seconds = await timed(tiers.get_many(SPACE, [key]))
            assert (found, seconds) == ([kept[key]], 0.0)
        await asyncio.sleep(0.1)
        assert len(near.asked) == 4
        near.slow_s = 0.0
        await asyncio.sleep(1.0)
        for key in [*kept][9:12]:
            await tiers.get_many(SPACE, [key])
            await asyncio.sleep(0.01)
        assert len(near.asked) == 7
    assert seen.changes == [("redis", False, "slow"), ("redis", True, "answered")]


@virtual_time
async def test_who_has_time_waits_for_a_slow_level() -> None:
    """For seconds, and whatever those think of it who have none; for one that is down nobody waits."""
    level, kept = DictLevel(), entries([str(n) for n in range(9)])
    await fill(level, kept)
    level.slow_s = 2.0
    async with cache(level) as tiers:
        for key in [*kept][:4]:
            assert await tiers.get_many(SPACE, [key]) == [None]
        asked = [*kept][4:6]
        found, seconds = await timed(tiers.get_many(SPACE, asked, patient=True))
        assert (found, seconds) == ([kept[key] for key in asked], 2.0)
        assert (await timed(tiers.get_many(SPACE, [[*kept][6]])))[1] == 0.0
        level.slow_s, level.down = 0.0, True
        for key in [*kept][6:]:
            assert await timed(tiers.get_many(SPACE, [key], patient=True)) == ([None], 0.0)
        assert len(level.asked) == 3 + 1 + 1 + 3  # in a hurry, patient, a look at whether it is back, patient


@virtual_time
@pytest.mark.parametrize("fault", ["down", "bug"])
async def test_a_level_that_fails_is_skipped(fault: str) -> None:
    """Errors of the store and bugs of ours alike: the request goes on further down, and bugs are counted."""
    near, far, kept, seen = DictLevel("redis"), DictLevel("sql"), entries(["a"]), Seen()
    await fill(far, kept)
    near.down, near.bug = fault == "down", RuntimeError("a bug") if fault == "bug" else None
    async with cache(near, far, seen=seen) as tiers:
        assert await tiers.get_many(SPACE, [*kept, b"?" * 32]) == [*kept.values(), None]
        await asyncio.sleep(0)
    assert set(seen.crashes) == ({"cache read", "cache writes"} if fault == "bug" else set())
    assert seen.dropped["redis", "down"] == 1


@virtual_time
async def test_each_level_says_how_full_it_is_or_that_it_cannot() -> None:
    """By name, nearest first."""
    near, far = DictLevel("redis"), DictLevel("sql")
    await fill(far, entries(["a", "b"]))
    near.down = True
    async with cache(near, far) as tiers:
        await tiers.get_many(SPACE, [entry("a")[0]])
        stats = await tiers.stats()
    assert [*stats] == ["memory", "redis", "sql"]
    assert [level and level.entries for level in stats.values()] == [1, None, 2]


@virtual_time
async def test_a_level_that_fails_to_write_works_again_afterwards() -> None:
    """What was to be written meanwhile is dropped and counted, never kept waiting."""
    level, seen = DictLevel(), Seen()
    async with cache(level, seen=seen) as tiers:
        level.down = True
        tiers.put_many(SPACE, [entry("lost")])
        await asyncio.sleep(0.2)
        tiers.put_many(SPACE, [entry("lost at once"), entry("too")])
        assert seen.dropped == {("sql", "down"): 3}
        level.down = False
        await asyncio.sleep(1.0)
        tiers.put_many(SPACE, [entry("kept")])
    assert level.values.keys() == {entry("kept")[0]}


@virtual_time
async def test_what_waits_to_be_written_is_bounded_in_bytes() -> None:
    """While the level is busy with earlier values; what finds no room is dropped and counted."""
    level, seen = DictLevel(), Seen()
    level.slow_s = 0.5
    async with cache(level, seen=seen, most_waiting_bytes=10_000) as tiers:
        for number in range(100):
            tiers.put_many(SPACE, [entry(str(number))])
        assert seen.dropped["sql", "full"] == 100 - 10_000 // (32 + 512)
        await asyncio.sleep(1.0)
        tiers.put_many(SPACE, [entry("there is room again")])
    assert entry("there is room again")[0] in level.values


@virtual_time
async def test_closing_writes_what_waits_but_not_for_ever() -> None:
    """Two seconds at most, however long the level takes; nothing is left behind."""
    level, tasks = DictLevel(), asyncio.all_tasks()

    async def put_and_close() -> None:
        async with cache(level) as tiers:
            tiers.put_many(SPACE, [entry("a")])

    level.slow_s = 1.0
    assert (await timed(put_and_close()))[1] == pytest.approx(1.0)
    assert level.values.keys() == {entry("a")[0]}
    level.slow_s = 1000.0
    assert (await timed(put_and_close()))[1] == pytest.approx(2.0)
    assert asyncio.all_tasks() == tasks


@virtual_time
async def test_callers_that_leave_cancel_nothing_and_leave_nothing_behind() -> None:
    """What they asked of a store is answered, in a task of the cache; a moment later it has none of it any more."""
    level, kept = DictLevel(), entries([str(number) for number in range(100)])
    await fill(level, kept)
    level.slow_s = 0.03
    async with cache(level) as tiers:
        await asyncio.sleep(0)
        tasks = asyncio.all_tasks()
        asking = [asyncio.ensure_future(tiers.get_many(SPACE, [key])) for key in kept]
        await asyncio.sleep(0.01)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        assert len(asyncio.all_tasks()) == len(tasks) + 100
        await asyncio.sleep(0.03)
        assert asyncio.all_tasks() == tasks
        assert (await timed(tiers.get_many(SPACE, [*kept])))[0] == [*kept.values()]


@virtual_time
@pytest.mark.parametrize("poison", poisons())
@pytest.mark.parametrize("where", ["redis", "sql"])
async def test_poison_is_a_miss_is_counted_and_is_deleted(poison: str, where: str) -> None:
    """In whichever level; its neighbours are found, and a sound vector further down takes its place."""
    (key, vector), kept, seen = entry("poisoned"), entries(["neighbour", "poisoned"]), Seen()
    levels = {"redis": DictLevel("redis"), "sql": DictLevel("sql")}
    for level in levels.values():
        await fill(level, kept)
    levels[where].values[key] = poisons()[poison]
    if where == "sql":
        levels["redis"].values.clear()
    sound = vector if where == "redis" else None
    async with cache(*levels.values(), seen=seen) as tiers:
        assert await tiers.get_many(SPACE, [*kept]) == [kept[entry("neighbour")[0]], sound]
        assert seen.rejected == {where: 1}
    assert where == "redis" or key not in levels["sql"].values
    assert Sealer(SECRET).open_many(levels["redis"].values, SPACE).keys() == levels["redis"].values.keys()


# ── invalidation ────────────────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_an_invalidated_space_is_out_of_reach_in_every_process_within_five_seconds() -> None:
    """Its keys are made with another base from then on; those of other spaces stay."""
    level, epochs = DictLevel(), DictEpochs()
    async with cache(level, epochs=epochs) as one, cache(level, epochs=epochs) as other:
        before, before_wide = one.base(SPACE), one.base(WIDE)
        assert (before, before_wide) == (other.base(SPACE), other.base(WIDE))
        epochs.epochs[SPACE.id] = Epoch(1)
        await one.refresh()
        assert one.base(SPACE) != before
        await asyncio.sleep(5.0)
        assert one.base(SPACE) == other.base(SPACE) != before
        assert one.base(WIDE) == other.base(WIDE) == before_wide
        epochs.epochs["*"] = Epoch(1)
        await asyncio.sleep(5.0)
        assert one.base(WIDE) == other.base(WIDE) != before_wide


@virtual_time
async def test_what_was_made_too_long_ago_is_no_longer_found() -> None:
    """In memory, in any level, in any process; it is deleted there, and no poison."""
    near, far, epochs, seen = DictLevel("redis"), DictLevel("sql"), DictEpochs(), Seen()
    old, new = entry("old"), entry("new")
    async with cache(near, far, epochs=epochs, made_at_s=1000) as process, cache(far, made_at_s=2000) as later:
        process.put_many(SPACE, [old])
        later.put_many(SPACE, [new])
        await asyncio.sleep(0.2)
        assert await process.get_many(SPACE, [old[0], new[0]]) == [old[1], new[1]]
        epochs.epochs[SPACE.id] = Epoch(0, not_before_s=1500)
        await asyncio.sleep(5.0)
        assert await process.get_many(SPACE, [old[0], new[0]]) == [None, new[1]]
    async with cache(near, far, epochs=epochs, seen=seen) as process:
        assert await process.get_many(SPACE, [old[0], new[0]]) == [None, new[1]]
    assert near.values.keys() == far.values.keys() == {new[0]}
    assert not seen.rejected


@virtual_time
async def test_nothing_shared_is_used_before_it_is_known_what_was_invalidated() -> None:
    """A process that starts while that cannot be read has a base of its own and works in memory alone."""
    level, epochs, (key, vector) = DictLevel(), DictEpochs(), entry("a")
    await fill(level, entries(["b"]))
    epochs.down = True
    async with cache(level, epochs=epochs) as one, cache(level, epochs=epochs) as other:
        assert one.base(SPACE) != other.base(SPACE)
        one.put_many(SPACE, [(key, vector)])
        assert await one.get_many(SPACE, [key, entry("b")[0]]) == [vector, None]
        assert level.asked == []
        epochs.down = False
        await asyncio.sleep(5.0)
        base = one.base(SPACE)
        assert base == other.base(SPACE)
        assert await one.get_many(SPACE, [key, entry("b")[0]]) == [None, entry("b")[1]]
        epochs.down = True
        await asyncio.sleep(5.0)
        assert one.base(SPACE) == base
    assert level.values.keys() == {entry("b")[0]}


@virtual_time
async def test_an_older_reading_that_comes_late_takes_nothing_back() -> None:
    """What was once invalidated stays so."""
    epochs = DictEpochs()
    epochs.epochs[SPACE.id] = Epoch(2, 1500)
    async with cache(DictLevel(), epochs=epochs) as tiers:
        base = tiers.base(SPACE)
        epochs.epochs[SPACE.id] = Epoch(1, 1000)
        await tiers.refresh()
        assert tiers.base(SPACE) == base
