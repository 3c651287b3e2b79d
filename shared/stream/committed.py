"""A group's committed offsets, which the broker withholds while an unfinished transaction covers them."""

import time
from collections.abc import Iterable, Sequence
from itertools import takewhile

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from shared.errors import Outage
from shared.kafka.messages import coordinates

_ANSWER_S = 5.0
_FORGOTTEN_S = 30.0  # brokers abort transactions after ten seconds, and check for old ones every ten seconds

Place = tuple[str, int]
"""Topic and partition."""


class CommittedOffsets:
    """Reads committed offsets and notices when the broker withholds them for longer than any transaction may last."""

    def __init__(self) -> None:
        self._unknown_since: float | None = None  # monotonic

    def assigned(self) -> None:
        """Note that partitions were assigned: the consumer fetches their offsets, and logs nothing while it waits."""
        self._unknown_since = time.monotonic()

    def read(self, consumer: Consumer, places: Iterable[Place]) -> dict[Place, int]:
        """The next offset to read in each partition; negative before its first commit. Raises Outage."""
        partitions = [TopicPartition(*place) for place in places]
        try:
            found = consumer.committed(partitions, timeout=_ANSWER_S) if partitions else []
        except KafkaException as exception:
            self._unknown_since = self._unknown_since or time.monotonic()
            raise Outage(f"committed offsets: {exception.args[0].str()}") from None
        if failed := next((each.error for each in found if each.error), None):
            raise Outage(f"committed offsets: {failed.str()}")
        return {(each.topic, each.partition): each.offset for each in found}

    @property
    def overdue(self) -> bool:
        """Whether it is time to call `withheld`."""
        return self._unknown_since is not None and time.monotonic() - self._unknown_since > _FORGOTTEN_S

    def withheld(self, consumer: Consumer) -> bool:
        """Whether the broker withholds the offsets of an assigned partition. If so, ask again once `overdue`."""
        self._unknown_since = time.monotonic()
        try:
            self.read(consumer, {(each.topic, each.partition) for each in consumer.assignment()})
        except Outage:
            return True
        self._unknown_since = None
        return False


def not_committed(messages: Sequence[Message], committed: dict[Place, int]) -> list[Message]:
    """`messages` without the leading ones that are already committed. A batch is committed as a whole or not at all."""
    places = [coordinates(message) for message in messages]
    final = len(list(takewhile(lambda place: place[2] < committed[place[:2]], places)))
    return list(messages[final:])
