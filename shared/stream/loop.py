"""The loop of every consumer: polls, hands batches over, commits, rebalances, and pauses during outages.

A service passes a handler to the loop, and never commits an offset itself. Handler and delivery run in other threads.
However long these threads take, the loop keeps polling, and therefore stays a member of the group. On SIGTERM, the loop
finishes the batches in flight. docs/architecture.md has a diagram of the loop's states.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext, suppress
from itertools import takewhile
from threading import Event, Thread
from typing import Any, Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from shared import health, metrics
from shared.dead_letters import unparsed
from shared.errors import Outage
from shared.flow import Flow
from shared.kafka.clients import DENIED, consumer
from shared.kafka.connections import OnError
from shared.kafka.messages import coordinates
from shared.retry import OutageLog, delay_s, retry_outages
from shared.settings import StreamSettings
from shared.stream.committed import CommittedOffsets, not_committed
from shared.stream.delivery import Delivery
from shared.stream.flight import Flight, Flights, Handler, Outcome
from shared.stream.gaps import LostPositions, TopicId, read_anew
from shared.stream.lag import Lag
from shared.stream.reachability import Reachability
from shared.stream.suspects import REASON, Suspects

log = structlog.get_logger()

_IDLE_POLL_S = 0.5
_BUSY_POLL_S = 0.01
_KEEPALIVE_S = 1.0
_REVOKE_WAIT_S = 30.0
_CLOSE_S = 3.0
_MEASURE_S = 1.0
_COMMIT = metrics.STAGE.labels("commit")
# A static member is fenced if another process has the same name. If the broker has forgotten that the member had
# joined, the member is also fenced when it joins again.
_FATAL = frozenset({KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID})
# Errors of a single connection. The client then retries or uses another connection. The client reports a different
# error when all connections are broken.
_CONNECTION = frozenset({KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._SSL, KafkaError._AUTHENTICATION})


class Observer(Protocol):
    """Receives a stream's partition changes, for example to keep state for each partition.

    The methods are called in the loop's thread, so they must not block.

    For each partition, `assigned` is called once, then `final` any number of times, then `revoked`. Records before a
    `final` offset are committed and are never handed over again. After a partition is revoked, the next member that
    reads the partition hands over the uncommitted records again.
    """

    def assigned(self, partitions: Sequence[TopicPartition]) -> None:
        """This member reads these partitions from now on."""

    def final(self, offsets: Sequence[TopicPartition]) -> None:
        """All records before these offsets are committed."""

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """This member no longer reads these partitions."""


class Stream:
    """A member of a consumer group, with one handler and one delivery."""

    def __init__(
        self,
        *,
        make_consumer: Callable[[OnError], Consumer],
        group: str,
        topic: str,
        delivery: Delivery,
        settings: StreamSettings,
        shutdown: Event,
        observers: Sequence[Observer] = (),
        topic_id: TopicId | None = None,
    ) -> None:
        """Raises SettingsError if `make_consumer` raises it."""
        self._make_consumer: Callable[[], Consumer] = lambda: make_consumer(self._on_error)
        self._consumer = self._make_consumer()
        self._lost: str | None = None  # why this consumer must be replaced
        self._ended = False  # nothing is handed over any more, perhaps because of an exception
        self._short_lived = 0  # number of consumers lost in quick succession
        self._group = group
        self._log = log.bind(group=group)  # every line names the group, since a process may have several streams
        self._topic = topic
        self._delivery = delivery
        self._settings = settings
        self._shutdown = shutdown
        self._lag = Lag(group, topic)
        self._committed = CommittedOffsets()
        self._suspects = Suspects(self._committed, group=group)
        self._lost_positions = LostPositions(group=group)
        self._topic_id = topic_id
        self._topic_changed = False
        self._observers: tuple[Observer, ...] = (self._lag, self._suspects, *observers)
        self._flow = Flow("processed", levels=lambda: {"lag": self._lag.records}, group=group)
        self._flights = Flights(delivery, group=group, flow=self._flow)
        self._most_in_flight = 1
        self._waiting: list[Message] = []  # consumed, but not handed over yet
        self._gathers_until = 0.0  # monotonic time
        self._idle: Callable[[], object] | None = None
        self._places: set[tuple[str, int]] = set()  # (topic, partition) of each assigned partition
        self._paused = False
        self._resume_due = False  # a partition that was revoked while paused is still paused when it is assigned again
        self._measured = 0.0  # monotonic time
        self._reachability = Reachability(group=group, topic=topic)
        self._outage = OutageLog(f"what {group} needs", waiting=lambda: self._lag.records, group=group)
        self._place = f"partitions of {topic}, for {group}"
        health.waits_for(self._place, "has not joined the group yet")

    def run(self, handle: Handler, *, ahead: bool = False, idle: Callable[[], object] | None = None) -> None:
        """Hand one batch after another to `handle` until the shutdown event is set, then finish the batches in flight.

        With `ahead`, a batch is handled while the previous batch is still being delivered. Use `ahead` only for
        handlers that finish the whole batch, and that have no side effects except in `Outcome.finish`. `idle()` is
        called whenever no message is left, that is, all messages are done or their partitions were revoked.
        """
        self._idle = idle
        self._most_in_flight = 2 if ahead else 1
        try:
            self._retry(self._delivery.open)
            while not self._shutdown.is_set():
                self._consume(handle)
        except Outage as outage:
            self._log.warning("stopped_in_outage", reason=str(outage), left_for_later=len(self._waiting))
        finally:
            self._ended = True
            self._flights.close()
            self._flow.report()
            health.ended(f"{self._group} loop")
            self.close()

    def close(self) -> None:
        """Leave the group, if it was joined, and disconnect."""
        try:
            self._delivery.close()
        finally:
            _close_or_leave_behind(self._consumer)

    def _consume(self, handle: Handler) -> None:
        """Consume as a member of the group until shutdown. If the consumer is lost, replace the consumer and return."""
        began = time.monotonic()
        self._consumer.subscribe(
            [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        while not self._shutdown.is_set() and not self._lost:
            if self._topic_changed and not self._waiting:  # what was read of the old topic is finished first
                self._read_anew()
            self._fill()
            if time.monotonic() >= self._gathers_until or len(self._waiting) >= self._settings.max_batch_size:
                self._process(handle)
            if self._flights.in_doubt and not (self._waiting or self._flights):
                with suppress(Outage):  # the next member with the revoked partitions waits until this is settled
                    self._settle()
        while self._flights:
            with suppress(Outage) if self._lost else nullcontext():
                self._collect(down_to=0)
        if self._lost:
            self._replace_consumer(began)
        elif not self._flights.in_doubt:
            self._suspects.take_back(self._consumer)

    def _replace_consumer(self, began: float) -> None:
        """Close the lost consumer and make a new one.

        Two replicas with the same name keep fencing each other. Each replica waits longer every time, so that the other
        replica makes some progress.
        """
        self._log.warning("consumer_lost", reason=self._lost, hint="check that REPLICA is unique among the replicas")
        health.waits_for(self._place, str(self._lost))
        closing = _closing(self._consumer)  # wait until it is closed, because both consumers have the same name
        while closing.is_alive() and not self._shutdown.is_set():
            health.turned(f"{self._group} loop")
            closing.join(_IDLE_POLL_S)
        if self._places:
            self._forget([TopicPartition(*place) for place in self._places])
        initial_s, max_s = self._settings.backoff_initial_seconds, self._settings.backoff_max_seconds
        self._short_lived = 0 if time.monotonic() - began > max_s else self._short_lived + 1
        self._shutdown.wait(delay_s(self._short_lived, initial_s=initial_s, max_s=max_s))
        self._consumer, self._lost, self._paused = self._make_consumer(), None, False

    def _fill(self) -> None:
        """Add messages to the batch until the batch is full or has waited long enough.

        If there is a backlog, the batch is full at once.
        """
        self._turn()
        if not self._flights:  # otherwise, each delivery reports the flow
            self._flow.report_if_due()
        if self._resume_due:
            self._resume()
        wait_s = 0.0  # a redelivered batch has waited long enough
        if not self._waiting:
            if self._idle and not self._flights:
                self._idle()
            self._gathers_until = 0.0
            # consume() returns a partial batch only after its timeout, so an idle loop polls for one message first.
            self._poll(_BUSY_POLL_S if self._flights else _IDLE_POLL_S)
            wait_s = self._settings.max_batch_wait_ms / 1000
        elif (gathers_s := self._gathers_until - time.monotonic()) > 0:
            wait_s = min(gathers_s, _IDLE_POLL_S)
        room = self._settings.max_batch_size - len(self._waiting)
        if self._waiting and self._topic_changed:
            self._keep_place(wait_s)
        elif self._waiting and room > 0:
            self._accept(self._consumer.consume(room, wait_s))

    def _process(self, handle: Handler) -> None:
        """Hand over the batch. In an outage, retry until the batch succeeds or its partitions are revoked."""
        self._retry(lambda: self._attempt(handle), wait=self._wait_out)
        if self._paused and not (self._lost or self._topic_changed):
            self._resume()
            self._log.info("resumed")

    def _retry(self, step: Callable[[], None], *, wait: Callable[[float], None] | None = None) -> None:
        retry_outages(
            step,
            shutdown=self._shutdown,
            initial_s=self._settings.backoff_initial_seconds,
            max_s=self._settings.backoff_max_seconds,
            wait=wait,
            outage_log=self._outage,
        )

    def _attempt(self, handle: Handler) -> None:
        """Hand a batch to the handler, and keep polling while too many batches are in flight.

        After an Outage, the messages wait for the next attempt.
        """
        if len(self._flights) == self._most_in_flight:  # happens only after a failed commit
            self._collect(down_to=self._most_in_flight - 1)
        if self._flights.in_doubt and not (self._flights or self._lost):
            self._settle()
        if self._waiting and not self._lost:
            self._launch(handle)
        # An outage is over only once a batch is final, so a paused loop waits until then.
        alone = self._paused or self._suspects.on_trial
        self._collect(down_to=0 if alone else self._most_in_flight - 1)

    def _launch(self, handle: Handler) -> None:
        """Hand over a batch, or less if a partition's first batch may be what makes the process end."""
        most = self._settings.max_batch_size
        batch = self._waiting[:most]
        if self._suspects.among(batch):
            self._collect(down_to=0)  # a failed delivery puts its messages back before these
            while (admitted := self._suspects.admit(self._consumer, self._waiting[:most])).wait_s:
                self._wait_out(admitted.wait_s)
                if not self._waiting or self._lost or self._shutdown.is_set():
                    return
            batch = admitted.messages
            if admitted.condemned:
                handle = self._set_aside
        self._waiting = self._waiting[len(batch) :]
        self._flights.launch(handle, batch, self._consumer.consumer_group_metadata())

    def _set_aside(self, batch: Sequence[Message]) -> Outcome:
        return Outcome(len(batch), dead=[unparsed(message, REASON, group=self._group) for message in batch])

    def _collect(self, *, down_to: int) -> None:
        """Commit delivered batches until at most `down_to` batches are in flight.

        Raises Outage if a batch was not delivered or cannot be committed.
        """
        while self._flights and (len(self._flights) > down_to or self._flights.oldest.delivered.done()):
            flight = self._flights.oldest
            self._until_done(flight.delivered)
            try:
                delivered = flight.delivered.result()
            except Outage:
                for each in self._flights:  # the later batches fail as well
                    self._until_done(each.delivered)
                self._waiting = [*self._flights.abandon(), *self._waiting]
                if not (self._flights.in_doubt or self._lost):
                    self._suspects.withdraw(self._consumer)
                raise
            self._commit(flight)
            self._flights.land()
            if rest := flight.still_assigned(delivered.rest):
                self._suspects.survived(self._consumer, rest)
                self._waiting = [*rest, *self._waiting]
                self._gathers_until = time.monotonic() + delivered.again_in_s

    def _until_done(self, future: Future[Any]) -> None:
        while not wait([future], _KEEPALIVE_S).done:
            self._keep_place(0)

    def _commit(self, flight: Flight) -> None:
        """Commit the offsets that the delivery has not committed. Raises Outage if committing fails.

        This runs in the loop's thread, because the loop's thread owns the consumer.
        """
        offsets = [
            each for each in flight.delivered.result().offsets if (each.topic, each.partition) not in flight.revoked
        ]
        if self._lost or not offsets:
            return
        with _COMMIT.time():
            self._delivery.commit(self._consumer, offsets)
        for observer in self._observers:
            observer.final(offsets)

    def _settle(self) -> None:
        """After a delivery whose result is unknown, drop the messages whose offsets turn out to be committed.

        Raises Outage if the committed offsets cannot be read.
        """
        opened = self._flights.between_deliveries(self._delivery.open)
        self._until_done(opened)
        opened.result()
        places = {coordinates(message)[:2] for message in self._waiting}
        committed = self._committed.read(self._consumer, places)
        self._flights.in_doubt = False
        self._suspects.settled(committed)
        self._waiting = not_committed(self._waiting, committed)

    def _read_anew(self) -> None:
        """Read the topic from its beginning, because it was deleted and made again.

        What was read of the new topic before this was noticed is handed over again. In an outage, nothing is done yet.
        """
        try:
            self._collect(down_to=0)
            if self._flights.in_doubt:
                self._settle()
            if self._waiting:  # a batch has failed, and is handed over again first
                return
            partitions = read_anew(self._consumer, self._topic, self._committed)
        except Outage:
            return
        self._topic_changed = False
        self._resume()
        for observer in self._observers:
            observer.revoked(partitions)
            observer.assigned(partitions)

    def _release_offsets(self) -> None:
        """If committed offsets stay unavailable, make the broker abort the Kafka transaction that withholds them.

        Otherwise, the consumer would silently wait for the offsets for ever.
        """
        if not self._committed.withheld(self._consumer):
            return
        place = self._consumer.assignment()[0]
        undone = self._flights.between_deliveries(
            lambda: self._delivery.undo(
                TopicPartition(place.topic, place.partition, 0),  # any offset works, because it is dropped as well
                self._consumer.consumer_group_metadata(),
            )
        )
        self._until_done(undone)  # fails if the broker is unavailable; this method is then called again

    def _wait_out(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (self._waiting or self._flights) and not (self._shutdown.is_set() or self._lost):
            if (left := until - time.monotonic()) <= 0:
                break
            self._keep_place(min(left, _IDLE_POLL_S))

    def _keep_place(self, timeout_s: float) -> None:
        """Poll with the partitions paused, so that the group does not consider this member dead."""
        health.turned(f"{self._group} loop")
        if self._lost:
            return
        self._turn()
        if not self._paused:
            self._paused = True
            self._log.info("paused", waiting=len(self._waiting))
        self._consumer.pause(self._consumer.assignment())  # every time, because a rebalance may have added partitions
        self._poll(timeout_s)

    def _resume(self) -> None:
        self._paused = self._resume_due = False
        self._consumer.resume(self._consumer.assignment())

    def _turn(self) -> None:
        """Report that the loop is alive. Once per second, also measure the lag, and check offsets and brokers."""
        health.turned(f"{self._group} loop")
        if (now := time.monotonic()) - self._measured < _MEASURE_S:
            return
        self._measured = now
        pending = [*(message for flight in self._flights for message in flight.batch), *self._waiting]
        self._lag.measure(self._consumer, pending, paused=self._paused)
        if self._committed.overdue and not self._flights:
            self._release_offsets()
        self._lost_positions.read_on(self._consumer)
        if self._topic_id and self._topic_id.changed():
            self._topic_changed = True
        self._reachability.check(self._consumer, other_outage=self._outage.under_way, at_least_s=_MEASURE_S)

    def _poll(self, timeout_s: float) -> None:
        message = self._consumer.poll(timeout_s)
        if message is not None:
            self._accept([message])

    def _accept(self, messages: Sequence[Message]) -> None:
        for message in messages:
            error = message.error()
            if error is None:
                self._waiting.append(message)
                self._reachability.read()
            elif error.code() == KafkaError._PARTITION_EOF:
                _, partition, offset = coordinates(message)
                self._lag.reached_end(partition, offset)
                self._reachability.read()
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                self._lost_positions.add(message)
                self._lost_positions.read_on(self._consumer)
            else:
                self._on_error(error)

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() in _FATAL:
            self._lost = error.str()
        elif error.code() == KafkaError._ALL_BROKERS_DOWN or error.code() in DENIED:
            self._reachability.report(error)
        elif error.code() not in _CONNECTION:
            self._log.warning("consumer_error", reason=error.str())

    def _on_assign(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._log.info("assigned", partitions=[partition.partition for partition in partitions])
        health.has(self._place)
        self._places |= {(each.topic, each.partition) for each in partitions}
        self._resume_due = True
        self._committed.assigned()
        for observer in self._observers:
            observer.assigned(partitions)

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Finish the batches in flight while the partitions are still assigned.

        Then drop the waiting messages of these partitions.
        """
        wait([flight.delivered for flight in self._flights], _REVOKE_WAIT_S)
        try:
            for flight in takewhile(_is_delivered, self._flights):
                self._commit(flight)
        except Outage as outage:
            self._log.warning("batch_redelivered", reason=str(outage))
        if not (self._ended or self._flights.in_doubt) and all(map(_is_delivered, self._flights)):
            self._suspects.take_back(self._consumer, [(each.topic, each.partition) for each in partitions])
        self._forget(partitions)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Drop the partitions without waiting for batches in flight, because other members already have them."""
        health.waits_for(self._place, "the group considered this member dead, so it must join again")
        self._forget(partitions)

    def _forget(self, partitions: list[TopicPartition]) -> None:
        self._log.info("revoked", partitions=[partition.partition for partition in partitions])
        revoked = {(partition.topic, partition.partition) for partition in partitions}
        self._places -= revoked
        self._lost_positions.forget(revoked)
        self._flights.revoke(revoked)
        self._waiting = [message for message in self._waiting if (message.topic(), message.partition()) not in revoked]
        for observer in self._observers:
            observer.revoked(partitions)


def open_stream(
    settings: StreamSettings,
    properties: Mapping[str, str],
    *,
    group: str,
    topic: str,
    delivery: Delivery,
    shutdown: Event,
    observers: Sequence[Observer] = (),
) -> Stream:
    """Make a stream, which is a static member of the group. The setting REPLICA is the name of the member.

    Raises SettingsError if a setting is wrong.
    """
    return Stream(
        make_consumer=lambda on_error: consumer(properties, group=group, replica=settings.replica, on_error=on_error),
        group=group,
        topic=topic,
        delivery=delivery,
        settings=settings,
        shutdown=shutdown,
        observers=observers,
        topic_id=TopicId(properties, topic),
    )


def _is_delivered(flight: Flight) -> bool:
    return flight.delivered.done() and not flight.delivered.exception()


def _closing(consumer: Consumer) -> Thread:
    """Start a thread that makes the consumer leave the group.

    While commits are under way, the thread waits for the broker, perhaps for ever.
    """

    def close() -> None:
        with suppress(KafkaException):
            consumer.close()

    closing = Thread(target=close, daemon=True, name="close")
    closing.start()
    return closing


def _close_or_leave_behind(consumer: Consumer) -> None:
    """Leave the group. If the broker does not answer in time, abandon the client."""
    closing = _closing(consumer)
    closing.join(_CLOSE_S)
    if closing.is_alive():
        log.warning("client_left_behind", reason="the broker does not answer")
