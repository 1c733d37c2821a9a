"""Tenants, projects and keys made at run time; the ledger, its sums, and what was told of allowances."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
additive = True


def upgrade() -> None:
    """Makes the tables of tenants and of money."""
    _directory()
    _ledger()
    for name, moment in (("usage_hours", "hour"), ("usage_days", "day")):
        _sums(name, moment, "tenant", "project", "model", "deployment", "cause")
        op.create_index(f"{name}_by_tenant", name, ["tenant", moment])
    _sums("usage_totals", "hour", "model", "deployment", "cause")
    _table(
        "spared", _key("minute", sa.Integer), _key("tenant"), _key("model"),
        *map(_number, ("hits", "joined", "tokens", "nano_usd")), _zero("unpriced_tokens"),
    )  # fmt: skip
    op.create_index("spared_by_tenant", "spared", ["tenant", "minute"])
    _table("spent", _key("account"), _key("span"), _number("nano_usd"))
    _table("replicas", _key("id"), _number("seen_at_ms"))
    _table(
        "alerts", _key("account"), _key("span"), _key("percent", sa.Integer), _number("at_ms"),
        _perhaps("delivered_at_ms"), _number("attempts", sa.Integer),
    )  # fmt: skip


def _directory() -> None:
    _table(
        "tenants", _key("name"), sa.Column("weight", sa.Float, nullable=False), *map(_text, ("priority", "models")),
        *map(_number, ("requests_per_minute", "tokens_per_minute")), _number("max_in_flight", sa.Integer),
        *map(_perhaps, ("day_nano_usd", "month_nano_usd")), *map(_text, ("cache_group", "webhook_url")),
        _number("created_at_ms"), _perhaps("deleted_at_ms"), _number("version"),
    )  # fmt: skip
    _table(
        "projects", _key("tenant"), _key("name"),
        *map(_perhaps, ("day_nano_usd", "month_nano_usd", "deleted_at_ms")), _number("version"),
    )  # fmt: skip
    _table(
        "api_keys", _key("id"), *map(_text, ("tenant", "project", "label")),
        sa.Column("digest", sa.LargeBinary(32), nullable=False), sa.Column("previous_digest", sa.LargeBinary(32)),
        _perhaps("previous_until_ms"), *map(_text, ("scopes", "models")),
        *map(_perhaps, ("day_nano_usd", "month_nano_usd")), _text("networks"), _number("created_at_ms"),
        *map(_perhaps, ("expires_at_ms", "revoked_at_ms")), _number("version"),
    )  # fmt: skip
    for table in ("tenants", "projects", "api_keys"):
        op.create_index(f"{table}_by_version", table, ["version"])
    op.create_index("api_keys_by_tenant", "api_keys", ["tenant"])
    _table("counters", _key("name"), _number("number"))


def _ledger() -> None:
    _table(
        "ledger", _key("call"), _key("part", sa.Integer), _number("at_ms"),
        *map(_text, ("replica", "tenant", "project", "key", "user", "model", "space", "deployment", "cause", "state")),
        _number("texts", sa.Integer), *map(_number, ("tokens_estimated", "tokens")),
        *map(_perhaps, ("price", "nano_usd")),
    )  # fmt: skip
    op.create_index("ledger_by_time", "ledger", ["at_ms"])
    left_open = sa.text("state = 'begun'")
    op.create_index("ledger_open", "ledger", ["replica"], postgresql_where=left_open, sqlite_where=left_open)
    uncertain = sa.text("state IN ('estimated', 'unconfirmed')")
    op.create_index(
        "ledger_uncertain", "ledger", ["at_ms", "call", "part"], postgresql_where=uncertain, sqlite_where=uncertain
    )


def _sums(name: str, moment: str, *by: str) -> None:
    sums = ("calls", "texts", "tokens", "nano_usd", "estimated_nano_usd", "unconfirmed_nano_usd", "unpriced_tokens")
    spared = ("hits", "joined", "spared_tokens", "spared_nano_usd", "spared_unpriced_tokens")
    _table(name, _key(moment, sa.Integer), *map(_key, by), *map(_number, sums), *map(_zero, spared))


def _table(name: str, *columns: sa.Column[Any]) -> None:
    op.create_table(name, *columns)


def _key(name: str, kind: Any = sa.Text) -> sa.Column[Any]:
    return sa.Column(name, kind, primary_key=True, autoincrement=False)


def _text(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False)


def _number(name: str, kind: Any = sa.BigInteger) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


def _zero(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _perhaps(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger)
