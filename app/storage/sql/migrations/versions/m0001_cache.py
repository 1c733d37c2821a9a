"""The cache's level in SQL, landmarks, leases and facts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
additive = True
"""Programs of before work with it: it only adds what they do not know."""


def upgrade() -> None:
    """Makes the first tables."""
    op.create_table(
        "cache",
        sa.Column("key", sa.LargeBinary(32), primary_key=True),
        sa.Column("space", sa.Text, nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("made_at_s", sa.BigInteger, nullable=False),
        sa.Column("used_on_day", sa.Integer, nullable=False),
    )
    op.create_index("cache_by_use", "cache", ["used_on_day", "size_bytes"])
    op.create_index("cache_by_space", "cache", ["space"])
    op.create_index("cache_by_age", "cache", ["made_at_s"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE cache ALTER COLUMN value SET STORAGE EXTERNAL")  # vectors do not compress
        op.execute(
            "ALTER TABLE cache SET (toast_tuple_target = 8160)"
        )  # in the row up to 2,000 floats: a read is 25 % quicker
    op.create_table(
        "cache_epochs",
        sa.Column("space", sa.Text, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("not_before_s", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "landmarks",
        sa.Column("place", sa.Text, primary_key=True),
        sa.Column("vectors", sa.LargeBinary, nullable=False),
        sa.Column("probes", sa.Integer, nullable=False),
        sa.Column("accepted_at_s", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("taken_at_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "facts",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
