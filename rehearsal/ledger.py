"""The ledger: tracks every transaction, by its identity, through the topics, the mailbox and the table.

All figures are counted in the topics, in the mailbox and in the table. No figure comes from the services themselves.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread

import msgspec
import numpy as np
import sqlalchemy as sa
from confluent_kafka import Message, TopicPartition

from sandbox.hostile_answers import MARK
from sandbox.mailbox import messages as mails_in
from services.alerter.mail import message_id
from shared.dead_letters import SUFFIX
from shared.kafka.clients import consumer
from shared.kafka.messages import coordinates, readable_headers, says_nothing
from shared.provenance import from_headers

Identity = tuple[str, int]
Place = tuple[str, int, int]
"""Topic, partition and offset."""
Refusal = tuple[str, str, int, int]
"""A service, and the place of the record that it refused. See `refused_answer` for what the producer refuses."""

RECORD_MARK = "hostile-record-"  # how the key of a marked record begins; followed by a number

_READ_S = 0.05
_SILENCE_S = 20.0
_MARKED_ANSWER = re.compile(rf"{MARK}(\d+)".encode()).search
_MARKED_RECORD = re.compile(rf"{RECORD_MARK}(\d+)".encode()).match
_NOT_REPORTED = ("suspects", "mail_delays", "dead_letter_places")


class _Seen(msgspec.Struct, gc=False):
    """The fields of a record that the ledger needs."""

    trans_num: str
    unix_time: int
    cc_num: int
    prediction: int = 0

    @property
    def identity(self) -> Identity:
        return self.trans_num, self.unix_time


@dataclass
class Topics:
    """The records written to the topics since the start."""

    records_1: int = 0
    records_2: int = 0
    repeated: list[Identity] = field(default_factory=list)  # one entry for each repetition on either topic
    misplaced: list[Identity] = field(default_factory=list)  # predicted after a later transaction of the same card
    # The places of the dead letters, by what they are about.
    dead_letters: defaultdict[Refusal, list[Place]] = field(default_factory=lambda: defaultdict(list))
    refused_rows: int = 0  # number of the producer's dead letters without a mark, for invalid rows from the API
    marked: dict[tuple[str, int], Place] = field(default_factory=dict)  # marked records, by topic and number
    produced_ms: dict[Identity, int] = field(default_factory=dict)  # timestamp of the record on topic_1
    # When a read_committed consumer received the record from topic_2.
    visible_ms: dict[Identity, float] = field(default_factory=dict)
    frauds: set[Identity] = field(default_factory=set)
    dead: defaultdict[str, set[Identity]] = field(default_factory=lambda: defaultdict(set))  # by service
    # For each card, the topic_1 offset of its last predicted transaction.
    last_source: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ledger:
    """The figures of a run. The ledger balances if nothing was lost or duplicated."""

    served: int
    fetched: int
    skipped_repeats: int
    topic_1: int
    topic_2: int
    predicted_frauds: int
    emails: int
    mailed_frauds: int
    rows: int
    repeated_mails: int
    dead_letters: int
    lost: int
    duplicates: int
    out_of_order: int
    seconds: float
    latency_ms: Mapping[str, Mapping[str, float | None]]
    suspects: Mapping[str, list[Identity]]  # by kind of problem, the identities of the transactions affected
    mail_delays: list[tuple[int, float]]  # per fraud: time on topic_1 (epoch ms), time from topic_1 to the mail (ms)
    dead_letter_places: Mapping[Refusal, Sequence[Place]]

    @property
    def balanced(self) -> bool:
        """True if every fraud was mailed and no transaction is missing, repeated on a topic or out of order."""
        return not self.suspects and self.mailed_frauds == self.predicted_frauds

    def report(self) -> dict[str, object]:
        """Return the figures for the report file."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_REPORTED}


