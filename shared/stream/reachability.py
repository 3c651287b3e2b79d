"""Checks whether a group can reach its brokers and may read its topic.

After the Kafka client has reported a problem, probes show when the problem is over.
"""

import time

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from shared.kafka.clients import DENIED
from shared.retry import OutageLog

_PROBE_S = 1.0


class Reachability:
    """After the client has reported unavailable brokers or a forbidden topic, logs an outage until a probe succeeds."""

    def __init__(self, *, group: str, topic: str) -> None:
        self._topic = topic
        self._outage = OutageLog(f"Kafka, for {group}", group=group)
        self._reason = ""  # from the last report
        self._denied = False  # access to the topic was denied, and no record or end of a partition has been read since
        self._group_denied = False  # access to the group is denied as well
        self._reported_at = 0.0  # monotonic time

    def report(self, error: KafkaError) -> None:
        """Record that all brokers are unavailable, or that a permission is missing."""
        if not self._reason:
            self._reported_at = time.monotonic()
        denied = error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
        if denied != self._denied:
            self._outage.over()  # a different kind of outage follows, and is logged separately
            self._group_denied = False
        self._denied = denied
        self._reason = f"{self._topic}: {error.str()}" if denied else error.str()

    def read(self) -> None:
        """Record that the topic is readable, because a record or the end of a partition was read."""
        self._denied = False

    def check(self, consumer: Consumer, *, other_outage: bool, at_least_s: float) -> None:
        """Probe the brokers after a report, and log whether the outage continues.

        If `other_outage` is true, no new outage is logged here, because the log already shows an outage. The first
        probe is made at least `at_least_s` seconds after the report. By then, the outage may be over, or the log may
        already show it because a batch has failed.
        """
        due = self._reason and not other_outage and time.monotonic() - self._reported_at >= at_least_s
        if not (due or self._outage.under_way):
            return
        if problem := self._problem(consumer):
            self._outage.failed(problem)
        else:
            self._reason = ""
            self._outage.over()

    def _problem(self, consumer: Consumer) -> str | None:
        """Return why the group cannot read its topic, or None if it can."""
        if self._denied:
            # While the topic is denied, the client does not report what else is.
            group_denial = self._group_denial(consumer)
            if bool(group_denial) != self._group_denied:
                self._group_denied = bool(group_denial)
                self._outage.over()  # so that the log shows the new reason at once
            return f"{self._reason}; {group_denial}" if group_denial else self._reason
        try:
            known = consumer.list_topics(self._topic, timeout=_PROBE_S).topics[self._topic]
            if known.error and known.error.code() in DENIED:
                return self._reason
            consumer.committed([TopicPartition(self._topic, 0)], timeout=_PROBE_S)
        except KafkaException:
            return self._reason
        return None

    def _group_denial(self, consumer: Consumer) -> str | None:
        """Return the broker's words if the group's offsets must not be read, otherwise None."""
        try:
            consumer.committed([TopicPartition(self._topic, 0)], timeout=_PROBE_S)
        except KafkaException as error:
            problem = error.args[0]
            return str(problem.str()) if problem.code() == KafkaError.GROUP_AUTHORIZATION_FAILED else None
        return None
