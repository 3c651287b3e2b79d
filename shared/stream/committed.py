"""Reads a group's committed offsets. The broker withholds offsets that are in an unfinished Kafka transaction."""

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from shared.errors import Outage
from shared.kafka.messages import coordinates

_ANSWER_S = 5.0
_FORGOTTEN_S = 30.0  # every ten seconds, brokers abort Kafka transactions that are older than ten seconds

Place = tuple[str, int]
"""Topic and partition."""


class CommittedOffsets:
    """Reads committed offsets, and detects if the broker withholds them longer than a Kafka transaction may last."""

    def __init__(self) -> None:
        self._unknown_since: float | None = None  # monotonic time

    def assigned(self) -> None:
        """Record that partitions were assigned. The consumer now waits silently for their committed offsets."""
        self._unknown_since = time.monotonic()

    def read(self, consumer: Consumer, places: Iterable[Place]) -> dict[Place, TopicPartition]:
        """Return the committed offset of each partition, and its metadata.

        Before the first commit, the offset is negative.

        Raises Outage if the offsets cannot be read.
        """
        partitions = [TopicPartition(*place) for place in places]
        try:
            found = consumer.committed(partitions, timeout=_ANSWER_S) if partitions else []
        except KafkaException as exception:
            self._unknown_since = self._unknown_since or time.monotonic()
            raise Outage(f"cannot read the committed offsets: {exception.args[0].str()}") from None
        if failed := next((each.error for each in found if each.error), None):
            raise Outage(f"cannot read the committed offsets: {failed.str()}")
        return {(each.topic, each.partition): each for each in found}

    def write(self, consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
        """Commit these offsets and their metadata, and read them back.

        Call this only while nothing of these partitions is in flight. Raises Outage if the broker does not accept them.
        """
        try:
            consumer.commit(offsets=list(offsets), asynchronous=True)
        except KafkaException as exception:
            raise Outage(f"offsets not committed: {exception.args[0].str()}") from None
        written = self.read(consumer, [(each.topic, each.partition) for each in offsets])
        for each in offsets:
            found = written[each.topic, each.partition]
            if (found.offset, found.metadata or "") != (each.offset, each.metadata or ""):
                raise Outage(f"offsets of {each.topic} not committed: the broker did not accept them")

    @property
    def overdue(self) -> bool:
        """Whether the offsets have been unknown for so long that `withheld` should be called."""
        return self._unknown_since is not None and time.monotonic() - self._unknown_since > _FORGOTTEN_S

    def withheld(self, consumer: Consumer) -> bool:
        """Return whether the broker withholds the offset of an assigned partition.

        If the result is true, call this again when `overdue` is true again.
        """
        self._unknown_since = time.monotonic()
        try:
            self.read(consumer, {(each.topic, each.partition) for each in consumer.assignment()})
        except Outage:
            return True
        self._unknown_since = None
        return False


def not_committed(messages: Sequence[Message], committed: Mapping[Place, TopicPartition]) -> list[Message]:
    """Return `messages` without the leading messages that are already committed.

    A batch is committed as a whole or not at all.
    """
    places = [coordinates(message) for message in messages]
    final = len(list(takewhile(lambda place: place[2] < committed[place[:2]].offset, places)))
    return list(messages[final:])
