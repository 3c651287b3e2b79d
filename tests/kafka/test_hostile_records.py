"""Records that nobody should have written, on Apache Kafka: none of them stops a service, and none costs another."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec
import pytest
import sqlalchemy as sa
from confluent_kafka import Message, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from conftest import EFFORT, Rig, dead_letter_topic, make_transactions, until
from forked import Forked

from sandbox.mailbox import Mailbox, messages
from sandbox.processes import Process
from sandbox.raw_producer import RawProducer
from shared.kafka.clients import consumer
from shared.records import Transaction, encode_prediction, encode_transaction

pytestmark = [pytest.mark.kafka, pytest.mark.server]

NOT_UTF_8 = [(b"good", b"1"), (b"\xff\xfe", b"2")]
LARGE = {"compression.type": "lz4", "message.max.bytes": "10000000"}
KILLER = "5egfau1t"


def predicted(transaction: Transaction, label: int = 0) -> bytes:
    return encode_prediction(encode_transaction(transaction), label)


def flawed(transaction: Transaction, **flaws: object) -> bytes:
    return msgspec.json.encode(msgspec.structs.asdict(transaction) | flaws)


def end_at_the_killer() -> None:
    """Let both decoders end the process as a crash in C code does, at records that contain a certain word."""
    from shared import records

    def ending(decode: Callable[[bytes | None], object]) -> Callable[[bytes | None], object]:
        def decode_or_end(value: bytes | None) -> object:
            if KILLER.encode() in (value or b""):
                os.kill(os.getpid(), signal.SIGSEGV)
            return decode(value)

        return decode_or_end

    records.read_topic_1 = ending(records.read_topic_1)  # type: ignore[assignment]
    records.decode_prediction = ending(records.decode_prediction)  # type: ignore[assignment]


def restarting(process: Process, done: Callable[[], object], *, timeout_s: float) -> int:
    """Start the process again whenever it has ended, as a container engine does, until `done()`. Returns how often."""
    starts = 0

    def alive_and_done() -> object:
        nonlocal starts
        if not process.running:
            process.spawn()
            starts += 1
        return done()

    until(alive_and_done, timeout_s=timeout_s, what="everything but the record that ends the process")
    return starts


def headers_of(letter: Message) -> dict[str, bytes]:
    return {name: content for name, content in letter.headers() or [] if isinstance(content, bytes)}  # type: ignore[str-unpack]


def reasons(letters: Sequence[Message]) -> list[str]:
    return [headers_of(letter)["dlq-reason"].decode() for letter in letters]


def by_card(found: Iterable[Message | Transaction]) -> dict[int, list[str]]:
    """The transactions of each card, in order."""
    cards: dict[int, list[str]] = {}
    for each in found:
        values = (
            msgspec.structs.asdict(each) if isinstance(each, Transaction) else msgspec.json.decode(each.value() or b"")
        )
        cards.setdefault(values["cc_num"], []).append(values["trans_num"])
    return cards


def count(rig: Rig, topic: str) -> int:
    """How many records of a topic are committed."""
    return len(rig.read(topic, 0, extra_s=1.0))


def stored(engine: sa.Engine) -> list[str]:
    if not sa.inspect(engine).has_table("transactions"):
        return []
    with engine.connect() as connection:
        return list(connection.execute(sa.text("SELECT trans_num FROM transactions")).scalars())


@pytest.fixture
def environment(environment: dict[str, str], surroundings: dict[str, str]) -> dict[str, str]:
    return environment | surroundings | {"ALERT_BURST": "1000"}


def test_no_record_on_topic_1_stops_the_predictor(apache_rig: Rig) -> None:
    good = make_transactions(1001)
    spaced = good[0]
    apache = RawProducer({**apache_rig.properties, **LARGE})
    apache.write(apache_rig.topic_1, b"not JSON", headers=NOT_UTF_8)
    apache.write(apache_rig.topic_1, b"x" * 3_000_000)
    apache.write(apache_rig.topic_1, encode_transaction(spaced)[:-1] + b" " * 2_000_000 + b"}", key=spaced.key)
    apache.write(apache_rig.topic_1, flawed(good[1], unix_time=10**14 + 1))
    apache.write(apache_rig.topic_1, b"small", headers=[(b"large", b"h" * 900_000)], key=b"k" * 900_000)
    apache.close()
    predictor = apache_rig.start("predictor")
    first = predictor.pid
    apache_rig.put_transactions(good[1:])

    found = apache_rig.read(apache_rig.topic_2, len(good))
    letters = apache_rig.read(dead_letter_topic(apache_rig.topic_1), 4)

    assert sorted(msgspec.json.decode(each.value() or b"")["trans_num"] for each in found) == sorted(
        each.trans_num for each in good
    )
    assert max(len(each.value() or b"") for each in found) < 2000
    assert (predictor.pid, predictor.running) == (first, True)
    assert len(letters) == 4
    by_value = {(letter.value() or b"")[:5]: headers_of(letter) for letter in letters}
    assert b"header" in by_value[b"not J"]["dlq-reason"]
    assert by_value[b"xxxxx"]["dlq-value-bytes"] == b"3000000"
    assert by_value[b"small"]["dlq-value-bytes"] == b"5"
    assert b"unix_time" in by_value[b'{"tra']["dlq-reason"]


def test_a_letter_fits_into_a_topic_that_takes_less_than_usual(apache_rig: Rig) -> None:
    letters = dead_letter_topic(apache_rig.topic_1)
    admin = AdminClient({**apache_rig.properties, "log_level": 0})
    limit = ConfigEntry("max.message.bytes", "100000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, letters, incremental_configs=[limit])
    admin.incremental_alter_configs([resource])[resource].result(20)
    noise = random.Random(1).randbytes(300_000)
    apache_rig.put(apache_rig.topic_1, [noise])
    apache_rig.put_transactions(make_transactions(20))
    predictor = apache_rig.start("predictor")

    assert len(apache_rig.read(apache_rig.topic_2, 20)) == 20
    (letter,) = apache_rig.read(letters, 1)

    value = letter.value() or b""
    assert noise.startswith(value)
    assert len(value) > 20_000
    assert headers_of(letter)["dlq-value-bytes"] == b"300000"
    assert predictor.running


def test_no_record_on_topic_2_stops_the_alerter_or_the_db_sink(
    apache_rig: Rig, engine: sa.Engine, mailbox: Mailbox
) -> None:
    good = make_transactions(1000)
    frauds = good[::5]
    odd = make_transactions(4, seed=8)
    raw = RawProducer({**apache_rig.properties, **LARGE})
    raw.write(apache_rig.topic_2, predicted(odd[0], 1), headers=NOT_UTF_8)
    raw.write(apache_rig.topic_2, b"x" * 3_000_000)
    raw.write(apache_rig.topic_2, predicted(odd[1], 1), headers=[(b"provenance", b'{"model_name":"a\\u0000b"}')])
    raw.write(apache_rig.topic_2, predicted(odd[2], 1), headers=[(b"provenance", b"\xff" * 1000)])
    raw.write(apache_rig.topic_2, flawed(odd[3], unix_time=2**62, prediction=1))
    for each in good:
        raw.write(apache_rig.topic_2, predicted(each, int(each in frauds)), key=each.key)
    raw.close()
    services = [apache_rig.start("alerter"), apache_rig.start("db_sink")]
    pids = [each.pid for each in services]

    until(lambda: len(stored(engine)) >= len(good) + 2, what="the rows")
    alarms = sorted(each.trans_num for each in [*frauds, odd[1], odd[2]])
    until(
        lambda: sorted(each for mail in messages(mailbox.directory) for each, _ in mail.alarms) == alarms,
        what="the mails",
    )
    letters = apache_rig.read(dead_letter_topic(apache_rig.topic_2), 6)

    assert sorted(stored(engine)) == sorted(each.trans_num for each in [*good, odd[1], odd[2]])
    assert [(each.pid, each.running) for each in services] == [(pid, True) for pid in pids]
    groups = [headers_of(letter)["dlq-group"] for letter in letters]
    assert sorted(groups) == sorted(
        3 * [apache_rig.environment["ALERTER_GROUP"].encode()] + 3 * [apache_rig.environment["DB_SINK_GROUP"].encode()]
    )
    assert sum("header" in reason for reason in reasons(letters)) == 2
    assert sum("unix_time" in reason for reason in reasons(letters)) == 2


@pytest.mark.parametrize("name", ["predictor", "db_sink"])
def test_a_record_that_ends_the_process_is_set_aside(apache_rig: Rig, engine: sa.Engine, name: str) -> None:
    apache_rig.launch = partial(Forked, prepare=end_at_the_killer)
    batch = make_transactions(60)
    batch[30] = msgspec.structs.replace(batch[30], merchant=KILLER)
    source = apache_rig.topic_1 if name == "predictor" else apache_rig.topic_2
    producer = Producer({**apache_rig.properties, "log_level": 0})
    for each in batch:
        value = encode_transaction(each) if name == "predictor" else predicted(each)
        producer.produce(source, value, partition=0)
    assert producer.flush(20) == 0
    process = apache_rig.start(name, ready=False)
    began = time.monotonic()

    def done() -> bool:
        return (count(apache_rig, apache_rig.topic_2) if name == "predictor" else len(stored(engine))) >= 59

    starts = restarting(process, done, timeout_s=90)
    (letter,) = apache_rig.read(dead_letter_topic(source), 1)

    assert time.monotonic() - began < 90
    assert starts == 6
    assert KILLER.encode() in (letter.value() or b"")
    assert reasons([letter]) == ["the process ended 3 times while it handled this record alone"]
    if name == "predictor":
        found = apache_rig.read(apache_rig.topic_2, 59)
        assert by_card(found) == by_card(batch[:30] + batch[31:])


KILLS = 6 * EFFORT


@pytest.mark.timeout(60 + 20 * KILLS)
def test_kills_right_after_an_assignment_cost_no_record(apache_rig: Rig) -> None:
    batch = make_transactions(2000)
    apache_rig.put_transactions(batch)
    dice = random.Random(20261128)
    predictor = apache_rig.start("predictor", ready=False)
    for _ in range(KILLS):
        until(lambda: predictor.said("assigned"), what="an assignment")
        time.sleep(dice.uniform(0, 0.5))
        predictor.kill()
        predictor.spawn()

    found = apache_rig.read(apache_rig.topic_2, len(batch))

    assert sorted(msgspec.json.decode(each.value() or b"")["trans_num"] for each in found) == sorted(
        each.trans_num for each in batch
    )
    assert count(apache_rig, dead_letter_topic(apache_rig.topic_1)) == 0


def test_what_a_predecessor_still_commits_is_not_rewound(apache_rig: Rig) -> None:
    """A Kafka transaction with the offset 10 is pending while the next member starts, whose own start is announced."""
    group, topic = apache_rig.environment["PREDICTOR_GROUP"], apache_rig.topic_1
    batch = make_transactions(30)
    producer = Producer({**apache_rig.properties, "log_level": 0})
    for each in batch:
        producer.produce(topic, encode_transaction(each), partition=0)
    assert producer.flush(20) == 0
    predecessor = consumer(apache_rig.properties, group=group)
    predecessor.subscribe([topic])
    until(lambda: predecessor.poll(0.2), what="a record")
    pending = Producer({**apache_rig.properties, "transactional.id": f"{group}-before", "log_level": 0})
    pending.init_transactions(30)
    pending.begin_transaction()
    for each in batch[:10]:
        pending.produce(apache_rig.topic_2, predicted(each))
    pending.send_offsets_to_transaction([TopicPartition(topic, 0, 10)], predecessor.consumer_group_metadata(), 30)
    predecessor.close()
    predictor = apache_rig.start("predictor", ready=False)
    until(lambda: predictor.said("assigned"), what="an assignment")
    time.sleep(2)  # the predictor must wait for the offsets, for however long
    pending.commit_transaction(30)

    found = apache_rig.read(apache_rig.topic_2, len(batch))

    assert by_card(found) == by_card(batch)
