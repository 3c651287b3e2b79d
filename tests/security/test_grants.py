"""The database's roles: each may do what deploy/grants.sql gives it, and nothing else."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from command_line import call
from conftest import make_transactions

from fraudctl import export, labels
from sandbox.postgres import _binaries
from services.db_sink.table import Row, connect, copy_text, migrate, upsert, versions
from shared.errors import Outage
from shared.provenance import Provenance
from shared.records import Prediction, Transaction

pytestmark = pytest.mark.xdist_group("logins")  # roles belong to the whole server
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

    def holds(self, condition: str) -> bool:
        with self.owner.connect() as connection:
            return bool(connection.execute(sa.text(f"SELECT {condition}")).scalar_one())

    def psql(self, role: str) -> subprocess.CompletedProcess[str]:
        """Run the file as its head says."""
        program, url = shutil.which("psql", path=f"{_binaries()}:{os.defpath}"), self.owner.url
        if program is None:
            pytest.skip("no psql")
        server = ["-X", "-h", str(url.host), "-p", str(url.port), "-U", role, "-d", str(url.database)]
        return subprocess.run([program, *server, "-f", GRANTS], capture_output=True, text=True, check=False)

    def fraudctl(self, role: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return call(*arguments, cwd=Path.cwd(), environment={**os.environ, "DATABASE_URL": self.url(role)})


def statements() -> list[str]:
    """What the file has between BEGIN and COMMIT."""
    lines = [line for line in GRANTS.read_text().splitlines() if not line.startswith(("--", "\\"))]
    first, *found, last = re.findall(r"\s*((?:\$\$.*?\$\$|[^;$])+);", "\n".join(lines), re.DOTALL)
    assert (first, last) == ("BEGIN", "COMMIT")
    return found


@pytest.fixture
def ungranted(engine: sa.Engine) -> Iterator[Granted]:
    """The tables and the roles, which have no rights yet."""
    made = Granted(engine)
    migrate(engine)
    for role in ROLES:
        made.run(f"CREATE ROLE {role} LOGIN")
    yield made
    for role in ROLES:
        if made.holds(f"to_regrole('{role}') IS NOT NULL"):
            made.run(f"DROP OWNED BY {role}")
            made.run(f"DROP ROLE {role}")


@pytest.fixture
def granted(ungranted: Granted) -> Granted:
    for statement in statements():
        ungranted.run(statement)
    return ungranted


_CLOSED = "NOT has_database_privilege('public', current_database(), 'CONNECT, TEMPORARY')"
_STORES = "has_table_privilege('db_sink', 'transactions', 'INSERT')"


def test_psql_runs_the_file(ungranted: Granted) -> None:
    done = ungranted.psql(str(ungranted.owner.url.username))

    assert (done.returncode, done.stderr) == (0, "")
    assert ungranted.holds(_CLOSED)
    assert ungranted.holds(_STORES)


def test_without_a_role_psql_fails_and_nothing_is_granted(ungranted: Granted) -> None:
    ungranted.run("DROP ROLE exporter")

    done = ungranted.psql(str(ungranted.owner.url.username))

    assert done.returncode != 0
    assert 'role "exporter" does not exist' in done.stderr
    assert not ungranted.holds(_CLOSED)
    assert not ungranted.holds(_STORES)


@pytest.mark.parametrize("closed_before", [False, True])
def test_an_owner_of_the_tables_but_not_the_database_is_reported(ungranted: Granted, closed_before: bool) -> None:
    ungranted.run("CREATE ROLE tables LOGIN")
    try:
        ungranted.run('GRANT CONNECT ON DATABASE :"DBNAME" TO tables')
        ungranted.run("GRANT USAGE ON SCHEMA public TO tables")
        for table in ("alembic_version", "transactions", "label_changes"):
            ungranted.run(f"ALTER TABLE {table} OWNER TO tables")
        if closed_before:
            ungranted.run('REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC')
            ungranted.run("REVOKE ALL ON SCHEMA public FROM PUBLIC")

        done = ungranted.psql("tables")

        assert done.returncode != 0
        assert "run this as its owner" in done.stderr
        assert not ungranted.holds(_STORES)
    finally:
        ungranted.run("DROP OWNED BY tables")
        ungranted.run("DROP ROLE tables")


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

    with pytest.raises(Outage, match=r"permission denied for schema public.*\. Run fraudctl migrate") as outage:
        migrate(sink)
    assert "\n" not in str(outage.value)
    owner = granted.owner.url.username
    assert owner
    done = granted.fraudctl(owner, "migrate")

    assert (done.returncode, done.stdout) == (0, "the database schema is up to date\n"), done.stderr
    migrate(sink)
    sink.dispose()
