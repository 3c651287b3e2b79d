"""The one stream loop: poll, hand over, make final; pause while something is away; rebalance; drain on SIGTERM.

A service hands it a handler and never commits an offset itself. The handler and the delivery run in threads of their
own, so that the loop can keep polling, and thus its place in the group, however long they take.
"""

import gc
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from threading import Event, Thread
from typing import Any, NamedTuple

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from shared import health, metrics
from shared.dead_letters import reason_of
from shared.errors import Outage
from shared.flow import Flow
from shared.kafka.clients import DENIED
from shared.kafka.connections import OnError
from shared.kafka.messages import Record, coordinates
from shared.kafka.offsets import next_offsets
from shared.retry import Spell, delay_s, until_over
from shared.settings import StreamSettings
from shared.stream.delivery import Delivery
from shared.stream.lag import Lag

log = structlog.get_logger()

_IDLE_POLL_S = 0.5
_BUSY_POLL_S = 0.01
_KEEPALIVE_S = 1.0
_REVOKE_WAIT_S = 30.0
_COMMITTED_WAIT_S = 5.0
_PROBE_S = 1.0
_CLOSE_S = 3.0
_MEASURE_S = 1.0
_FORGOTTEN_S = 30.0  # the broker ends transactions older than ten, and looks for them every ten
_AGES = 32  # records of a batch whose age is looked at
_HANDLE, _DELIVER, _COMMIT = (metrics.STAGE.labels(stage) for stage in ("handle", "deliver", "commit"))
# A static member is fenced by another process of its name, or by itself, when the broker forgets that it has let it in.
_FATAL = frozenset({KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID})
# Of one connection: the client tries the next, or again, and says so when all of them are broken.
_CONNECTION = frozenset({KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._SSL, KafkaError._AUTHENTICATION})


class Outcome(NamedTuple):
    """What a handler did with a batch.

    `done` counts the messages, from the front, that are finished for good; the rest is handed over again. `outputs` and
    `dead` letters are to be written before the offsets of the finished ones are committed. Before that comes `finish`,
    after that of the batch before; it returns further dead letters, or raises Outage like the handler. It, too, must
    bear repeating.

    The rest comes again: of it `keep`, in its order, if that is given, and then `again_in_s` seconds later, with what
    has come until then; at once when that fills the batch. What is not kept is committed with the next of its
    partition that is finished, so the last of each partition is to be kept.
    """

    done: int
    outputs: Sequence[Record] = ()
    dead: Sequence[Record] = ()
    finish: Callable[[], Sequence[Record]] | None = None
    keep: Sequence[Message] | None = None
    again_in_s: float = 0.0


Handler = Callable[[Sequence[Message]], Outcome]
"""Works on a batch, in order within a partition, never empty. It may block. It raises Outage when something it needs is
away: the batch comes again later, so what it did before must bear repeating."""


class _Final(NamedTuple):
    """What of a batch is delivered."""

    offsets: list[TopicPartition]  # that follow what is finished
    rest: Sequence[Message]  # which comes again
    again_in_s: float


@dataclass
class _InFlight:
    """A batch that was handed over."""

    batch: list[Message]
    final: Future[_Final]
    gone: set[tuple[str | None, int | None]] = field(default_factory=set)  # partitions revoked since

    def still_ours(self, messages: Sequence[Message]) -> list[Message]:
        """Those whose partitions were not revoked."""
        return [m for m in messages if (m.topic(), m.partition()) not in self.gone]


