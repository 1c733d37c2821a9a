"""Hides how a process knows every tenant and key made at run time, and follows what other processes change of them."""

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple, Self, cast

import msgspec

from app.domain import ANONYMOUS, NO_BOUND, Allowance, Limits, Priority, Scope, Spender, Tenant
from app.storage.api_key import KeyHash, public_id
from app.storage.level import LevelDown
from app.storage.secret import MasterSecret
from app.storage.sql.directory import KeyRecord, News, SqlDirectory, TenantRecord
from app.telemetry import Telemetry

POLL_S: Final = 2.0
"""How often other processes' changes are looked for."""

NAME: Final = "[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}"
"""What tenants and projects made at run time may be called: it fits into paths, headers and accounts."""

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Caller(msgspec.Struct, frozen=True, gc=False):
    """Whom a key stands for, what it is good for, and from where: `networks` () are all."""

    tenant: Tenant
    spender: Spender = Spender()
    scopes: frozenset[Scope] = frozenset({"embed", "batch"})
    networks: tuple[_Network, ...] = ()
    expires_at_ms: int | None = None

    def may_come_from(self, address: str) -> bool:
        """Whether the key is taken from there."""
        if not self.networks:
            return True
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = getattr(found, "ipv4_mapped", None) or found
        return any(mapped in network for network in self.networks)


ANYBODY: Final = Caller(ANONYMOUS)
"""Who calls where no key is asked for."""


class Terms(NamedTuple):
    """Of an account: whose it is, what may be spent, and the URL that is told; "" for none."""

    tenant: str
    allowance: Allowance
    webhook_url: str


class _Entry(msgspec.Struct):
    """A key that is in force, and whom it stands for; None: nobody any more."""

    record: KeyRecord
    digest: bytes
    caller: Caller | None = None


