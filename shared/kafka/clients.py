"""Makes Kafka clients.

`client.properties` overrides this project's default properties, but not the properties on which the delivery guarantees
depend.
"""

from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from shared.errors import SettingsError
from shared.kafka.connections import ConnectionReports, OnError, log

# A dead letter is larger than the record that it contains, and topics accept records of up to 1 MiB by default.
MAX_RECORD_BYTES = 2 * 1024 * 1024
# A missing permission counts as an outage, because the permission can be granted while a service runs.
DENIED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)

_DEFAULTS = {
    "reconnect.backoff.max.ms": "2000",  # reconnect soon after a broker is back
    "topic.metadata.refresh.interval.ms": "20000",  # also decides how soon added partitions are read
}
_CONSUMER_ONLY = (
    "group.",
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "max.poll.interval.ms",
    "fetch.",
    "max.partition.fetch.bytes",
    "queued.",
    "auto.",
    "enable.auto.",
    "partition.assignment.strategy",
    "isolation.level",
)
_PRODUCER_ONLY = (
    "acks",
    "request.required.acks",
    "linger.ms",
    "queue.buffering.",
    "batch.",
    "compression.",
    "enable.idempotence",
    "transactional.id",
    "transaction.timeout.ms",
    "message.timeout.ms",
    "delivery.",
    "partitioner",
)


def consumer(
    properties: Mapping[str, str], *, group: str, replica: str | None = None, on_error: OnError | None = None
) -> Consumer:
    """Make a consumer that reads only committed records and never commits offsets by itself.

    With a `replica` name, the consumer is a static member (KIP-345). A static member that restarts under the same name
    gets its partitions back at once, without waiting for the old session to expire. With a `replica` name, the consumer
    also reports when it has reached the end of a partition, and when the next record of a partition does not exist. It
    then waits for a new position.

    While the consumer polls, it calls `on_error(error)` for broken connections. If all connections are broken, the
    text of the error contains the cause. Raises SettingsError if the properties are wrong.
    """
    defaults = {
        "auto.offset.reset": "earliest",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": "10000",
        "heartbeat.interval.ms": "1000",  # also decides how soon members notice a rebalance
        # A full queue contains several batches. By default, the client stops fetching for a second when the queue is
        # full, and the queue may then run empty.
        "queued.max.messages.kbytes": "8192",
        "queued.min.messages": "10000",
        "max.partition.fetch.bytes": "131072",  # the default of 1 MB uses 40 MB more memory and is no faster
        "fetch.queue.backoff.ms": "10",
    }
    promised: dict[str, Any] = {
        "group.id": group,
        "enable.auto.commit": "false",
        "enable.auto.offset.store": "false",
        "isolation.level": "read_committed",
    }
    if replica:
        promised |= {"group.instance.id": replica, "enable.partition.eof": "true", "auto.offset.reset": "error"}
    own = {key: value for key, value in properties.items() if not key.startswith(_PRODUCER_ONLY)}
    client: Consumer = _client(Consumer, {**_DEFAULTS, **defaults, **own, **promised}, on_error)
    return client


def producer(
    properties: Mapping[str, str],
    *,
    transactional_id: str | None = None,
    on_failure: Callable[[Any, Message], None] | None = None,
    on_error: OnError | None = None,
) -> Producer:
    """Make an idempotent producer, which writes each record once and in order to all in-sync replicas.

    Without a `transactional_id`, the producer retries for ever (`message.timeout.ms` is 0), because an unavailable
    broker is an outage, not an error. `on_failure(error, message)` is called only for records that the producer has
    given up on.

    Like a consumer, the producer calls `on_error(error)` for broken connections. The producer also calls
    `on_error(error)` if a Kafka transaction is not permitted to write to a topic.

    Raises SettingsError if the properties are wrong.
    """
    defaults = {
        "compression.type": "lz4",
        "linger.ms": "5",
        "partitioner": "murmur2_random",
        "message.max.bytes": str(MAX_RECORD_BYTES),
    }
    promised: dict[str, Any] = {"enable.idempotence": "true", "acks": "all", "delivery.report.only.error": True}
    if transactional_id:
        promised |= {"transactional.id": transactional_id, "transaction.timeout.ms": "10000"}
        # After a Kafka transaction, the broker rejects the next one for some milliseconds, until the marker is written.
        defaults["retry.backoff.ms"] = "2"
    else:
        promised |= {"message.timeout.ms": "0"}
    if on_failure:
        promised["on_delivery"] = on_failure
    own = {key: value for key, value in properties.items() if not key.startswith(_CONSUMER_ONLY)}
    client: Producer = _client(Producer, {**_DEFAULTS, **defaults, **own, **promised}, on_error)
    return client


def admin(properties: Mapping[str, str], *, on_error: OnError | None = None) -> AdminClient:
    """Make an admin client. Like a consumer, the client calls `on_error(error)` while it is polled.

    Raises SettingsError if the properties are wrong.
    """
    own = {key: value for key, value in properties.items() if not key.startswith((*_CONSUMER_ONLY, *_PRODUCER_ONLY))}
    client: AdminClient = _client(AdminClient, own, on_error)
    return client


def _client(kind: Callable[..., Any], configuration: Mapping[str, Any], on_error: OnError | None = None) -> Any:
    own = dict(configuration)
    logger: Any = log
    if on_error:
        logger = reports = ConnectionReports(own, on_error)
        own["error_cb"] = reports.error
    try:
        return kind(own, logger=logger)
    except KafkaException as error:
        raise SettingsError(f"CLIENT_PROPERTIES: {error.args[0].str()}") from None
