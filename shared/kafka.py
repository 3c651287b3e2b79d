"""Kafka clients: `client.properties` under this project's defaults, with what the promises need laid over both."""

import logging
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ListOffsetsResultInfo,
    OffsetSpec,
)

from shared.errors import Outage, SettingsError

Headers = list[tuple[str, str | bytes | None]]
OnError = Callable[[KafkaError], None]

# A dead letter is larger than the record it keeps, and topics take records of 1 MiB by default.
MAX_RECORD_BYTES = 2 * 1024 * 1024
_READ_TIMEOUT_S = 10.0
# Not permitted: an outage too, since rights can be given while a service runs.
DENIED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)
NOTHING: Headers = [("nothing", b"")]  # of a record that was written for the sake of its transaction alone

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


class Record(msgspec.Struct, frozen=True, gc=False, array_like=True):
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


def says_nothing(message: Message) -> bool:
    """Whether it is a record without a message, which readers pass over."""
    return message.value() is None and message.headers() == NOTHING


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


def ends(
    properties: Mapping[str, str], partitions: Sequence[TopicPartition], *, committed: bool
) -> dict[tuple[str, int], int]:
    """The next offset of each partition: of all that is written, or before an open transaction. Raises Outage."""
    latest: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    found = _listed(admin(properties), partitions, latest, committed=committed)
    return {place: answer.offset for place, answer in found.items()}


def begins(properties: Mapping[str, str], partitions: Sequence[TopicPartition]) -> dict[tuple[str, int], int]:
    """The oldest offset that each partition still has. Raises Outage."""
    earliest: OffsetSpec = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
    found = _listed(admin(properties), partitions, earliest, committed=False)
    return {place: answer.offset for place, answer in found.items()}


def newest_ms(properties: Mapping[str, str], partitions: Sequence[TopicPartition]) -> int | None:
    """When the newest record of all these partitions was written, epoch milliseconds. Raises Outage."""
    newest: OffsetSpec = OffsetSpec.max_timestamp()  # type: ignore[no-untyped-call]
    found = _listed(admin(properties), partitions, newest, committed=False)
    return max((answer.timestamp for answer in found.values() if answer.timestamp >= 0), default=None)


def since(properties: Mapping[str, str], topic: str, epoch_ms: int) -> list[TopicPartition]:
    """For each partition of the topic that has such, the first record that is not older, committed or not.

    Raises Outage.
    """
    client = admin(properties)
    try:
        known = client.list_topics(topic, timeout=_READ_TIMEOUT_S).topics[topic]
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None
    if known.error:
        raise Outage(f"{topic}: {known.error.str()}")
    partitions = [TopicPartition(topic, partition) for partition in known.partitions]
    found = _listed(client, partitions, OffsetSpec.for_timestamp(epoch_ms), committed=False)
    return [TopicPartition(*place, answer.offset) for place, answer in found.items() if answer.offset >= 0]


def _listed(
    client: AdminClient, partitions: Sequence[TopicPartition], spec: OffsetSpec, *, committed: bool
) -> dict[tuple[str, int], ListOffsetsResultInfo]:
    level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
    try:
        answers = client.list_offsets(
            {TopicPartition(each.topic, each.partition): spec for each in partitions},
            isolation_level=level,
            request_timeout=_READ_TIMEOUT_S,
        )
        longest_s = 2 * _READ_TIMEOUT_S  # whatever becomes of the client's own limit
        return {(asked.topic, asked.partition): answer.result(longest_s) for asked, answer in answers.items()}
    except TimeoutError:
        raise Outage(f"Kafka: no answer in {longest_s:.0f} s") from None
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None


