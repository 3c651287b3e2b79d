"""What makes a batch final: its outputs, its dead letters and its offsets, in an order that keeps the promise."""

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
from shared.errors import Outage
from shared.kafka.clients import DENIED
from shared.kafka.clients import producer as make_producer
from shared.kafka.messages import NOTHING, Record
from shared.retry import Spell
from shared.settings import DeliveryGuarantee

log = structlog.get_logger()

_COMMITTED, _ABORTED = (metrics.TRANSACTIONS.labels(outcome) for outcome in ("committed", "aborted"))
_WAIT_S = 1.0
_SILENT_S = 5.0
_TRANSACTION_WAIT_S = 6.0  # after ten, the broker ends it; and within ten, a service is to end
_STUCK_S = 7.0
# What became of a record whose transaction was given up for another reason.
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})


class Delivery(Protocol):
    """Makes a batch final."""

    def open(self) -> None:
        """Take over from a predecessor that died: what it left half-done is undone. Raises Outage."""

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        """Write `records`, and commit with them, if that can be, `offsets`: the next to be read, by who read in
        `generation` of its group. Raises Outage: the batch is to be given again.

        What does not come from Kafka has neither. May block for as long as the broker is away; ends with an Outage soon
        after the shutdown event is set.
        """

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
        """Commit what `deliver` did not. Raises Outage: to be tried again."""

    def release(self, places: Sequence[tuple[str, int]]) -> None:
        """Have the broker end the transactions of ours that it forgot at these partitions. Raises Outage.

        A broker that was killed once it had decided on a transaction may come back and never mark it as ended, though
        it told the client so (seen with Apache Kafka 4.3.1). The mark of our next transaction there ends both.
        """

    def undo(self, place: TopicPartition, generation: object) -> None:
        """Have the broker drop the offsets of ours, in the group of `generation`, whose transaction it forgot.

        Nobody can read on meanwhile; `place` is any of the group's. Raises Outage. It is as with `release`, but how the
        broker had decided is not to be known, and a batch is better done twice than never.
        """

    def close(self) -> None:
        """Let go of the broker."""


class AtLeastOnce:
    """Outputs first, offsets after: a crash between the two repeats a batch, and never loses one."""

    def __init__(self, *, properties: Mapping[str, str], shutdown: Event) -> None:
        self._shutdown = shutdown
        self._failed: list[str] = []
        self._away = ""  # all connections broke, and why
        self._spell = Spell("Kafka, for what is written")
        self._make: Callable[[], Producer] = lambda: make_producer(
            properties, on_failure=self._on_failure, on_error=self._on_error
        )
        self._producer = self._make()

    def open(self) -> None:
        """Nothing is ever half-done."""

    def deliver(
        self,
        records: Sequence[Record],
        offsets: Sequence[TopicPartition] = (),  # noqa: ARG002 - they come after, see commit
        generation: object = None,  # noqa: ARG002
    ) -> None:
        # 1. Outputs and dead letters go into the producer's queue.
        with self._noting_errors():
            enqueue(self._producer, records, self._shutdown)
        # 2. Every one is acknowledged. The producer itself tries for ever: handing over twice would write twice.
        with self._noting_errors():
            left, since = len(records), time.monotonic()
            while unacknowledged := self._producer.flush(_WAIT_S):
                if unacknowledged < left:
                    left, since = unacknowledged, time.monotonic()
                if self._away or time.monotonic() - since > _SILENT_S:  # it may have no leader, or too few replicas
                    self._spell.lasts(f"not written yet: {self._away or 'the broker acknowledges nothing'}")
                if self._shutdown.is_set():
                    raise Outage("stopping before the broker acknowledged the outputs")
        self._away = ""
        self._spell.over()
        if self._failed:
            reason = self._failed[0]
            self._failed.clear()
            raise Outage(f"a record was not written: {reason}")

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
        # 3. The offsets are committed. The client's own wait for that ends no sooner than the broker is back; so it is
        # not waited for, but asked what is committed, which the broker answers after it.
        try:
            consumer.commit(offsets=list(offsets), asynchronous=True)
            committed = consumer.committed(list(offsets), timeout=_WAIT_S)
        except KafkaException as exception:
            raise Outage(f"offsets of {offsets[0].topic} not committed: {exception.args[0].str()}") from None
        for asked, found in zip(offsets, committed, strict=True):
            if found.error or found.offset < asked.offset:
                reason = found.error.str() if found.error else "the broker did not take them"
                raise Outage(f"offsets of {offsets[0].topic} not committed: {reason}")

    def release(self, places: Sequence[tuple[str, int]]) -> None:
        """There are none."""

    def undo(self, place: TopicPartition, generation: object) -> None:
        """It has no transactions."""

    def close(self) -> None:
        with suppress(KafkaException):
            self._producer.flush(_WAIT_S)
        del self._producer  # a client that outlives the interpreter crashes it

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """A client that is beyond repair, since it may not write anything for example, is replaced."""
        try:
            yield
        except KafkaException as exception:
            error = exception.args[0]
            self._failed.append(error.str())
            if error.fatal() or error.code() == KafkaError._FATAL:
                self._producer = self._make()

    def _on_failure(self, error: KafkaError, message: Message) -> None:
        self._failed.append(f"{message.topic()}: {error.str()}")

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._away = error.str()


