"""Hides where tenants, projects and keys made at run time are kept, and how all replicas learn what changed."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Executable, Row, Select, Table, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain import Allowance, Tier
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.tables import api_keys, counters, insert, now_ms, projects, tenants

_T = TypeVar("_T")

_WITHIN_S, _LOAD_S = 5.0, 30.0
_COUNTER = "directory"


class TenantRecord(msgspec.Struct, frozen=True, gc=False):
    """A row of `tenants`; limits of 0 are none, a `cache_group` of "" is its own."""

    name: str
    weight: float
    priority: str
    models: tuple[str, ...]
    requests_per_minute: int
    tokens_per_minute: int
    max_in_flight: int
    allowance: Allowance
    cache_group: str
    webhook_url: str
    bulk_tier: Tier
    created_at_ms: int | None
    deleted_at_ms: int | None = None


class ProjectRecord(msgspec.Struct, frozen=True, gc=False):
    """A row of `projects`."""

    tenant: str
    name: str
    allowance: Allowance
    deleted_at_ms: int | None


class KeyRecord(msgspec.Struct, frozen=True, gc=False):
    """A row of `api_keys`; `tenant` "" is nobody's, `networks` () are all."""

    id: str
    tenant: str
    project: str
    label: str
    digest: bytes
    previous_digest: bytes | None
    previous_until_ms: int | None
    scopes: tuple[str, ...]
    models: tuple[str, ...]
    allowance: Allowance
    networks: tuple[str, ...]
    created_at_ms: int
    expires_at_ms: int | None
    revoked_at_ms: int | None


class News(msgspec.Struct, frozen=True):
    """What changed up to `version`; a key was ever made for a tenant if `keyed`, for operators if `operated`."""

    version: int
    keyed: bool
    operated: bool
    tenants: Sequence[TenantRecord]
    projects: Sequence[ProjectRecord]
    keys: Sequence[KeyRecord]


