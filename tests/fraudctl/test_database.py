"""The database through psycopg2 alone: the same addresses and the same schema as SQLAlchemy and Alembic."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2

from fraudctl.database import Address, newest_schema, schema, transaction
from services.db_sink.table import connect, migrate, versions
from shared.errors import Outage, SettingsError


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ana:p%40ss@db.example.org:5433/fraud?sslmode=require",
        "postgresql+psycopg2://ana@db.example.org/fraud",
        "postgresql+asyncpg://ana:p/#?s:s@db.example.org:5433/fraud",
        "postgres://db.example.org",
        "postgresql:///fraud?host=/var/run/postgresql",
        "postgresql://ana:secret@[::1]:5433/fraud",
        "postgresql://ana:@db.example.org/fraud",
    ],
)
def test_an_address_is_read_as_sqlalchemy_reads_it(url: str) -> None:
    dialect: Any = PGDialect_psycopg2()  # type: ignore[no-untyped-call]
    _, wanted = dialect.create_connect_args(sa.make_url(url))

    assert Address(url).parameters == {name: str(value) for name, value in wanted.items()}


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "mysql://ana:hunter2@host/fraud",
        "postgresql://ana:hunter2@ss@host/fraud",
        "postgresql://a:hunter2@b:c/d",
    ],
)
def test_what_is_no_postgresql_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL: not a (PostgreSQL|database) URL") as refusal:
        Address(url)
    with pytest.raises(ValueError, match="not a"):
        connect(url)

    assert "hunter2" not in str(refusal.value)


def test_the_schema_is_the_one_that_alembic_knows(engine: sa.Engine) -> None:
    address = Address(engine.url.render_as_string(hide_password=False))
    with transaction(address) as first:
        assert schema(first) is None

    migrate(engine)

    with transaction(address) as first:
        assert (schema(first), newest_schema()) == versions(engine)


def test_what_the_database_refuses_is_named_with_the_remedy(engine: sa.Engine) -> None:
    url = engine.url
    for wrong, reason in (
        (url.set(port=9), "connection refused"),
        (url.set(host="nowhere.invalid"), "its host name is unknown"),
        (url.set(database="nowhere"), 'database "nowhere" does not exist'),
    ):
        address = Address(wrong.render_as_string(hide_password=False))
        with pytest.raises(Outage) as outage, transaction(address):
            pass
        assert str(outage.value).lower().startswith(f"cannot reach the database {address}: {reason.lower()}")
        assert "Check that it runs" in str(outage.value)
        assert "\n" not in str(outage.value)
