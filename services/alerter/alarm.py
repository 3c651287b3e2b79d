"""A fraud on topic_2, and what people and other systems may be shown of it: no full card number, no birth date."""

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
    """A transaction that was called fraud, and by whom."""

    prediction: Prediction
    provenance: Provenance

    @property
    def identity(self) -> tuple[str, int]:
        """The transaction's own."""
        return self.prediction.identity


class Found(NamedTuple):
    """What the first messages of a batch hold, each with the number of its message, counted from 1."""

    read: int  # so many of the messages
    alarms: list[tuple[int, Alarm]]
    dead: list[tuple[int, Record]]
    repeats: int  # alarms that were raised before, or that come twice


def find(messages: Sequence[Message], raised: Remembered, *, group: str, most: int) -> Found:
    """The alarms of a batch that are still to be raised, up to so many, and a dead letter for what cannot be read."""
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
        if prediction.identity in raised or prediction.identity in identities:
            repeats += 1
            continue
        alarms.append((number, Alarm(prediction, from_headers(headers(message)))))
        identities.add(prediction.identity)
        if len(alarms) == most:
            return Found(number, alarms, dead, repeats)
    return Found(len(messages), alarms, dead, repeats)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An alarm in people's words."""

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
    """Every text on one line, and of a length that fits there."""
    prediction, provenance = alarm
    known = provenance.probability is not None
    return Shown(
        amount=dollars(prediction.amt),
        merchant=merchant_of(alarm),
        category=one_line(prediction.category.replace("_", " ")),
        place=one_line(f"{prediction.city}, {prediction.state}"),
        time=f"{one_line(prediction.trans_date_trans_time)} UTC",
        card=mask_card(prediction.cc_num),
        probability=f"{provenance.probability:.1%}" if known else "not given by this model",
        model=one_line(f"{provenance.model_name} version {provenance.model_version}"),
        trans_num=one_line(prediction.trans_num),
        unix_time=prediction.unix_time,
    )


def fields(alarm: Alarm) -> dict[str, str | float | int | None]:
    """An alarm for machines."""
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
    """Its name without the prefix that every merchant of the source bears."""
    return one_line(alarm.prediction.merchant.removeprefix("fraud_"))


def dollars(amount: float) -> str:
    """`$1,147.91`."""
    return f"${amount:,.2f}"


def one_line(text: str) -> str:
    """So that no header, no row of a text and no line of a log can be forged."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:200]


def digest_of(alarms: Sequence[Alarm]) -> str:
    """The same for the same transactions, whatever their order."""
    return hashlib.sha256(repr(sorted(alarm.identity for alarm in alarms)).encode()).hexdigest()[:32]


def sample(now: datetime) -> Alarm:
    """What an alarm looks like, when none was raised."""
    values = msgspec.structs.asdict(REFERENCE) | {
        "trans_date_trans_time": f"{now.astimezone(UTC):{TIME_FORMAT}}",
        "unix_time": int(now.timestamp()),
        "merchant": "Test of the alarm, nothing happened",
        "amt": 1147.91,
    }
    return Alarm(Prediction(**values, prediction=1), Provenance("sample", "0", 0.973))
