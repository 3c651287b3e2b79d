"""topic_2 to e-mail, with a real SMTP server."""

import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from confluent_kafka import Producer
from conftest import Rig, dead_letter_topic, make_transactions, until

from sandbox.mailbox import Mailbox, ReceivedMail, messages
from sandbox.processes import free_port
from sandbox.stack import RECIPIENT, SENDER
from services.alerter.mail import Mailer, compose, message_id
from shared.errors import Outage, Poison
from shared.kafka import Headers
from shared.provenance import Provenance, to_headers
from shared.records import Prediction, Transaction, encode_prediction

PROVENANCE = Provenance("fraud", "3", 0.97312, 1730134684025, 0, 0)


def predicted(transaction: Transaction, label: int = 1, **changes: object) -> Prediction:
    values = {name: getattr(transaction, name) for name in Transaction.__struct_fields__} | changes
    return Prediction(**values, prediction=label)


def put_predictions(rig: Rig, batch: list[tuple[Transaction, int]]) -> None:
    producer = Producer({**rig.properties, "log_level": 0})
    headers: Headers = to_headers(PROVENANCE)
    for transaction, label in batch:
        producer.produce(rig.topic_2, value=encode_prediction(transaction, label), key=transaction.key, headers=headers)
    assert producer.flush(20) == 0


def received(mailbox: Mailbox, count: int, *, timeout_s: float = 30.0) -> list[ReceivedMail]:
    until(lambda: len(list(messages(mailbox.directory))) >= count, timeout_s=timeout_s, what=f"{count} mails")
    return list(messages(mailbox.directory))


def text_of(message: EmailMessage, kind: str) -> str:
    body = message.get_body((kind,))
    assert body is not None
    return str(body.get_content())


def test_every_fraud_is_mailed_once_and_nothing_else(rig: Rig, mailbox: Mailbox) -> None:
    batch = [(each, int(number % 5 == 0)) for number, each in enumerate(make_transactions(60))]
    put_predictions(rig, batch)
    rig.start("alerter", SMTP_PORT=str(mailbox.port))

    mails = received(mailbox, 12)

    wanted = {message_id(each.identity, sender=SENDER) for each, label in batch if label}
    assert sorted(mail.message["Message-ID"] for mail in mails) == sorted(wanted)


def test_the_mail_says_what_an_analyst_needs_and_no_more(rig: Rig, mailbox: Mailbox) -> None:
    (transaction,) = make_transactions(1)
    fraud = predicted(transaction, amt=1147.91, merchant="fraud_Kihn, Abernathy and Douglas", cc_num=4497913965510030)
    put_predictions(rig, [(fraud, 1)])
    rig.start("alerter", SMTP_PORT=str(mailbox.port))

    (mail,) = received(mailbox, 1)

    message = mail.message
    assert message["Subject"] == "Fraud alert: $1,147.91 at Kihn, Abernathy and Douglas (card ending 0030)"
    assert (message["From"], message["To"]) == (SENDER, RECIPIENT)
    assert message["Auto-Submitted"] == "auto-generated"
    assert abs(message["Date"].datetime.timestamp() - time.time()) < 60
    for kind in ("plain", "html"):
        text = text_of(message, kind)
        for shown in (
            "$1,147.91",
            "Kihn, Abernathy and Douglas",
            fraud.category.replace("_", " "),
            f"{fraud.city}, {fraud.state}",
            f"{fraud.trans_date_trans_time} UTC",
            "**** 0030",
            "97.3%",
            "fraud version 3",
            fraud.trans_num,
        ):
            assert shown in text
    raw = mail.path.read_text()
    assert "4497913965510030" not in raw
    assert fraud.dob not in raw
    assert "4497913965510030" not in rig.log("alerter")


def test_markup_and_line_breaks_are_inert() -> None:
    (transaction,) = make_transactions(1)
    nasty = predicted(transaction, merchant='fraud_<script>alert("x")</script>\r\nBcc: all@example.org', city="A\nB")

    message = compose(nasty, PROVENANCE, sender=SENDER, recipients=[RECIPIENT], now=datetime.now(UTC))

    assert message["Bcc"] is None
    assert "\n" not in message["Subject"]
    assert "<script>" not in text_of(message, "html")
    assert "A B" in text_of(message, "plain")


def test_message_ids_are_stable_and_always_valid() -> None:
    assert message_id(("3cb54a48", 1730134684), sender="a@bank.example") == "<3cb54a48.1730134684@bank.example>"
    odd = message_id(("<x>\r\n y", 1), sender="a@bank.example")
    assert odd == message_id(("<x>\r\n y", 1), sender="a@bank.example")
    assert not set(odd[1:-1]) & set("<> \r\n")


