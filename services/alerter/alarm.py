"""Finds alarms (predicted frauds) on topic_2, and formats them without full card numbers or birth dates."""

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
from shared.text import one_line


class Alarm(NamedTuple):
    """A transaction that was predicted to be fraud, with the provenance of this prediction."""

    prediction: Prediction
    provenance: Provenance

    @property
    def identity(self) -> tuple[str, int]:
        """The identity of the transaction: (trans_num, unix_time)."""
        return self.prediction.identity


class Found(NamedTuple):
    """Alarms and dead letters from the first messages of a batch.

    Each alarm and each dead letter has the number of its message. The messages are numbered from 1.
    """

    read: int  # number of messages that were searched
    alarms: list[tuple[int, Alarm]]
    dead: list[tuple[int, Record]]  # one dead letter for each unreadable message
    repeats: int  # number of alarms skipped because they were already sent or are in the batch twice


def find(messages: Sequence[Message], sent: Remembered, *, group: str, most: int) -> Found:
    """Find alarms that are not in `sent`, and stop after `most` alarms.

    Also make a dead letter of each unreadable message.
    """
    alarms: list[tuple[int, Alarm]] = []
    dead: list[tuple[int, Record]] = []
    identities: set[tuple[str, int]] = set()
    repeats = 0
    for number, message in enumerate(messages, start=1):
        try:
            prediction = decode_prediction(message.value())
            if not prediction.prediction:
                continue
            alarm = Alarm(prediction, from_headers(headers(message)))
        except Poison as poison:
            dead.append((number, dead_letter(message, str(poison), group=group)))
            continue
        if prediction.identity in sent or prediction.identity in identities:
            repeats += 1
            continue
        alarms.append((number, alarm))
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
    """Format an alarm for a mail. Each text in the result is one line of at most 200 characters."""
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
    """Return an alarm's fields for a webhook post or a CSV file."""
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
    """Return the merchant's name without the prefix `fraud_`, which every merchant in the source data has."""
    return one_line(alarm.prediction.merchant.removeprefix("fraud_"))


def dollars(amount: float) -> str:
    """Format an amount, for example as `$1,147.91`."""
    return f"${amount:,.2f}"


def batch_id(alarms: Sequence[Alarm]) -> str:
    """Return an ID (32 hexadecimal digits) for a set of alarms. The order of the alarms does not change the ID."""
    return hashlib.sha256(repr(sorted(alarm.identity for alarm in alarms)).encode()).hexdigest()[:32]


def sample(now: datetime) -> Alarm:
    """Return a made-up alarm for testing a channel or a template."""
    values = msgspec.structs.asdict(REFERENCE) | {
        "trans_date_trans_time": f"{now.astimezone(UTC):{TIME_FORMAT}}",
        "unix_time": int(now.timestamp()),
        "merchant": "Test alarm, no payment was made",
        "amt": 1147.91,
    }
    return Alarm(Prediction(**values, prediction=1), Provenance("sample", "0", 0.973))