class SqlDirectory:
    """Tenants, projects and keys of all that share a database. Every method raises DatabaseDown.

    Whoever changes something raises the version of all in the same transaction, and stamps the row with it; so changes
    are seen in the order of their versions. `ready`: whether the database is ours to ask by now.
    """

    def __init__(self, database: Database, *, ready: Callable[[], bool] = lambda: True) -> None:
        self._database = database
        self._ready = ready

    # ── for those who follow ────────────────────────────────────────────────────────────────────────────────────────

    async def now(self) -> tuple[int, int]:
        """The newest version, 0 where nothing was ever made, and the database's time in Unix milliseconds."""
        self._check()
        row = (await self._database.fetch(_NOW, {}, within_s=_WITHIN_S))[0]
        return row.version, row.at_ms

    async def since(self, version: int) -> News:
        """What changed after `version`; after 0 all that is in force."""
        self._check()

        async def look(connection: AsyncConnection) -> News:
            newest = (await connection.execute(_NOW)).one().version  # first: what comes meanwhile is seen again
            keyed, operated = [(await connection.execute(each)).first() is not None for each in (_KEYED, _OPERATED)]
            made = [_tenant(row) for row in await connection.execute(_changed(tenants, version))]
            parts = [_project(row) for row in await connection.execute(_changed(projects, version))]
            keys = [_key(row) for row in await connection.execute(_changed(api_keys, version))]
            return News(newest, keyed, operated, made, parts, keys)

        return await self._database.read(look, within_s=_LOAD_S)

    # ── for operators: tenants and projects ─────────────────────────────────────────────────────────────────────────

    async def tenants(self, *, after: str, limit: int) -> list[TenantRecord]:
        """Those that are not deleted, by name, from behind `after`."""
        where = tenants.c.deleted_at_ms.is_(None) & (tenants.c.name > after)
        return [_tenant(row) for row in await self._rows(select(tenants).where(where).limit(limit), tenants.c.name)]

    async def tenant(self, name: str) -> TenantRecord | None:
        """The one of that name, if it is not deleted."""
        found = await self._rows(select(tenants).where(_live_tenant(name)), tenants.c.name)
        return _tenant(found[0]) if found else None

    async def projects(self, tenant: str) -> list[ProjectRecord]:
        """Those of a tenant, by name."""
        where = projects.c.deleted_at_ms.is_(None) & (projects.c.tenant == tenant)
        return [_project(row) for row in await self._rows(select(projects).where(where), projects.c.name)]

    async def add_tenant(self, values: Mapping[str, Any]) -> TenantRecord | None:
        """Makes a tenant of its columns; None: there is one of that name."""

        async def add(connection: AsyncConnection, version: int) -> TenantRecord | None:
            new = insert(connection, tenants).values(**values, created_at_ms=now_ms, version=version)
            ours = {name: new.excluded[name] for name in (*values, "created_at_ms", "version", "deleted_at_ms")}
            again = new.on_conflict_do_update(
                index_elements=["name"], set_=ours, where=tenants.c.deleted_at_ms.is_not(None)
            )
            return await _only(connection, again.returning(*tenants.c), _tenant)

        return await self._change(add)

    async def change_tenant(self, name: str, values: Mapping[str, Any]) -> TenantRecord | None:
        """Sets some of its columns; None: there is none."""

        async def change(connection: AsyncConnection, version: int) -> TenantRecord | None:
            changed = update(tenants).where(_live_tenant(name)).values(**values, version=version)
            return await _only(connection, changed.returning(*tenants.c), _tenant)

        return await self._change(change)

    async def delete_tenant(self, name: str) -> bool:
        """Ends it with its projects and keys; whether there ever was one."""

        async def end(connection: AsyncConnection, version: int) -> bool:
            ended = {"deleted_at_ms": now_ms, "version": version}
            await connection.execute(update(tenants).where(_live_tenant(name)).values(**ended))
            ours = (projects.c.tenant == name) & projects.c.deleted_at_ms.is_(None)
            await connection.execute(update(projects).where(ours).values(**ended))
            revoked = {
                "revoked_at_ms": func.coalesce(api_keys.c.revoked_at_ms, now_ms),
                "label": "",
                "version": version,
            }
            await connection.execute(update(api_keys).where(api_keys.c.tenant == name).values(**revoked))
            return await _exists(connection, tenants.c.name == name)

        return await self._change(end)

    async def set_project(
        self, tenant: str, name: str, allowance: Allowance, *, configured: bool
    ) -> ProjectRecord | None:  # fmt: skip
        """Makes or changes a project of a tenant that is `configured` elsewhere or kept here; None: there is none."""
        money = {"day_nano_usd": allowance.per_day, "month_nano_usd": allowance.per_month}

        async def put(connection: AsyncConnection, version: int) -> ProjectRecord | None:
            if not (configured or await _exists(connection, _live_tenant(tenant))):
                return None
            new = insert(connection, projects).values(tenant=tenant, name=name, **money, version=version)
            again = new.on_conflict_do_update(
                index_elements=["tenant", "name"], set_=money | {"version": version, "deleted_at_ms": None}
            )
            return _project((await connection.execute(again.returning(*projects.c))).one())

        return await self._change(put)

    async def delete_project(self, tenant: str, name: str) -> bool:
        """Ends a project with its keys; whether there was one."""

        async def end(connection: AsyncConnection, version: int) -> bool:
            ended = update(projects).where(_live_project(tenant, name)).values(deleted_at_ms=now_ms, version=version)
            keys = (api_keys.c.tenant == tenant) & (api_keys.c.project == name) & api_keys.c.revoked_at_ms.is_(None)
            await connection.execute(update(api_keys).where(keys).values(revoked_at_ms=now_ms, version=version))
            return (await connection.execute(ended.returning(projects.c.name))).first() is not None

        return await self._change(end)

    # ── for operators: keys ─────────────────────────────────────────────────────────────────────────────────────────

    async def keys(self, *, tenant: str | None, after: str, limit: int) -> list[KeyRecord]:
        """Keys of a tenant, or of all, revoked ones too, by public id, from behind `after`."""
        wanted = select(api_keys).where(api_keys.c.id > after).limit(limit)
        wanted = wanted if tenant is None else wanted.where(api_keys.c.tenant == tenant)
        return [_key(row) for row in await self._rows(wanted, api_keys.c.id)]

    async def add_key(
        self, values: Mapping[str, Any], *, configured: bool, expires_in_ms: int | None
    ) -> KeyRecord | None:
        """Makes a key of its columns; None: there is no such tenant, neither `configured` nor kept here, or project."""

        async def add(connection: AsyncConnection, version: int) -> KeyRecord | None:
            tenant, project = values["tenant"], values["project"]
            if tenant and not (configured or await _exists(connection, _live_tenant(tenant))):
                return None
            if project and not await _exists(connection, _live_project(tenant, project)):
                return None
            expires = None if expires_in_ms is None else now_ms + expires_in_ms
            new = insert(connection, api_keys).values(
                **values, created_at_ms=now_ms, expires_at_ms=expires, version=version
            )
            return _key((await connection.execute(new.returning(*api_keys.c))).one())

        return await self._change(add)

    async def rotate_key(self, public_id: str, digest: bytes, *, overlap_ms: int) -> KeyRecord | None:
        """Gives a key another secret; the one it has is good for `overlap_ms` more. None: no key that is in force."""

        async def rotate(connection: AsyncConnection, version: int) -> KeyRecord | None:
            expired = func.coalesce(api_keys.c.expires_at_ms <= now_ms, False)
            in_force = (api_keys.c.id == public_id) & api_keys.c.revoked_at_ms.is_(None) & ~expired
            changed = update(api_keys).where(in_force).values(
                previous_digest=api_keys.c.digest, previous_until_ms=now_ms + overlap_ms, digest=digest, version=version
            )  # fmt: skip
            return await _only(connection, changed.returning(*api_keys.c), _key)

        return await self._change(rotate)

    async def revoke_key(self, public_id: str) -> KeyRecord | None:
        """Ends a key, if it has not ended; None: there never was one."""

        async def revoke(connection: AsyncConnection, version: int) -> KeyRecord | None:
            ended = func.coalesce(api_keys.c.revoked_at_ms, now_ms)
            changed = update(api_keys).where(api_keys.c.id == public_id).values(revoked_at_ms=ended, version=version)
            return await _only(connection, changed.returning(*api_keys.c), _key)

        return await self._change(revoke)

    # ── how ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        if not self._ready():
            raise DatabaseDown("not prepared")

    async def _rows(self, wanted: Select[Any], order: ColumnElement[Any]) -> Sequence[Row[Any]]:
        self._check()
        return await self._database.fetch(wanted.order_by(order), {}, within_s=_WITHIN_S)

    async def _change(self, change: Callable[[AsyncConnection, int], Awaitable[_T]]) -> _T:
        """What `change` makes of the next version: one at a time, over all replicas."""
        self._check()

        async def transact(connection: AsyncConnection) -> _T:
            new = insert(connection, counters).values(name=_COUNTER, number=1)
            more = new.on_conflict_do_update(index_elements=["name"], set_={"number": counters.c.number + 1})
            version = (await connection.execute(more.returning(counters.c.number))).scalar_one()
            return await change(connection, version)

        return await self._database.write(transact, within_s=_WITHIN_S)


