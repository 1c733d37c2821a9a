"""Hides how tests write the sums of what was spent, past the ledger that makes them, and see how they are asked for."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import event

from app.storage.sql.database import Database
from app.storage.sql.tables import usage_days, usage_hours, usage_totals
from app.storage.sql.usage import Sums
from tests.contract.stored import SOON_S

NOTHING = Sums(*[0] * len(Sums._fields))


class Fact(NamedTuple):
    """What one tenant bought or was spared within an hour since 1970."""

    hour: int
    tenant: str
    project: str
    model: str
    deployment: str
    cause: str
    sums: Sums


def bought(hour: int, tenant: str, model: str, nano_usd: int, **other: Any) -> Fact:
    """A call of one text and ten tokens; `other` are further groups and sums."""
    groups = {"project": "", "deployment": "main", "cause": "miss"}
    groups |= {name: other.pop(name) for name in [*groups] if name in other}
    sums = NOTHING._replace(**{"calls": 1, "texts": 1, "tokens": 10, "nano_usd": nano_usd} | other)
    return Fact(hour, tenant, groups["project"], model, groups["deployment"], groups["cause"], sums)


def spared(hour: int, tenant: str, model: str, nano_usd: int, **other: int) -> Fact:
    """One hit of ten tokens."""
    sums = NOTHING._replace(**{"hits": 1, "spared_tokens": 10, "spared_nano_usd": nano_usd} | other)
    return Fact(hour, tenant, "", model, "", "", sums)


def added(sums: Iterable[Sums]) -> Sums:
    """All of them together."""
    return Sums(*map(sum, zip(NOTHING, *sums, strict=True)))


async def sum_up(database: Database, facts: Iterable[Fact]) -> None:
    """Writes what the ledger would have made of these facts."""
    facts = [*facts]
    for table in (usage_hours, usage_days, usage_totals):
        rows: dict[tuple[object, ...], list[Sums]] = {}
        keys = [column.name for column in table.primary_key]
        for fact in facts:
            named: Mapping[str, object] = fact._asdict() | {"day": fact.hour // 24}
            rows.setdefault(tuple(named[key] for key in keys), []).append(fact.sums)
        values = [dict(zip(keys, key, strict=True)) | added(sums)._asdict() for key, sums in rows.items()]
        await database.write(lambda c, t=table, v=values: c.execute(t.insert(), v), within_s=SOON_S)  # type: ignore[misc]


@contextmanager
def overheard(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """The statements that are sent meanwhile, and what they are sent with."""
    engine, heard = database._engines.single.engine.sync_engine, list[tuple[str, Any]]()

    def hear(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        heard.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", hear)
    yield heard
    event.remove(engine, "before_cursor_execute", hear)
