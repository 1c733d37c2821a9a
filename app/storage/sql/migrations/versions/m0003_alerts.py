"""Of which budget an alert told, and how those are found that nobody was told of."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
additive = True


def upgrade() -> None:
    """Adds the budget and the index."""
    op.add_column("alerts", sa.Column("budget_nano_usd", sa.BigInteger, nullable=False, server_default="0"))
    untold = sa.text("delivered_at_ms IS NULL")
    op.create_index("alerts_untold", "alerts", ["at_ms"], postgresql_where=untold, sqlite_where=untold)