class TopicReader:
    """Reads both topics and their dead letters continuously in a thread.

    Reading everything at the end is not possible, because the embedded broker drops old records.
    """

    def __init__(self, properties: Mapping[str, str], *, topic_1: str) -> None:
        self._properties = properties
        self._topic_1 = topic_1
        self._decode = msgspec.json.Decoder(_Seen).decode
        self._stop = Event()
        self._thread = Thread(target=self._read, name="ledger", daemon=True)
        self.topics = Topics()
        self._next: dict[tuple[str, int], int] = {}
        # The offset after the last record that was read, even if Kafka's transaction markers follow.
        self.positions: dict[tuple[str, int], int] = {}

    def start(self, starts: Iterable[TopicPartition]) -> None:
        """Start reading at these offsets."""
        self._next = {(start.topic, start.partition): start.offset for start in starts}
        self._thread.start()

    def stop(self) -> Topics:
        """Read to the end of the topics, then stop. Returns everything read since the start."""
        self._stop.set()
        self._thread.join()
        return self.topics

    def _read(self) -> None:
        while not self._stop.is_set():
            self._read_until_silence()

    def _read_until_silence(self) -> None:
        """Read until no record has arrived for a while.

        The caller then retries with a new client, because a client may hang after a broker outage.
        """
        reader = consumer(self._properties, group="ledger")
        reader.assign([TopicPartition(*place, offset) for place, offset in (self._next | self.positions).items()])
        last_record = time.monotonic()
        while time.monotonic() - last_record < (1.0 if self._stop.is_set() else _SILENCE_S):
            first = reader.poll(_READ_S)
            if first is None or first.error():
                continue
            last_record = time.monotonic()
            now_ms = time.time() * 1000
            for message in (first, *reader.consume(5000, 0)):
                if message.error() is None:
                    self._count(message, now_ms)
        reader.close()

    def _count(self, message: Message, now_ms: float) -> None:
        topic, partition, offset = coordinates(message)
        self.positions[topic, partition] = offset + 1
        if says_nothing(message):
            return
        topics = self.topics
        seen: _Seen | None
        try:
            seen = self._decode(message.value() or b"")
        except (ValueError, RecursionError):
            seen = None
        if topic.endswith(SUFFIX):
            if (origin := _origin(message)) is None:
                return
            topics.dead_letters[origin].append((topic, partition, offset))
            topics.refused_rows += origin[:2] == ("producer", topic)
            if seen:
                topics.dead[origin[0]].add(seen.identity)
            return
        if mark := _MARKED_RECORD(message.key() or b""):
            topics.marked[topic, int(mark[1])] = topic, partition, offset
        if topic == self._topic_1:
            topics.records_1 += 1
            if seen:
                if seen.identity in topics.produced_ms:
                    topics.repeated.append(seen.identity)
                topics.produced_ms.setdefault(seen.identity, message.timestamp()[1])
        else:
            topics.records_2 += 1
            if seen:
                if seen.identity in topics.visible_ms:
                    topics.repeated.append(seen.identity)
                source = from_headers(readable_headers(message)).source_offset
                if source is not None:
                    if source < topics.last_source.get(seen.cc_num, 0):
                        topics.misplaced.append(seen.identity)
                    topics.last_source[seen.cc_num] = source
                topics.visible_ms.setdefault(seen.identity, now_ms)
                if seen.prediction:
                    topics.frauds.add(seen.identity)


def refused_answer(number: int) -> Refusal:
    """Return what the producer's dead letter for the payments API's answer with this mark is about."""
    return "producer", "payments API", 0, number


def _origin(letter: Message) -> Refusal | None:
    """Return what a dead letter is about, or None if the message only says that a letter was replayed."""
    found = {name: content for name, content in readable_headers(letter) if isinstance(content, bytes)}
    if "dlq-replayed" in found:
        return None
    if "dlq-offset" not in found:  # an answer or a row that the producer refused
        mark = _MARKED_ANSWER(letter.value() or b"")
        return refused_answer(int(mark[1])) if mark else ("producer", *coordinates(letter))
    service = found["dlq-group"].decode().partition("-")[0]
    return service, found["dlq-topic"].decode(), int(found["dlq-partition"]), int(found["dlq-offset"])


