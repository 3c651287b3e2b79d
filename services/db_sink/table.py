"""Connects to the database, migrates its schema, and stores batches of rows in the table of transactions."""

import io
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import psycopg2
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from msgspec.structs import astuple
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import Outage, Poison
from shared.privacy import without_digits
from shared.provenance import Provenance
from shared.records import Prediction

TABLE = "transactions"
FEATURES_2: tuple[str, ...] = Prediction.__struct_fields__
PROVENANCE = ("model_name", "model_version", "probability", "predicted_at", "source_partition", "source_offset")
_LOCK_TIMEOUT_S = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MIGRATIONS = Path(__file__).parent / "migrations"


class Row(NamedTuple):
    """A record from topic_2, as stored in the table."""

    prediction: Prediction
    provenance: Provenance


def connect(url: str) -> sa.Engine:
    """Make a database engine that is not connected yet. The engine uses psycopg2, even if the URL names another driver.

    Raises ValueError if the URL is not the URL of a PostgreSQL database.
    """
    try:
        parsed = sa.make_url(url)
    except (SQLAlchemyError, ValueError):  # the messages of these exceptions quote the password
        raise ValueError("not a database URL") from None
    # An unescaped @ in the password puts part of the password into the host, which a connection error would quote.
    if "@" in (parsed.host or ""):
        raise ValueError("not a database URL; write an @ in the password as %40")
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError("not a PostgreSQL URL")
    return sa.create_engine(
        parsed.set(drivername="postgresql+psycopg2"),
        pool_size=1,
        pool_pre_ping=True,  # detects a restart of the database before a batch, not in the middle of a batch
        max_overflow=0,
        connect_args={
            "connect_timeout": 10,
            "application_name": "fraud-alarm db_sink",
            # Detect within half a minute that the server has disappeared without closing the connection.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,
        },
    )


def migrate(engine: sa.Engine) -> None:
    """Upgrade the schema to the newest version. Raises Outage if the upgrade fails.

    Several processes may call this at once.
    """
    config = _config()
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except (SQLAlchemyError, psycopg2.Error) as error:
        engine.dispose()
        hint = ". Run fraudctl migrate as the owner of the tables" if _sqlstate(error) == _DENIED else ""
        raise Outage(f"database: {reason(error)}{hint}") from None


def versions(engine: sa.Engine) -> tuple[str | None, str | None]:
    """Return the database's schema version (None if there is no schema yet), and the newest schema version.

    Raises Outage if the database cannot be queried.
    """
    try:
        with engine.connect() as connection:
            present = MigrationContext.configure(connection).get_current_revision()
    except (SQLAlchemyError, psycopg2.Error) as error:
        raise Outage(f"database: {reason(error)}") from None
    return present, ScriptDirectory.from_config(_config()).get_current_head()


def upsert(engine: sa.Engine, text: bytes, *, keep: bool = True) -> None:
    """Store rows in one database transaction: COPY `text` into a temporary table, then upsert its rows by identity.

    `text` is the result of `copy_text`. A row that is already stored gets the newer prediction, but keeps a confirmed
    label. Without `keep`, everything is undone in the end. Raises Poison if PostgreSQL rejects a row. Raises Outage
    after any other failure, such as a lost connection, a lock timeout, a full disk or a missing table.
    """
    try:
        with engine.begin() as connection:
            cursor = connection.connection.cursor()
            cursor.execute(_STAGING)
            cursor.copy_expert(COPY, io.BytesIO(text), size=len(text))
            cursor.execute(_UPSERT)
            if not keep:
                connection.rollback()
    except (SQLAlchemyError, psycopg2.Error) as error:
        if _sqlstate(error).startswith(_REJECTED):
            raise Poison(f"database: {reason(error)}") from None
        engine.dispose()  # after a failover, a connection may stay read-only
        raise Outage(f"database: {reason(error)}") from None


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config


