"""Predicted frauds on topic_2, and the mails about them."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from email.message import EmailMessage

from confluent_kafka import Producer
from conftest import Rig, until

from sandbox.mailbox import Mailbox, ReceivedMail, messages
from services.alerter.alarm import Alarm
from services.alerter.mail import Mailer
from shared.kafka.messages import Headers
from shared.provenance import Provenance, to_headers
from shared.records import Prediction, Transaction, encode_prediction, encode_transaction

PROVENANCE = Provenance("fraud", "3", 0.97312, 1730134684025, 0, 0)
NOW = datetime(2026, 1, 31, 22, 30, tzinfo=UTC)


def predicted(transaction: Transaction, label: int = 1, **changes: object) -> Prediction:
    values = {name: getattr(transaction, name) for name in Transaction.__struct_fields__} | changes
    return Prediction(**values, prediction=label)


def alarm(transaction: Transaction, **changes: object) -> Alarm:
    return Alarm(predicted(transaction, **changes), PROVENANCE)  # type: ignore[arg-type]


def put_predictions(rig: Rig, batch: Sequence[tuple[Transaction, int]]) -> None:
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


def put_frauds(rig: Rig, frauds: Sequence[Transaction]) -> None:
    put_predictions(rig, [(each, 1) for each in frauds])


def received(mailbox: Mailbox, count: int, *, timeout_s: float = 30.0) -> list[ReceivedMail]:
    until(lambda: len(list(messages(mailbox.directory))) >= count, timeout_s=timeout_s, what=f"{count} mails")
    return list(messages(mailbox.directory))


def deliveries(mailbox: Mailbox) -> Counter[tuple[str, tuple[str, int]]]:
    """How often each recipient got each alarm, in a mail of its own or in a digest."""
    return Counter(
        (recipient, identity)
        for mail in messages(mailbox.directory)
        for recipient in str(mail.message["X-Envelope-To"]).split(", ")
        for identity in mail.alarms
    )


def plain_mailer(port: int, *, timeout_s: float = 20.0) -> Mailer:
    return Mailer(host="127.0.0.1", port=port, tls="none", timeout_s=timeout_s)


def text_of(message: EmailMessage, kind: str) -> str:
    body = message.get_body((kind,))
    assert body is not None
    return str(body.get_content())
