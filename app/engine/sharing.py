"""Hides how replicas hear whom the others served, so that a tenant's share is one wherever its requests arrive."""

import asyncio
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from app.engine.batcher import Batcher, CrashLog
from app.ports import Served, Shares

SHARE_S = 0.5
"""How often they tell and hear: a service is told within that time and heard within as much again.

So what a tenant may get too much is what the quota brings in twice that time, a second.
"""


async def share(shares: Shares, batchers: Mapping[tuple[str, ...], Batcher], crashes: CrashLog) -> None:
    """Tells and hears, until cancelled. Every replica calls a queue the same, by its place in `batchers`."""
    while True:
        await asyncio.sleep(SHARE_S)
        try:
            own = {
                f"{_name(place)}/{priority}": served
                for place, batcher in batchers.items()
                for priority, served in batcher.queue.news().items()
            }
            heard = await shares.exchange(own)
            if heard is None:
                continue
            for place, batcher in batchers.items():
                batcher.queue.told(_under(place, own))
                batcher.queue.hear([_under(place, news) for news in heard])
        except Exception as bug:  # supervision is for the errors that nobody thought of
            crashes.record("shares", bug)


def _name(place: Sequence[str]) -> str:
    return blake2b("\0".join(place).encode(), digest_size=12).hexdigest()


def _under(place: Sequence[str], news: Mapping[str, Served]) -> dict[str, Served]:
    prefix = f"{_name(place)}/"
    return {name.removeprefix(prefix): served for name, served in news.items() if name.startswith(prefix)}
