"""Hides the one step in which replicas share what is left of budgets, on the server that they all ask."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from app.storage.redis_server import RedisServer, Script, StoreDown

_SCRIPT = Script("budget")
_MEMORY_AGE, _SINCE = Script("memory_age"), "eg:{memory}:since"


class Answer(msgspec.Struct):
    """What `budget.lua` returns."""

    absent: bool = False
    late: bool = False
    wait_us: float = 0
    granted: Sequence[bool] = ()
    short: Sequence[int] = ()
    soon: Sequence[bool] = ()
    spans: Sequence[tuple[int, int, int]] = ()


async def decide(server: RedisServer, keys: Sequence[str], ask: Mapping[str, Any]) -> Answer:
    """Raises StoreDown, also where the server did not take it well: going on alone is better than not at all."""
    try:
        return msgspec.msgpack.decode(await server.run(_SCRIPT, keys, [msgspec.msgpack.encode(ask)]), type=Answer)
    except StoreDown:
        raise
    except Exception as bug:
        raise StoreDown(type(bug).__name__) from bug


async def remembered_us(server: RedisServer) -> int:
    """For how long the server has remembered what it was told. Raises StoreDown."""
    return int(await server.run(_MEMORY_AGE, [_SINCE], []))
