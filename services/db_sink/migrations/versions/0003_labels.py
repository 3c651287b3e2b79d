"""Add a history of label changes, and an index that finds confirmed rows without a table scan."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_CONFIRMED = "transactions_confirmed"


def upgrade() -> None:
    """Create the history and the index.

    The index covers only confirmed rows, so storing unconfirmed rows costs nothing extra.
    """
    op.create_table(
        "label_changes",
        sa.Column("id", sa.BigInteger(), sa.Identity(), primary_key=True),
        sa.Column("trans_num", sa.Text(), nullable=False),
        sa.Column("unix_time", sa.BigInteger(), nullable=False),
        sa.Column("was_fraud", sa.SmallInteger(), comment="the label before, whoever gave it"),
        sa.Column("was_validated_by", sa.Text(), comment="null if nobody had confirmed it"),
        sa.Column("is_fraud", sa.SmallInteger(), nullable=False),
        sa.Column("changed_by", sa.Text(), nullable=False),
        sa.Column("changed_at", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
    )
    op.create_index("label_changes_identity", "label_changes", ["unix_time", "trans_num"])
    op.create_index(
        _CONFIRMED, "transactions", ["unix_time", "trans_num"], postgresql_where=sa.text("validated_at IS NOT NULL")
    )


def downgrade() -> None:
    """Drop the history and the index. The labels stay, but the history of their changes is lost."""
    op.drop_index(_CONFIRMED, "transactions")
    op.drop_table("label_changes")