class Stream:
    """One place in a consumer group, one handler, one delivery."""

    def __init__(
        self,
        *,
        make_consumer: Callable[[OnError], Consumer],
        group: str,
        topic: str,
        delivery: Delivery,
        settings: StreamSettings,
        shutdown: Event,
    ) -> None:
        """Raises SettingsError if `make_consumer` does."""
        self._make_consumer: Callable[[], Consumer] = lambda: make_consumer(self._hear)
        self._consumer = self._make_consumer()
        self._lost: str | None = None  # why this consumer is beyond repair
        self._short_lived = 0  # consumers lost one after the other
        self._group = group
        self._log = log.bind(group=group)  # a process may have several
        self._topic = topic
        self._delivery = delivery
        self._settings = settings
        self._shutdown = shutdown
        self._handling = ThreadPoolExecutor(1, thread_name_prefix="handle")
        self._delivering = ThreadPoolExecutor(1, thread_name_prefix="deliver")
        self._waiting: list[Message] = []  # consumed, not handed over
        self._gathers_until = 0.0  # monotonic
        self._in_flight: deque[_InFlight] = deque()
        self._most_in_flight = 1
        self._idle: Callable[[], object] | None = None
        self._paused = False
        self._assigned = False  # just now: what was paused when it was taken away comes back paused
        self._in_doubt = False  # a delivery failed, and perhaps only its answer was lost
        self._offsets_since: float | None = None  # monotonic; since then, it is not known whether they can be had
        self._lag = Lag(group, topic)
        self._measured = 0.0  # monotonic
        self._flow = Flow("processed", levels=lambda: {"lag": self._lag.records}, group=group)
        self._place = f"partitions of {topic}, for {group}"
        self._spell = Spell(f"what {group} needs", waiting=lambda: self._lag.records, group=group)
        self._broker_away = Spell(f"Kafka, for {group}", group=group)
        self._away_because = ""  # it is, or does not let us in, as it said last
        self._unreadable = False  # the topic, until there is something to read or its end
        health.waits_for(self._place, "it has joined no group yet")

    def run(self, handle: Handler, *, ahead: bool = False, idle: Callable[[], object] | None = None) -> None:
        """Hand over batch after batch until the shutdown event is set, then finish those in flight.

        With `ahead`, a batch is handled while the one before it is made final. That is for handlers that have no effect
        (but for what their outcomes' `finish` has) and are done with all of a batch. `idle()` is called whenever
        nothing waits, be it done or another member's by now.
        """
        self._idle = idle
        self._most_in_flight = 2 if ahead else 1
        _tune()
        try:
            self._until_over(self._delivery.open)
            while not self._shutdown.is_set():
                self._consume(handle)
        except Outage as outage:
            self._log.warning("stopped_in_outage", reason=str(outage), left_for_later=len(self._waiting))
        finally:
            self._handling.shutdown()
            self._delivering.shutdown()
            self._flow.report()
            health.ended(f"{self._group} loop")
            self.close()

    def close(self) -> None:
        """Leave the group, if it was joined, and let go of the broker."""
        try:
            self._delivery.close()
        finally:
            _let_go(self._consumer)

    def _consume(self, handle: Handler) -> None:
        """Hold a place in the group until the shutdown, or until the consumer is lost; then have a new one.

        Two replicas of one name take the place from each other: each waits longer every time, so that the other gets
        something done.
        """
        began = time.monotonic()
        self._consumer.subscribe(
            [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        while not self._shutdown.is_set() and not self._lost:
            self._fill()
            if time.monotonic() >= self._gathers_until or len(self._waiting) >= self._settings.max_batch_size:
                self._process(handle)
            if self._in_doubt and not (self._waiting or self._in_flight):
                with suppress(Outage):  # its partitions are gone; who has them waits for the end of it
                    self._settle()
        while self._in_flight:
            with suppress(Outage) if self._lost else nullcontext():
                self._collect(down_to=0)
        if self._lost:
            self._log.warning("consumer_lost", reason=self._lost, hint="is REPLICA unique among the replicas?")
            health.waits_for(self._place, self._lost)
            closing = _closing(self._consumer)  # to its end: it would fight with the next one for their common name
            while closing.is_alive() and not self._shutdown.is_set():
                health.turned(f"{self._group} loop")
                closing.join(_IDLE_POLL_S)
            self._waiting.clear()
            initial_s, max_s = self._settings.backoff_initial_seconds, self._settings.backoff_max_seconds
            self._short_lived = 0 if time.monotonic() - began > max_s else self._short_lived + 1
            self._shutdown.wait(delay_s(self._short_lived, initial_s=initial_s, max_s=max_s))
            self._consumer, self._lost, self._paused = self._make_consumer(), None, False

    def _fill(self) -> None:
        """Grow the batch until it is full or has waited long enough; at backlog it is full at once."""
        self._turn()
        if not self._in_flight:  # those tell of themselves
            self._flow.report_if_due()
        if self._assigned:
            self._resume()
        wait_s = 0.0  # a batch that comes again has waited long enough
        if not self._waiting:
            if self._idle and not self._in_flight:
                self._idle()
            self._gathers_until = 0.0
            # consume() sits out its whole timeout on a partial batch: the idle wait is for one message only.
            self._poll(_BUSY_POLL_S if self._in_flight else _IDLE_POLL_S)
            wait_s = self._settings.max_batch_wait_ms / 1000
        elif (gathers_s := self._gathers_until - time.monotonic()) > 0:
            wait_s = min(gathers_s, _IDLE_POLL_S)
        room = self._settings.max_batch_size - len(self._waiting)
        if self._waiting and room > 0:
            self._accept(self._consumer.consume(room, wait_s))

    def _process(self, handle: Handler) -> None:
        """Bring the batch to its end: final, or forgotten because its partitions went to another member."""
        self._until_over(lambda: self._attempt(handle), wait=self._wait_out)
        if self._paused and not self._lost:
            self._resume()
            self._log.info("resumed")

    def _until_over(self, step: Callable[[], None], *, wait: Callable[[float], None] | None = None) -> None:
        until_over(
            step,
            shutdown=self._shutdown,
            initial_s=self._settings.backoff_initial_seconds,
            max_s=self._settings.backoff_max_seconds,
            wait=wait,
            spell=self._spell,
        )

    def _attempt(self, handle: Handler) -> None:
        """Hand a batch over, and keep polling while too many are in flight. Raises Outage; they then wait on."""
        if len(self._in_flight) == self._most_in_flight:  # a commit failed; otherwise, it can wait for the handing over
            self._collect(down_to=self._most_in_flight - 1)
        if self._in_doubt and not (self._in_flight or self._lost):
            self._settle()
        if self._waiting and not self._lost:
            self._submit(handle)
        self._collect(down_to=0 if self._paused else self._most_in_flight - 1)  # an outage is over when one is through

    def _submit(self, handle: Handler) -> None:
        size = self._settings.max_batch_size
        batch, self._waiting = self._waiting[:size], self._waiting[size:]
        before = self._in_flight[-1].final if self._in_flight else None
        handled = self._handling.submit(self._handle, handle, batch)
        generation = self._consumer.consumer_group_metadata()
        final = self._delivering.submit(self._complete, handled, batch, generation, before)
        self._in_flight.append(_InFlight(batch, final))

    def _collect(self, *, down_to: int) -> None:
        """Commit batches that are delivered until so many, or fewer, are in flight. Raises Outage."""
        while self._in_flight and (len(self._in_flight) > down_to or self._in_flight[0].final.done()):
            first = self._in_flight[0]
            self._until_done(first.final)
            try:
                final = first.final.result()
            except Outage:
                for each in self._in_flight:  # they cannot get through either
                    self._until_done(each.final)
                self._waiting = [*(m for each in self._in_flight for m in each.still_ours(each.batch)), *self._waiting]
                self._in_flight.clear()
                raise
            self._commit(first)
            self._in_flight.popleft()
            if left := first.still_ours(final.rest):
                self._waiting = [*left, *self._waiting]
                self._gathers_until = time.monotonic() + final.again_in_s

    def _until_done(self, future: Future[Any]) -> None:
        while not wait([future], _KEEPALIVE_S).done:
            self._keep_place(0)

    def _commit(self, delivered: _InFlight) -> None:
        """Commit what the delivery has left to do, in this thread: the client lets in one at a time. Raises Outage."""
        following, gone = delivered.final.result().offsets, delivered.gone
        offsets = [each for each in following if (each.topic, each.partition) not in gone]
        if offsets and not self._lost:
            with _COMMIT.time():
                self._delivery.commit(self._consumer, offsets)
        self._lag.finished(offsets)

    def _handle(self, handle: Handler, batch: list[Message]) -> Outcome:
        with health.call(f"{self._group} handler"), _HANDLE.time():
            return handle(batch)

    def _complete(
        self, handled: Future[Outcome], batch: list[Message], generation: object, before: Future[_Final] | None
    ) -> _Final:
        """Deliver what is done of the batch."""
        if before and before.exception():
            raise Outage("the batch before it comes first")  # none overtakes one that did not get through
        outcome = handled.result()
        began = time.monotonic()
        with health.call(f"{self._group} finish"):
            dead = [*outcome.dead, *outcome.finish()] if outcome.finish else outcome.dead
        finished = batch[: outcome.done]
        offsets = next_offsets(finished)
        if finished:
            try:
                self._delivery.deliver([*outcome.outputs, *dead], offsets, generation)
            except Outage:
                self._in_doubt = True
                raise
        if dead:
            self._log.warning("dead_letters", records=len(dead), first_reason=reason_of(dead[0]))
        took_s = time.monotonic() - began
        if finished:
            metrics.BATCH.observe(len(finished))
            _DELIVER.observe(took_s)
        rest = batch[outcome.done :] if outcome.keep is None else outcome.keep
        metrics.RECORDS_IN.inc(len(batch) - len(rest))
        metrics.RECORDS_OUT.inc(len(outcome.outputs))
        metrics.DEAD_LETTERS.inc(len(dead))
        self._flow.add(
            records=len(batch) - len(rest),
            dead_letters=len(dead),
            delivery_ms=round(took_s * 1000),
            ages_ms=_ages_ms(finished[:: len(finished) // _AGES + 1]),
        )
        return _Final(offsets, rest, outcome.again_in_s)

    def _settle(self) -> None:
        """Forget what a delivery made final whose answer was lost: it was all of its batch or none. Raises Outage."""
        opened = self._delivering.submit(self._delivery.open)
        self._until_done(opened)
        opened.result()
        places = [coordinates(message) for message in self._waiting]
        partitions = [TopicPartition(topic, partition) for topic, partition in {place[:2] for place in places}]
        try:
            committed = self._consumer.committed(partitions, timeout=_COMMITTED_WAIT_S) if partitions else []
        except KafkaException as exception:
            self._offsets_since = self._offsets_since or time.monotonic()
            raise Outage(f"committed offsets: {exception.args[0].str()}") from None
        if failed := next((each.error for each in committed if each.error), None):
            raise Outage(f"committed offsets: {failed.str()}")
        self._in_doubt = False
        following = {(each.topic, each.partition): each.offset for each in committed}
        final = len(list(takewhile(lambda place: place[2] < following[place[:2]], places)))
        self._waiting = self._waiting[final:]

    def _wait_out(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (self._waiting or self._in_flight) and not (self._shutdown.is_set() or self._lost):
            if (left := until - time.monotonic()) <= 0:
                break
            self._keep_place(min(left, _IDLE_POLL_S))

    def _keep_place(self, timeout_s: float) -> None:
        """Poll with the partitions paused, so that the group does not think this member dead."""
        health.turned(f"{self._group} loop")
        if self._lost:
            return
        self._turn()
        if not self._paused:
            self._paused = True
            self._log.info("paused", waiting=len(self._waiting))
        self._consumer.pause(self._consumer.assignment())  # each time: a rebalance may have brought more
        self._poll(timeout_s)

    def _resume(self) -> None:
        self._paused = self._assigned = False
        self._consumer.resume(self._consumer.assignment())

    def _turn(self) -> None:
        """Show that the loop turns, and every so often where it stands."""
        health.turned(f"{self._group} loop")
        if (now := time.monotonic()) - self._measured < _MEASURE_S:
            return
        self._measured = now
        pending = [*(m for each in self._in_flight for m in each.batch), *self._waiting]
        self._lag.measure(self._consumer, pending, paused=self._paused)
        if self._offsets_since and now - self._offsets_since > _FORGOTTEN_S and not self._in_flight:
            self._look_for_offsets()
        if self._broker_away.under_way or (self._away_because and not self._spell.under_way):  # which tells of it
            if problem := self._problem():
                self._broker_away.lasts(problem)
            else:
                self._away_because = ""
                self._broker_away.over()

    def _look_for_offsets(self) -> None:
        """Have the broker drop what holds the committed offsets back: a consumer would wait for them without a word."""
        self._offsets_since = time.monotonic()
        places = self._consumer.assignment()
        try:
            committed = self._consumer.committed(places, timeout=_COMMITTED_WAIT_S) if places else []
            known = not any(each.error for each in committed)
        except KafkaException:
            known = False
        if known:
            self._offsets_since = None
            return
        place = TopicPartition(places[0].topic, places[0].partition, 0)  # some offset: it is dropped as well
        undone = self._delivering.submit(self._delivery.undo, place, self._consumer.consumer_group_metadata())
        self._until_done(undone)  # or not, when the broker is away: that is told, and this is tried again

    def _problem(self) -> str | None:
        """Why the group cannot read its topic, if it cannot."""
        if self._unreadable:
            return self._away_because
        try:
            known = self._consumer.list_topics(self._topic, timeout=_PROBE_S).topics[self._topic]
            if known.error and known.error.code() in DENIED:
                return self._away_because
            self._consumer.committed([TopicPartition(self._topic, 0)], timeout=_PROBE_S)
        except KafkaException:
            return self._away_because
        return None

    def _poll(self, timeout_s: float) -> None:
        message = self._consumer.poll(timeout_s)
        if message is not None:
            self._accept([message])

    def _accept(self, messages: Sequence[Message]) -> None:
        for message in messages:
            error = message.error()
            if error is None:
                self._waiting.append(message)
                self._unreadable = False
            elif error.code() == KafkaError._PARTITION_EOF:
                _, partition, offset = coordinates(message)
                self._lag.reached_end(partition, offset)
                self._unreadable = False
            else:
                self._hear(error)

    def _hear(self, error: KafkaError) -> None:
        if error.fatal() or error.code() in _FATAL:
            self._lost = error.str()
        elif error.code() == KafkaError._ALL_BROKERS_DOWN or error.code() in DENIED:
            if not self._away_because:
                self._measured = time.monotonic()  # the next look is in a second: a batch may tell of it, or it is over
            unreadable = error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
            if unreadable != self._unreadable:
                self._broker_away.over()  # what comes is another one, and is told as such
            self._unreadable = unreadable
            self._away_because = f"{self._topic}: {error.str()}" if self._unreadable else error.str()
        elif error.code() not in _CONNECTION:
            self._log.warning("consumer_error", reason=error.str())

    def _on_assign(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._log.info("assigned", partitions=[partition.partition for partition in partitions])
        health.has(self._place)
        self._assigned = True
        self._offsets_since = time.monotonic()

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Finish what is in flight while these partitions are still ours; forget what else is waiting of them."""
        wait([each.final for each in self._in_flight], _REVOKE_WAIT_S)
        try:
            for each in takewhile(lambda each: each.final.done() and not each.final.exception(), self._in_flight):
                self._commit(each)
        except Outage as outage:
            self._log.warning("comes_again", reason=str(outage))
        self._forget(partitions)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """These partitions are others' already: there is nothing to wait for."""
        health.waits_for(self._place, "it was taken for dead, and has to join again")
        self._forget(partitions)

    def _forget(self, partitions: list[TopicPartition]) -> None:
        self._log.info("revoked", partitions=[partition.partition for partition in partitions])
        self._lag.forget(partition.partition for partition in partitions)
        gone = {(partition.topic, partition.partition) for partition in partitions}
        for each in self._in_flight:
            each.gone |= gone
        self._waiting = [m for m in self._waiting if (m.topic(), m.partition()) not in gone]


def _closing(consumer: Consumer) -> Thread:
    """Leave the group. A client with commits under way waits for the broker to be back, perhaps for ever."""

    def close() -> None:
        with suppress(KafkaException):
            consumer.close()

    closing = Thread(target=close, daemon=True, name="close")
    closing.start()
    return closing


def _let_go(consumer: Consumer) -> None:
    """Leave the group, if the broker lets us; if not, this client is left behind."""
    closing = _closing(consumer)
    closing.join(_CLOSE_S)
    if closing.is_alive():
        log.warning("client_left_behind", reason="it waits for the broker to answer")


def _ages_ms(messages: Sequence[Message]) -> list[float]:
    """Since each was written."""
    now_ms = time.time() * 1000
    return [max(0.0, now_ms - message.timestamp()[1]) for message in messages]  # clocks differ


def _tune() -> None:
    """Have the interpreter serve threads that wait for each other's small steps, and batches that come and go."""
    sys.setswitchinterval(0.0002)  # a thread that comes back from the broker or the database goes on at once
    gc.freeze()  # what is loaded by now stays
    gc.set_threshold(50_000)  # and nothing that a batch is made of refers to itself
