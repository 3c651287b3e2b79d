"""Kafka clients. `client.properties` overrides this project's defaults, but not what the guarantees require."""

from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from shared.errors import SettingsError
from shared.kafka.connections import ConnectionReports, OnError, log

# A dead letter is larger than the record it keeps, and topics accept records of up to 1 MiB by default.
MAX_RECORD_BYTES = 2 * 1024 * 1024
# A missing permission is an outage too, since it can be granted while a service runs.
DENIED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)

_DEFAULTS = {"reconnect.backoff.max.ms": "2000"}  # reconnect soon after a broker is back
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
    """A consumer that sees only committed records and never commits by itself. Raises SettingsError if misconfigured.

    With a `replica` name, the consumer is a static member (KIP-345): restarted under that name, it gets its partitions
    back at once, without waiting for the old session to expire. It then also reports the ends of its partitions. While
    the consumer polls, `on_error(error)` is called for broken connections; once all of them are broken, the error gives
    the cause.
    """
    defaults = {
        "auto.offset.reset": "earliest",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": "10000",
        "heartbeat.interval.ms": "1000",  # how soon members notice a rebalance
        # A full queue holds several batches. By default, the client would then fetch nothing for a second, and run dry.
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
        promised |= {"group.instance.id": replica, "enable.partition.eof": "true"}
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
    """An idempotent producer: it writes each record once and in order, to all in-sync replicas.

    Without a `transactional_id`, it retries for ever (`message.timeout.ms` 0): an unavailable broker is an outage, not
    an error. `on_failure(error, message)` is called only for records that the producer has given up on. `on_error` is
    called as for a consumer, and also for topics that a transaction may not write to. Raises SettingsError if
    misconfigured.
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
        # The broker rejects a transaction for some milliseconds, until it has written the marker of the previous one.
        defaults["retry.backoff.ms"] = "2"
    else:
        promised |= {"message.timeout.ms": "0"}
    if on_failure:
        promised["on_delivery"] = on_failure
    own = {key: value for key, value in properties.items() if not key.startswith(_CONSUMER_ONLY)}
    client: Producer = _client(Producer, {**_DEFAULTS, **defaults, **own, **promised}, on_error)
    return client


def admin(properties: Mapping[str, str], *, on_error: OnError | None = None) -> AdminClient:
    """An admin client. When polled, it calls `on_error` as a consumer does. Raises SettingsError if misconfigured."""
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
