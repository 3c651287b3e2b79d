"""The identity's index with the time first: new rows meet at its end, however many there are."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A `trans_num` is random: an index that begins with it is written all over."""
    _identity("unix_time", "trans_num")


def downgrade() -> None:
    """As it was."""
    _identity("trans_num", "unix_time")


def _identity(*columns: str) -> None:
    op.drop_constraint("transactions_pkey", "transactions", type_="primary")
    op.create_primary_key("transactions_pkey", "transactions", list(columns))
