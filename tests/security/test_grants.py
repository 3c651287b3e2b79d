"""The database's roles: each may do what deploy/grants.sql gives it, and nothing else."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import make_transactions

from fraudctl import export, labels
from services.db_sink.table import Row, connect, copy_text, migrate, upsert, versions
from shared.errors import Outage
from shared.provenance import Provenance
from shared.records import Prediction, Transaction

GRANTS = Path(__file__).parents[2] / "deploy" / "grants.sql"
ROLES = ("db_sink", "labels", "exporter")
_SECRET = "very-secret"


@dataclass
class Granted:
    """A database with the tables, the roles and their rights."""

    owner: sa.Engine

    def run(self, statement: str) -> None:
        with self.owner.begin() as connection:
            connection.execute(sa.text(statement.replace(':"DBNAME"', str(self.owner.url.database))))

    def url(self, role: str) -> str:
        return self.owner.url.set(username=role, password=_SECRET).render_as_string(hide_password=False)

    def fraudctl(self, role: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DATABASE_URL": self.url(role)}
        return subprocess.run(
            [sys.executable, "-m", "fraudctl", *arguments], env=environment, capture_output=True, text=True, check=False
        )


def statements() -> list[str]:
    lines = [line for line in GRANTS.read_text().splitlines() if not line.startswith("--")]
    return [statement.strip() for statement in "\n".join(lines).split(";") if statement.strip()]


@pytest.fixture
def granted(engine: sa.Engine) -> Iterator[Granted]:
    made = Granted(engine)
    migrate(engine)
    for role in ROLES:
        made.run(f"CREATE ROLE {role} LOGIN")
    for statement in statements():
        made.run(statement)
    yield made
    for role in ROLES:
        made.run(f"DROP OWNED BY {role}")
        made.run(f"DROP ROLE {role}")


def row(transaction: Transaction) -> Row:
    values = {name: getattr(transaction, name) for name in Transaction.__struct_fields__}
    return Row(Prediction(**values, prediction=1), Provenance("fraud", "1", 0.9, 1_730_134_684_025, 0, 0))


def use(role: str, engine: sa.Engine, directory: Path, known: Transaction) -> str:
    """Do what the role is there for. Returns what is said of a failure."""
    try:
        if role == "db_sink":
            migrate(engine)
            upsert(engine, copy_text([row(known)]))
        elif role == "labels":
            labels.newest(engine, unreviewed=True, predicted_fraud=False, limit=1)
            labels.confirm(engine, [labels.Label(known.trans_num, True, "ana")])
        else:
            export.export(
                engine, str(directory / "out.csv"), since=None, until=None, append=False, progress=lambda *_: None
            )
            labels.performance(engine)
            versions(engine)
    except Outage as outage:
        return str(outage)
    finally:
        engine.dispose()
    return ""


@pytest.mark.parametrize("role", ROLES)
def test_each_right_is_needed_and_what_lacks_is_named(granted: Granted, tmp_path: Path, role: str) -> None:
    (known,) = make_transactions(1)
    upsert(granted.owner, copy_text([row(known)]))

    def said_of_its_use() -> str:
        granted.run("UPDATE transactions SET validated_at = NULL, is_fraud = 0")
        return use(role, connect(granted.url(role)), tmp_path, known)

    assert said_of_its_use() == ""
    rights = [statement for statement in statements() if statement.endswith(f" TO {role}")]
    assert rights

    for right in rights:
        granted.run(right.replace("GRANT", "REVOKE").replace(f" TO {role}", f" FROM {role}"))
        said = said_of_its_use()
        granted.run(right)
        on = re.search(r" ON (?:DATABASE |SCHEMA )?(\S+) TO", right)
        assert on is not None
        name = str(granted.owner.url.database) if "DBNAME" in on[1] else on[1]
        assert name in said or re.sub(r"\d", "#", name) in said, (right, said)  # as everything that errors quote
        assert "permission denied" in said or "is missing" in said, right
        assert len(said.splitlines()) == 1
        assert _SECRET not in said

    assert said_of_its_use() == ""


def test_what_is_none_of_their_business_is_closed_to_them(granted: Granted) -> None:
    (known,) = make_transactions(1)
    upsert(granted.owner, copy_text([row(known)]))

    done = granted.fraudctl("exporter", "labels", "confirm", known.trans_num, "--fraud", "yes", "--by", "ana")
    assert done.returncode == 2
    assert "permission denied" in done.stderr
    forbidden = {
        "exporter": ("UPDATE transactions SET is_fraud = 1", "DELETE FROM transactions", "CREATE TABLE own (id int)"),
        "db_sink": ("DELETE FROM transactions", "SELECT * FROM label_changes", "DROP TABLE transactions"),
        "labels": (
            "UPDATE transactions SET prediction = 0",
            "UPDATE label_changes SET changed_by = 'another'",
            "DELETE FROM label_changes",
            "DELETE FROM transactions",
        ),
    }
    for role, tries in forbidden.items():
        engine = connect(granted.url(role))
        for statement in tries:
            with (
                pytest.raises(sa.exc.ProgrammingError, match=r"permission denied|must be owner"),
                engine.begin() as own,
            ):
                own.execute(sa.text(statement))
        engine.dispose()
    for role in ("predictor", "producer", "alerter"):
        with pytest.raises(sa.exc.OperationalError, match=f'role "{role}" does not exist'):
            connect(granted.url(role)).connect()


def test_a_sink_whose_tables_are_old_names_who_brings_them_up_to_date(granted: Granted) -> None:
    granted.run("DROP TABLE label_changes")
    granted.run("DROP INDEX transactions_confirmed")
    granted.run("UPDATE alembic_version SET version_num = '0002'")
    sink = connect(granted.url("db_sink"))

    with pytest.raises(Outage, match=r"permission denied for schema public.*: fraudctl migrate") as outage:
        migrate(sink)
    assert "\n" not in str(outage.value)
    owner = granted.owner.url.username
    assert owner
    done = granted.fraudctl(owner, "migrate")

    assert (done.returncode, done.stdout) == (0, "the tables are up to date\n"), done.stderr
    migrate(sink)
    sink.dispose()
