"""Makes a batch final: writes outputs and dead letters, and commits offsets, as the delivery guarantee requires."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread
from typing import Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from shared import metrics
from shared.dead_letters import MOST_BYTES, SUFFIX, fit
from shared.errors import Outage
from shared.kafka.clients import DENIED
from shared.kafka.clients import producer as make_producer
from shared.kafka.messages import NOTHING, Record
from shared.retry import OutageLog
from shared.settings import DeliveryGuarantee

log = structlog.get_logger()

_COMMITTED, _ABORTED = (metrics.TRANSACTIONS.labels(outcome) for outcome in ("committed", "aborted"))
_WAIT_S = 1.0
_SILENT_S = 5.0
_TRANSACTION_WAIT_S = 6.0  # the broker aborts a Kafka transaction after 10 s, and a service must exit within 10 s
_STUCK_S = 7.0
_SMALLEST_LETTER_BYTES = 16 * 1024  # the headers alone may take a third of it
# These errors are reported for records whose Kafka transaction was aborted for a different reason.
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})


class Delivery(Protocol):
    """Makes a batch final: once delivered and committed, it is not processed again."""

    def open(self) -> None:
        """Take over from a process or client that died: abort or complete the Kafka transaction that it left open.

        Raises Outage if the transaction cannot be aborted or completed.
        """

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        """Write `records`. If the guarantee allows it, commit `offsets` (the next offsets to read) with the records.

        `generation` is the consumer group's generation at the time when the batch was read. A batch that was not read
        from Kafka has neither offsets nor a generation. A call may block while the broker is unavailable, but raises
        Outage soon after a shutdown request. After an Outage, the batch must be delivered again.
        """

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
        """Commit the offsets, unless `deliver` has already committed them. After an Outage, call this again."""

    def release(self, places: Sequence[tuple[str, int]]) -> None:
        """If the broker left our own Kafka transactions open on these partitions, make the broker end them.

        A broker may be killed right after it confirmed a transaction to the client. Such a broker may never write the
        marker that ends the transaction, not even after a restart (seen with Apache Kafka 4.3.1). Therefore, commit a
        new transaction on the same partitions. Its markers also end the old transactions. Raises Outage if the new
        transaction fails.
        """

    def undo(self, place: TopicPartition, generation: object) -> None:
        """If our offsets are in a Kafka transaction that the broker left open, make the broker drop these offsets.

        Until the offsets are dropped, no member of the group can continue to read. `place` is any partition that the
        group reads, and `generation` is the group's generation. It is unknown whether the transaction was committed.
        The batch may therefore be processed twice, which is better than losing it. Raises Outage if dropping fails.
        """

    def close(self) -> None:
        """Close the Kafka client."""


class AtLeastOnce:
    """Writes outputs first, and commits offsets afterwards. If a crash happens in between, the batch is repeated."""

    def __init__(self, *, properties: Mapping[str, str], shutdown: Event) -> None:
        self._shutdown = shutdown
        self._letters = _Letters()
        self._failed: list[str] = []
        self._away = ""  # why all connections are broken
        self._outage = OutageLog("Kafka, for writing")
        self._make: Callable[[], Producer] = lambda: make_producer(
            properties, on_failure=self._on_failure, on_error=self._on_error
        )
        self._producer = self._make()

    def open(self) -> None:
        """Do nothing, because without Kafka transactions nothing is left unfinished."""

    def deliver(
        self,
        records: Sequence[Record],
        offsets: Sequence[TopicPartition] = (),  # noqa: ARG002 - committed afterwards, see commit
        generation: object = None,  # noqa: ARG002
    ) -> None:
        # 1. Put outputs and dead letters into the producer's queue.
        with self._noting_errors():
            enqueue(self._producer, self._letters.fit(records), self._shutdown)
        # 2. Wait until all records are acknowledged. The producer itself retries for ever. Enqueuing the records again
        # would write them twice.
        with self._noting_errors():
            left, since = len(records), time.monotonic()
            while unacknowledged := self._producer.flush(_WAIT_S):
                if unacknowledged < left:
                    left, since = unacknowledged, time.monotonic()
                if self._away or time.monotonic() - since > _SILENT_S:  # no leader, or too few in-sync replicas
                    self._outage.failed(self._away or "the broker acknowledges no records")
                if self._shutdown.is_set():
                    raise Outage("the service is stopping, and the broker has not acknowledged all outputs")
        self._away = ""
        self._outage.over()
        if self._failed:
            reason = self._failed[0]
            self._failed.clear()
            raise Outage(f"record not written: {reason}")

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
        # 3. Commit the offsets. A synchronous commit would block until the broker is available again. Therefore, commit
        # asynchronously, and then read the committed offsets. The broker handles the two requests in this order.
        try:
            consumer.commit(offsets=list(offsets), asynchronous=True)
            committed = consumer.committed(list(offsets), timeout=_WAIT_S)
        except KafkaException as exception:
            raise Outage(f"offsets of {offsets[0].topic} not committed: {exception.args[0].str()}") from None
        for asked, found in zip(offsets, committed, strict=True):
            if found.error or found.offset < asked.offset:
                reason = found.error.str() if found.error else "the broker did not accept them"
                raise Outage(f"offsets of {offsets[0].topic} not committed: {reason}")

    def release(self, places: Sequence[tuple[str, int]]) -> None:
        """Do nothing, because without Kafka transactions there is nothing to end."""

    def undo(self, place: TopicPartition, generation: object) -> None:
        """Do nothing, because without Kafka transactions there are no offsets to drop."""

    def close(self) -> None:
        with suppress(KafkaException):
            self._producer.flush(_WAIT_S)
        del self._producer  # a client that outlives the interpreter crashes the process

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Record an error of the client. After a fatal error, replace the client.

        For example, a missing permission to write is a fatal error.
        """
        try:
            yield
        except KafkaException as exception:
            error = exception.args[0]
            self._failed.append(error.str())
            if error.fatal() or error.code() == KafkaError._FATAL:
                self._producer = self._make()

    def _on_failure(self, error: KafkaError, message: Message) -> None:
        self._letters.refused(error, message.topic())
        self._failed.append(f"{message.topic()}: {error.str()}")

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._away = error.str()


