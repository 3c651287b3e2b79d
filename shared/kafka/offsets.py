"""Finds where partitions begin and end, as offsets, and reads partitions to their current ends."""

from collections.abc import Iterator, Mapping, Sequence

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ListOffsetsResultInfo,
    OffsetSpec,
)

from shared.errors import Outage
from shared.kafka.clients import admin, consumer
from shared.kafka.messages import coordinates, says_nothing

_READ_TIMEOUT_S = 10.0


def ends(
    properties: Mapping[str, str], partitions: Sequence[TopicPartition], *, committed: bool
) -> dict[tuple[str, int], int]:
    """For each partition, return the offset that its next record will get.

    With `committed`, returns the last stable offset instead: `read_committed` consumers read only records before this
    offset. While a Kafka transaction is open, the last stable offset is the offset of the transaction's first record.

    Raises Outage if the broker does not answer.
    """
    latest: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    found = _listed(admin(properties), partitions, latest, committed=committed)
    return {place: answer.offset for place, answer in found.items()}


def begins(properties: Mapping[str, str], partitions: Sequence[TopicPartition]) -> dict[tuple[str, int], int]:
    """Return the offset of each partition's oldest record. Raises Outage if the broker does not answer."""
    earliest: OffsetSpec = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
    found = _listed(admin(properties), partitions, earliest, committed=False)
    return {place: answer.offset for place, answer in found.items()}


def newest_ms(properties: Mapping[str, str], partitions: Sequence[TopicPartition]) -> int | None:
    """Return the time of the newest record in these partitions, in epoch milliseconds, or None if they are empty.

    Raises Outage if the broker does not answer.
    """
    newest: OffsetSpec = OffsetSpec.max_timestamp()  # type: ignore[no-untyped-call]
    found = _listed(admin(properties), partitions, newest, committed=False)
    return max((answer.timestamp for answer in found.values() if answer.timestamp >= 0), default=None)


def since(properties: Mapping[str, str], topic: str, epoch_ms: int) -> list[TopicPartition]:
    """For each partition, return the offset of the first record at or after `epoch_ms`.

    Uncommitted records are included. Partitions that are empty, or contain only older records, are left out. Raises
    Outage if the broker does not answer, or denies access to the topic.
    """
    client = admin(properties)
    try:
        known = client.list_topics(topic, timeout=_READ_TIMEOUT_S).topics[topic]
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None
    if known.error:
        raise Outage(f"{topic}: {known.error.str()}")
    partitions = [TopicPartition(topic, partition) for partition in known.partitions]
    found = _listed(client, partitions, OffsetSpec.for_timestamp(epoch_ms), committed=False)
    return [TopicPartition(*place, answer.offset) for place, answer in found.items() if answer.offset >= 0]


def read_to_end(properties: Mapping[str, str], starts: Sequence[TopicPartition], *, group: str) -> Iterator[Message]:
    """Yield every committed record from the offsets `starts` to the current ends of their partitions.

    Skips empty records that were written only to give a Kafka transaction a marker. Raises Outage if the broker does
    not answer, or denies access to a topic.
    """
    reader = consumer({**properties, "enable.partition.eof": "true"}, group=group)
    unread = {(start.topic, start.partition) for start in starts}
    problem = "no response"
    try:
        reader.assign(list(starts))
        while unread:
            first = reader.poll(_READ_TIMEOUT_S)
            if first is None:
                raise Outage(f"Kafka: {problem} in {_READ_TIMEOUT_S:.0f} s")
            for message in (first, *reader.consume(1000, 0)):
                error = message.error()
                if error is None:
                    if not says_nothing(message):
                        yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard((message.topic(), message.partition()))
                elif error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                    raise Outage(f"Kafka: {message.topic()}: {error.str()}")
                else:
                    problem = f"{error.str()}; no data"  # the client retries by itself
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None
    finally:
        reader.close()


def read_at(properties: Mapping[str, str], place: TopicPartition, *, group: str) -> Message | None:
    """Return the committed record at this offset, or None if there is none (any more).

    Raises Outage if the broker does not answer, or denies access to the topic.
    """
    for message in read_to_end(properties, [place], group=group):
        return message if coordinates(message)[2] == place.offset else None
    return None


def _listed(
    client: AdminClient, partitions: Sequence[TopicPartition], spec: OffsetSpec, *, committed: bool
) -> dict[tuple[str, int], ListOffsetsResultInfo]:
    level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
    try:
        answers = client.list_offsets(
            {TopicPartition(each.topic, each.partition): spec for each in partitions},
            isolation_level=level,
            request_timeout=_READ_TIMEOUT_S,
        )
        longest_s = 2 * _READ_TIMEOUT_S  # a limit that holds even if the client ignores its timeout
        return {(asked.topic, asked.partition): answer.result(longest_s) for asked, answer in answers.items()}
    except TimeoutError:
        raise Outage(f"Kafka: no response in {longest_s:.0f} s") from None
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None


def next_offsets(messages: Sequence[Message]) -> list[TopicPartition]:
    """For each partition of `messages`, return the offset to read next.

    The messages must be from one topic, and in order within each partition.
    """
    last = {message.partition(): message for message in messages}
    return [
        TopicPartition(topic, partition, offset + 1) for topic, partition, offset in map(coordinates, last.values())
    ]
