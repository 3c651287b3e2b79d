"""Accesses the database without SQLAlchemy. Importing SQLAlchemy takes longer than a whole run of `fraudctl status`."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import psycopg2
from psycopg2.extras import NamedTupleCursor

import services.db_sink
from shared.errors import Outage, SettingsError
from shared.privacy import without_digits

_TIMEOUT_S = 10.0
_MIGRATIONS = Path(services.db_sink.__path__[0]) / "migrations" / "versions"
_PERMISSION_DENIED, _QUERY_CANCELED = "42501", "57014"  # SQLSTATE

# Matches the URLs that SQLAlchemy accepts in the db_sink. In a password, only @ must be percent-encoded.
_URL = re.compile(
    r"(?P<dialect>\w+)(\+\w+)?://((?P<user>[^:/]*)(:(?P<password>[^@]*))?@)?"
    r"(\[(?P<ipv6>[^/?]+)\]|(?P<host>[^/:?]+))?(:(?P<port>\d*))?(/(?P<dbname>[^?]*))?(\?(?P<query>.*))?",
    re.DOTALL,
).fullmatch


Query = Callable[..., Any]
"""A function that runs a query with parameters, and returns the first row of the result or None."""


class Address:
    """The host, port and name of the database, and the login for it."""

    def __init__(self, url: str) -> None:
        """Parse a database URL. Raises SettingsError if `url` is not a PostgreSQL URL."""
        found = _URL(url)
        if found is None or "@" in (found["host"] or ""):
            raise SettingsError("DATABASE_URL: not a database URL. In a password, write @ as %40")
        if found["dialect"] not in ("postgresql", "postgres"):
            raise SettingsError("DATABASE_URL: not a PostgreSQL URL")
        self.parameters: dict[str, str] = {name: values[-1] for name, values in parse_qs(found["query"] or "").items()}
        for name in ("user", "password", "dbname"):
            if found[name]:
                self.parameters[name] = found[name] if name == "dbname" else unquote(found[name])
        for name, value in (("host", found["ipv6"] or found["host"]), ("port", found["port"])):
            if value:
                self.parameters[name] = value

    @property
    def user(self) -> str:
        """The role that logs in."""
        return self.parameters.get("user", "")

    def __str__(self) -> str:
        host, port = (self.parameters.get(name, default) for name, default in (("host", "localhost"), ("port", "5432")))
        return f"{f'[{host}]' if ':' in host else host}:{port}/{self.parameters.get('dbname', self.user)}"


@contextmanager
def transaction(address: Address, *, timeout_s: float = _TIMEOUT_S) -> Iterator[Query]:
    """Open a database transaction, and yield a function that runs a query in this transaction.

    The function returns the first row of the result, or None.

    A statement fails if it takes longer than `timeout_s` seconds, including the time spent waiting for locks.
    Raises Outage if the database cannot be reached or a statement fails.
    """
    parameters: dict[str, Any] = {"connect_timeout": int(timeout_s), "application_name": "fraudctl"}
    try:
        connection = psycopg2.connect(**parameters | address.parameters)
    except (psycopg2.Error, UnicodeError) as error:
        raise Outage(f"Cannot reach the database {address}: {_refusal(error)}. {_REMEDY}") from None
    try:
        with closing(connection), connection, connection.cursor(cursor_factory=NamedTupleCursor) as cursor:

            def first(query: str, parameters: Mapping[str, object] | None = None) -> Any:
                cursor.execute(query, parameters)
                return cursor.fetchone()

            cursor.execute("SET LOCAL statement_timeout = %s", (f"{timeout_s * 1000:.0f}ms",))
            yield first
    except psycopg2.Error as error:
        raise Outage(f"The database {address} {_failure(error, address, timeout_s)}") from None


def schema(first: Query) -> str | None:
    """Return the version of the schema, or None if the database was never migrated."""
    if first("SELECT to_regclass('alembic_version') AS found").found is None:
        return None
    row = first("SELECT version_num FROM alembic_version")
    return None if row is None else str(row.version_num)


def newest_schema() -> str:
    """Return the schema version that `fraudctl migrate` produces.

    The name of each migration's file begins with the version that the migration produces.
    """
    return max(path.stem.partition("_")[0] for path in _MIGRATIONS.glob("[0-9]*_*.py"))


_REMEDY = "Check that it runs, and check the user, password, host and database name in DATABASE_URL."


def _refusal(error: Exception) -> str:
    """Return the first reason that libpq's message gives for a failed connection, without the address."""
    text = str(error).strip().partition("\n")[0].rpartition("failed: ")[2].removeprefix("FATAL:").strip()
    if "translate host name" in text:
        return "its host name is unknown"
    return text[:1].lower() + text[1:].removesuffix(".")


def _failure(error: psycopg2.Error, address: Address, timeout_s: float) -> str:
    if error.pgcode == _QUERY_CANCELED:
        return f"did not respond within {timeout_s:.0f} s. Look for a lock in pg_stat_activity, or for a slow disk."
    said = error.diag.message_primary
    if said is None:
        return "closed the connection. Check the server's log."
    if error.pgcode == _PERMISSION_DENIED:
        return f"refuses {address.user}: {without_digits(said)}. Grant the privileges in deploy/grants.sql."
    return f"failed: {without_digits(said)}"
