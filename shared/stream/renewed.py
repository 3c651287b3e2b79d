"""Notices that a topic was deleted and made again while it is being read.

The client does not notice: it reads on at its old offsets. Records of the new log before these offsets would be skipped
(https://github.com/confluentinc/librdkafka/issues/3255). Only the topic's ID distinguishes the two topics.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaException, TopicCollection

from shared.kafka.clients import admin

_EVERY_S = 3.0
_TIMEOUT_S = 10.0


class Renewed:
    """Asks for a topic's ID every few seconds, without waiting for the answers.

    If the login has no permission to describe the topic, or the broker knows no IDs, nothing is ever noticed.
    """

    def __init__(self, properties: Mapping[str, str], topic: str) -> None:
        self._client = admin(properties)
        self._topic = topic
        self._known: str | None = None
        self._asked: Future[Any] | None = None
        self._asked_at = 0.0  # monotonic time

    def look(self) -> bool:
        """Return whether the topic is another one than at the last look."""
        if self._asked and self._asked.done():
            found, self._asked = _id(self._asked), None
            known, self._known = self._known, found or self._known
            return bool(found and known and found != known)
        if not self._asked and time.monotonic() - self._asked_at >= _EVERY_S:
            self._asked_at = time.monotonic()
            asked = self._client.describe_topics(TopicCollection([self._topic]), request_timeout=_TIMEOUT_S)
            self._asked = asked[self._topic]
        return False


def _id(answer: Future[Any]) -> str | None:
    try:
        return str(answer.result().topic_id)
    except KafkaException:  # it is away or deleted, or this login must not see it
        return None
