"""How the jobs of a tenant are done that do not say."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
additive = True


def upgrade() -> None:
    """Adds the column; programs of before do not name it, and every job was done online."""
    op.add_column("tenants", sa.Column("bulk_tier", sa.Text, nullable=False, server_default="online"))
