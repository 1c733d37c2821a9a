"""Hides nothing: every table that embedgate has, as its newest migration leaves them."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    literal_column,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeEngine

metadata = MetaData()

cache = Table(
    "cache",
    metadata,
    Column("key", LargeBinary(32), primary_key=True),
    Column("space", Text, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("made_at_s", BigInteger, nullable=False),
    Column("used_on_day", Integer, nullable=False),
    Index("cache_by_use", "used_on_day", "size_bytes"),
    Index("cache_by_space", "space"),
    Index("cache_by_age", "made_at_s"),
)
"""Sealed vectors by key, with the space's id, bytes with overhead, Unix second and the day since 1970 of last use."""

cache_epochs = Table(
    "cache_epochs",
    metadata,
    Column("space", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("not_before_s", BigInteger, nullable=False),
)
"""What was invalidated, by space id; `*` is all of them."""

landmarks = Table(
    "landmarks",
    metadata,
    Column("place", Text, primary_key=True),
    Column("vectors", LargeBinary, nullable=False),
    Column("probes", Integer, nullable=False),
    Column("accepted_at_s", BigInteger, nullable=False),
)
"""The accepted vectors of each Space's probes: float32 little-endian, one after the other."""

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("taken_at_ms", BigInteger, nullable=False),
)
"""When something that one replica does for all was last begun."""

facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
"""What is true of the whole database: the fingerprint of its secret, the programs that it suits."""


tenants = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True),
    Column("weight", Float, nullable=False),
    Column("priority", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("requests_per_minute", BigInteger, nullable=False),
    Column("tokens_per_minute", BigInteger, nullable=False),
    Column("max_in_flight", Integer, nullable=False),
    Column("day_nano_usd", BigInteger),
    Column("month_nano_usd", BigInteger),
    Column("cache_group", Text, nullable=False),
    Column("webhook_url", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("deleted_at_ms", BigInteger),
    Column("version", BigInteger, nullable=False),
    Column("bulk_tier", Text, nullable=False, server_default="online"),
    Index("tenants_by_version", "version"),
)
"""Tenants made at run time; `models` are separated by line feeds, an allowance that is NULL has no bound."""

projects = Table(
    "projects",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("day_nano_usd", BigInteger),
    Column("month_nano_usd", BigInteger),
    Column("deleted_at_ms", BigInteger),
    Column("version", BigInteger, nullable=False),
    Index("projects_by_version", "version"),
)
"""What a tenant divides its spending into."""

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("previous_digest", LargeBinary(32)),
    Column("previous_until_ms", BigInteger),
    Column("scopes", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("day_nano_usd", BigInteger),
    Column("month_nano_usd", BigInteger),
    Column("networks", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger),
    Column("revoked_at_ms", BigInteger),
    Column("version", BigInteger, nullable=False),
    Index("api_keys_by_tenant", "tenant"),
    Index("api_keys_by_version", "version"),
)
"""Keys by their public id: the keyed hash of the secret, and of the one before it while both are good."""

counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
)
"""Numbers that only go up: `directory` is the newest version of any tenant, project or key."""

uncertain: ColumnElement[bool] = literal_column("state IN ('estimated', 'unconfirmed')")
"""Rows of the ledger whose money the vendor did not say; spelt out, and no Boolean, so that their index is found."""

left_open: ColumnElement[bool] = literal_column("state = 'begun'")
"""Rows of the ledger that nobody has ended yet; spelt out for the same reason."""

untold: ColumnElement[bool] = literal_column("delivered_at_ms IS NULL")
"""Rows of `alerts` that the tenant does not know of; spelt out like these."""

still_open: ColumnElement[bool] = literal_column("status NOT IN ('failed', 'completed', 'expired', 'cancelled')")
"""Rows of `jobs` that are not over; spelt out like these."""

keyed: ColumnElement[bool] = literal_column("idempotency_key <> ''")
"""Rows of `jobs` whose caller named them; spelt out like these."""

