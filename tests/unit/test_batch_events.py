"""What who follows a batch is told, and when: at once, when it changes, something at least every 15 s, and its end."""

import asyncio
from collections.abc import Mapping

import orjson
import pytest
from msgspec.structs import replace

from app.api.batches import told
from app.job import Job, Order
from app.storage.level import LevelDown

pytestmark = pytest.mark.looptime

BEGUN = Job(Order("batch_1", "t", "", "", "file-1", 86_400, {}), "in_progress", 0, 86_400_000, total=9)
DONE = replace(BEGUN, status="completed", completed=9)


async def followed(
    course: Mapping[float, Job | LevelDown | None], *, drains_at_s: float = 1e9
) -> list[tuple[float, bytes]]:  # fmt: skip
    """When what was told of a job that goes this way: what it is from a second on."""
    clock = asyncio.get_running_loop().time
    started_s = clock()

    async def look() -> Job | None:
        found = [state for since_s, state in course.items() if since_s <= clock() - started_s][-1]
        if isinstance(found, LevelDown):
            raise found
        return found

    events = told(BEGUN, look, over=lambda: clock() - started_s >= drains_at_s)
    return [(round(clock() - started_s, 3), event) async for event in events]


def completed(event: bytes) -> int:
    """How many lines were, by an event."""
    head, data, *end = event.split(b"\n")
    assert (head, data[:6], end) == (b"event: batch", b"data: ", [b"", b""])
    return int(orjson.loads(data[6:])["request_counts"]["completed"])


async def test_every_change_is_told_within_a_second_and_the_end_is_the_last() -> None:
    """The first event comes at once; what did not change is not told again."""
    found = await followed({0: BEGUN, 2.5: replace(BEGUN, completed=4), 6.5: DONE})
    assert [(at_s, completed(event)) for at_s, event in found] == [(0, 0), (3, 4), (7, 9)]
    assert b'"status":"completed"' in found[-1][1]


async def test_a_job_in_which_nothing_happens_is_not_silent() -> None:
    """A comment every 15 s keeps proxies from closing; a change in between starts them anew."""
    found = await followed({0: BEGUN, 20: replace(BEGUN, completed=1), 40: DONE})
    assert [(at_s, event[:1]) for at_s, event in found] == [(0, b"e"), (15, b":"), (20, b"e"), (35, b":"), (40, b"e")]
    assert {event for _, event in found if event.startswith(b":")} == {b": still there\n\n"}


async def test_a_database_that_is_away_for_a_while_ends_nothing() -> None:
    """What it says when it is back is told."""
    found = await followed({0: BEGUN, 1: LevelDown("away"), 20.5: DONE})
    assert [at_s for at_s, _ in found] == [0, 15, 21]


async def test_at_drain_and_when_the_job_is_gone_it_ends() -> None:
    """Within a second, without another word; one that has ended before is told once."""
    assert [at_s for at_s, _ in await followed({0: BEGUN}, drains_at_s=4.5)] == [0]
    assert asyncio.get_running_loop().time() <= 5.001
    assert [at_s for at_s, _ in await followed({0: BEGUN, 3: None})] == [0]

    async def never() -> Job | None:
        raise AssertionError("an ended job is not looked at again")

    assert len([event async for event in told(DONE, never, over=lambda: False)]) == 1