_NEWEST = select(counters.c.number).where(counters.c.name == _COUNTER).scalar_subquery()
_NOW = select(func.coalesce(_NEWEST, 0).label("version"), now_ms.label("at_ms"))
_KEYED = select(literal(1)).where(api_keys.c.tenant != "").limit(1)
_OPERATED = select(literal(1)).where(api_keys.c.tenant == "").limit(1)


def _changed(table: Table, version: int) -> Select[Any]:
    """The rows to learn; who knows nothing needs none that has ended."""
    if version:
        return select(table).where(table.c.version > version)
    return select(table).where((table.c.revoked_at_ms if table is api_keys else table.c.deleted_at_ms).is_(None))


def _live_tenant(name: str) -> ColumnElement[bool]:
    return (tenants.c.name == name) & tenants.c.deleted_at_ms.is_(None)


def _live_project(tenant: str, name: str) -> ColumnElement[bool]:
    return (projects.c.tenant == tenant) & (projects.c.name == name) & projects.c.deleted_at_ms.is_(None)


async def _only(connection: AsyncConnection, statement: Executable, read: Callable[[Row[Any]], _T]) -> _T | None:
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else read(row)


async def _exists(connection: AsyncConnection, where: ColumnElement[bool]) -> bool:
    return (await connection.execute(select(literal(1)).where(where))).first() is not None


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def listed(names: Sequence[str]) -> str:
    """Several names in one column."""
    return "\n".join(names)


def _names(column: str) -> tuple[str, ...]:
    return tuple(column.split("\n")) if column else ()


def _allowance(row: Row[Any]) -> Allowance:
    return Allowance(row.day_nano_usd, row.month_nano_usd)


def _tenant(row: Row[Any]) -> TenantRecord:
    return TenantRecord(
        row.name, row.weight, row.priority, _names(row.models), row.requests_per_minute, row.tokens_per_minute,
        row.max_in_flight, _allowance(row), row.cache_group, row.webhook_url, row.bulk_tier, row.created_at_ms,
        row.deleted_at_ms,
    )  # fmt: skip


def _project(row: Row[Any]) -> ProjectRecord:
    return ProjectRecord(row.tenant, row.name, _allowance(row), row.deleted_at_ms)


def _key(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        row.id, row.tenant, row.project, row.label, row.digest, row.previous_digest, row.previous_until_ms,
        _names(row.scopes), _names(row.models), _allowance(row), _names(row.networks),
        row.created_at_ms, row.expires_at_ms, row.revoked_at_ms,
    )  # fmt: skip
