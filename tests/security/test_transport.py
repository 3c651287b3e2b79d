"""TLS and logins on a real Apache Kafka, PostgreSQL and mail server; certificates of the tests' own."""

import json
import os
import ssl
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest
import sqlalchemy as sa
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from certificates import Authority
from command_line import call
from confluent_kafka.admin import ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion  # type: ignore[attr-defined]
from conftest import Rig, make_rig, until
from pipeline import pipeline
from secured import OWNER, SecuredKafka, SecuredPostgres, password_of, programs_with_tls

from rehearsal.stack import RECIPIENT, SENDER
from sandbox.mailbox import Mailbox
from sandbox.processes import free_port
from sandbox.registry import Registry
from services.alerter.mail import Mailer
from services.db_sink.table import connect, migrate
from shared.errors import Outage
from shared.kafka import topics

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240), pytest.mark.server]

WRONG = "not-this-one"
OPEN = {"security_protocol": "PLAINTEXT", "sasl_mechanisms": None, "sasl_username": None, "sasl_password": None}


def written(path: Path, properties: dict[str, str]) -> str:
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    return str(path)


@pytest.mark.parametrize("listener", ["PLAIN", "MTLS"])
def test_every_transaction_gets_through(
    tmp_path: Path,
    secured: SecuredKafka,
    listener: str,
    environment: dict[str, str],
    engine: sa.Engine,
    registry: Registry,
    mailbox: Mailbox,
) -> None:
    exactly_once = environment | {"DELIVERY": "exactly_once"}
    rig = make_rig(tmp_path, secured.properties(listener), exactly_once, embedded=False)
    with pipeline(rig, engine=engine, registry=registry, mailbox=mailbox) as running:
        running.stream(300)

        assert set(running.stop(10).values()) == {0}
        for log in running.logs().values():
            assert password_of(OWNER) not in log


@pytest.mark.usefixtures("forking")
def test_the_ledger_of_the_demo_balances(tmp_path: Path, trained_directory: Path, secured: SecuredKafka) -> None:
    properties = written(tmp_path / "own.properties", secured.properties("SCRAM"))
    report = tmp_path / "report.json"

    done = call(
        *("demo", "--broker", properties, "--transactions", "300", "--rate", "0", "--fraud-rate", "0.05"),
        *("--report", report, "--work-dir", trained_directory),
        cwd=tmp_path,
        environment=os.environ,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(report.read_text())
    assert figures["topic_1"] == figures["topic_2"] == figures["rows"] == 300
    assert figures["mailed_frauds"] == figures["predicted_frauds"] > 0
    for log in (trained_directory / "logs").iterdir():
        assert password_of(OWNER) not in log.read_text()


@pytest.fixture
def secured_rig(tmp_path: Path, secured: SecuredKafka, environment: dict[str, str]) -> Iterator[Rig]:
    """The services, with nobody but the broker at their other ends."""
    owner = secured.properties("PLAIN")
    topics.create(owner, ["topic_1", "topic_2"])
    settings = {"BACKOFF_INITIAL_SECONDS": "0.5", "DELIVERY": "exactly_once", "JOURNAL_DIRECTORY": str(tmp_path / "j")}
    rig = Rig(tmp_path, owner, environment | settings, "topic_1", "topic_2")
    yield rig
    for process in rig.processes:
        process.kill()


def troubles(log: str) -> list[str]:
    """What an operator would look at, but for the API, which is away."""
    return [line for line in log.splitlines() if "level='info'" not in line and "reason='payments API" not in line]


@pytest.mark.parametrize(
    ("listener", "changes", "said"),
    [
        ("PLAIN", {"sasl_password": WRONG}, "Authentication failed: Invalid username or password"),
        ("SCRAM", {"sasl_password": WRONG}, "invalid credentials with SASL mechanism SCRAM-SHA-512"),
        (
            "PLAIN",
            {"ssl_ca_location": "foreign"},
            "its certificate is not accepted: unable to get local issuer certificate",
        ),
        ("EXPIRED", {}, "its certificate is not accepted: certificate has expired"),
        ("ELSEWHERE", {}, "certificate is not valid for"),
        (
            "MTLS",
            {"ssl_certificate_location": None, "ssl_key_location": None},
            "the broker requires a client certificate that it trusts",
        ),
        ("PLAIN", {"sasl_mechanisms": "SCRAM-SHA-512"}, "supported mechanisms: PLAIN"),
        ("PLAIN", OPEN, "check security.protocol"),
    ],
    ids=["password", "SCRAM password", "CA", "expired", "host", "no certificate", "mechanism", "no TLS"],
)
def test_a_wrong_setting_is_one_line_without_a_credential_and_tried_again_until_the_end(
    secured_rig: Rig, secured: SecuredKafka, listener: str, changes: dict[str, str | None], said: str
) -> None:
    if changes.get("ssl_ca_location"):
        changes = {"ssl_ca_location": str(Authority(secured_rig.directory, "foreign").path)}
    properties = secured.properties(listener, **changes)
    path = written(secured_rig.directory / "wrong.properties", properties)
    names = ("producer", "alerter")
    services = {name: secured_rig.start(name, ready=False, CLIENT_PROPERTIES=path) for name in names}

    for name, process in services.items():
        until(lambda process=process: process.said(said), what=f"the line of the {name}")  # type: ignore[misc]
    time.sleep(1.5)  # some tries later

    for name, process in services.items():
        assert process.stop(10) == 0
        (line,) = [line for line in troubles(secured_rig.log(name)) if "event='stopped_in_outage'" not in line]
        assert said in line
        assert f"Kafka at {properties['bootstrap.servers']}: " in line
        for credential in (password_of(OWNER), WRONG):
            assert credential not in secured_rig.log(name)


def test_a_password_that_becomes_right_ends_the_outage(secured_rig: Rig, secured: SecuredKafka) -> None:
    properties = secured.properties("SCRAM", sasl_password=WRONG)
    path = written(secured_rig.directory / "early.properties", properties)
    services = [secured_rig.start(name, ready=False, CLIENT_PROPERTIES=path) for name in ("producer", "alerter")]
    for each in services:
        until(lambda each=each: each.said("invalid credentials"), what="the outage")  # type: ignore[misc]

    def let_in(password: str) -> None:
        admin = secured.admin()
        login = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        for done in admin.alter_user_scram_credentials(
            [UserScramCredentialUpsertion(OWNER, login, password.encode())]
        ).values():
            done.result(15)

    let_in(WRONG)
    try:
        for each in services:
            until(lambda each=each: each.said("event='outage_over'"), what="its end")  # type: ignore[misc]
            assert each.stop(10) == 0
    finally:
        let_in(password_of(OWNER))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ssl_ca_location": "/nowhere/ca.pem"}, "ssl.ca.location"),
        ({"sasl_mechanisms": "ROT13"}, "Unsupported SASL mechanism: ROT13"),
        ({"security_protocol": "TLS"}, "security.protocol"),
        ({"sasl_password": None}, "SASL_PASSWORD: missing"),
    ],
)
def test_what_waiting_cannot_fix_ends_the_service_with_one_line(
    secured_rig: Rig, secured: SecuredKafka, changes: dict[str, str | None], said: str
) -> None:
    path = written(secured_rig.directory / "wrong.properties", secured.properties("PLAIN", **changes))

    process = secured_rig.start("alerter", ready=False, CLIENT_PROPERTIES=path)

    assert process.wait(20) == 2
    (line,) = troubles(secured_rig.log("alerter"))
    assert said in line
    assert password_of(OWNER) not in line


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[str]:
    """A PostgreSQL with TLS. Where it cannot run the test is skipped, in CI failed."""
    if programs_with_tls() is None:
        reason = "no PostgreSQL in /usr/lib/postgresql: apt-get install postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with SecuredPostgres(tmp_path_factory.mktemp("postgres"), authority) as database:
        yield database.url.replace("fraud@", f"fraud:{WRONG}@")


