"""Create the table of transactions, with their predictions and labels."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table. The key is (trans_num, unix_time), because a trans_num can recur with a different time."""
    text = sa.Text()
    double: sa.Double[float] = sa.Double()
    timestamp = sa.TIMESTAMP(timezone=True)
    op.create_table(
        "transactions",
        sa.Column("trans_date_trans_time", sa.TIMESTAMP(), nullable=False, comment="UTC"),
        sa.Column("cc_num", sa.Numeric(19, 0), nullable=False, comment="up to 19 digits, beyond bigint"),
        sa.Column("merchant", text, nullable=False),
        sa.Column("category", text, nullable=False),
        sa.Column("amt", double, nullable=False),
        sa.Column("first", text, nullable=False),
        sa.Column("last", text, nullable=False),
        sa.Column("gender", text, nullable=False),
        sa.Column("street", text, nullable=False),
        sa.Column("city", text, nullable=False),
        sa.Column("state", text, nullable=False),
        sa.Column("zip", sa.Integer(), nullable=False),
        sa.Column("lat", double, nullable=False),
        sa.Column("long", double, nullable=False),
        sa.Column("city_pop", sa.BigInteger(), nullable=False),
        sa.Column("job", text, nullable=False),
        sa.Column("dob", sa.Date(), nullable=False),
        sa.Column("trans_num", text, nullable=False),
        sa.Column("unix_time", sa.BigInteger(), nullable=False, comment="epoch seconds, UTC"),
        sa.Column("merch_lat", double, nullable=False),
        sa.Column("merch_long", double, nullable=False),
        sa.Column("is_fraud", sa.SmallInteger(), comment="what the source says; once validated, what is true"),
        sa.Column("prediction", sa.SmallInteger(), nullable=False),
        sa.Column("model_name", text),
        sa.Column("model_version", text),
        sa.Column("probability", double, comment="of fraud, in the model's opinion"),
        sa.Column("predicted_at", timestamp),
        sa.Column("source_partition", sa.Integer(), comment="of topic_1"),
        sa.Column("source_offset", sa.BigInteger(), comment="of topic_1"),
        sa.Column("ingested_at", timestamp, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("validated_at", timestamp),
        sa.Column("validated_by", text),
        sa.PrimaryKeyConstraint("trans_num", "unix_time"),
    )


def downgrade() -> None:
    """Drop the table and all its rows."""
    op.drop_table("transactions")
