"""The topics and their dead-letter topics."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.cimpl import NewTopic

from shared.dead_letters import SUFFIX
from shared.errors import Outage
from shared.kafka import MAX_RECORD_BYTES, admin, consumer

PARTITIONS = 6
_TIMEOUT_S = 15.0


def create(
    properties: Mapping[str, str], names: Sequence[str], *, partitions: int = PARTITIONS, letters: bool = True
) -> list[str]:
    """Create what is missing of the topics and, with `letters`, of their dead-letter topics; returns the new names.

    Several may do so at once. Raises Outage if the broker does not do it, SettingsError for wrong properties.
    """
    client = admin(properties)
    wanted = [
        NewTopic(name + suffix, num_partitions=partitions, config=config)
        for name in names
        for suffix, config in (("", {}), (SUFFIX, {"max.message.bytes": str(MAX_RECORD_BYTES)}))[: 1 + letters]
    ]
    try:
        present = client.list_topics(timeout=_TIMEOUT_S).topics
        absent = [topic for topic in wanted if topic.topic not in present]
        return [name for name, done in client.create_topics(absent).items() if _new(done)] if absent else []
    except KafkaException as error:
        raise Outage(f"Kafka at {properties['bootstrap.servers']}: {error.args[0].str()}") from None


def use(properties: Mapping[str, str], names: Sequence[str]) -> None:
    """Have a broker that creates topics by use create these and their dead-letter topics. Raises Outage."""
    client = admin(properties)  # which may create topics, where a consumer may not
    for name in names:
        for suffix in ("", SUFFIX):
            client.list_topics(name + suffix, timeout=_TIMEOUT_S)
    ends(properties, names)


def ends(properties: Mapping[str, str], names: Sequence[str]) -> list[TopicPartition]:
    """The next offset of every partition of these topics; a new topic's leaders are waited for. Raises Outage."""
    reader = consumer(properties, group="fraudctl")
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while True:
            try:
                return [end for name in names for end in _ends(reader, name)]
            except KafkaException as error:
                if time.monotonic() > deadline:
                    raise Outage(f"Kafka at {properties['bootstrap.servers']}: {error.args[0].str()}") from None
                time.sleep(0.1)
    finally:
        reader.close()


def _ends(reader: Consumer, name: str) -> Iterator[TopicPartition]:
    for partition in sorted(reader.list_topics(name, timeout=_TIMEOUT_S).topics[name].partitions):
        _, end = reader.get_watermark_offsets(TopicPartition(name, partition), timeout=_TIMEOUT_S)
        yield TopicPartition(name, partition, end)


def _new(done: Future[None]) -> bool:
    try:
        done.result()
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
        return False
    return True
