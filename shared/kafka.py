"""Kafka clients: `client.properties` under this project's defaults, with what the promises need laid over both."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from shared.errors import SettingsError

Headers = list[tuple[str, str | bytes | None]]

# A dead letter is larger than the record it keeps, and topics take records of 1 MiB by default.
MAX_RECORD_BYTES = 2 * 1024 * 1024

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


class Record(NamedTuple):
    """A record to be written."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: Headers


def coordinates(message: Message) -> tuple[str, int, int]:
    """Topic, partition and offset of a consumed message."""
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    if topic is None or partition is None or offset is None:
        raise ValueError("not a consumed message")
    return topic, partition, offset


def headers(message: Message) -> Headers:
    """A consumed message's headers; none is an empty list."""
    found = message.headers() or []
    return list(found.items()) if isinstance(found, dict) else found


def consumer(properties: Mapping[str, str], *, group: str) -> Consumer:
    """A consumer that sees committed records only and commits nothing by itself. Raises SettingsError."""
    defaults = {
        "auto.offset.reset": "earliest",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": "10000",
    }
    promised = {
        "group.id": group,
        "enable.auto.commit": "false",
        "enable.auto.offset.store": "false",
        "isolation.level": "read_committed",
    }
    own = {key: value for key, value in properties.items() if not key.startswith(_PRODUCER_ONLY)}
    client: Consumer = _client(Consumer, {**defaults, **own, **promised})
    return client


def producer(
    properties: Mapping[str, str],
    *,
    transactional_id: str | None = None,
    on_failure: Callable[[Any, Message], None] | None = None,
) -> Producer:
    """An idempotent producer: in order, once, acknowledged by all in-sync replicas. Raises SettingsError.

    Without a transaction it tries for ever (`message.timeout.ms` 0): a broker that is away is an outage, not an error.
    `on_failure(error, message)` hears of the deliveries that failed for good, and of no other.
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
    else:
        promised |= {"message.timeout.ms": "0"}
    if on_failure:
        promised["on_delivery"] = on_failure
    own = {key: value for key, value in properties.items() if not key.startswith(_CONSUMER_ONLY)}
    client: Producer = _client(Producer, {**defaults, **own, **promised})
    return client


def admin(properties: Mapping[str, str]) -> AdminClient:
    """An administrative client. Raises SettingsError."""
    own = {key: value for key, value in properties.items() if not key.startswith((*_CONSUMER_ONLY, *_PRODUCER_ONLY))}
    client: AdminClient = _client(AdminClient, own)
    return client


def _client(kind: Callable[..., Any], configuration: Mapping[str, Any]) -> Any:
    try:
        return kind(dict(configuration), logger=logging.getLogger("librdkafka"))
    except KafkaException as error:
        raise SettingsError(f"CLIENT_PROPERTIES: {error.args[0].str()}") from None
