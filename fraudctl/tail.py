"""Reads a topic's last records, or new records as they arrive, and masks card numbers and birth dates."""

import time
from collections.abc import Callable, Iterator, Mapping

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from fraudctl.call import CallError
from fraudctl.readable import readable_header, readable_key, readable_value
from shared.errors import Outage
from shared.kafka.clients import DENIED, consumer
from shared.kafka.messages import coordinates, readable_headers, says_nothing
from shared.kafka.offsets import begins, read_to_end
from shared.kafka.topics import away, ends
from shared.provenance import HEADER, Provenance, from_headers
from shared.records import format_time

_GROUP = "fraudctl"
_POLL_S = 0.1
_TIMEOUT_S = 10.0
# Errors to ignore. A consumer with assigned partitions also looks up its group, but `follow` does not need a group.
_HARMLESS = frozenset({KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError._PARTITION_EOF})


def last(properties: Mapping[str, str], topic: str, count: int) -> list[Message]:
    """Return the last `count` records, oldest first.

    Raises CallError if the topic is missing, and Outage if Kafka does not respond.
    """
    places = _ends(properties, topic)
    first = begins(properties, places)
    reach = count
    while True:
        starts = [
            TopicPartition(topic, end.partition, max(first[topic, end.partition], end.offset - reach)) for end in places
        ]
        found = list(read_to_end(properties, starts, group=_GROUP))
        # Transaction markers have offsets, too, so `reach` offsets may contain too few records. All of the last records
        # may be in one partition, so each partition needs `count` records.
        behind = [start.partition for start in starts if start.offset > first[topic, start.partition]]
        if all(sum(message.partition() == each for message in found) >= count for each in behind):
            return sorted(found, key=lambda message: (message.timestamp()[1], coordinates(message)))[-count:]
        reach *= 4


def follow(properties: Mapping[str, str], topic: str, *, report: Callable[[str], None]) -> Iterator[Message]:
    """Yield new records as they arrive, and never return.

    Calls `report` with each problem. A problem of the same kind is reported again only after a record has arrived.
    Raises CallError if the topic is missing, and Outage if Kafka does not respond or denies access.
    """
    reported: set[int] = set()

    def report_once(error: KafkaError, text: str) -> None:
        if error.code() not in reported:
            reported.add(error.code())
            report(text)

    def on_error(error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            report_once(error, f"Kafka at {properties['bootstrap.servers']}: no broker responds; retrying")

    reader = consumer(properties, group=_GROUP, on_error=on_error)
    try:
        reader.assign(_ends(properties, topic))
        while True:
            message = reader.poll(0)
            if message is None:
                time.sleep(_POLL_S)  # not a blocking poll, whose callbacks may swallow Ctrl+C
                continue
            error = message.error()
            if error is None:
                reported.clear()
                if not says_nothing(message):
                    yield message
            elif error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise Outage(f"Kafka: {topic}: {error.str()}")
            elif error.code() not in _HARMLESS:
                report_once(error, f"Kafka: {topic}: {error.str()}")
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None
    finally:
        reader.close()


def description(message: Message) -> str:
    """Describe a record in a few lines of text, with card numbers and birth dates masked."""
    topic, partition, offset = coordinates(message)
    found = readable_headers(message)
    provenance = from_headers(found)
    lines = [
        f"{topic}:{partition}:{offset}, {format_time(message.timestamp()[1] // 1000)} UTC",
        f"  key: {readable_key(message.key())}",
        *(f"  {readable_header('', name)}: {readable_header(name, value)}" for name, value in found if name != HEADER),
        *([f"  {HEADER}: {_words(provenance)}"] if provenance != Provenance() else []),
        f"  value: {readable_value(message.value(), indent=None)}",
    ]
    return "\n".join(lines)


def _words(provenance: Provenance) -> str:
    model = f"{provenance.model_name or 'unknown'} version {provenance.model_version or 'unknown'}"
    parts = [readable_header(HEADER, model)]
    if provenance.probability is not None:
        parts.append(f"probability {provenance.probability:.4f}")
    if provenance.predicted_at_ms is not None:
        parts.append(f"predicted {format_time(provenance.predicted_at_ms // 1000)} UTC")
    if provenance.source_offset is not None:
        parts.append(f"from partition {provenance.source_partition}, offset {provenance.source_offset}")
    return ", ".join(parts)


def _ends(properties: Mapping[str, str], topic: str) -> list[TopicPartition]:
    if found := ends(properties, [topic]):
        return found
    reader = consumer(properties, group=_GROUP)
    try:
        error = reader.list_topics(topic, timeout=_TIMEOUT_S).topics[topic].error
    except KafkaException as exception:
        raise away(properties, exception) from None
    finally:
        reader.close()
    if error and error.code() in DENIED:
        raise Outage(f"Kafka: {topic}: {error.str()}")
    raise CallError(f"there is no topic {topic}")
