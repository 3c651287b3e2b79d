"""How far a consumer is behind the ends of its partitions, by what the client knows without asking the broker."""

import time
from collections.abc import Iterable, Sequence

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from shared import metrics
from shared.kafka.messages import coordinates

_ANSWER_S = 1.0


class Lag:
    """Of one group on one topic.

    The end of a partition is told by the client (`enable.partition.eof`): behind the last record lie the marks of
    transactions, which are no records and yet have offsets.
    """

    def __init__(self, group: str, topic: str) -> None:
        self.records = 0
        self._names = (group, topic)
        self._next: dict[int, int] = {}  # behind what is finished
        self._ends: dict[int, int] = {}  # as the client told them last
        self._behind_since: dict[int, float] = {}  # monotonic; since something was finished last, at the earliest

    def finished(self, offsets: Iterable[TopicPartition]) -> None:
        """The next offsets to be read, were this process to end now."""
        for each in offsets:
            self._next[each.partition] = each.offset
            self._behind_since.pop(each.partition, None)

    def reached_end(self, partition: int, offset: int) -> None:
        """There is nothing from this offset on, for now."""
        self._ends[partition] = offset

    def forget(self, partitions: Iterable[int]) -> None:
        """These are others' now."""
        for partition in partitions:
            for known in (self._next, self._ends, self._behind_since):
                known.pop(partition, None)
            for gauge in (metrics.LAG, metrics.OLDEST):
                gauge.remove(*self._names, str(partition))

    def measure(self, consumer: Consumer, pending: Sequence[Message], *, paused: bool) -> None:
        """Take stock: `pending` are consumed and not finished, in order within each partition.

        Of paused partitions the client hears nothing: the broker is asked.
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
    """The partition's next offset, -1 if it is not known, and whether the broker answers."""
    if ask:
        try:
            _, end = consumer.get_watermark_offsets(place, timeout=_ANSWER_S)
            return end, True
        except KafkaException:
            pass
    _, end = consumer.get_watermark_offsets(place, cached=True)
    return end, False
