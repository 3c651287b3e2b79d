"""Kafka clients: `client.properties` under this project's defaults, with what the promises need laid over both."""

from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from shared.errors import SettingsError
from shared.kafka.connections import Heard, OnError, log

# A dead letter is larger than the record it keeps, and topics take records of 1 MiB by default.
MAX_RECORD_BYTES = 2 * 1024 * 1024
# Not permitted: an outage too, since rights can be given while a service runs.
DENIED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)


_DEFAULTS = {"reconnect.backoff.max.ms": "2000"}  # a broker that is back is soon noticed
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
    """A consumer that sees committed records only and commits nothing by itself. Raises SettingsError.

    With a `replica` name it is a static member (KIP-345): restarted under that name it has its partitions back at once,
    without the group waiting for the session of the dead one to end; it then also hears of the ends of its partitions.
    `on_error(error)` hears, while it polls, of connections that broke; of all of them, it hears why.
    """
    defaults = {
        "auto.offset.reset": "earliest",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": "10000",
        "heartbeat.interval.ms": "1000",  # by which the others learn of a rebalance
        # A full queue is enough for some batches; by its own default the client then rests a second, and runs dry.
        "queued.max.messages.kbytes": "8192",
        "queued.min.messages": "10000",
        "max.partition.fetch.bytes": "131072",  # a megabyte of each partition at once is 40 MB more, and no faster
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
    """An idempotent producer: in order, once, acknowledged by all in-sync replicas. Raises SettingsError.

    Without a transaction it tries for ever (`message.timeout.ms` 0): a broker that is away is an outage, not an error.
    `on_failure(error, message)` hears of the deliveries that failed for good, and of no other; `on_error(error)` of
    connections that broke, of all of them why, and of topics that a transaction may not write to.
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
        # The broker turns away what comes hard on the heels of another, until that one's end is written: milliseconds.
        defaults["retry.backoff.ms"] = "2"
    else:
        promised |= {"message.timeout.ms": "0"}
    if on_failure:
        promised["on_delivery"] = on_failure
    own = {key: value for key, value in properties.items() if not key.startswith(_CONSUMER_ONLY)}
    client: Producer = _client(Producer, {**_DEFAULTS, **defaults, **own, **promised}, on_error)
    return client


def admin(properties: Mapping[str, str], *, on_error: OnError | None = None) -> AdminClient:
    """An administrative client; `on_error(error)` hears, when it polls, of connections that broke.

    Raises SettingsError.
    """
    own = {key: value for key, value in properties.items() if not key.startswith((*_CONSUMER_ONLY, *_PRODUCER_ONLY))}
    client: AdminClient = _client(AdminClient, own, on_error)
    return client


def _client(kind: Callable[..., Any], configuration: Mapping[str, Any], on_error: OnError | None = None) -> Any:
    own = dict(configuration)
    logger: Any = log
    if on_error:
        logger = heard = Heard(own, on_error)
        own["error_cb"] = heard.error
    try:
        return kind(own, logger=logger)
    except KafkaException as error:
        raise SettingsError(f"CLIENT_PROPERTIES: {error.args[0].str()}") from None
