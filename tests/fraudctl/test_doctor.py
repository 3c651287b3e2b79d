"""fraudctl doctor: each thing that is set up wrongly makes the line about it fail, and no other."""

import email.utils
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import msgspec
import pytest
import sqlalchemy as sa
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType  # type: ignore[attr-defined]
from conftest import Rig, dead_letter_topic, make_transactions, until
from typer.testing import CliRunner

from fraudctl.__main__ import app
from sandbox.mailbox import Mailbox
from sandbox.payments_api import PaymentsApi
from sandbox.registry import Registry
from services.db_sink.table import migrate
from shared.kafka import topics
from shared.kafka.clients import consumer, producer
from shared.records import FEATURES

pytestmark = [pytest.mark.kafka, pytest.mark.xdist_group("logins")]

LOGIN = ("operator", "right-mail-password")
SECRETS = (LOGIN[1], "wrong-mail-password", "right-database-password", "wrong-database-password", "registry-password")
ALL = (
    "settings",
    "client.properties",
    "Kafka",
    "credentials",
    "topics",
    "ACLs",
    "MLflow",
    "champion",
    "database",
    "migrations",
    "privileges",
    "SMTP",
    "API contract",
    "clock skew",
)

Environment = dict[str, str]
Doctor = Callable[[Environment], tuple[int, dict[str, str]]]
Misconfigure = Callable[[Rig, sa.Engine], Environment]


@pytest.fixture(scope="module")
def api(session_directory: Path) -> Iterator[PaymentsApi]:
    with PaymentsApi("--seed", "1", log=session_directory / "doctor-api.log") as simulator:
        yield simulator


@pytest.fixture(scope="module")
def mail(session_directory: Path) -> Iterator[Mailbox]:
    with Mailbox(session_directory / "doctor-mail" / "mail", login=LOGIN) as server:
        yield server