_DENIED = "42501"  # SQLSTATE: insufficient privilege
_NOT_FOUND = ("42P01", "3F000")  # SQLSTATE: undefined table, invalid schema name
_COLUMNS = ", ".join(f'"{name}"' for name in (*FEATURES_2, *PROVENANCE))
# SQLSTATE prefixes: data exceptions, constraint violations, check option violations, and errors raised by triggers.
_REJECTED = ("22", "23", "44", "P0001")
# The timeout turns a long wait for a lock into an outage, which is logged.
# The schema of the temporary table is named, because another schema with a table of that name may come first.
_STAGING = f"""
SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s';
CREATE TEMPORARY TABLE IF NOT EXISTS pg_temp.staging (LIKE {TABLE} INCLUDING DEFAULTS) ON COMMIT DELETE ROWS
"""
# E'...' means the same whatever standard_conforming_strings is.
COPY = f"COPY pg_temp.staging ({_COLUMNS}) FROM STDIN (FORMAT csv, NULL 'null', ESCAPE E'\\\\', ENCODING 'UTF8')"
_UPDATED = ", ".join(
    f'"{name}" = EXCLUDED."{name}"'
    for name in (*FEATURES_2, *PROVENANCE)
    if name not in ("trans_num", "unix_time", "is_fraud")
)
_UPSERT = f"""
INSERT INTO {TABLE} AS stored ({_COLUMNS}) SELECT {_COLUMNS} FROM pg_temp.staging
ON CONFLICT (trans_num, unix_time) DO UPDATE SET {_UPDATED},
  is_fraud = CASE WHEN stored.validated_at IS NULL THEN EXCLUDED.is_fraud ELSE stored.is_fraud END
"""  # noqa: S608 - only constants


def copy_text(rows: Iterable[Row]) -> bytes:
    """Format rows as CSV for COPY. If several rows have the same identity, only the last of them is kept.

    Numbers, strings and null are written as in JSON. The CSV format is described on this page:
    https://www.postgresql.org/docs/current/sql-copy.html
    """
    last = {row.prediction.identity: row for row in rows}
    lines = list(map(stored, last.values()))
    text = b"\n".join(_as_json(lines)[1:-2].split(b"]\n["))
    return b"\n".join(map(_csv, lines)) if _UNLIKE_CSV(text) else text


def stored(row: Row) -> tuple[object, ...]:
    """Return the values of a row: the values of FEATURES_2, followed by the values of PROVENANCE."""
    name, version, probability, predicted_at_ms, partition, offset = astuple(row.provenance)
    return (*astuple(row.prediction), name, version, probability, _timestamp(predicted_at_ms), partition, offset)


_as_json = msgspec.json.Encoder().encode_lines  # one JSON array per line
_UNLIKE_CSV = re.compile(rb'\\[^\\"]').search  # JSON escapes that COPY does not understand


def _csv(values: Iterable[object]) -> bytes:
    return ",".join(map(_csv_field, values)).encode()


def _csv_field(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
    return "null" if value is None else repr(value)


@lru_cache(1000)
def _timestamp(epoch_ms: int | None) -> str | None:
    """Format the time. The text is cached, because the predictor gives all rows of a batch the same time."""
    return None if epoch_ms is None else (_EPOCH + timedelta(milliseconds=epoch_ms)).isoformat()


def _sqlstate(error: Exception) -> str:
    return getattr(getattr(error, "orig", None) or error, "pgcode", None) or ""


def reason(error: Exception) -> str:
    """Return the database's error message, without the values that the message may quote."""
    original = getattr(error, "orig", None) or error
    message = getattr(getattr(original, "diag", None), "message_primary", None)
    if message is None:  # a connection error, which quotes the address but no values
        return str(original).strip().partition("\n")[0]
    hint = " (or USAGE on schema public is missing)" if _sqlstate(error) in _NOT_FOUND else ""
    return without_digits(f"{type(original).__name__}: {message}") + hint
