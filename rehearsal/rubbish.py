"""Writes rubbish to topic_1: many kinds of values that are not valid transactions."""

import logging
import random
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from rehearsal.ledger import Place
from shared.kafka.messages import coordinates
from shared.records import REFERENCE


class Rubbish:
    """Writes many kinds of records that no service can decode.

    `places` contains the place of each acknowledged record. `cut_off` contains the place and the value of each
    acknowledged record that was made by removing the last character of a valid transaction.
    """

    def __init__(self, properties: Mapping[str, str], topic: str, dice: random.Random) -> None:
        self.places: set[Place] = set()
        self.cut_off: dict[Place, bytes] = {}
        self._topic = topic
        self._dice = dice
        self._numbers = count(1)
        # shared.kafka.clients.producer is not used, because it has no callback for delivered records.
        self._producer = Producer(
            {**properties, "enable.idempotence": True, "message.timeout.ms": 0, "linger.ms": 5},
            logger=logging.getLogger("librdkafka"),
        )

    def write(self) -> None:
        """Write one more record. The first record is always a valid transaction whose last character was removed."""
        number = next(self._numbers)
        kind, value_of = _CUT_OFF if number == 1 else self._dice.choice(_KINDS)
        self._producer.produce(self._topic, value_of(number), on_delivery=partial(self._delivered, kind))
        self._producer.poll(0)

    def flush(self) -> None:
        """Wait until the broker has acknowledged all records."""
        self._producer.flush()

    def _delivered(self, kind: str, error: KafkaError | None, message: Message) -> None:
        if error:
            raise KafkaException(error)
        place = coordinates(message)
        self.places.add(place)
        if kind == _CUT_OFF[0]:
            self.cut_off[place] = message.value() or b""


def _flawed(number: int, **flaws: object) -> bytes:
    """Return an encoded transaction that is valid except for these fields."""
    valid = msgspec.structs.asdict(REFERENCE) | {"trans_num": f"rubbish-{number}"}
    return msgspec.json.encode(valid | flaws)


_Kind = tuple[str, Callable[[int], bytes | None]]

_CUT_OFF: _Kind = ("cut off", lambda number: _flawed(number)[:-1])
_KINDS: tuple[_Kind, ...] = (
    _CUT_OFF,
    ("null", lambda _: None),
    ("empty", lambda _: b""),
    ("not UTF-8", lambda number: b"\xff\xfe" + number.to_bytes(4, "big")),
    ("not JSON", lambda number: f"temperature: {number}".encode()),
    ("not an object", lambda number: msgspec.json.encode([number])),
    ("HTML page", lambda number: f"<!DOCTYPE html><html><body>Error {number}</body></html>".encode()),
    ("large", lambda number: str(number).encode() * 50_000),
    ("other object", lambda number: msgspec.json.encode({"degrees": number})),
    ("other columns", lambda number: msgspec.json.encode({"columns": ["degrees"], "index": [0], "data": [[number]]})),
    ("amount as text", lambda number: _flawed(number, amt="12.50")),
    ("no merchant", lambda number: _flawed(number, merchant=None)),
    ("card number too long", lambda number: _flawed(number, cc_num=10**19 + number)),
    ("impossible date", lambda number: _flawed(number, trans_date_trans_time="2024-13-45 25:61:61")),
)
