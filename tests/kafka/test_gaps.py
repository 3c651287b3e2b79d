"""Records that vanish and topics that are made again, on Apache Kafka: nothing is skipped in silence."""

import time
import urllib.request
from collections.abc import Callable, Iterable

import msgspec
import pytest
import sqlalchemy as sa
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic  # type: ignore[attr-defined]
from conftest import Rig, make_transactions, until

from sandbox.mailbox import Mailbox, messages
from sandbox.processes import free_port
from shared.records import Transaction, encode_prediction, encode_transaction

pytestmark = [pytest.mark.kafka, pytest.mark.server]


@pytest.fixture
def environment(environment: dict[str, str], surroundings: dict[str, str]) -> dict[str, str]:
    return environment | surroundings | {"ALERT_BURST": "5000", "METRICS_PORT": str(free_port())}


def write(rig: Rig, topic: str, batch: Iterable[Transaction], *, label: int | None) -> None:
    """Write transactions or, with a label, predictions, all to one partition."""
    producer = Producer({**rig.properties, "log_level": 0})
    for each in batch:
        value = encode_transaction(each)
        producer.produce(topic, value if label is None else encode_prediction(value, label), partition=0)
    assert producer.flush(20) == 0


def make_again(rig: Rig, topic: str, *, partitions: int) -> None:
    client = AdminClient({**rig.properties, "log_level": 0})
    client.delete_topics([topic])[topic].result(20)

    def made() -> bool:
        try:
            client.create_topics([NewTopic(topic, partitions, 1)])[topic].result(20)
        except Exception as error:
            assert "being deleted" in str(error) or "already exists" in str(error), error
            return False
        return True

    until(made, what="the topic")


def numbers(batch: Iterable[Transaction]) -> list[str]:
    return sorted(each.trans_num for each in batch)


@pytest.fixture
def stored(engine: sa.Engine) -> Callable[[], list[str]]:
    def look() -> list[str]:
        if not sa.inspect(engine).has_table("transactions"):
            return []
        with engine.connect() as connection:
            return sorted(connection.execute(sa.text("SELECT trans_num FROM transactions")).scalars())

    return look


def counted(rig: Rig, metric: str) -> float:
    """The sum of a counter's values over all its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{rig.environment['METRICS_PORT']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric))


def test_records_deleted_unread_are_counted_and_the_others_stored(
    apache_rig: Rig, stored: Callable[[], list[str]]
) -> None:
    batch = make_transactions(100)
    write(apache_rig, apache_rig.topic_2, batch[:20], label=0)
    sink = apache_rig.start("db_sink")
    until(lambda: stored() == numbers(batch[:20]), what="the first rows")
    assert counted(apache_rig, "fraud_alarm_deleted_unread_total") == 0
    sink.stop(20)
    write(apache_rig, apache_rig.topic_2, batch[20:], label=0)
    client = AdminClient({**apache_rig.properties, "log_level": 0})
    (deleted,) = client.delete_records([TopicPartition(apache_rig.topic_2, 0, 70)]).values()
    deleted.result(20)

    apache_rig.start("db_sink")
    until(lambda: stored() == numbers([*batch[:20], *batch[70:]]), what="what is left")

    assert counted(apache_rig, "fraud_alarm_deleted_unread_total") == 50


@pytest.mark.parametrize("partitions", [1, 6])
def test_a_topic_2_made_again_is_read_from_its_beginning(
    apache_rig: Rig, stored: Callable[[], list[str]], mailbox: Mailbox, partitions: int
) -> None:
    batch = make_transactions(260)
    old, new = batch[:60], batch[60:]  # the new topic is longer at once

    def mailed() -> list[str]:
        return sorted({number for mail in messages(mailbox.directory) for number, _ in mail.alarms})

    write(apache_rig, apache_rig.topic_2, old, label=1)
    alerter = apache_rig.start("alerter")
    apache_rig.environment["METRICS_PORT"] = str(free_port())
    sink = apache_rig.start("db_sink")
    until(lambda: mailed() == numbers(old) == stored(), what="the old alarms")
    time.sleep(4)  # the services know the topic's ID

    make_again(apache_rig, apache_rig.topic_2, partitions=partitions)
    write(apache_rig, apache_rig.topic_2, new, label=1)
    until(lambda: mailed() == numbers(batch) == stored(), timeout_s=90, what="the new alarms")

    assert counted(apache_rig, "fraud_alarm_topic_recreated_total") == 1
    assert alerter.running
    assert sink.running


def test_a_topic_1_made_again_is_predicted_whole(apache_rig: Rig) -> None:
    batch = make_transactions(260)
    old, new = batch[:60], batch[60:]
    write(apache_rig, apache_rig.topic_1, old, label=None)
    predictor = apache_rig.start("predictor")
    apache_rig.read(apache_rig.topic_2, len(old))
    time.sleep(4)  # the predictor knows the topic's ID

    make_again(apache_rig, apache_rig.topic_1, partitions=6)
    write(apache_rig, apache_rig.topic_1, new, label=None)

    def predicted() -> list[str]:
        found = apache_rig.read(apache_rig.topic_2, 0, extra_s=1.0)
        return sorted({msgspec.json.decode(each.value() or b"")["trans_num"] for each in found})

    until(lambda: predicted() == numbers(batch), timeout_s=90, what="all predictions")
    assert predictor.running


def test_added_partitions_are_read_within_half_a_minute(apache_rig: Rig, stored: Callable[[], list[str]]) -> None:
    batch = make_transactions(2)
    apache_rig.start("db_sink")
    client = AdminClient({**apache_rig.properties, "log_level": 0})
    client.create_partitions([NewPartitions(apache_rig.topic_2, 7)])[apache_rig.topic_2].result(20)
    began = time.monotonic()
    producer = Producer({**apache_rig.properties, "log_level": 0})
    producer.produce(apache_rig.topic_2, encode_prediction(encode_transaction(batch[0]), 0), partition=6)
    assert producer.flush(20) == 0

    until(lambda: stored() == numbers(batch[:1]), what="the row of the new partition")

    assert time.monotonic() - began < 30
