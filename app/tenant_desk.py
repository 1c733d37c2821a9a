"""Hides what operators do with tenants, projects and keys: what they may ask for, and what they are shown of it."""

import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from app import money
from app.alerts import webhook_secret
from app.directory import NAME
from app.domain import ANONYMOUS, Allowance, Limits, Tenant, Tier
from app.errors import InvalidRequest, NotFound
from app.settings import Settings, webhook_url
from app.storage import api_key
from app.storage.secret import MasterSecret
from app.storage.sql.database import Database
from app.storage.sql.directory import KeyRecord, ProjectRecord, SqlDirectory, TenantRecord, listed
from app.storage.sql.entries import spans_of
from app.storage.sql.erasure import erase
from app.storage.sql.ledger import SqlLedger

_NAME = re.compile(NAME).fullmatch
_MOST_NETWORKS = 100
_DAY_MS = 86_400_000
_LONGEST_S = 3_155_760_000

_END = r"(?!\n)$"
_PerMinute = Annotated[int, Meta(ge=0, le=10**12)]
_Dollars = Decimal | None
_Models = Annotated[list[Annotated[str, Meta(min_length=1, max_length=128)]], Meta(min_length=1, max_length=1000)]
_Seconds = Annotated[int, Meta(ge=0, le=_LONGEST_S)]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be spent, in dollars of at most nine decimals; 0 and None: no bound."""

    budget_usd_per_day: _Dollars = None
    budget_usd_per_month: _Dollars = None


class TenantTerms(Budget, frozen=True, forbid_unknown_fields=True):
    """What a tenant gets, in the words of `[tenants.X]`; a `cache_group` of "" is its own."""

    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    priority: Literal["interactive", "default", "bulk"] = "default"
    models: _Models = msgspec.field(default_factory=lambda: ["*"])
    requests_per_minute: _PerMinute = 0
    tokens_per_minute: _PerMinute = 0
    max_in_flight: Annotated[int, Meta(ge=0, le=100_000)] = 0
    cache_group: Annotated[str, Meta(pattern=f"^[!-~]{{0,128}}{_END}")] = ""
    webhook_url: Annotated[str, Meta(max_length=2048)] = ""
    bulk_tier: Tier = "online"


class NewTenant(TenantTerms, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tenant that there is not yet."""

    name: str


class NewKey(Budget, frozen=True, forbid_unknown_fields=True):
    """A key of a tenant and perhaps of one of its projects; with the scope admin alone it is an operator's.

    `networks` are the only ones it is taken from, in CIDR notation.
    """

    tenant: str = ""
    project: str = ""
    label: Annotated[str, Meta(pattern=rf"^[^\x00-\x1f\x7f-\x9f]{{0,128}}{_END}")] = ""
    scopes: Annotated[list[Literal["embed", "batch", "admin"]], Meta(min_length=1, max_length=3)] = msgspec.field(
        default_factory=lambda: ["embed", "batch"]
    )
    models: _Models = msgspec.field(default_factory=lambda: ["*"])
    networks: Annotated[list[str], Meta(max_length=_MOST_NETWORKS)] = []
    expires_s: Annotated[int, Meta(ge=1, le=_LONGEST_S)] | None = None


class Rotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For how long the secret before goes on being good."""

    overlap_s: _Seconds = 86_400


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a list: so many from behind `after`, by name or id."""

    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000


class KeyPage(Page, frozen=True, forbid_unknown_fields=True):
    """The same of the keys of one tenant, or of all."""

    tenant: str | None = None


class Listed(NamedTuple):
    """What was found, and whether more stands behind it."""

    rows: Sequence[dict[str, Any]]
    has_more: bool


