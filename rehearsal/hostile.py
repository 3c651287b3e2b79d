"""Writes hostile records to both topics, as another client may. Some must become dead letters, and some are valid."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count, product
from typing import NamedTuple

import msgspec

from rehearsal.ledger import RECORD_MARK
from sandbox.hostile_answers import TEXTS
from sandbox.raw_producer import RawProducer
from shared.records import RAW_COLUMNS, REFERENCE

_READERS = {"topic_1": ("predictor",), "topic_2": ("alerter", "db_sink")}
_LARGE = {"compression.type": "lz4", "message.max.bytes": "10000000"}
_RUN = 25  # records; more than DEAD_LETTER_LIMIT_CONSECUTIVE
_FIRST_CARD = 10**15

Headers = Sequence[tuple[bytes, bytes]]


class _Record(NamedTuple):
    value: bytes | None
    headers: Headers = ()
    more_key: bytes = b""


class Hostile:
    """Writes hostile records of all kinds, in random order.

    `refused_by` contains the services that must refuse each record, by the topic and the number of the record's mark.
    Records that no service refuses are valid transactions or frauds.
    """

    def __init__(self, properties: Mapping[str, str], dice: random.Random) -> None:
        self.refused_by: dict[tuple[str, int], tuple[str, ...]] = {}
        self._dice = dice
        self._numbers = count(1)
        self._unix_time = int(time.time())  # makes the identities differ from those of earlier runs
        self._due: list[tuple[str, str]] = []
        self._producer = RawProducer({**properties, **_LARGE})

    def write(self) -> None:
        """Write the next record, or a run of records. After all kinds were written to both topics, they begin anew."""
        if not self._due:
            self._due = list(product(_READERS, _KINDS))
            self._dice.shuffle(self._due)
        topic, name = self._due.pop()
        refused, make = _KINDS[name]
        for _ in range(_RUN if name in _IN_RUNS else 1):
            number = next(self._numbers)
            record = make(partial(self._valid, topic, number))
            key = f"{RECORD_MARK}{number} ".encode() + record.more_key
            self._producer.write(topic, record.value, headers=record.headers, key=key)
            self.refused_by[topic, number] = _READERS[topic] if topic in refused else ()

    def _valid(self, topic: str, number: int, **changes: object) -> bytes:
        """Return a transaction, or a fraud on topic_2, with these changes. A tuple stands for one of its values."""
        own: dict[str, object] = {"trans_num": f"{RECORD_MARK}{number}", "cc_num": _FIRST_CARD + number}
        own |= {"unix_time": self._unix_time + number} | ({"prediction": 1} if topic == "topic_2" else {})
        drawn = {
            name: self._dice.choice(value) if isinstance(value, tuple) else value for name, value in changes.items()
        }
        return msgspec.json.encode(msgspec.structs.asdict(REFERENCE) | own | drawn)

    def close(self) -> None:
        """Wait until everything is written."""
        self._producer.close()


_BOTH, _NONE = ("topic_1", "topic_2"), ()
_NOT_UTF_8 = [(b"good", b"1"), (b"\xff\xfe", b"2")]
_LARGE_HEADER, _LARGE_KEY = [(b"large", b"h" * 900_000)], b"k" * 900_000
_COLUMNS = msgspec.json.encode(RAW_COLUMNS)
_DEEP = 100_000
_FORGED = [
    (b"dlq-topic", b"topic_1"),
    (b"dlq-partition", b"0"),
    (b"dlq-offset", b"0"),
    (b"dlq-group", b"predictor"),
    (b"dlq-reason", b"none"),
    (b"dlq-replayed", b"topic_1.dlq:0:0"),
]

# For each kind: the topics on which it must be refused, and a function that makes a record from a valid value.
_KINDS: Mapping[str, tuple[Sequence[str], Callable[[Callable[..., bytes]], _Record]]] = {
    "header that is not UTF-8": (("topic_2",), lambda valid: _Record(valid(), _NOT_UTF_8)),
    "header that is not UTF-8, not JSON": (_BOTH, lambda _: _Record(b"temperature: 21", _NOT_UTF_8)),
    "3 MB": (_BOTH, lambda _: _Record(b"x" * 3_000_000)),
    "2 MB of white space": (_NONE, lambda valid: _Record(valid()[:-1] + b" " * 2_000_000 + b"}")),
    "after the year 2100": (_BOTH, lambda valid: _Record(valid(unix_time=10**14 + 1))),
    "giant time": (_BOTH, lambda valid: _Record(valid(unix_time=2**62))),
    "large key and headers": (_BOTH, lambda _: _Record(b"small", _LARGE_HEADER, _LARGE_KEY)),
    "valid, large key and headers": (_NONE, lambda valid: _Record(valid(), _LARGE_HEADER, _LARGE_KEY)),
    "200 headers": (_NONE, lambda valid: _Record(valid(), [(b"h%d" % number, b"") for number in range(200)])),
    "NUL in the provenance": (_NONE, lambda valid: _Record(valid(), [(b"provenance", b'{"model_name":"a\\u0000b"}')])),
    "provenance not UTF-8": (_NONE, lambda valid: _Record(valid(), [(b"provenance", b"\xff" * 1000)])),
    "deep provenance": (_NONE, lambda valid: _Record(valid(), [(b"provenance", b'{"x":' + b"[" * _DEEP)])),
    "forged dead letter": (_NONE, lambda valid: _Record(valid(), _FORGED)),
    "forged dead letter, cut off": (_BOTH, lambda valid: _Record(valid()[:-1], _FORGED)),
    "cut off": (_BOTH, lambda valid: _Record(valid()[:-1])),
    "tombstone": (_BOTH, lambda _: _Record(None)),
    "empty": (_BOTH, lambda _: _Record(b"")),
    "brackets": (_BOTH, lambda _: _Record(b"[" * _DEEP)),
    "deep field": (_BOTH, lambda valid: _Record(valid()[:-1] + b',"x":' + b'{"x":' * _DEEP)),
    "deep rows": (_BOTH, lambda _: _Record(b'{"columns":%b,"data":[' % _COLUMNS + b"[" * _DEEP)),
    "NUL": (_BOTH, lambda valid: _Record(valid(merchant="a\0b"))),
    "half a character": (_BOTH, lambda valid: _Record(valid(merchant="MARK").replace(b"MARK", rb"\ud800"))),
    "too large for a float": (_BOTH, lambda valid: _Record(valid(amt=1.5).replace(b"1.5", b"1e400"))),
    "largest amount": (_NONE, lambda valid: _Record(valid(amt=1.7e308))),
    "many large amounts": (_NONE, lambda valid: _Record(valid(amt=1e39))),  # beyond a 32-bit float
    "many from the year 2100": (_BOTH, lambda valid: _Record(valid(unix_time=4_102_444_800))),
    "odd texts": (_NONE, lambda valid: _Record(valid(merchant=TEXTS, city=TEXTS, state=TEXTS, category=TEXTS))),
    "many odd texts": (_NONE, lambda valid: _Record(valid(merchant=TEXTS, first=TEXTS, job=TEXTS))),
    "odd transaction number": (_NONE, lambda valid: _Record(valid(trans_num=tuple(text[:200] for text in TEXTS)))),
}  # fmt: skip
_IN_RUNS = [name for name in _KINDS if name.startswith("many ")]