def draw_up(
    topics: Topics,
    *,
    served: set[Identity],
    repeats: int,
    mailbox: Path,
    since_ms: int,
    sender: str,
    engine: sa.Engine,
    seconds: float,
) -> Ledger:
    """Compare the transactions that the source served with the topics, the mailbox and the table.

    `repeats` counts how often the source served a transaction that it had already served before.
    """
    produced, predicted = topics.produced_ms.keys(), topics.visible_ms.keys()
    mailed_ms, emails = mailed(mailbox, predicted, since_ms=since_ms, sender=sender)
    ingested_ms = _stored(engine, predicted, since_ms=since_ms)
    frauds = topics.frauds - topics.dead["alerter"]
    missing = {
        "missing on topic_1": served - produced,
        "missing on topic_2": produced - predicted - topics.dead["predictor"],
        "missing in the mailbox": frauds - mailed_ms.keys(),
        "missing in the table": predicted - ingested_ms.keys() - topics.dead["db_sink"],
    }
    if len(missing["missing on topic_1"]) == topics.refused_rows:  # a refused row has no identity to compare
        del missing["missing on topic_1"]
    suspects = {**missing, "repeated": topics.repeated, "out of order": topics.misplaced}
    return Ledger(
        served=len(served),
        fetched=len(served) + repeats,
        skipped_repeats=repeats,
        topic_1=topics.records_1,
        topic_2=topics.records_2,
        predicted_frauds=len(frauds),
        emails=emails,
        mailed_frauds=len(mailed_ms),
        rows=len(ingested_ms),
        repeated_mails=emails - len(mailed_ms),
        dead_letters=sum(map(len, topics.dead_letters.values())),
        lost=len(set().union(*missing.values())),
        duplicates=len(topics.repeated),
        out_of_order=len(topics.misplaced),
        seconds=round(seconds, 1),
        latency_ms={
            "topic_1_to_topic_2": _latency(topics.produced_ms, topics.visible_ms),
            "topic_1_to_email": _latency(topics.produced_ms, mailed_ms),
            "topic_1_to_row": _latency(topics.produced_ms, ingested_ms),
        },
        suspects={what: sorted(identities) for what, identities in suspects.items() if identities},
        mail_delays=[(at, mailed_ms[each] - at) for each, at in topics.produced_ms.items() if each in mailed_ms],
        dead_letter_places={origin: letters for origin, letters in topics.dead_letters.items() if letters},
    )


def mailed(
    mailbox: Path, identities: Iterable[Identity], *, since_ms: int, sender: str
) -> tuple[dict[Identity, float], int]:
    """Return when each of these transactions was first mailed (epoch ms), and the total number of mails."""
    by_message_id = {message_id(identity, sender=sender): identity for identity in identities}
    first: dict[Identity, float] = {}
    emails = 0
    for mail in mails_in(mailbox):
        if mail.received_ms < since_ms:
            continue
        emails += 1
        identity = by_message_id.get(str(mail.message["Message-ID"]))
        if identity is not None:
            first[identity] = min(mail.received_ms, first.get(identity, mail.received_ms))
    return first, emails


def _stored(engine: sa.Engine, identities: Iterable[Identity], *, since_ms: int) -> dict[Identity, float]:
    """Return when each of these transactions was first stored (epoch ms).

    Transactions that were predicted before `since_ms` are left out, but not those without a time of prediction. If an
    earlier run inserted the row, the time is from that run, because an upsert does not change `ingested_at`.
    """
    wanted = set(identities)
    query = sa.text("""
        SELECT trans_num, unix_time, 1000 * EXTRACT(EPOCH FROM ingested_at) FROM transactions
        WHERE predicted_at >= to_timestamp(:since) OR predicted_at IS NULL
    """)
    with engine.connect() as connection:
        rows = connection.execution_options(stream_results=True).execute(query, {"since": since_ms / 1000})
        return {(num, at): float(ms) for num, at, ms in rows if (num, at) in wanted}


def _latency(begin: Mapping[Identity, float], end: Mapping[Identity, float]) -> dict[str, float | None]:
    """Return the median and 99th percentile of the time from `begin` to `end` (ms).

    Only transactions that have both times are counted.
    """
    both = begin.keys() & end.keys()
    # A span is negative if an earlier run stored the row.
    spans = [span for identity in both if (span := end[identity] - begin[identity]) >= 0]
    if not spans:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(spans, (50, 99))
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1)}
