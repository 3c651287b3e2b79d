"""The table of transactions and how a batch gets into it."""

import io
import re
from collections.abc import Iterable
from datetime import UTC, datetime
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
_MIGRATIONS = Path(__file__).parent / "migrations"


class Row(NamedTuple):
    """What is stored of a record of topic_2."""

    prediction: Prediction
    provenance: Provenance


def connect(url: str) -> sa.Engine:
    """An engine on psycopg2, whichever PostgreSQL driver the URL names. Raises ValueError for any other database."""
    try:
        parsed = sa.make_url(url)
    except (SQLAlchemyError, ValueError):  # whose words quote the password
        raise ValueError("not a database URL") from None
    if "@" in (parsed.host or ""):  # it is a part of the password, which would be told as a host that is not found
        raise ValueError("not a database URL; an @ in a password is written as %40")
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError("not a PostgreSQL URL")
    return sa.create_engine(
        parsed.set(drivername="postgresql+psycopg2"),
        pool_size=1,
        pool_pre_ping=True,  # a restarted database is met here, not in the middle of a batch
        max_overflow=0,
        connect_args={
            "connect_timeout": 10,
            "application_name": "fraud-alarm db_sink",
            # a server that vanished without a word is noticed within half a minute
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,
        },
    )


def migrate(engine: sa.Engine) -> None:
    """Bring the schema to its newest version; several may do so at once. Raises Outage."""
    config = _config()
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except (SQLAlchemyError, psycopg2.Error) as error:
        hint = "; the tables' owner can: fraudctl migrate" if _sqlstate(error) == _DENIED else ""
        raise Outage(f"database: {reason(error)}{hint}") from None


def versions(engine: sa.Engine) -> tuple[str | None, str | None]:
    """The version of the schema, None before the first, and the newest that there is. Raises Outage."""
    try:
        with engine.connect() as connection:
            present = MigrationContext.configure(connection).get_current_revision()
    except (SQLAlchemyError, psycopg2.Error) as error:
        raise Outage(f"database: {reason(error)}") from None
    return present, ScriptDirectory.from_config(_config()).get_current_head()


def upsert(engine: sa.Engine, text: bytes) -> None:
    """Store rows in one transaction: COPY into a temporary table, from there into the table by identity.

    `text` is copy_text's. A row that is there already gets the newer prediction; a label that somebody confirmed stays
    as it is. Raises Poison if PostgreSQL rejects a row, Outage for everything else: a lost connection, a lock, a full
    disk, a missing table.
    """
    try:
        with engine.begin() as connection:
            cursor = connection.connection.cursor()
            cursor.execute(_STAGING)
            cursor.copy_expert(COPY, io.BytesIO(text), size=len(text))
            cursor.execute(_UPSERT)
    except (SQLAlchemyError, psycopg2.Error) as error:
        if _sqlstate(error).startswith(_REJECTED):
            raise Poison(f"database: {reason(error)}") from None
        raise Outage(f"database: {reason(error)}") from None


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config


_DENIED = "42501"  # SQLSTATE
_UNSEEN = ("42P01", "3F000")  # SQLSTATE: no such table, no schema at all
_COLUMNS = ", ".join(f'"{name}"' for name in (*FEATURES_2, *PROVENANCE))
# SQLSTATE: data exceptions, violated constraints and views' check options, and what a trigger raises.
_REJECTED = ("22", "23", "44", "P0001")
# A lock that somebody holds for long is an outage with a name, not a silence.
_STAGING = f"""
SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s';
CREATE TEMPORARY TABLE IF NOT EXISTS staging (LIKE {TABLE} INCLUDING DEFAULTS) ON COMMIT DELETE ROWS
"""
COPY = f"COPY staging ({_COLUMNS}) FROM STDIN (FORMAT csv, NULL 'null', ESCAPE '\\', ENCODING 'UTF8')"
_UPDATED = ", ".join(
    f'"{name}" = EXCLUDED."{name}"'
    for name in (*FEATURES_2, *PROVENANCE)
    if name not in ("trans_num", "unix_time", "is_fraud")
)
_UPSERT = f"""
INSERT INTO {TABLE} AS stored ({_COLUMNS}) SELECT {_COLUMNS} FROM staging
ON CONFLICT (trans_num, unix_time) DO UPDATE SET {_UPDATED},
  is_fraud = CASE WHEN stored.validated_at IS NULL THEN EXCLUDED.is_fraud ELSE stored.is_fraud END
"""  # noqa: S608 - nothing in it comes from outside


def copy_text(rows: Iterable[Row]) -> bytes:
    """The rows, the last of each identity, as CSV for COPY: JSON's numbers, strings and null, commas between them.

    https://www.postgresql.org/docs/current/sql-copy.html
    """
    last = {row.prediction.identity: row for row in rows}
    lines = list(map(stored, last.values()))
    text = b"\n".join(_as_json(lines)[1:-2].split(b"]\n["))
    return b"\n".join(map(_csv, lines)) if _UNLIKE_CSV(text) else text


def stored(row: Row) -> tuple[object, ...]:
    """What is stored of a row, in the order of FEATURES_2 and PROVENANCE."""
    name, version, probability, predicted_at_ms, partition, offset = astuple(row.provenance)
    return (*astuple(row.prediction), name, version, probability, _timestamp(predicted_at_ms), partition, offset)


_as_json = msgspec.json.Encoder().encode_lines  # a line each: [...]
_UNLIKE_CSV = re.compile(rb'\\[^\\"]').search  # CSV knows the escapes of quotes and of the backslash itself


def _csv(values: Iterable[object]) -> bytes:
    return ",".join(map(_csv_field, values)).encode()


def _csv_field(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
    return "null" if value is None else repr(value)


@lru_cache(1000)
def _timestamp(epoch_ms: int | None) -> str | None:
    """A batch of the predictor has one."""
    return None if epoch_ms is None else datetime.fromtimestamp(epoch_ms / 1000, UTC).isoformat()


def _sqlstate(error: Exception) -> str:
    return getattr(getattr(error, "orig", None) or error, "pgcode", None) or ""


def reason(error: Exception) -> str:
    """The database's own words without the values that they quote."""
    original = getattr(error, "orig", None) or error
    said = getattr(getattr(original, "diag", None), "message_primary", None)
    if said is None:  # it is about the connection: no values, but an address
        return f"{type(original).__name__}: {str(original).strip().partition(chr(10))[0]}"
    hint = " (or USAGE on schema public is missing)" if _sqlstate(error) in _UNSEEN else ""
    return without_digits(f"{type(original).__name__}: {said}") + hint
