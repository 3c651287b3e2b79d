"""Runs the migrations on the connection that it is given, one process at a time."""

import sqlalchemy as sa
from alembic import context

# Any number will do, as long as every db_sink asks for the same.
_LOCK = 7_216_413_305

connection: sa.Connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=None)
with context.begin_transaction():
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    context.run_migrations()