def test_a_database_is_verified(postgres_url: str, authority: Authority, tmp_path: Path) -> None:
    foreign = Authority(tmp_path, "foreign")
    verified = f"{postgres_url}?sslmode=verify-full&sslrootcert="
    elsewhere = f"{verified}{authority.path}&hostaddr=127.0.0.1".replace("@127.0.0.1", "@db.elsewhere.example")

    migrate(connect(f"{verified}{authority.path}"))
    for url, said in (
        (f"{verified}{foreign.path}", "certificate verify failed"),
        (elsewhere, 'does not match host name "db.elsewhere.example"'),
        (f"{verified}/nowhere/ca.pem", 'root certificate file "/nowhere/ca.pem" does not exist'),
    ):
        with pytest.raises(Outage) as outage:
            migrate(connect(url))
        assert said in str(outage.value)
        assert "\n" not in str(outage.value)
        assert WRONG not in str(outage.value)


class Keeper:
    """A mail server's inside."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        self.kept.append(bytes(envelope.content or b""))
        return "250 OK"


def test_mail_over_implicit_tls(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = EmailMessage()
    message["From"], message["To"] = SENDER, RECIPIENT
    keeper = Keeper()

    def send(certificate: Path, *, trusted: Path) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server = Controller(keeper, hostname="127.0.0.1", port=free_port(), ssl_context=context)
        server.start()
        try:
            mailer = Mailer(host="127.0.0.1", port=server.port, tls="implicit", timeout_s=20)
            mailer.send(message)
            mailer.close()
        finally:
            server.stop()

    own = authority.server("mail")
    for certificate, trusted, said in (
        (own, Authority(tmp_path, "foreign").path, "unable to get local issuer certificate"),
        (authority.server("old", expired=True), authority.path, "certificate has expired"),
        (authority.server("other", host="mail.elsewhere.example"), authority.path, "IP address mismatch"),
    ):
        with pytest.raises(Outage, match=said):
            send(certificate, trusted=trusted)
    assert not keeper.kept
    send(own, trusted=authority.path)
    assert len(keeper.kept) == 1
