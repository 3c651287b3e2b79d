"""The one stream loop: poll, hand over, make final; pause while something is away; rebalance; drain on SIGTERM.

A service hands it a handler and never commits an offset itself. The handler and the delivery run in a worker thread, so
that the loop can keep polling, and thus its place in the group, however long they take.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import NamedTuple

import structlog
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from shared.dead_letters import reason_of
from shared.delivery import Delivery, next_offsets
from shared.errors import Outage
from shared.flow import Flow
from shared.kafka import Record
from shared.retry import until_over
from shared.settings import StreamSettings

log = structlog.get_logger()

_IDLE_POLL_S = 0.5
_KEEPALIVE_S = 1.0
_REVOKE_WAIT_S = 60.0


class Outcome(NamedTuple):
    """What a handler did with a batch.

    `done` counts the messages, from the front, that are finished for good; the rest is handed over again. `outputs` and
    `dead` letters are to be written before the offsets of the finished ones are committed.
    """

    done: int
    outputs: Sequence[Record] = ()
    dead: Sequence[Record] = ()


Handler = Callable[[Sequence[Message]], Outcome]
"""Works on a batch, in order within a partition, never empty. It may block. It raises Outage when something it needs is
away: the batch comes again later, so what it did before must bear repeating."""


class Stream:
    """One consumer, one handler, one delivery."""

    def __init__(
        self,
        *,
        consumer: Consumer,
        topic: str,
        handle: Handler,
        delivery: Delivery,
        settings: StreamSettings,
        shutdown: Event,
    ) -> None:
        self._consumer = consumer
        self._topic = topic
        self._handle = handle
        self._delivery = delivery
        self._settings = settings
        self._shutdown = shutdown
        self._waiting: list[Message] = []  # consumed, not final
        self._gone: set[tuple[str | None, int | None]] = set()  # revoked since the batch in flight was handed over
        self._running: Future[int] | None = None
        self._paused = False
        self._flow = Flow("processed")

    def run(self) -> None:
        """Turn until the shutdown event is set, then finish the batch in flight and leave the group."""
        self._consumer.subscribe(
            [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="batch") as worker:
                while not self._shutdown.is_set():
                    self._fill()
                    self._process(worker)
        except Outage as outage:
            log.warning("stopped_in_outage", reason=str(outage), left_for_later=len(self._waiting))
        finally:
            self._flow.report()
            self._delivery.close()
            self._consumer.close()

    def _fill(self) -> None:
        """Grow the batch until it is full or has waited long enough; at backlog it is full at once."""
        wait_s = 0.0  # a batch that comes again has waited long enough
        if not self._waiting:
            # consume() sits out its whole timeout on a partial batch: the idle wait is for one message only.
            self._accept([self._consumer.poll(_IDLE_POLL_S)])
            wait_s = self._settings.max_batch_wait_ms / 1000
        room = self._settings.max_batch_size - len(self._waiting)
        if self._waiting and room > 0:
            self._accept(self._consumer.consume(room, wait_s))

    def _process(self, worker: ThreadPoolExecutor) -> None:
        """Bring the batch to its end: final, or forgotten because its partitions went to another member."""
        until_over(
            lambda: self._attempt(worker),
            shutdown=self._shutdown,
            initial_s=self._settings.backoff_initial_seconds,
            max_s=self._settings.backoff_max_seconds,
            wait=self._wait_out,
        )
        if self._paused:
            self._paused = False
            self._consumer.resume(self._consumer.assignment())
            log.info("resumed")

    def _attempt(self, worker: ThreadPoolExecutor) -> None:
        """Hand one batch to the worker and keep polling until it is through. Raises Outage; the batch then waits on."""
        if not self._waiting:
            return
        size = self._settings.max_batch_size
        batch, self._waiting = self._waiting[:size], self._waiting[size:]
        self._gone.clear()
        done = 0
        self._running = worker.submit(self._complete, batch, self._consumer.consumer_group_metadata())
        try:
            while not wait([self._running], _KEEPALIVE_S).done:
                self._keep_place(0)
            done = self._running.result()
        finally:
            self._running = None
            self._waiting = [m for m in batch[done:] if (m.topic(), m.partition()) not in self._gone] + self._waiting

    def _complete(self, batch: list[Message], member: object) -> int:
        """In the worker: handle the batch and make what is done of it final."""
        began = time.monotonic()
        outcome = self._handle(batch)
        finished = batch[: outcome.done]
        if finished:
            self._delivery.deliver([*outcome.outputs, *outcome.dead], next_offsets(finished), member)
        if outcome.dead:
            log.warning("dead_letters", records=len(outcome.dead), first_reason=reason_of(outcome.dead[0]))
        busy_ms = round((time.monotonic() - began) * 1000)
        self._flow.add(records=len(finished), dead_letters=len(outcome.dead), busy_ms=busy_ms)
        return outcome.done

    def _wait_out(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._waiting and not self._shutdown.is_set() and (left := until - time.monotonic()) > 0:
            self._keep_place(min(left, _IDLE_POLL_S))

    def _keep_place(self, timeout_s: float) -> None:
        """Poll with the partitions paused, so that the group does not think this member dead."""
        if not self._paused:
            self._paused = True
            log.info("paused", waiting=len(self._waiting))
        self._consumer.pause(self._consumer.assignment())  # each time: a rebalance may have brought more
        self._accept([self._consumer.poll(timeout_s)])

    def _accept(self, messages: Sequence[Message | None]) -> None:
        for message in messages:
            if message is None:
                continue
            error = message.error()
            if error is None:
                self._waiting.append(message)
            elif error.fatal():
                raise KafkaException(error)
            else:
                log.warning("consumer_error", reason=error.str())

    def _on_assign(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        log.info("assigned", partitions=[partition.partition for partition in partitions])

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Finish the batch in flight while these partitions are still ours; forget what else is waiting of them."""
        if self._running:
            wait([self._running], _REVOKE_WAIT_S)
        log.info("revoked", partitions=[partition.partition for partition in partitions])
        self._gone |= {(partition.topic, partition.partition) for partition in partitions}
        self._waiting = [m for m in self._waiting if (m.topic(), m.partition()) not in self._gone]