class Directory:
    """All tenants, projects and keys of `source`; an async context manager that owns the task which follows it.

    What is known stays valid while the database is away. `configured` tenants are known by name and go first;
    `on_limits` hears the limits of every other tenant's account as they come, change and go. Looking somebody up
    neither waits nor asks anybody.
    """

    def __init__(
        self, source: SqlDirectory, secret: MasterSecret, telemetry: Telemetry, *, configured: Mapping[str, Tenant],
        on_limits: Callable[[str, Limits | None], None], clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._source = source
        self._telemetry = telemetry
        self._configured = configured
        self._on_limits = on_limits
        self._clock = clock
        self._hash = KeyHash(secret)
        self._users = secret.derive("users")
        self._nobody = _Entry(_no_key(), secrets.token_bytes(32))
        self._version: int | None = None
        self._ahead_ms = 0.0
        self._read_s = clock()
        self.keyed = False
        """Whether a key was ever made for a tenant."""
        self.operated = False
        """Whether one was ever made for operators, of no tenant; ending it opens nothing again."""
        self._tenants: dict[str, Tenant] = {}
        self._projects: dict[tuple[str, str], Allowance] = {}
        self._keys: dict[str, _Entry] = {}
        self._keys_of: defaultdict[str, set[str]] = defaultdict(set)
        self._refreshing = asyncio.Lock()
        self._tasks = asyncio.TaskGroup()
        self._following: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        with suppress(LevelDown):
            await self.refresh()
        await self._tasks.__aenter__()
        self._following = self._tasks.create_task(self._follow(), name="directory")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._following.cancel()
        await self._tasks.__aexit__(None, None, None)

    # ── who calls ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def loaded(self) -> bool:
        """Whether the database was ever read: until then nobody knows which keys there are."""
        return self._version is not None

    @property
    def age_s(self) -> float:
        """How long ago it was last read, or tried for the first time."""
        return self._clock() - self._read_s

    @property
    def size(self) -> int:
        """How many tenants are known that are not configured."""
        return len(self._tenants)

    def find(self, key: bytes) -> Caller | None:
        """Who calls with `key`. For an unknown key no less is done than for a wrong secret of a known one."""
        entry = self._keys.get(public_id(key), self._nobody)
        digest = self._hash.of(key)
        if not (hmac.compare_digest(entry.digest, digest) or self._was(entry, key, digest)):
            return None
        caller = entry.caller
        if caller is None or (caller.expires_at_ms is not None and caller.expires_at_ms <= self._now_ms()):
            return None
        return caller

    def owner(self, tenant: str, key: str) -> Caller | None:
        """Whom the tenant's key with this public id stands for, "": one without an id; None: nobody any more.

        A key that has run out since may no longer be shown, but what was begun with it is its owner's.
        """
        if not key:
            configured = self._configured.get(tenant)
            return Caller(configured) if configured else ANYBODY if tenant == ANONYMOUS.name else None
        entry = self._keys.get(key)
        caller = entry.caller if entry else None
        return caller if caller is not None and caller.tenant.name == tenant else None

    def spender(self, caller: Caller, project: str, user: str) -> Spender:
        """On whose account `caller` buys for a project, unless its key names one, and a user of its own."""
        base, name = caller.spender, project or caller.spender.project
        allowances = base.allowances
        if name != base.project:
            allowances += self._project_allowance(caller.tenant.name, name)
        hashed = blake2b(user.encode(), key=self._users, digest_size=8).hexdigest() if user else ""
        return Spender(name, base.key, hashed, allowances)

    def _was(self, entry: _Entry, key: bytes, digest: bytes) -> bool:
        """Whether `key` is the secret before the last one, or was made under an older secret of the server."""
        record = entry.record
        previous = record.previous_digest or self._nobody.digest
        overlaps = record.previous_until_ms is not None and record.previous_until_ms > self._now_ms()
        if hmac.compare_digest(previous, digest) and overlaps:
            return True
        for older in self._hash.older(key):
            if hmac.compare_digest(entry.digest, older):
                entry.digest = digest  # from now on as quick as any
                return True
            if hmac.compare_digest(previous, older) and overlaps:
                return True
        return False

    def _now_ms(self) -> float:
        """The database's time, by which all processes agree on when a key ends."""
        return self._clock() * 1000 + self._ahead_ms

    def terms(self, account: str) -> Terms | None:
        """Whose account it is, what may be spent on it, and who wants to be told; None: it is nobody's any more."""
        kind, _, name = account.partition(" ")
        tenant, allowance = name, NO_BOUND
        if kind == "project":
            tenant, _, project = name.rpartition("/")
            allowance = self._projects.get((tenant, project), NO_BOUND)
        elif kind == "key":
            if (entry := self._keys.get(name)) is None:
                return None
            tenant, allowance = entry.record.tenant, entry.record.allowance
        owner = self._configured.get(tenant) or self._tenants.get(tenant)
        if owner is None:
            return None
        return Terms(tenant, owner.allowance if kind == "tenant" else allowance, owner.webhook_url)

    # ── following ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def refresh(self) -> None:
        """Learns what changed, now. Raises LevelDown."""
        async with self._refreshing:  # what was read first is learned first
            version, at_ms = await self._source.now()
            self._ahead_ms = at_ms - self._clock() * 1000
            if self._version is None or version < self._version:  # another database, or the same one from a backup
                self._begin(await self._source.since(0))
            elif version > self._version:
                self._learn(await self._source.since(self._version))
            self._read_s = self._clock()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except LevelDown:
                continue
            except Exception as bug:
                self._telemetry.loop_crashed(loop="directory", error=bug)

    def _begin(self, news: News) -> None:
        for name in self._tenants.keys() - {tenant.name for tenant in news.tenants}:
            self._set_tenant(name, None)
        self._projects.clear()
        self._keys.clear()
        self._keys_of.clear()
        self._learn(news)

    def _learn(self, news: News) -> None:
        """Takes over what changed, and with it every key that it concerns."""
        concerned = {record.name for record in news.tenants} | {record.tenant for record in news.projects}
        for tenant in news.tenants:
            self._set_tenant(tenant.name, None if tenant.deleted_at_ms is not None else _noun(tenant))
        for project in news.projects:
            if project.deleted_at_ms is None:
                self._projects[project.tenant, project.name] = project.allowance
            else:
                self._projects.pop((project.tenant, project.name), None)
        for key in news.keys:
            self._set_key(key)
        for public in [each for name in concerned for each in self._keys_of.get(name, ())]:
            entry = self._keys[public]
            entry.caller = self._caller(entry.record)
        self.keyed |= news.keyed
        self.operated |= news.operated
        self._version = news.version

    def _set_tenant(self, name: str, tenant: Tenant | None) -> None:
        if name in self._configured:
            return
        before = self._tenants.pop(name, None)
        if tenant is not None:
            self._tenants[name] = tenant
        limits = tenant.limits if tenant else None
        if limits != (before.limits if before else None):
            self._on_limits(f"tenant {name}", limits)

    def _set_key(self, record: KeyRecord) -> None:
        if record.revoked_at_ms is None:
            self._keys[record.id] = _Entry(record, record.digest, self._caller(record))
            self._keys_of[record.tenant].add(record.id)
        elif self._keys.pop(record.id, None) is not None:
            self._keys_of[record.tenant].discard(record.id)

    def _caller(self, record: KeyRecord) -> Caller | None:
        scopes = cast("frozenset[Scope]", _set(record.scopes))
        networks = tuple(map(ipaddress.ip_network, record.networks))
        if not record.tenant:
            return Caller(ANONYMOUS, Spender(key=record.id), scopes, networks, record.expires_at_ms)
        tenant = self._configured.get(record.tenant) or self._tenants.get(record.tenant)
        if tenant is None:
            return None
        own = () if record.allowance == NO_BOUND else ((f"key {record.id}", record.allowance),)
        allowances = own + self._project_allowance(tenant.name, record.project)
        spender = Spender(record.project, record.id, allowances=allowances)
        return Caller(_narrowed(tenant, _set(record.models)), spender, scopes, networks, record.expires_at_ms)

    def _project_allowance(self, tenant: str, project: str) -> tuple[tuple[str, Allowance], ...]:
        allowance = self._projects.get((tenant, project), NO_BOUND)
        return () if allowance == NO_BOUND else ((f"project {tenant}/{project}", allowance),)


def _noun(record: TenantRecord) -> Tenant:
    """Its cache is its own unless it names a group: no group has a blank, and who is made again does not find it."""
    limits = (record.requests_per_minute, record.tokens_per_minute, record.max_in_flight)
    return Tenant(
        record.name,
        record.weight,
        Priority[record.priority.upper()],
        _set(record.models),
        record.cache_group or f"tenant {record.name} {record.created_at_ms}",
        Limits(*limits) if any(limits) else None,
        record.allowance,
        record.webhook_url,
        record.bulk_tier,
    )


def _narrowed(tenant: Tenant, models: frozenset[str]) -> Tenant:
    """The tenant as a key shows it that is good for these models only."""
    if "*" in models:
        return tenant
    allowed = models if "*" in tenant.models else tenant.models & models
    return replace(tenant, models=allowed)


@lru_cache(maxsize=1024)
def _set(names: Iterable[str]) -> frozenset[str]:
    """One object for all who have the same."""
    return frozenset(names)


def _no_key() -> KeyRecord:
    return KeyRecord("", "", "", "", b"", None, None, (), (), NO_BOUND, (), 0, None, None)
