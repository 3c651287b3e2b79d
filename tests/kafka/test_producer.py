"""The producer on Apache Kafka: what it fetched is written once, whatever becomes of it or of the broker."""

import random
import struct
import time
from pathlib import Path

import pytest
from conftest import Rig, until

from sandbox.apache import ApacheKafka
from sandbox.payments_api import PaymentsApi
from shared.kafka import topics
from shared.kafka.messages import says_nothing
from shared.records import read_topic_1

pytestmark = [pytest.mark.kafka, pytest.mark.server]


def test_a_topic_that_is_missing_is_waited_for(apache_rig: Rig) -> None:
    absent = f"late-{apache_rig.topic_1}"
    with (apache_rig.directory / "client.properties").open("a") as properties:
        properties.write("topic.metadata.propagation.max.ms=500\n")  # how long a new topic may go unseen
    with PaymentsApi("--transactions", "50", "--rate", "0", log=apache_rig.directory / "api.log") as api:
        apache_rig.start(
            *("producer",), API_URL=api.url, TOPIC_1=absent, POLL_INTERVAL_SECONDS="0", BACKOFF_MAX_SECONDS="1"
        )
        until(lambda: "Unknown topic or partition" in apache_rig.log("producer"), what="the refusal in the log")
        topics.create(apache_rig.properties, [absent])

        messages = apache_rig.read(absent, 50, timeout_s=60, extra_s=2)

    identities = [row.identity for message in messages for row in read_topic_1(message.value()).transactions]
    assert len(identities) == len(set(identities)) == 50


def test_killed_again_and_again_it_loses_and_doubles_nothing(apache_rig: Rig) -> None:
    options = ("--confirmed", "--transactions", "2000", "--rate", "400", "--seed", "3", "--max-rows", "20")
    dice = random.Random(4)
    with PaymentsApi(*options, log=apache_rig.directory / "api.log") as api:
        for _ in range(6):
            process = apache_rig.start("producer", API_URL=api.url)
            time.sleep(dice.uniform(0.1, 0.6))  # the moment of death is the point; nothing is waited for
            process.kill()
        apache_rig.start("producer", API_URL=api.url)
        until(lambda: api.status()["exhausted"], what="the end of the source")
        served = api.identities()

        messages = apache_rig.read(apache_rig.topic_1, 2000, extra_s=2)

    identities = [row.identity for message in messages for row in read_topic_1(message.value()).transactions]
    assert len(identities) == len(set(identities)) == 2000
    assert set(identities) == served


def test_a_transaction_that_the_broker_forgot_to_end_is_ended(tmp_path: Path, apache_rig: Rig) -> None:
    with ApacheKafka(tmp_path / "own") as broker:
        apache_rig.properties = {"bootstrap.servers": broker.bootstrap}
        (apache_rig.directory / "client.properties").write_text(f"bootstrap.servers={broker.bootstrap}\n")
        topics.create(apache_rig.properties, [apache_rig.topic_1])
        with PaymentsApi("--transactions", "300", "--rate", "0", log=tmp_path / "api.log") as api:
            producer = apache_rig.start("producer", API_URL=api.url)
            apache_rig.read(apache_rig.topic_1, 300)
            producer.kill()
            broker.stop()
            for partition in (0, 1):
                cut_off_last_marker(tmp_path / "own" / "records" / f"{apache_rig.topic_1}-{partition}")
            (tmp_path / "own" / "records" / ".kafka_cleanshutdown").unlink(missing_ok=True)
        with PaymentsApi("--transactions", "300", "--rate", "0", "--seed", "9", log=tmp_path / "more.log") as api:
            apache_rig.start("producer", API_URL=api.url, BACKOFF_MAX_SECONDS="1")
            until(lambda: api.status()["exhausted"], what="more that waits to be written")
            broker.start()

            messages = apache_rig.read(apache_rig.topic_1, 600, timeout_s=90, extra_s=2)

    values = [message.value() for message in messages if not says_nothing(message)]
    rows = [row for value in values for row in read_topic_1(value).transactions]
    assert len(rows) == len({row.identity for row in rows}) == 600


def cut_off_last_marker(partition: Path) -> None:
    """Make the partition's last transaction one that the coordinator has decided and nobody has marked as such.

    The layout of record batches: https://kafka.apache.org/documentation/#recordbatch
    """
    (log,) = partition.glob("*.log")
    content = log.read_bytes()
    start, last = 0, 0
    while start < len(content):
        last = start
        start += 12 + struct.unpack_from(">i", content, start + 8)[0]
    (attributes,) = struct.unpack_from(">h", content, last + 21)
    assert attributes & 0b110000 == 0b110000  # of a transaction, and a control batch
    log.write_bytes(content[:last])
    for index in (*partition.glob("*index"), *partition.glob("*.snapshot")):
        index.unlink()


def test_while_the_broker_is_away_it_keeps_what_it_fetches(tmp_path: Path, apache_rig: Rig) -> None:
    with ApacheKafka(tmp_path / "own") as broker, PaymentsApi("--rate", "100", log=tmp_path / "api.log") as api:
        apache_rig.properties = {"bootstrap.servers": broker.bootstrap}
        (apache_rig.directory / "client.properties").write_text(f"bootstrap.servers={broker.bootstrap}\n")
        topics.create(apache_rig.properties, [apache_rig.topic_1])
        process = apache_rig.start("producer", API_URL=api.url, BACKOFF_MAX_SECONDS="1")
        until(lambda: api.status()["served"] > 100, what="some transactions")
        broker.kill()
        before = api.status()["served"]
        until(lambda: process.said("event='outage'"), what="the outage in the log")
        until(lambda: api.status()["served"] > before + 200, what="more polls while the broker is away")
        broker.start()
        until(lambda: process.said("event='outage_over'"), what="the end of the outage")
        assert process.stop() == 0
        served = api.identities()

        messages = apache_rig.read(apache_rig.topic_1, len(served), extra_s=1)

    messages = [message for message in messages if not says_nothing(message)]
    values = [read_topic_1(message.value()).transactions[0] for message in messages]
    assert len(values) == len({each.identity for each in values}) == len(served)
    for partition in {message.partition() for message in messages}:
        times = [
            each.unix_time for each, message in zip(values, messages, strict=True) if message.partition() == partition
        ]
        assert times == sorted(times)
