"""The real broker as a stand-in: it comes back with its records."""

from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from conftest import Rig

from sandbox.apache import ApacheKafka
from shared.kafka import topics

pytestmark = [pytest.mark.kafka, pytest.mark.server]


def test_records_survive_stop_and_kill(tmp_path: Path, apache_rig: Rig) -> None:
    del apache_rig  # asks for Apache Kafka, so that its absence is dealt with in one place
    with ApacheKafka(tmp_path / "own") as broker:
        properties = {"bootstrap.servers": broker.bootstrap}
        assert topics.create(properties, ["kept"]) == ["kept", "kept.dlq"]
        assert topics.create(properties, ["kept"]) == []
        producer = Producer({**properties, "log_level": 0, "message.timeout.ms": 30_000})
        producer.produce("kept", b"before", partition=0)
        assert producer.flush(20) == 0

        broker.stop()
        broker.start()
        producer.produce("kept", b"between", partition=0)
        assert producer.flush(30) == 0
        broker.kill()
        broker.start()

        reader = Consumer({**properties, "group.id": "reader", "log_level": 0})
        reader.assign([TopicPartition("kept", 0, 0)])
        found = reader.consume(2, 20)
        reader.close()
        assert [message.value() for message in found] == [b"before", b"between"]
