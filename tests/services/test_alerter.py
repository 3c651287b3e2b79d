"""topic_2 to e-mail, with a real SMTP server."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.message import EmailMessage
from itertools import chain, repeat
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from confluent_kafka import Producer
from conftest import Rig, dead_letter_topic, make_transactions, until

from sandbox.mailbox import Mailbox, ReceivedMail, messages
from sandbox.processes import free_port
from sandbox.stack import RECIPIENT, SENDER
from services.alerter.__main__ import AlerterSettings, alert
from services.alerter.mail import Mailer, compose, message_id
from services.alerter.mailed import Mailed
from shared.dead_letters import Limit
from shared.errors import Outage, Poison
from shared.kafka import Headers
from shared.provenance import Provenance, to_headers
from shared.records import Prediction, Transaction, encode_prediction, encode_transaction

PROVENANCE = Provenance("fraud", "3", 0.97312, 1730134684025, 0, 0)


def predicted(transaction: Transaction, label: int = 1, **changes: object) -> Prediction:
    values = {name: getattr(transaction, name) for name in Transaction.__struct_fields__} | changes
    return Prediction(**values, prediction=label)


def put_predictions(rig: Rig, batch: list[tuple[Transaction, int]]) -> None:
    producer = Producer({**rig.properties, "log_level": 0})
    headers: Headers = to_headers(PROVENANCE)
    for transaction, label in batch:
        producer.produce(
            rig.topic_2,
            value=encode_prediction(encode_transaction(transaction), label),
            key=transaction.key,
            headers=headers,
        )
    assert producer.flush(20) == 0


def received(mailbox: Mailbox, count: int, *, timeout_s: float = 30.0) -> list[ReceivedMail]:
    until(lambda: len(list(messages(mailbox.directory))) >= count, timeout_s=timeout_s, what=f"{count} mails")
    return list(messages(mailbox.directory))


def alarms(count: int) -> list[EmailMessage]:
    return [
        compose(predicted(each), PROVENANCE, sender=SENDER, recipients=[RECIPIENT], now=datetime.now(UTC))
        for each in make_transactions(count)
    ]


def plain_mailer(port: int, *, timeout_s: float = 20.0) -> Mailer:
    return Mailer(host="127.0.0.1", port=port, tls="none", timeout_s=timeout_s)


def message_ids(mails: Sequence[ReceivedMail]) -> list[str]:
    return sorted(str(mail.message["Message-ID"]) for mail in mails)


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


@pytest.mark.parametrize("bad_day", ["4xx", "hang"])
def test_while_the_mail_server_has_a_bad_day_nothing_is_lost_or_dead_or_mailed_twice(
    rig: Rig, mailbox: Mailbox, bad_day: str
) -> None:
    environment = {"SMTP_TIMEOUT_SECONDS": "1", "BACKOFF_INITIAL_SECONDS": "0.02", "BACKOFF_MAX_SECONDS": "0.1"}
    frauds = make_transactions(6)
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), **environment)
    put_predictions(rig, [(each, 1) for each in frauds[:3]])
    received(mailbox, 3)

    mailbox.misbehave(bad_day)
    put_predictions(rig, [(each, 1) for each in frauds[3:]])
    until(lambda: "event='outage'" in rig.log("alerter"), what="the outage in the log")
    mailbox.misbehave(None)
    received(mailbox, 6)

    assert process.stop() == 0
    wanted = sorted(message_id(each.identity, sender=SENDER) for each in frauds)
    assert message_ids(received(mailbox, 6)) == wanted
    assert "event='outage_over'" in rig.log("alerter")
    assert "event='dead_letters'" not in rig.log("alerter")


def test_a_recipient_who_is_gone_costs_the_others_nothing(rig: Rig, mailbox: Mailbox) -> None:
    mailbox.misbehave("5xx-one-recipient")
    frauds = make_transactions(2)
    put_predictions(rig, [(each, 1) for each in frauds])
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port), ALERT_TO=f"gone@fraud-alarm.example, {RECIPIENT}")

    mails = received(mailbox, 2)

    assert process.stop() == 0
    assert message_ids(mails) == sorted(message_id(each.identity, sender=SENDER) for each in frauds)
    assert {mail.message["X-Envelope-To"] for mail in mails} == {RECIPIENT}
    (first, *_) = [line for line in rig.log("alerter").splitlines() if "event='recipient_refused'" in line]
    assert "level='warning'" in first
    assert "recipient='gone@fraud-alarm.example'" in first
    assert "550" in first
    assert "event='dead_letters'" not in rig.log("alerter")


def test_a_mail_that_is_refused_for_good_is_kept_and_the_next_fraud_is_mailed(
    rig: Rig, refusing: Callable[..., int]
) -> None:
    first, second = make_transactions(2)
    batch = [encode_prediction(encode_transaction(each), 1) for each in (first, second)]
    rig.put(rig.topic_2, batch, key=b"one card")
    rig.start("alerter", SMTP_PORT=str(refusing("554 5.6.0 Message content rejected", "250 OK")))

    (letter,) = rig.read(dead_letter_topic(rig.topic_2), 1)

    assert letter.value() == batch[0]
    until(lambda: "event='alarm_mailed'" in rig.log("alerter"), what="the alarm")
    (line,) = [line for line in rig.log("alerter").splitlines() if "event='alarm_mailed'" in line]
    assert second.trans_num in line


def test_a_mail_server_that_refuses_one_after_the_other_is_not_taken_out_on_the_alarms(
    rig: Rig, mailbox: Mailbox, refusing: Callable[..., int]
) -> None:
    put_predictions(rig, [(each, 1) for each in make_transactions(40)])
    port = refusing("554 5.6.0 unwanted")
    process = rig.start("alerter", SMTP_PORT=str(port), BACKOFF_MAX_SECONDS="0.2", DEAD_LETTER_LIMIT_CONSECUTIVE="5")
    until(lambda: process.said("rows refused, it is not the rows"), what="a word on the mail server")
    assert process.stop() == 0

    rig.start("alerter", SMTP_PORT=str(mailbox.port))

    assert len(received(mailbox, 35)) >= 35


def test_a_fraud_that_lies_twice_on_the_topic_is_mailed_once(rig: Rig, mailbox: Mailbox) -> None:
    first, second = make_transactions(2)
    rig.put(
        rig.topic_2,
        [encode_prediction(encode_transaction(each), 1) for each in (first, first, second)],
        key=b"one card",
    )
    process = rig.start("alerter", SMTP_PORT=str(mailbox.port))

    mails = received(mailbox, 2)

    assert process.stop() == 0
    assert message_ids(mails) == sorted(message_id(each.identity, sender=SENDER) for each in (first, second))
    assert rig.log("alerter").count("event='alarm_repeat_skipped'") == 1


def test_a_fraud_whose_commit_failed_comes_again_and_is_not_mailed_again(rig: Rig, mailbox: Mailbox) -> None:
    settings = AlerterSettings(smtp_host="127.0.0.1", alert_from=SENDER, alert_to=RECIPIENT)
    batch = [
        encode_prediction(encode_transaction(each), label)
        for each, label in zip(make_transactions(4), (1, 0, 1, 0), strict=True)
    ]
    rig.put(rig.topic_2, batch, key=b"one card")
    messages, mailer, mailed = rig.read(rig.topic_2, 4), plain_mailer(mailbox.port), Mailed(10)

    done = [alert(messages, mailer, mailed, Limit(ratio=0.5, consecutive=20), settings).done for _ in range(3)]

    assert done == [1, 3, 4]
    assert len(received(mailbox, 2)) == 2


def test_the_frauds_mailed_longest_ago_are_forgotten() -> None:
    identities = [(str(number), number) for number in range(4)]
    mailed = Mailed(3)
    for identity in (*identities, identities[3]):
        mailed.add(identity)

    assert [identity in mailed for identity in identities] == [False, True, True, True]


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
    (message,) = alarms(1)
    with Mailbox(tmp_path / "secure", login=("alarm", "secret"), certificate=certificate) as server:

        def mailer(password: str, host: str = "localhost") -> Mailer:
            return Mailer(
                host=host, port=server.port, tls="starttls", timeout_s=20, username="alarm", password=password
            )

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
    mailer = plain_mailer(mailbox.port)
    for message in alarms(2):
        mailer.send(message)
        mailbox.stop()
        mailbox.start()

    assert len(received(mailbox, 2)) == 2


@pytest.mark.parametrize("reused", [False, True])
def test_a_server_that_hangs_is_an_outage_after_one_timeout(mailbox: Mailbox, reused: bool) -> None:
    mailer = plain_mailer(mailbox.port, timeout_s=1.5)
    earlier, message = alarms(2)
    if reused:
        mailer.send(earlier)
    mailbox.misbehave("hang")
    began = time.monotonic()

    with pytest.raises(Outage, match=r"mail server: .*timed out"):
        mailer.send(message)

    assert 1.4 < time.monotonic() - began < 2.9
    mailbox.misbehave(None)
    mailer.send(message)
    mailbox.stop()
    assert message_ids(received(mailbox, 1)).count(message["Message-ID"]) == 1


def test_a_refusal_for_now_is_an_outage_at_any_stage_and_the_mail_goes_out_once(mailbox: Mailbox) -> None:
    mailer = plain_mailer(mailbox.port)
    (message,) = alarms(1)
    mailbox.misbehave("4xx")
    for _ in range(12):  # each code at each stage
        with pytest.raises(Outage, match=r"mail server.* 4[25]"):
            mailer.send(message)

    mailbox.misbehave(None)
    mailer.send(message)

    mailbox.stop()
    assert message_ids(received(mailbox, 1)) == [message["Message-ID"]]


@pytest.fixture
def refusing() -> Iterator[Callable[..., int]]:
    """A mail server that answers each message with the next of these lines, then with the last; returns its port."""
    servers: list[Controller] = []

    def start(*answers: str) -> int:
        following = chain(answers, repeat(answers[-1]))

        class Handler:
            async def handle_DATA(self, *_: object) -> str:
                return next(following)

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
    refusing: Callable[..., int], answer: str, verdict: type[Exception]
) -> None:
    (message,) = alarms(1)
    mailer = plain_mailer(refusing(answer))

    with pytest.raises(verdict, match="mail server: " + answer[:3]):
        mailer.send(message)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"ALERT_TO": "somebody"}, "ALERT_TO"),
        ({"ALERT_TO": "a@"}, "ALERT_TO"),
        ({"ALERT_TO": ","}, "ALERT_TO"),
        ({"ALERT_FROM": "Fraud Alarm"}, "ALERT_FROM"),
        ({"SMTP_TIMEOUT_SECONDS": "0"}, "SMTP_TIMEOUT_SECONDS"),
        ({"SMTP_PASSWORD": "gehe\u00efm"}, "SMTP_PASSWORD"),
        ({"BACKOFF_INITIAL_SECONDS": "0"}, "BACKOFF_INITIAL_SECONDS"),
    ],
)
def test_a_wrong_setting_is_named_at_the_start(rig: Rig, wrong: dict[str, str], named: str) -> None:
    process = rig.start("alerter", ready=False, **wrong)

    assert process.wait(20) == 2
    assert process.last_line().startswith(f"alerter: {named}: ")
    assert "gehe" not in rig.log("alerter")
