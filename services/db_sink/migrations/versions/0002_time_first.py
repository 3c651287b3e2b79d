"""Put `unix_time` first in the primary key, so that new rows are added at the end of the key's index."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Put `unix_time` first. An index that begins with the random `trans_num` is written at random places."""
    _identity("unix_time", "trans_num")


def downgrade() -> None:
    """Put `trans_num` first again."""
    _identity("trans_num", "unix_time")


def _identity(*columns: str) -> None:
    op.drop_constraint("transactions_pkey", "transactions", type_="primary")
    op.create_primary_key("transactions_pkey", "transactions", list(columns))