class ExactlyOnce:
    """Writes outputs, dead letters and offsets in one Kafka transaction.

    Consumers with `read_committed` read either the whole transaction or none of it. When a transaction fails, its
    client is discarded. The next client uses the same transactional ID, so the broker aborts or completes the
    transaction that the old client left open. The committed offsets show whether the transaction was aborted or
    completed.
    """

    def __init__(self, *, properties: Mapping[str, str], transactional_id: str, shutdown: Event) -> None:
        self._shutdown = shutdown
        self._letters = _Letters()
        self._id = transactional_id
        self._suspect = False  # a connection broke, so the next Kafka transaction may hang; see _Calls
        self._away = ""  # why all connections are broken
        self._failed: list[str] = []
        self._make: Callable[[], Producer] = lambda: make_producer(
            properties, transactional_id=transactional_id, on_failure=self._on_failure, on_error=self._on_error
        )
        self._calls = _Calls()
        self._fresh: Producer | None = self._make()  # made now, so that a wrong setting is reported at the start
        self._producer: Producer | None = None

    def open(self) -> None:
        self._ready()

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        # 1. Begin a Kafka transaction, and add outputs and dead letters to it.
        with self._transaction() as producer:
            enqueue(producer, self._letters.fit(records), self._shutdown)

            def finish() -> None:
                # 2. Add the offsets and the generation that read the batch. The broker fences an older generation.
                if generation:
                    producer.send_offsets_to_transaction(list(offsets), generation, _TRANSACTION_WAIT_S)
                # 3. Commit, so that everything becomes visible at once.
                producer.commit_transaction(_TRANSACTION_WAIT_S)

            self._bounded(finish)
        _COMMITTED.inc()

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
        """Do nothing, because the Kafka transaction has already committed the offsets."""

    def release(self, places: Sequence[tuple[str, int]]) -> None:
        if not places:
            return
        with self._transaction() as producer:
            for topic, partition in places:
                producer.produce(topic, partition=partition, headers=NOTHING)
            self._bounded(lambda: producer.commit_transaction(_TRANSACTION_WAIT_S))
        _COMMITTED.inc()
        log.warning("forgotten_transactions_ended", partitions=[f"{topic} {partition}" for topic, partition in places])

    def undo(self, place: TopicPartition, generation: object) -> None:
        with self._transaction() as producer:

            def drop() -> None:
                producer.send_offsets_to_transaction([place], generation, _TRANSACTION_WAIT_S)
                producer.abort_transaction(_TRANSACTION_WAIT_S)

            self._bounded(drop)
        _ABORTED.inc()
        reason = "a Kafka transaction never ended; if it was this replica's, its batch is redelivered"
        log.warning("offsets_held_back", place=f"{place.topic} {place.partition}", reason=reason)

    @contextmanager
    def _transaction(self) -> Iterator[Producer]:
        """Begin a Kafka transaction. If anything fails, discard the transaction and its client, and raise Outage."""
        producer = self._ready()
        try:
            producer.begin_transaction()
            yield producer
        except Outage:
            self._discard()
            raise
        except KafkaException as exception:
            self._discard()
            self._poll(producer)  # calls _on_failure for records that were not written
            reason = self._failed[0] if self._failed else exception.args[0].str()
            raise Outage(f"Kafka transaction of {self._id} failed: {reason}") from None
        except _Stuck:
            self._discard()
            raise Outage(f"Kafka transaction of {self._id} failed: the client hung for {_STUCK_S:.0f} s") from None

    def _discard(self) -> None:
        self._producer = None
        _ABORTED.inc()

    def _bounded(self, call: Callable[[], None]) -> None:
        """Run `call`. Raises what `call` raises, or _Stuck if `call` does not return in time."""
        done = self._calls.start(call)
        if not wait([done], _STUCK_S).done:
            self._calls = _Calls()
            raise _Stuck
        done.result()

    def close(self) -> None:
        self._producer = self._fresh = None

    def _ready(self) -> Producer:
        if self._producer:
            self._poll(self._producer)  # calls _on_error for broken connections
            if not self._suspect:
                return self._producer
        self._failed.clear()
        producer, self._fresh, self._producer, self._suspect = self._fresh or self._make(), None, None, False
        deadline = time.monotonic() + _TRANSACTION_WAIT_S
        while True:
            try:
                self._bounded(partial(producer.init_transactions, _WAIT_S))
                break
            except _Stuck:
                raise Outage(
                    f"cannot use Kafka transactions with the ID {self._id}: the client hung for {_STUCK_S:.0f} s"
                ) from None
            except KafkaException as exception:
                error = exception.args[0]
                self._poll(producer)
                if error.retriable():
                    if not (self._away or self._shutdown.is_set() or time.monotonic() > deadline):
                        continue
                    self._fresh = producer
                raise Outage(
                    f"cannot use Kafka transactions with the ID {self._id}: {self._away or error.str()}"
                ) from None
        self._producer, self._suspect, self._away = producer, False, ""
        return producer

    def _poll(self, producer: Producer) -> None:
        try:
            producer.poll(0)
        except KafkaException:  # the client is fenced, for example by another process with the same ID
            self._suspect = True

    def _on_failure(self, error: KafkaError, message: Message) -> None:
        self._letters.refused(error, message.topic())
        if error.code() not in _PURGED:
            self._failed.append(f"{message.topic()}: {error.str()}")

    def _on_error(self, error: KafkaError) -> None:
        self._suspect = True
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._away = error.str()
        elif error.code() in DENIED:
            self._failed.append(error.str())