def test_while_the_mail_server_is_away_nothing_is_lost_or_dead(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.stop()
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), BACKOFF_MAX_SECONDS="0.5")
    put_predictions(rig, [(each, 1) for each in make_transactions(5)])
    until(lambda: "event='outage'" in rig.log("alerter"), what="the outage in the log")
    assert process.running

    mailbox.start()

    assert len({mail.message["Message-ID"] for mail in received(mailbox, 5)}) == 5
    assert "event='outage_over'" in rig.log("alerter")
    assert "dead_letters=1" not in rig.log("alerter")


def test_rubbish_is_kept_and_the_next_fraud_is_mailed(rig: Rig, mailbox: Mailbox) -> None:
    rig.put(rig.topic_2, [b"rubbish"])
    put_predictions(rig, [(make_transactions(1)[0], 1)])
    rig.start("alerter", SMTP_PORT=str(mailbox.port))

    received(mailbox, 1)

    assert rig.read(dead_letter_topic(rig.topic_2), 1)[0].value() == b"rubbish"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a self-signed certificate for localhost, in one file."""
    path = tmp_path / "server.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            *subject,
            "-keyout",
            path,
            "-out",
            path,
        ],
        check=True,
        capture_output=True,
    )
    return path


def test_starttls_and_login(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (transaction,) = make_transactions(1)
    message = compose(predicted(transaction), PROVENANCE, sender=SENDER, recipients=[RECIPIENT], now=datetime.now(UTC))
    with Mailbox(tmp_path / "secure", login=("alarm", "secret"), certificate=certificate) as server:

        def mailer(password: str, host: str = "localhost") -> Mailer:
            return Mailer(host=host, port=server.port, tls="starttls", username="alarm", password=password)

        with pytest.raises(Outage, match="certificate verify failed"):
            mailer("secret").send(message)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(Outage, match=r"Hostname mismatch|IP address mismatch"):
            mailer("secret", host="127.0.0.1").send(message)
        with pytest.raises(Outage, match="mail server: 535") as refusal:
            mailer("wrong").send(message)
        assert "wrong" not in str(refusal.value)
        mailer("secret").send(message)

        assert len(received(server, 1)) == 1


def test_a_connection_that_the_server_closed_is_opened_again(mailbox: Mailbox) -> None:
    mailer = Mailer(host="127.0.0.1", port=mailbox.port, tls="none")
    for transaction in make_transactions(2):
        message = compose(
            predicted(transaction), PROVENANCE, sender=SENDER, recipients=[RECIPIENT], now=datetime.now(UTC)
        )
        mailer.send(message)
        mailbox.stop()
        mailbox.start()

    assert len(received(mailbox, 2)) == 2


@pytest.fixture
def refusing() -> Iterator[Callable[[str], int]]:
    """A mail server that answers every message with this line; returns its port."""
    servers: list[Controller] = []

    def start(answer: str) -> int:
        class Handler:
            async def handle_DATA(self, *_: object) -> str:
                return answer

        servers.append(Controller(Handler(), hostname="127.0.0.1", port=free_port()))
        servers[-1].start()
        return servers[-1].port

    yield start
    for server in servers:
        server.stop()


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("451 4.3.0 Try again later", Outage),
        ("550 5.4.5 Daily user sending limit exceeded", Outage),
        ("550 5.7.1 Sender not allowed", Outage),
        ("554 5.6.0 Message content rejected", Poison),
        ("552 5.3.4 Message too big", Poison),
        ("554 Transaction failed", Poison),
    ],
)
def test_a_refusal_is_about_this_message_or_about_all(
    refusing: Callable[[str], int], answer: str, verdict: type[Exception]
) -> None:
    (transaction,) = make_transactions(1)
    message = compose(predicted(transaction), PROVENANCE, sender=SENDER, recipients=[RECIPIENT], now=datetime.now(UTC))
    mailer = Mailer(host="127.0.0.1", port=refusing(answer), tls="none")

    with pytest.raises(verdict, match="mail server: " + answer[:3]):
        mailer.send(message)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"ALERT_TO": "somebody"}, "ALERT_TO"),
        ({"ALERT_TO": "a@"}, "ALERT_TO"),
        ({"ALERT_TO": ","}, "ALERT_TO"),
        ({"ALERT_FROM": "Fraud Alarm"}, "ALERT_FROM"),
        ({"SMTP_PASSWORD": "gehe\u00efm"}, "SMTP_PASSWORD"),
        ({"BACKOFF_INITIAL_SECONDS": "0"}, "BACKOFF_INITIAL_SECONDS"),
    ],
)
def test_a_wrong_setting_is_named_at_the_start(rig: Rig, wrong: dict[str, str], named: str) -> None:
    process = rig.start("alerter", ready=False, **wrong)

    assert process.wait(20) == 2
    assert process.last_line().startswith(f"alerter: {named}: ")
    assert "gehe" not in rig.log("alerter")
