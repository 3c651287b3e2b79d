"""Finds alarms (predicted frauds) on topic_2, and formats them without full card numbers and birth dates."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from confluent_kafka import Message

from services.alerter.remembered import Remembered
from shared.dead_letters import dead_letter
from shared.errors import Poison
from shared.kafka.messages import Record, headers
from shared.privacy import mask_card
from shared.provenance import Provenance, from_headers
from shared.records import REFERENCE, TIME_FORMAT, Prediction, decode_prediction


class Alarm(NamedTuple):
    """A transaction that was predicted to be fraud, and the model that predicted it."""

    prediction: Prediction
    provenance: Provenance

    @property
    def identity(self) -> tuple[str, int]:
        """(trans_num, unix_time) of the transaction."""
        return self.prediction.identity


class Found(NamedTuple):
    """Alarms and dead letters from the first `read` messages of a batch, each with its message number (from 1)."""

    read: int
    alarms: list[tuple[int, Alarm]]
    dead: list[tuple[int, Record]]  # dead letters for unreadable messages
    repeats: int  # number of alarms skipped, because they were sent before or are in the batch twice


def find(messages: Sequence[Message], sent: Remembered, *, group: str, most: int) -> Found:
    """Up to `most` alarms of a batch that are not in `sent`, and dead letters for messages that cannot be read."""
    alarms: list[tuple[int, Alarm]] = []
    dead: list[tuple[int, Record]] = []
    identities: set[tuple[str, int]] = set()
    repeats = 0
    for number, message in enumerate(messages, start=1):
        try:
            prediction = decode_prediction(message.value())
        except Poison as poison:
            dead.append((number, dead_letter(message, str(poison), group=group)))
            continue
        if not prediction.prediction:
            continue
        if prediction.identity in sent or prediction.identity in identities:
            repeats += 1
            continue
        alarms.append((number, Alarm(prediction, from_headers(headers(message)))))
        identities.add(prediction.identity)
        if len(alarms) == most:
            return Found(number, alarms, dead, repeats)
    return Found(len(messages), alarms, dead, repeats)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An alarm as text for a mail template."""

    amount: str
    merchant: str
    category: str
    place: str
    time: str
    card: str
    probability: str
    model: str
    trans_num: str
    unix_time: int


def show(alarm: Alarm) -> Shown:
    """The alarm as text for a mail. Each field is on one line and at most 200 characters long."""
    prediction, provenance = alarm
    has_probability = provenance.probability is not None
    return Shown(
        amount=dollars(prediction.amt),
        merchant=merchant_of(alarm),
        category=one_line(prediction.category.replace("_", " ")),
        place=one_line(f"{prediction.city}, {prediction.state}"),
        time=f"{one_line(prediction.trans_date_trans_time)} UTC",
        card=mask_card(prediction.cc_num),
        probability=f"{provenance.probability:.1%}" if has_probability else "not provided by this model",
        model=one_line(f"{provenance.model_name} version {provenance.model_version}"),
        trans_num=one_line(prediction.trans_num),
        unix_time=prediction.unix_time,
    )


def fields(alarm: Alarm) -> dict[str, str | float | int | None]:
    """The fields of an alarm for a webhook post or a CSV file."""
    prediction, provenance = alarm
    return {
        "trans_num": prediction.trans_num,
        "unix_time": prediction.unix_time,
        "time": prediction.trans_date_trans_time,
        "amount": prediction.amt,
        "merchant": merchant_of(alarm),
        "category": one_line(prediction.category),
        "city": one_line(prediction.city),
        "state": one_line(prediction.state),
        "card": mask_card(prediction.cc_num),
        "probability": provenance.probability,
        "model_name": provenance.model_name,
        "model_version": provenance.model_version,
    }


def merchant_of(alarm: Alarm) -> str:
    """The merchant's name without the prefix `fraud_`, which every merchant in the source data has."""
    return one_line(alarm.prediction.merchant.removeprefix("fraud_"))


def dollars(amount: float) -> str:
    """The amount as text, for example `$1,147.91`."""
    return f"${amount:,.2f}"


def one_line(text: str) -> str:
    """The text on one line, cut to 200 characters, so that it cannot forge a mail header, table row or log line."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:200]


def batch_id(alarms: Sequence[Alarm]) -> str:
    """An ID for a set of alarms (32 hexadecimal digits). It does not depend on the order of the alarms."""
    return hashlib.sha256(repr(sorted(alarm.identity for alarm in alarms)).encode()).hexdigest()[:32]


def sample(now: datetime) -> Alarm:
    """A made-up alarm for testing a channel or a template."""
    values = msgspec.structs.asdict(REFERENCE) | {
        "trans_date_trans_time": f"{now.astimezone(UTC):{TIME_FORMAT}}",
        "unix_time": int(now.timestamp()),
        "merchant": "Test alarm, no payment was made",
        "amt": 1147.91,
    }
    return Alarm(Prediction(**values, prediction=1), Provenance("sample", "0", 0.973))
