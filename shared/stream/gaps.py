"""Closes the gaps that the client would skip in silence: records that were deleted unread, and topics made again.

A topic may be deleted and made again while it is being read. The client does not notice, and reads on at its old
offsets. The records of the new topic before these offsets would be skipped
(https://github.com/confluentinc/librdkafka/issues/3255). Only a topic's ID distinguishes the two topics.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import structlog
from confluent_kafka import (
    OFFSET_STORED,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)

from shared import metrics
from shared.errors import Outage
from shared.kafka.clients import admin
from shared.stream.committed import CommittedOffsets, Place

log = structlog.get_logger()

_EVERY_S = 3.0
_TIMEOUT_S = 10.0
_ANSWER_S = 5.0


class LostPositions:
    """The partitions whose next record does not exist, and which the client therefore does not read.

    That is so before the group's first commit, and after the broker has deleted records that were not read yet.
    """

    def __init__(self, *, group: str) -> None:
        self._log = log.bind(group=group)
        self._next: dict[Place, int | None] = {}  # offset of the record that does not exist; None: nothing is committed
        self._begins: dict[Place, int] = {}  # where partitions were begun

    def add(self, event: Message) -> None:
        """Record what the client reports (`auto.offset.reset=error`)."""
        self._next[str(event.topic()), int(event.partition() or 0)] = event.offset()

    def read_on(self, consumer: Consumer) -> None:
        """Read these partitions from their oldest records on. If the broker does not answer, call this again."""
        for place, following in list(self._next.items()):
            try:
                begin, end = consumer.get_watermark_offsets(TopicPartition(*place), timeout=_ANSWER_S)
                self._begins[place] = begin
                self._begin(consumer, TopicPartition(*place, begin))
            except KafkaException:
                return
            del self._next[place]
            if following is not None:
                self._report(place, following, begin, end)

    def forget(self, places: set[Place]) -> None:
        """Forget these partitions, because they were revoked."""
        for place in places:
            self._next.pop(place, None)
            self._begins.pop(place, None)

    def _begin(self, consumer: Consumer, begin: TopicPartition) -> None:
        """Give the partition a position. The client refuses to seek in a partition that it does not read."""
        try:
            consumer.incremental_unassign([begin])
            consumer.incremental_assign([begin])
        except KafkaException as exception:
            if exception.args[0].code() != KafkaError._STATE:
                raise
            # With an assignor that is not cooperative, only the assignment as a whole can be replaced.
            consumer.assign(list(map(self._kept, consumer.position(consumer.assignment()))))

    def _kept(self, each: TopicPartition) -> TopicPartition:
        begun = self._begins.get((each.topic, each.partition), OFFSET_STORED)
        return TopicPartition(each.topic, each.partition, each.offset if each.offset >= 0 else begun)

    def _report(self, place: Place, following: int, begin: int, end: int) -> None:
        topic, partition = place
        if following < begin:
            metrics.DELETED_UNREAD.inc(begin - following)
            self._log.error("records_deleted_unread", topic=topic, partition=partition, records=begin - following)
        else:
            reason = f"offset {following} is beyond the end of the partition, {end}; the topic was probably made again"
            self._log.error("position_lost", topic=topic, partition=partition, reason=reason, reads_from=begin)


class TopicId:
    """Asks for a topic's ID every few seconds, without waiting for the answers.

    If the login has no permission to describe the topic, or the broker knows no IDs, nothing is ever noticed.
    """

    def __init__(self, properties: Mapping[str, str], topic: str) -> None:
        self._client = admin(properties)
        self._topic = topic
        self._known: str | None = None
        self._asked: Future[Any] | None = None
        self._asked_at = 0.0  # monotonic time

    def changed(self) -> bool:
        """Return whether the topic is another one than at the last answer."""
        if self._asked and self._asked.done():
            found, self._asked = _id(self._asked), None
            known, self._known = self._known, found or self._known
            return bool(found and known and found != known)
        if not self._asked and time.monotonic() - self._asked_at >= _EVERY_S:
            self._asked_at = time.monotonic()
            asked = self._client.describe_topics(TopicCollection([self._topic]), request_timeout=_TIMEOUT_S)
            self._asked = asked[self._topic]
        return False


def read_anew(consumer: Consumer, topic: str, committed: CommittedOffsets) -> list[TopicPartition]:
    """Read the assigned partitions of a topic that was made again from their beginnings. Nothing may be in flight.

    Returns those of them that the new topic has. Raises Outage if the broker does not answer.
    """
    try:
        present = consumer.list_topics(topic, timeout=_ANSWER_S).topics[topic].partitions
        partitions = [each for each in consumer.assignment() if each.partition in present]
        positions = [each.offset for each in consumer.position(partitions)]
        marks = [consumer.get_watermark_offsets(each, timeout=_ANSWER_S) for each in partitions]
        begins = [
            TopicPartition(topic, each.partition, begin) for each, (begin, _) in zip(partitions, marks, strict=True)
        ]
        committed.write(consumer, begins)  # otherwise, a successor would begin at the old offsets
        for each in begins:
            consumer.seek(each)
    except KafkaException as exception:
        raise Outage(f"cannot read {topic} from its beginning: {exception.args[0].str()}") from None
    again = sum(max(0, min(position, end) - begin) for position, (begin, end) in zip(positions, marks, strict=True))
    metrics.TOPIC_RECREATED.inc()
    log.error("topic_recreated", topic=topic, reads_from="its beginning", read_again_at_most=again)
    return partitions


def _id(answer: Future[Any]) -> str | None:
    try:
        return str(answer.result().topic_id)
    except KafkaException:  # it is away or deleted, or this login must not see it
        return None