class TenantDesk:
    """What the command line and the admin routes do with the tenants of a database; `settings` has the others.

    Every method raises InvalidRequest, NotFound and DatabaseDown. What was changed holds everywhere within 5 s.
    """

    def __init__(self, settings: Settings, database: Database, directory: SqlDirectory, secret: MasterSecret) -> None:
        self._settings = settings
        self._database = database
        self._directory = directory
        self._secret = secret
        self._books = SqlLedger(database, "")
        self._hash = api_key.KeyHash(secret)

    # ── tenants ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def tenants(self, page: Page) -> Listed:
        """All of them, by name; those of the configuration stand before the first page."""
        found = await self._directory.tenants(after=page.after, limit=page.limit + 1)
        configured = [] if page.after else [*map(self._configured, self._settings.tenants)]
        return Listed(configured + [_tenant(each) for each in found[: page.limit]], len(found) > page.limit)

    async def tenant(self, name: str) -> dict[str, Any]:
        """One of them, with its projects, and what they spent today and this month by UTC."""
        found = await self._known(name)
        projects = [*map(_project, await self._directory.projects(name))]
        accounts = {f"tenant {name}": found} | {f"project {name}/{each['name']}": each for each in projects}
        _, now_ms = await self._directory.now()
        spans = dict(zip(("spent_usd_today", "spent_usd_this_month"), spans_of(now_ms // _DAY_MS), strict=True))
        spent = await self._books.spent([*accounts], [*spans.values()])
        for account, row in accounts.items():
            row |= {column: money.usd(spent.get((account, span), 0)) for column, span in spans.items()}
        return found | {"projects": projects}

    async def webhook_secret(self, name: str) -> dict[str, Any]:
        """With what a tenant checks that a message to its webhook is from here."""
        await self._known(name)
        return {"object": "webhook_secret", "tenant": name, "secret": webhook_secret(self._secret, name)}

    async def _known(self, name: str) -> dict[str, Any]:
        if name in self._settings.tenants:
            return self._configured(name)
        record = await self._directory.tenant(name)
        if record is None:
            raise _no_tenant(name)
        return _tenant(record)

    async def create_tenant(self, new: NewTenant) -> dict[str, Any]:
        """Makes a tenant; nobody can call for it before it has a key."""
        _check_name("tenant", new.name)
        if new.name in {*self._settings.tenants, ANONYMOUS.name}:
            raise _taken(new.name)
        made = await self._directory.add_tenant({"name": new.name, **self._columns(new)})
        if made is None:
            raise _taken(new.name)
        return _tenant(made)

    async def update_tenant(self, name: str, terms: TenantTerms, given: Collection[str]) -> dict[str, Any]:
        """Changes the `given` ones of its terms."""
        self._refuse_configured(name)
        columns = self._columns(terms)
        values = {_COLUMNS.get(each, each): columns[_COLUMNS.get(each, each)] for each in given}
        changed = await self._directory.change_tenant(name, values)
        if changed is None:
            raise _no_tenant(name)
        return _tenant(changed)

    async def delete_tenant(self, name: str) -> None:
        """Ends a tenant, its projects and its keys; what it spent becomes nobody's. May be done again."""
        self._refuse_configured(name)
        if not await self._directory.delete_tenant(name):
            raise _no_tenant(name)
        await erase(self._database, name)

    # ── projects ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def set_project(self, tenant: str, project: str, budget: Budget) -> dict[str, Any]:
        """Makes a project of a tenant, or changes its budget."""
        _check_name("project", project)
        configured = tenant in self._settings.tenants
        made = await self._directory.set_project(tenant, project, _allowance(budget), configured=configured)
        if made is None:
            raise _no_tenant(tenant)
        return _project(made)

    async def project(self, tenant: str, project: str) -> dict[str, Any]:
        """One of a tenant's projects."""
        found = [each for each in await self._directory.projects(tenant) if each.name == project]
        if not found:
            raise _no_project(tenant, project)
        return _project(found[0])

    async def delete_project(self, tenant: str, project: str) -> None:
        """Ends a project and its keys."""
        if not await self._directory.delete_project(tenant, project):
            raise _no_project(tenant, project)

    # ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def keys(self, page: KeyPage) -> Listed:
        """Keys by public id, ended ones too; never their secrets."""
        found = await self._directory.keys(tenant=page.tenant, after=page.after, limit=page.limit + 1)
        _, now_ms = await self._directory.now()
        return Listed([_key(each, now_ms) for each in found[: page.limit]], len(found) > page.limit)

    async def create_key(self, new: NewKey) -> dict[str, Any]:
        """Makes a key. `key` is the only time that anybody sees it."""
        if ("admin" in new.scopes) != (not new.tenant) or (not new.tenant and set(new.scopes) != {"admin"}):
            text = "A key belongs to a 'tenant', or it is an operator's: then its only scope is 'admin'."
            raise InvalidRequest(text, param="scopes" if new.tenant else "tenant", code="invalid_value")
        self._check_models(new.models)
        key = api_key.make()
        allowance = _allowance(new)
        values = {
            "id": api_key.public_id(key.encode()), "tenant": new.tenant, "project": new.project, "label": new.label,
            "digest": self._hash.of(key.encode()), "scopes": listed(_distinct(new.scopes)),
            "models": listed(_distinct(new.models)), "networks": listed(_networks(new.networks)),
            "day_nano_usd": allowance.per_day, "month_nano_usd": allowance.per_month,
        }  # fmt: skip
        expires_in_ms = None if new.expires_s is None else 1000 * new.expires_s
        configured = new.tenant in self._settings.tenants
        made = await self._directory.add_key(values, configured=configured, expires_in_ms=expires_in_ms)
        if made is None:
            raise _no_project(new.tenant, new.project) if new.project else _no_tenant(new.tenant)
        return _key(made, made.created_at_ms) | {"key": key}

    async def rotate_key(self, public_id: str, rotation: Rotation) -> dict[str, Any]:
        """Gives a key another secret, shown this once; the one before is good for a while beside it."""
        key = api_key.make(public_id) if len(public_id) == api_key.ID_LENGTH and public_id.isascii() else ""
        digest, overlap_ms = self._hash.of(key.encode()), 1000 * rotation.overlap_s
        made = await self._directory.rotate_key(public_id, digest, overlap_ms=overlap_ms) if key else None
        if made is None:
            raise NotFound(f"There is no key '{_shown(public_id)}' in force.")
        _, now_ms = await self._directory.now()
        return _key(made, now_ms) | {"key": key}

    async def revoke_key(self, public_id: str) -> dict[str, Any]:
        """Ends a key."""
        ended = await self._directory.revoke_key(public_id)
        if ended is None:
            raise NotFound(f"There is no key '{_shown(public_id)}'.")
        return _key(ended, ended.created_at_ms)

    # ── checks ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _configured(self, name: str) -> dict[str, Any]:
        return _tenant(_record(self._settings.tenants[name].tenant(name))) | {"configured": True}

    def _refuse_configured(self, name: str) -> None:
        if name in self._settings.tenants:
            text = f"The tenant '{_shown(name)}' is in the configuration file: change it there."
            raise InvalidRequest(text, code="invalid_value")

    def _check_models(self, models: Sequence[str]) -> None:
        for model in models:
            if model != "*" and model not in self._settings.models:
                text = f"There is no model '{_shown(model)}'."
                raise InvalidRequest(text, param="models", code="invalid_value")

    def _columns(self, terms: TenantTerms) -> dict[str, Any]:
        """The terms as the database has them."""
        self._check_models(terms.models)
        allowance = _allowance(terms)
        return {
            "weight": terms.weight, "priority": terms.priority, "models": listed(_distinct(terms.models)),
            "requests_per_minute": terms.requests_per_minute, "tokens_per_minute": terms.tokens_per_minute,
            "max_in_flight": terms.max_in_flight, "day_nano_usd": allowance.per_day,
            "month_nano_usd": allowance.per_month, "cache_group": terms.cache_group,
            "webhook_url": _webhook(terms.webhook_url), "bulk_tier": terms.bulk_tier,
        }  # fmt: skip


_COLUMNS: Mapping[str, str] = {"budget_usd_per_day": "day_nano_usd", "budget_usd_per_month": "month_nano_usd"}


def _allowance(budget: Budget) -> Allowance:
    return Allowance(*(_nano_usd(name, getattr(budget, name)) for name in _COLUMNS))


def _nano_usd(name: str, dollars: Decimal | None) -> int | None:
    if not dollars:  # NaN is not false
        return None
    try:
        return money.nano_usd_of(dollars)
    except ValueError as error:
        raise InvalidRequest(f"'{name}' {error}.", param=name, code="invalid_value") from None


def _check_name(what: str, name: str) -> None:
    if not _NAME(name):
        text = f"The name of a {what} must be 1 to 128 of A-Z a-z 0-9 . _ : @ + -, a letter or a digit first."
        raise InvalidRequest(text, param="name", code="invalid_value")


def _networks(given: Sequence[str]) -> list[str]:
    try:
        return _distinct([str(ipaddress.ip_network(each)) for each in given])
    except ValueError:
        text = "'networks' must be in CIDR notation, such as 10.0.0.0/8, without host bits."
        raise InvalidRequest(text, param="networks", code="invalid_value") from None


def _webhook(url: str) -> str:
    try:
        return webhook_url(url)
    except ValueError as error:
        raise InvalidRequest(f"'webhook_url' {error}.", param="webhook_url", code="invalid_value") from None


def _distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _taken(name: str) -> InvalidRequest:
    return InvalidRequest(f"There is a tenant '{name}' already.", param="name", code="already_exists")


def _no_tenant(name: str) -> NotFound:
    return NotFound(f"There is no tenant '{_shown(name)}'.")


def _no_project(tenant: str, project: str) -> NotFound:
    return NotFound(f"There is no tenant '{_shown(tenant)}' with a project '{_shown(project)}'.")


def _shown(name: str) -> str:
    return "".join(c for c in name[:64] if c.isprintable())


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────


def _record(tenant: Tenant) -> TenantRecord:
    """A configured tenant as if it were kept here."""
    limits = tenant.limits or Limits(max_in_flight=0)
    return TenantRecord(
        tenant.name, tenant.weight, tenant.priority.name.lower(), tuple(sorted(tenant.models)),
        limits.requests_per_minute, limits.tokens_per_minute, limits.max_in_flight, tenant.allowance,
        tenant.cache_group, tenant.webhook_url, tenant.bulk_tier, None,
    )  # fmt: skip


def _tenant(record: TenantRecord) -> dict[str, Any]:
    return {
        "object": "tenant", "name": record.name, "weight": record.weight, "priority": record.priority,
        "models": [*record.models], "requests_per_minute": record.requests_per_minute,
        "tokens_per_minute": record.tokens_per_minute, "max_in_flight": record.max_in_flight,
        **_budget(record.allowance), "cache_group": record.cache_group, "webhook_url": record.webhook_url,
        "bulk_tier": record.bulk_tier, "created_at": _moment(record.created_at_ms), "configured": False,
    }  # fmt: skip


def _project(record: ProjectRecord) -> dict[str, Any]:
    return {"object": "project", "tenant": record.tenant, "name": record.name, **_budget(record.allowance)}


def _key(record: KeyRecord, now_ms: int) -> dict[str, Any]:
    expired = record.expires_at_ms is not None and record.expires_at_ms <= now_ms
    return {
        "object": "key", "id": record.id, "tenant": record.tenant, "project": record.project, "label": record.label,
        "state": "revoked" if record.revoked_at_ms is not None else "expired" if expired else "live",
        "scopes": [*record.scopes], "models": [*record.models], "networks": [*record.networks],
        **_budget(record.allowance), "created_at": _moment(record.created_at_ms),
        "expires_at": _moment(record.expires_at_ms), "revoked_at": _moment(record.revoked_at_ms),
        "previous_until": _moment(record.previous_until_ms),
    }  # fmt: skip


def _budget(allowance: Allowance) -> dict[str, str | None]:
    amounts = (allowance.per_day, allowance.per_month)
    return {name: None if each is None else money.usd(each) for name, each in zip(_COLUMNS, amounts, strict=True)}


def _moment(at_ms: int | None) -> str | None:
    return None if at_ms is None else datetime.fromtimestamp(at_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