def read_to_end(properties: Mapping[str, str], starts: Sequence[TopicPartition], *, group: str) -> Iterator[Message]:
    """Every committed record that says something, from these offsets to the present end of their partitions.

    Raises Outage.
    """
    reader = consumer({**properties, "enable.partition.eof": "true"}, group=group)
    unread = {(start.topic, start.partition) for start in starts}
    problem = "no answer"
    try:
        reader.assign(list(starts))
        while unread:
            first = reader.poll(_READ_TIMEOUT_S)
            if first is None:
                raise Outage(f"Kafka: {problem} in {_READ_TIMEOUT_S:.0f} s")
            for message in (first, *reader.consume(1000, 0)):
                error = message.error()
                if error is None:
                    if not says_nothing(message):
                        yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard((message.topic(), message.partition()))
                elif error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                    raise Outage(f"Kafka: {message.topic()}: {error.str()}")
                else:
                    problem = error.str()  # it may come back: the client tries on
    except KafkaException as error:
        raise Outage(f"Kafka: {error.args[0].str()}") from None
    finally:
        reader.close()


def _client(kind: Callable[..., Any], configuration: Mapping[str, Any], on_error: OnError | None = None) -> Any:
    own = dict(configuration)
    logger: Any = _log
    if on_error:
        logger = heard = _Heard(own, on_error)
        own["error_cb"] = heard.error
    try:
        return kind(own, logger=logger)
    except KafkaException as error:
        raise SettingsError(f"CLIENT_PROPERTIES: {error.args[0].str()}") from None


_log = logging.getLogger("librdkafka")
_SAID = re.compile(r"(?:\w+://)?(?P<host>\S+):(?P<port>\d+)/\w+: (?P<what>.*?)(?: \(after \d+ms in state .*\))?$")
_REFUSED_TOPIC = re.compile(r'Failed to add partition "(.+)" \[\d+\] .*(Broker: Topic authorization failed)').search
# What these lines of the log say comes back as an error as well.
_TOLD = frozenset({"ADDPARTS", "ADDOFFSETS", "TXNERR"})
_ONE_RUN_S = 5.0  # a client tries again within two seconds
_LOOK_S = 2.0
_HANDSHAKE_S = 5.0


class _Heard:
    """What a client says of its connections, in its errors and in its log, as one thing.

    Broken connections are in its log as long as not all of them are broken, which the error then says.
    """

    def __init__(self, properties: Mapping[str, Any], tell: OnError) -> None:
        self._properties = properties
        self._tell = tell
        self._last = ""
        self._broke_at = self._began = 0.0  # monotonic
        self._all = False

    def log(self, level: int, form: str, facility: str, client: str, text: str) -> None:
        """Take the place of a logger."""
        if facility == "FAIL" and level > logging.DEBUG:
            now = time.monotonic()
            if now - self._broke_at > _ONE_RUN_S:
                self._began, self._all = now, False
            self._broke_at, self._last = now, text.partition("]: ")[2]
            if self._all or now - self._began < _LOOK_S:
                return
        if refused := _REFUSED_TOPIC(text):
            self._tell(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, f"{refused[1]}: {refused[2]}"))
        if facility not in _TOLD:
            _log.log(level, form, facility, client, text)

    def error(self, error: KafkaError) -> None:
        """Take the place of `error_cb`."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._all = True
            error = KafkaError(KafkaError._ALL_BROKERS_DOWN, why_broken(self._last, self._properties))
        self._tell(error)


def why_broken(said: str, properties: Mapping[str, Any]) -> str:
    """What librdkafka said of a connection, in short, and what it leaves out."""
    if not (found := _SAID.match(said)):
        return "Kafka: no broker answers"
    host, port, what = found["host"], int(found["port"]), found["what"]
    if "certificate verify failed" in what:
        what = f"its certificate is refused: {_refused_because(host, port, properties)}"
    elif "alert" in what and "certificate" in what:
        what = "it wants a certificate that it trusts (ssl.certificate.location, ssl.key.location)"
    elif what.startswith("Disconnected"):
        what += " (if it goes on: does security.protocol fit?)"
    return f"Kafka at {host}:{port}: {what}"


def _refused_because(host: str, port: int, properties: Mapping[str, Any]) -> str:
    """In the words of OpenSSL, which librdkafka does not pass on."""
    try:
        context = ssl.create_default_context(
            cafile=properties.get("ssl.ca.location"), cadata=properties.get("ssl.ca.pem")
        )
        with socket.create_connection((host, port), _HANDSHAKE_S) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return str(error.verify_message)
    except OSError:
        pass
    return "it cannot be verified"