class _Letters:
    """Cuts dead letters to the size that their topics accept.

    The size is halved each time that the broker refuses a letter as too large, because the topic may have a limit of
    its own.
    """

    def __init__(self) -> None:
        self._most_bytes = MOST_BYTES

    def fit(self, records: Iterable[Record]) -> Iterable[Record]:
        if self._most_bytes == MOST_BYTES:  # letters are made no larger
            return records
        return (fit(record, self._most_bytes) if record.topic.endswith(SUFFIX) else record for record in records)

    def refused(self, error: KafkaError, topic: str | None) -> None:
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE and topic and topic.endswith(SUFFIX):
            self._most_bytes = max(_SMALLEST_LETTER_BYTES, self._most_bytes // 2)


class _Stuck(Exception):
    """A call to the client did not return in time."""


class _Calls:
    """A thread that calls the client, and that can be abandoned if a call hangs.

    In librdkafka 2.16, a call may ignore its timeout and never return, as send_offsets_to_transaction does in
    https://github.com/confluentinc/librdkafka/issues/5456.
    """

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        Thread(target=self._run, daemon=True, name="transaction").start()

    def start(self, call: Callable[[], None]) -> Future[None]:
        """Run `call` once all earlier calls have returned."""
        done: Future[None] = Future()
        self._waiting.put((call, done))
        return done

    def _run(self) -> None:
        while True:
            call, done = self._waiting.get()
            try:
                call()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)
            del call, done  # this also frees the client, if it was discarded


def delivery(
    guarantee: DeliveryGuarantee,
    *,
    properties: Mapping[str, str],
    transactional_id: str,
    shutdown: Event,
) -> Delivery:
    """Make a delivery with this guarantee. Raises SettingsError if the Kafka properties are wrong."""
    if guarantee == "exactly_once":
        return ExactlyOnce(properties=properties, transactional_id=transactional_id, shutdown=shutdown)
    return AtLeastOnce(properties=properties, shutdown=shutdown)


def enqueue(producer: Producer, records: Iterable[Record], shutdown: Event) -> None:
    """Put records into the producer's queue, waiting while the queue is full.

    Raises Outage if `shutdown` is set while the queue is full. Raises KafkaException, which names the topic, if the
    producer refuses a record, because the record's topic is unknown or forbidden, or the record is larger than
    `message.max.bytes`.
    """
    produce = producer.produce
    for record in records:
        while True:
            try:
                produce(record.topic, record.value, record.key, headers=record.headers)
                break
            except BufferError:
                if shutdown.is_set():
                    raise Outage("the service is stopping while the producer's queue is full") from None
                producer.poll(_WAIT_S)
            except KafkaException as exception:
                error = exception.args[0]
                named = f"{record.topic}: {error.str()}"
                raise KafkaException(KafkaError(error.code(), named, error.fatal(), error.retriable())) from None