left_to_do: ColumnElement[bool] = literal_column("done_at_ms IS NULL")
"""Rows of `job_tasks` that are not done; spelt out like these."""

has_owner: ColumnElement[bool] = literal_column("owner <> ''")
"""Rows of `job_tasks` that somebody works on; spelt out like these."""

ledger = Table(
    "ledger",
    metadata,
    Column("call", Text, primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("replica", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("user", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("space", Text, nullable=False),
    Column("deployment", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("texts", Integer, nullable=False),
    Column("tokens_estimated", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("price", BigInteger),
    Column("nano_usd", BigInteger),
    Index("ledger_by_time", "at_ms"),
    Index("ledger_open", "replica", postgresql_where=left_open, sqlite_where=left_open),
    Index("ledger_uncertain", "at_ms", "call", "part", postgresql_where=uncertain, sqlite_where=uncertain),
)
"""What was spent, a row for each part of a call. `state` is how it ended, or `begun`; money that is NULL: unknown."""

_USAGE = (
    "tenant",
    "project",
    "model",
    "deployment",
    "cause",
)
_SPARED = ("hits", "joined", "spared_tokens", "spared_nano_usd", "spared_unpriced_tokens")


def _usage(name: str, moment: str, by: tuple[str, ...] = _USAGE) -> Table:
    """Sums of the ledger by a span of time; what was spared is added to rows of no project, deployment and cause."""
    return Table(
        name,
        metadata,
        Column(moment, Integer, primary_key=True),
        *(Column(each, Text, primary_key=True) for each in by),
        Column("calls", BigInteger, nullable=False),
        Column("texts", BigInteger, nullable=False),
        Column("tokens", BigInteger, nullable=False),
        Column("nano_usd", BigInteger, nullable=False),
        Column("estimated_nano_usd", BigInteger, nullable=False),
        Column("unconfirmed_nano_usd", BigInteger, nullable=False),
        Column("unpriced_tokens", BigInteger, nullable=False),
        *(Column(each, BigInteger, nullable=False, server_default="0") for each in _SPARED),
        *([Index(f"{name}_by_tenant", "tenant", moment)] if "tenant" in by else []),
    )


usage_hours = _usage("usage_hours", "hour")
"""By hour since 1970. Of `nano_usd` parts were estimated or are unconfirmed; unpriced tokens are beside it."""

usage_days = _usage("usage_days", "day")
"""The same by day since 1970."""

usage_totals = _usage("usage_totals", "hour", ("model", "deployment", "cause"))
"""The same by hour, of all tenants together: what they all spent would else take a sum over each of them."""

spared = Table(
    "spared",
    metadata,
    Column("minute", Integer, primary_key=True),
    Column("tenant", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("hits", BigInteger, nullable=False),
    Column("joined", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("nano_usd", BigInteger, nullable=False),
    Column("unpriced_tokens", BigInteger, nullable=False, server_default="0"),
    Index("spared_by_tenant", "tenant", "minute"),
)
"""What was not bought, by minute since 1970; unpriced tokens would have cost nobody knows what, and are beside it."""

spent = Table(
    "spent",
    metadata,
    Column("account", Text, primary_key=True),
    Column("span", Text, primary_key=True),
    Column("nano_usd", BigInteger, nullable=False),
)
"""What an account spent in a UTC day (`2026-11-21`) or month (`2026-11`): what of the ledger a budget asks for."""

replicas = Table(
    "replicas",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seen_at_ms", BigInteger, nullable=False),
)
"""Who writes into the ledger: what one began that has not been seen for long is booked as unconfirmed."""

alerts = Table(
    "alerts",
    metadata,
    Column("account", Text, primary_key=True),
    Column("span", Text, primary_key=True),
    Column("percent", Integer, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("delivered_at_ms", BigInteger),
    Column("attempts", Integer, nullable=False),
    Column("budget_nano_usd", BigInteger, nullable=False, server_default="0"),
    Index("alerts_untold", "at_ms", postgresql_where=untold, sqlite_where=untold),
)
"""Which parts of which budgets were seen spent, and whether the tenant was told, in how many attempts."""


def _each(kind: type[TypeEngine[Any]], *names: str) -> list[Column[Any]]:
    return [Column(name, kind, nullable=False) for name in names]


_COUNTS = ("completed", "failed", "tokens", "texts", "cached")

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    *_each(Text, "tenant", "purpose", "filename"),
    *_each(BigInteger, "size_bytes", "created_at_ms"),
    Column("expires_at_s", BigInteger),
    Index("files_by_tenant", "tenant", "created_at_ms", "id"),
    Index("files_by_expiry", "expires_at_s"),
)
"""Files by id; what expired in 1970 was deleted. A row stays until the bytes are gone."""

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    *_each(Text, "tenant", "project", "key", "input_file_id", "metadata", "tier", "idempotency_key"),
    Column("window_s", BigInteger, nullable=False),
    Column("output_expires_after_s", BigInteger),
    Column("digest", LargeBinary, nullable=False),
    *_each(Text, "status", "ending", "model", "errors", "pause", "output_file_id", "error_file_id"),
    *_each(BigInteger, "total", *_COUNTS),
    Column("calls", Float, nullable=False),
    Column("nano_usd", BigInteger),
    Column("paused_until_ms", BigInteger),
    *_each(BigInteger, "created_at_ms", "expires_at_ms"),
    *(
        Column(f"{status}_at_ms", BigInteger)
        for status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    ),
    Index("jobs_by_tenant", "tenant", "created_at_ms", "id"),
    Index("jobs_open", "tenant", postgresql_where=still_open, sqlite_where=still_open),
    Index("jobs_by_key", "tenant", "idempotency_key", unique=True, postgresql_where=keyed, sqlite_where=keyed),
)
"""What was ordered and what became of it; `metadata` and `errors` are JSON, the counts those of its pieces."""

job_tasks = Table(
    "job_tasks",
    metadata,
    Column("job", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    *_each(Text, "kind", "owner"),
    *_each(BigInteger, "fence", "held_until_ms", "done_lines", "next_piece"),
    Column("note", LargeBinary, nullable=False),
    *(Column(name, BigInteger) for name in ("done_at_ms", "first_line", "lines", "offset_bytes", "size_bytes")),
    Index("job_tasks_left", "job", "kind", "number", postgresql_where=left_to_do, sqlite_where=left_to_do),
    Index("job_tasks_held", "job", postgresql_where=has_owner, sqlite_where=has_owner),
)
"""The parts of jobs that have not ended, and who works on them; those of a file in the order of its lines."""

job_pieces = Table(
    "job_pieces",
    metadata,
    Column("job", Text, primary_key=True),
    Column("task", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    *_each(BigInteger, "fence", "lines", *_COUNTS, "output_bytes", "error_bytes"),
    Column("calls", Float, nullable=False),
    Column("nano_usd", BigInteger),
)
"""What of the tasks is done: nothing else counts. Money that is NULL: unknown."""

job_leavings = Table("job_leavings", metadata, Column("job", Text, primary_key=True))
"""Jobs that are over whose pieces may still be there as blobs."""


class NowMs(FunctionElement[int]):
    """The database's clock in Unix milliseconds, an integer."""

    type = BigInteger()
    inherit_cache = True


@compiles(NowMs, "postgresql")
def _postgres_now(_: NowMs, __: SQLCompiler, **___: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS bigint)"


@compiles(NowMs, "sqlite")
def _sqlite_now(_: NowMs, __: SQLCompiler, **___: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


now_ms: ColumnElement[int] = NowMs()
now_s: ColumnElement[int] = now_ms // 1000
today: ColumnElement[int] = now_ms // 86_400_000


def insert(connection: AsyncConnection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that can say what to do about rows that are there already."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)
