"""Claims and backlogged callers of limiters, and the strict provider that judges them."""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.domain import Priority
from app.ports import Claim, Grant, Limiter, NotYet

NAME = "vendor"


def claim(
    tokens: int,
    most: int | None = None,
    *,
    priority: Priority = Priority.DEFAULT,
    requests: int = 1,
    to: str = NAME,
    paced: bool = False,
    rank: float = 0.0,
    waits: bool = True,
) -> Claim:
    """A wish for `tokens`, or up to `most`."""
    most = tokens if most is None else most
    return Claim(to, tokens, most, priority, requests, paced=paced, rank=rank, waits=waits)


async def granted(limiter: Limiter, wanted: Claim) -> Grant:
    """The grant for a claim that must not be refused."""
    answer = await limiter.reserve(wanted)
    assert isinstance(answer, Grant), answer
    return answer


async def refused(limiter: Limiter, wanted: Claim) -> float:
    """The wait of a claim that must be refused."""
    answer = await limiter.reserve(wanted)
    assert isinstance(answer, NotYet), answer
    return answer.wait_s


async def patiently(limiter: Limiter, wanted: Claim) -> Grant:
    """Asks again whenever told to, until granted and until its start has come."""
    while True:
        answer = await limiter.reserve(wanted)
        if isinstance(answer, Grant):
            await asyncio.sleep(answer.start_in_s)
            return answer
        await asyncio.sleep(min(answer.wait_s, 1.0))


@dataclass
class Judge:
    """A provider that counts what arrived in each sliding span, to the unit."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def saw(self, tokens: int, *, late_s: float = 0.0) -> None:
        """A call arrives."""
        self.arrivals.append((asyncio.get_running_loop().time() + late_s, tokens))

    def _sums(self, span_s: float, counted: Callable[[int], int]) -> list[tuple[float, int]]:
        """The sum over the closed span that ends with each arrival."""
        sums, first, total = [], 0, 0
        arrivals = sorted(self.arrivals)
        for when, tokens in arrivals:
            total += counted(tokens)
            while arrivals[first][0] < when - span_s:
                total -= counted(arrivals[first][1])
                first += 1
            sums.append((when, total))
        return sums

    def most(self, span_s: float, *, requests: bool = False) -> int:
        """The most that ever arrived in one span."""
        return max(total for _, total in self._sums(span_s, (lambda _: 1) if requests else int))

    def rate(self, *, requests: bool = False) -> float:
        """What arrived per minute over five turns of the limiter's window, after the first."""
        arrived = [tokens for when, tokens in self.arrivals if 40.0 <= when < 40.0 + 5 * 60.75]
        return (len(arrived) if requests else sum(arrived)) / (5 * 60.75 / 60.0)


async def offer(
    *limiters: Limiter,
    for_s: float,
    late_s: float,
    callers: int = 20,
    sizes: tuple[int, int] = (1, 2000),
    priority: Priority = Priority.DEFAULT,
    least_used: float = 0.75,
    paced: bool = False,
    spells: Sequence[tuple[float, float]] = (),
) -> Judge:
    """Backlogged callers that know little about their texts' real size and whose calls arrive up to `late_s` late.

    They share the limiters evenly; `spells` say from when to when each limiter is asked, where that is not all along.
    """
    judge, rng, loop = Judge(), random.Random(7), asyncio.get_running_loop()

    async def caller(number: int) -> None:
        at = number % len(limiters)
        limiter, (since_s, until_s) = limiters[at], spells[at] if spells else (0.0, for_s)
        await asyncio.sleep(since_s)
        while loop.time() < until_s:
            text = int(math.exp(rng.uniform(math.log(sizes[0]), math.log(sizes[1] + 1))))
            grant = await patiently(limiter, claim(text, text * rng.randint(1, 8), priority=priority, paced=paced))
            used = rng.randint(int(grant.tokens * least_used), grant.tokens)
            judge.saw(used, late_s=rng.uniform(0.0, late_s))
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            await limiter.settle(grant, used)

    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(caller(number))
    return judge
