"""The producer on Apache Kafka: what it fetched is written once, whatever becomes of it or of the broker."""

import random
import time
from pathlib import Path

import pytest
from conftest import Rig, until

from fraudctl import topics
from sandbox.apache import ApacheKafka
from sandbox.payments_api import PaymentsApi
from shared.records import read_topic_1

pytestmark = pytest.mark.kafka


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
        assert process.stop() == 0
        served = api.identities()

        messages = apache_rig.read(apache_rig.topic_1, len(served), extra_s=1)

    values = [read_topic_1(message.value()).transactions[0] for message in messages]
    assert len(values) == len({each.identity for each in values}) == len(served)
    for partition in {message.partition() for message in messages}:
        times = [
            each.unix_time for each, message in zip(values, messages, strict=True) if message.partition() == partition
        ]
        assert times == sorted(times)
