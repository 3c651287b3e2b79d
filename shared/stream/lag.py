"""Measures how far a group is behind the ends of its partitions, mostly without asking the broker."""

import time
from collections.abc import Sequence

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from shared import metrics
from shared.kafka.messages import coordinates

_ANSWER_S = 1.0


class Lag:
    """The lag of one group on one topic.

    When the client reports the end of a partition (`enable.partition.eof`), the lag is 0. Offsets between the last
    record and the end belong to markers of Kafka transactions, not to records.
    """

    def __init__(self, group: str, topic: str) -> None:
        self.records = 0
        self._names = (group, topic)
        self._next: dict[int, int] = {}  # offset after the last committed record
        self._ends: dict[int, int] = {}  # ends of partitions, as last reported by the client
        self._behind_since: dict[int, float] = {}  # monotonic; reset when a batch is committed

    def assigned(self, partitions: Sequence[TopicPartition]) -> None:
        """Do nothing, because nothing is known about a partition until a record or the partition's end is read."""

    def final(self, offsets: Sequence[TopicPartition]) -> None:
        """Record that all records before these offsets are committed."""
        for each in offsets:
            self._next[each.partition] = each.offset
            self._behind_since.pop(each.partition, None)

    def reached_end(self, partition: int, offset: int) -> None:
        """Record that the partition now ends at this offset."""
        self._ends[partition] = offset

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Forget these partitions, and remove their metrics."""
        for each in partitions:
            for known in (self._next, self._ends, self._behind_since):
                known.pop(each.partition, None)
            for gauge in (metrics.LAG, metrics.OLDEST):
                gauge.remove(*self._names, str(each.partition))

    def measure(self, consumer: Consumer, pending: Sequence[Message], *, paused: bool) -> None:
        """Set the metrics. `pending` has the consumed but uncommitted messages, in order within each partition.

        While partitions are paused, the client does not follow their ends, so the broker is asked for the ends.
        """
        firsts = {message.partition(): message for message in reversed(pending)}
        now, now_ms = time.monotonic(), time.time() * 1000
        records = 0
        for place in consumer.assignment():
            first = firsts.get(place.partition)
            if first is not None:
                _, _, following = coordinates(first)
            else:
                following = max(self._next.get(place.partition, -1), self._ends.get(place.partition, -1))
            end, paused = _end(consumer, place, ask=paused)
            lag = max(end - following, 0) if following >= 0 else 0
            if lag:
                self._behind_since.setdefault(place.partition, now)
            else:
                self._behind_since.pop(place.partition, None)
            since = self._behind_since.get(place.partition, now)
            age_s = max(0.0, now_ms - first.timestamp()[1]) / 1000 if first else now - since
            labels = (*self._names, str(place.partition))
            metrics.LAG.labels(*labels).set(lag)
            metrics.OLDEST.labels(*labels).set(age_s)
            records += lag
        self.records = records


def _end(consumer: Consumer, place: TopicPartition, *, ask: bool) -> tuple[int, bool]:
    """Return the offset of the partition's end (-1 if unknown), and whether to ask the broker about more partitions."""
    if ask:
        try:
            _, end = consumer.get_watermark_offsets(place, timeout=_ANSWER_S)
            return end, True
        except KafkaException:
            pass
    _, end = consumer.get_watermark_offsets(place, cached=True)
    return end, False