class ExactlyOnce:
    """Outputs, dead letters and offsets in one Kafka transaction: readers of what is committed see all or nothing.

    A transaction that fails in whatever way is given up together with its client. The next client takes the same
    transactional id: the broker then ends what the other left open, and the committed offsets tell how.
    """

    def __init__(self, *, properties: Mapping[str, str], transactional_id: str, shutdown: Event) -> None:
        self._shutdown = shutdown
        self._id = transactional_id
        self._shaken = False  # a connection broke: the client may hang in its next transaction, see _Calls
        self._away = ""  # all of them did, and why
        self._failed: list[str] = []
        self._make: Callable[[], Producer] = lambda: make_producer(
            properties, transactional_id=transactional_id, on_failure=self._on_failure, on_error=self._on_error
        )
        self._calls = _Calls()
        self._fresh: Producer | None = self._make()  # a wrong setting is told at the start
        self._producer: Producer | None = None

    def open(self) -> None:
        self._ready()

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        # 1. The transaction begins, and outputs and dead letters go into it.
        with self._transaction() as producer:
            enqueue(producer, records, self._shutdown)

            def finish() -> None:
                # 2. So do the offsets, under the generation that read the batch: who lost its partitions is fenced.
                if generation:
                    producer.send_offsets_to_transaction(list(offsets), generation, _TRANSACTION_WAIT_S)
                # 3. All of it becomes visible at once.
                producer.commit_transaction(_TRANSACTION_WAIT_S)

            self._bounded(finish)
        _COMMITTED.inc()

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition]) -> None:
        """They are."""

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
        reason = "a transaction has no end; if it was ours, its batch comes again"
        log.warning("offsets_held_back", place=f"{place.topic} {place.partition}", reason=reason)

    @contextmanager
    def _transaction(self) -> Iterator[Producer]:
        """A transaction that is begun, and given up with its client if anything goes wrong. Raises Outage."""
        producer = self._ready()
        try:
            producer.begin_transaction()
            yield producer
        except Outage:
            self._give_up()
            raise
        except KafkaException as exception:
            self._give_up()
            self._hear(producer)  # of records that were not written
            reason = self._failed[0] if self._failed else exception.args[0].str()
            raise Outage(f"transaction of {self._id} given up: {reason}") from None
        except _Stuck:
            self._give_up()
            raise Outage(f"transaction of {self._id} given up: no return in {_STUCK_S:.0f} s") from None

    def _give_up(self) -> None:
        self._producer = None
        _ABORTED.inc()

    def _bounded(self, call: Callable[[], None]) -> None:
        """Raises what the call raises, or _Stuck."""
        done = self._calls.start(call)
        if not wait([done], _STUCK_S).done:
            self._calls = _Calls()
            raise _Stuck
        done.result()

    def close(self) -> None:
        self._producer = self._fresh = None

    def _ready(self) -> Producer:
        if self._producer:
            self._hear(self._producer)  # of broken connections
            if not self._shaken:
                return self._producer
        self._failed.clear()
        producer, self._fresh, self._producer, self._shaken = self._fresh or self._make(), None, None, False
        deadline = time.monotonic() + _TRANSACTION_WAIT_S
        while True:
            try:
                self._bounded(partial(producer.init_transactions, _WAIT_S))
                break
            except _Stuck:
                raise Outage(f"no transactions of {self._id}: no return in {_STUCK_S:.0f} s") from None
            except KafkaException as exception:
                error = exception.args[0]
                self._hear(producer)
                if error.retriable():
                    if not (self._away or self._shutdown.is_set() or time.monotonic() > deadline):
                        continue
                    self._fresh = producer
                raise Outage(f"no transactions of {self._id}: {self._away or error.str()}") from None
        self._producer, self._shaken, self._away = producer, False, ""
        return producer

    def _hear(self, producer: Producer) -> None:
        try:
            producer.poll(0)
        except KafkaException:  # it is fenced, by another process of its name for example
            self._shaken = True

    def _on_failure(self, error: KafkaError, message: Message) -> None:
        if error.code() not in _PURGED:
            self._failed.append(f"{message.topic()}: {error.str()}")

    def _on_error(self, error: KafkaError) -> None:
        self._shaken = True
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._away = error.str()
        elif error.code() in DENIED:
            self._failed.append(error.str())


class _Stuck(Exception):
    """The client hangs in a call."""


class _Calls:
    """A thread that calls into the client, and that can be left behind.

    librdkafka 2.16 may ignore a call's own timeout for ever: https://github.com/confluentinc/librdkafka/issues/5456 is
    about send_offsets_to_transaction.
    """

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        Thread(target=self._run, daemon=True, name="transaction").start()

    def start(self, call: Callable[[], None]) -> Future[None]:
        """Have it called once those before it have returned."""
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
            del call, done  # and with them the client, which may have been given up


def delivery(
    guarantee: DeliveryGuarantee,
    *,
    properties: Mapping[str, str],
    transactional_id: str,
    shutdown: Event,
) -> Delivery:
    """The delivery that keeps the guarantee. Raises SettingsError."""
    if guarantee == "exactly_once":
        return ExactlyOnce(properties=properties, transactional_id=transactional_id, shutdown=shutdown)
    return AtLeastOnce(properties=properties, shutdown=shutdown)


def enqueue(producer: Producer, records: Iterable[Record], shutdown: Event) -> None:
    """Hand records over to the producer; while its queue is full, wait.

    Raises Outage when that is cut short, KafkaException if the producer does not take one: its topic is unknown, or it
    is larger than `message.max.bytes`.
    """
    produce = producer.produce
    for record in records:
        while True:
            try:
                produce(record.topic, record.value, record.key, headers=record.headers)
                break
            except BufferError:
                if shutdown.is_set():
                    raise Outage("stopping while the producer's queue is full") from None
                producer.poll(_WAIT_S)