@pytest.fixture
def stack(apache_rig: Rig, registry: Registry, engine: sa.Engine, mail: Mailbox, api: PaymentsApi) -> Rig:
    """All as it should be."""
    migrate(engine)
    topics.create(apache_rig.properties, [f"{apache_rig.topic_2}.challenger"], letters=False)
    # A new broker makes its topics of groups and transactions when it is first asked for any, and takes its time.
    producer(apache_rig.properties, transactional_id="first").init_transactions(60)
    reader = consumer(apache_rig.properties, group="first")
    reader.committed([TopicPartition(apache_rig.topic_1, 0)], timeout=60)
    reader.close()
    apache_rig.environment |= {
        "MLFLOW_TRACKING_URI": registry.uri.replace("http://", "http://somebody:registry-password@"),
        "DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "SMTP_PORT": str(mail.port),
        "SMTP_USERNAME": LOGIN[0],
        "SMTP_PASSWORD": LOGIN[1],
        "API_URL": f"{api.url}",
    }
    return apache_rig


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doctor:
    """Exit code, and the lines by what they are about; of several, the last."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
        monkeypatch.setenv(name, value)  # whatever other tests have left there
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    def call(environment: Environment) -> tuple[int, dict[str, str]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        done = CliRunner().invoke(app, ["doctor"])
        assert time.monotonic() - began < 25
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert not any(secret in done.stdout for secret in SECRETS)
        return done.exit_code, {line[9:].partition(": ")[0]: line for line in done.stdout.splitlines()}

    return call


def failed(lines: dict[str, str]) -> list[str]:
    return [what for what, line in lines.items() if line.startswith("failed")]


def test_where_all_is_well_every_line_says_so(stack: Rig, doctor: Doctor) -> None:
    code, lines = doctor(stack.environment)

    assert tuple(lines) == ALL
    assert [line for line in lines.values() if not line.startswith("ok")] == [lines["credentials"]]
    assert lines["credentials"] == "skipped  credentials: not needed with this security.protocol"
    assert code == 0


def no_properties(_stack: Rig, _engine: sa.Engine) -> Environment:
    return {"CLIENT_PROPERTIES": "nowhere.properties"}


def no_credentials(stack: Rig, _engine: sa.Engine) -> Environment:
    path = stack.directory / "client.properties"
    path.write_text(path.read_text() + "security.protocol=SASL_SSL\nsasl.mechanisms=PLAIN\n")
    return {}


def wrong_bootstrap(stack: Rig, _engine: sa.Engine) -> Environment:
    (stack.directory / "client.properties").write_text("bootstrap.servers=127.0.0.1:9\n")
    return {}


def missing_topic(stack: Rig, _engine: sa.Engine) -> Environment:
    name = dead_letter_topic(stack.topic_2)
    client = AdminClient(dict(stack.properties))
    client.delete_topics([name])[name].result()
    return {}


def compacted_topic(stack: Rig, _engine: sa.Engine) -> Environment:
    entry = ConfigEntry("cleanup.policy", "compact", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, stack.topic_1, incremental_configs=[entry])
    client = AdminClient(dict(stack.properties))
    client.incremental_alter_configs([resource])[resource].result()
    return {}


def wrong_registry(_stack: Rig, _engine: sa.Engine) -> Environment:
    return {"MLFLOW_TRACKING_URI": "http://somebody:registry-password@127.0.0.1:9"}


def no_champion(_stack: Rig, _engine: sa.Engine) -> Environment:
    return {"MODEL_NAME": "nobody"}


def no_schema(_stack: Rig, engine: sa.Engine) -> Environment:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0002'"))
    return {}


def no_privileges(_stack: Rig, engine: sa.Engine) -> Environment:
    with engine.begin() as connection:
        if not connection.execute(sa.text("SELECT FROM pg_roles WHERE rolname = 'reader'")).all():
            connection.execute(sa.text("CREATE ROLE reader LOGIN"))
        connection.execute(sa.text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"))
    return {"DATABASE_URL": str(engine.url.set(username="reader"))}


def wrong_mail_password(_stack: Rig, _engine: sa.Engine) -> Environment:
    return {"SMTP_PASSWORD": "wrong-mail-password"}


def no_starttls(_stack: Rig, _engine: sa.Engine) -> Environment:
    return {"SMTP_TLS": "starttls"}


def wrong_mail_port(_stack: Rig, _engine: sa.Engine) -> Environment:
    return {"SMTP_PORT": "9"}


def torn_secrets(stack: Rig, _engine: sa.Engine) -> Environment:
    (stack.directory / "secrets.env").write_bytes("MODEL_NAME=café\n".encode("latin-1"))
    return {}


def missing_setting(_stack: Rig, _engine: sa.Engine) -> Environment:
    return {"ALERT_TO": ""}


@pytest.mark.parametrize(
    ("misconfigure", "what", "said"),
    [
        (no_properties, "client.properties", "cannot read nowhere.properties: No such file"),
        (no_credentials, "credentials", "SASL_USERNAME: missing"),
        (
            wrong_bootstrap,
            "Kafka",
            "Check that it runs, and check bootstrap.servers and security.protocol in client.properties.",
        ),
        (missing_topic, "topics", ".dlq: missing, or hidden by ACLs. Run fraudctl topics create"),
        (compacted_topic, "topics", "--add-config cleanup.policy=delete"),
        (
            wrong_registry,
            "MLflow",
            "Cannot reach MLflow at http://127.0.0.1:9: connection refused. Check that it runs, and check MLFLOW_",
        ),
        (
            no_champion,
            "champion",
            "no version of nobody has the alias champion. Run `fraudctl train` or `fraudctl promote VERSION`",
        ),
        (no_schema, "migrations", "the schema version is 0002, not 0003. Run `fraudctl migrate`"),
        (
            no_privileges,
            "privileges",
            "lacks INSERT, UPDATE. If reader is the db_sink's role, grant it the privileges in deploy/grants.sql.",
        ),
        (wrong_mail_password, "SMTP", "refuses the login (535). Check SMTP_USERNAME and SMTP_PASSWORD."),
        (no_starttls, "SMTP", "does not offer STARTTLS or a login. Set SMTP_TLS to what the server offers"),
        (
            wrong_mail_port,
            "SMTP",
            ": connection refused. Check that it runs, and check SMTP_HOST, SMTP_PORT and SMTP_TLS.",
        ),
        (
            missing_setting,
            "settings",
            "ALERT_TO: required, because SMTP_HOST is set. Fix these settings in secrets.env",
        ),
        (torn_secrets, "settings", "secrets.env: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_misconfiguration_is_named_with_its_remedy(
    stack: Rig,
    engine: sa.Engine,
    doctor: Doctor,
    misconfigure: Misconfigure,
    what: str,
    said: str,
) -> None:
    code, lines = doctor(stack.environment | misconfigure(stack, engine))

    assert failed(lines) == [what], "\n".join(lines.values())
    assert said in lines[what]
    assert code == 1


def test_a_wrong_database_password_is_named(stack: Rig, engine: sa.Engine, doctor: Doctor) -> None:
    with _role_with_a_password(engine, "careful", "right-database-password"):
        wrong = engine.url.set(username="careful", password="wrong-database-password")

        code, lines = doctor(stack.environment | {"DATABASE_URL": wrong.render_as_string(hide_password=False)})

    assert failed(lines) == ["database"], "\n".join(lines.values())
    assert "password authentication failed" in lines["database"]
    assert (
        "Check that it runs, and check the user, password, host and database name in DATABASE_URL." in lines["database"]
    )
    assert code == 1


def test_rights_that_cannot_be_asked_about_in_time_are_not_called_lacking(
    stack: Rig, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fraudctl.status.COORDINATOR_S", 0.001)

    code, lines = doctor(stack.environment)

    assert failed(lines) == ["ACLs"], "\n".join(lines.values())
    assert lines["ACLs"].startswith("failed   ACLs: cannot be checked: ")
    assert "kafka-acls" not in lines["ACLs"]
    assert code == 1


def test_an_api_that_answers_html_is_named(stack: Rig, api: PaymentsApi, doctor: Doctor) -> None:
    api.misbehave("html", share=1.0)
    try:
        code, lines = doctor(stack.environment)
    finally:
        api.misbehave()

    assert failed(lines) == ["API contract"], "\n".join(lines.values())
    assert "not JSON" in lines["API contract"]
    assert "Check API_URL, and the output of `curl http" in lines["API contract"]
    assert code == 1


def test_a_clock_that_is_wrong_is_named(stack: Rig, doctor: Doctor) -> None:
    with _api_of_an_hour_ago() as url:
        code, lines = doctor(stack.environment | {"API_URL": url})

    assert failed(lines) == ["clock skew"], "\n".join(lines.values())
    assert "payments API is 3" in lines["clock skew"]
    assert "s behind this machine. Set up NTP on both" in lines["clock skew"]
    assert code == 1


def _refused(url: sa.URL) -> bool:
    stranger = sa.create_engine(url, poolclass=sa.NullPool)
    try:
        stranger.connect().close()
    except sa.exc.OperationalError:
        return True
    return False


@contextmanager
def _role_with_a_password(engine: sa.Engine, name: str, password: str) -> Iterator[None]:
    """A role that PostgreSQL, which trusts everybody else here, lets in with its password alone."""
    with engine.begin() as connection:
        rules = Path(connection.execute(sa.text("SHOW hba_file")).scalar_one())
        connection.execute(sa.text(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
    before = rules.read_text()
    try:
        rules.write_text(f"host all {name} 127.0.0.1/32 scram-sha-256\n{before}")
        with engine.begin() as connection:
            connection.execute(sa.text("SELECT pg_reload_conf()"))
        until(lambda: _refused(engine.url.set(username=name, password="-")), what="the new rules")
        yield
    finally:
        rules.write_text(before)
        with engine.begin() as connection:
            connection.execute(sa.text("SELECT pg_reload_conf()"))
            connection.execute(sa.text(f"DROP ROLE {name}"))


@contextmanager
def _api_of_an_hour_ago() -> Iterator[str]:
    row = msgspec.to_builtins(make_transactions(1)[0])
    body = msgspec.json.encode({"columns": FEATURES, "index": [0], "data": [[row[name] for name in FEATURES]]})

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def date_time_string(self, _timestamp: float | None = None) -> str:
            return email.utils.formatdate(time.time() - 3600, usegmt=True)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/current-transactions"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_setting_that_nobody_reads_is_named(stack: Rig, doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "secrets.env").write_text("SMTP_PASWORD=hunter2\n")

    code, lines = doctor(stack.environment)

    assert code == 1
    assert lines["settings"] == (
        "failed   settings: SMTP_PASWORD, in secrets.env or in the environment, is not a setting."
        " Rename it to SMTP_PASSWORD, or remove it."
    )


def test_a_librarys_variable_is_known_and_a_place_where_it_is_not_read_is_reported(
    stack: Rig, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    (tmp_path / "secrets.env").write_text("AWS_SECRET_ACCESS_KEY=hunter2\nOMP_NUM_THREADS=1\n")

    code, lines = doctor(stack.environment | {"OMP_NUM_THREADS": "2"})

    assert code == 0
    assert lines["settings"] == (
        "ok       settings: secrets.env: AWS_SECRET_ACCESS_KEY: libraries read these variables from the environment"
        " only. Compose puts them there. In a checkout, export them."
    )
