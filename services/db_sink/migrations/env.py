"""Runs the migrations on the connection in the config's attributes.

A lock makes other processes wait until the migrations are done.
"""

import sqlalchemy as sa
from alembic import context

# The key of the lock that all processes use. The number is arbitrary.
_LOCK = 7_216_413_305

connection: sa.Connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=None)
with context.begin_transaction():
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    context.run_migrations()
