"""Batches in flight. One thread handles the batches, another thread delivers them, and the loop keeps polling."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import structlog
from confluent_kafka import Message, TopicPartition

from shared import health, metrics
from shared.dead_letters import reason_of
from shared.errors import Outage
from shared.flow import Flow
from shared.kafka.messages import Record
from shared.kafka.offsets import next_offsets
from shared.stream.delivery import Delivery

log = structlog.get_logger()

_AGES = 32  # approximate number of records per batch whose age is measured
_HANDLE, _DELIVER = (metrics.STAGE.labels(stage) for stage in ("handle", "deliver"))

T = TypeVar("T")


class Outcome(NamedTuple):
    """What a handler did with a batch.

    The first `done` messages of the batch are finished for good. The offsets of these messages are committed after
    `outputs` and `dead` (the dead letters) are written. `finish()` is called after the previous batch is delivered, but
    before `outputs` and `dead` are written. `finish()` returns further dead letters. `finish()` must be idempotent, and
    may raise Outage. `delivered()` is called after `outputs` and `dead` are written.

    The other messages are redelivered together with newer messages: after `again_in_s` seconds, or sooner if the batch
    fills up. If `keep` is given, only the messages in `keep` are redelivered. The messages that are not in `keep` are
    committed together with the next finished message of their partition. Therefore, `keep` must contain the last
    message of every partition.
    """

    done: int
    outputs: Sequence[Record] = ()
    dead: Sequence[Record] = ()
    finish: Callable[[], Sequence[Record]] | None = None
    keep: Sequence[Message] | None = None
    again_in_s: float = 0.0
    delivered: Callable[[], None] | None = None


Handler = Callable[[Sequence[Message]], Outcome]
"""A function that processes a batch. The batch is never empty, and is in order within each partition. A handler may
block. It raises Outage if something that it needs is unavailable. The batch is then redelivered, so everything that a
handler does must be idempotent."""


class Delivered(NamedTuple):
    """The result of delivering a batch."""

    offsets: list[TopicPartition]  # the next offsets to read
    rest: Sequence[Message]  # the messages to redeliver
    again_in_s: float


@dataclass
class Flight:
    """A batch that was handed to the handler and is not committed yet."""

    batch: list[Message]
    delivered: Future[Delivered]
    revoked: set[tuple[str | None, int | None]] = field(default_factory=set)  # partitions revoked after the handover

    def still_assigned(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages whose partitions were not revoked."""
        return [message for message in messages if (message.topic(), message.partition()) not in self.revoked]


class Flights:
    """The batches in flight, oldest first. No batch overtakes another."""

    def __init__(self, delivery: Delivery, *, group: str, flow: Flow) -> None:
        self._delivery = delivery
        self._group = group
        self._flow = flow
        self._handling = ThreadPoolExecutor(1, thread_name_prefix="handle")
        self._delivering = ThreadPoolExecutor(1, thread_name_prefix="deliver")
        self._flights: deque[Flight] = deque()
        self._log = log.bind(group=group)
        self.in_doubt = False  # a delivery failed, and it is unknown whether the broker committed it

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights)

    @property
    def oldest(self) -> Flight:
        """The oldest batch in flight, which is the next to be committed."""
        return self._flights[0]

    def launch(self, handle: Handler, batch: list[Message], generation: object) -> None:
        """Hand a batch to the handler and then to the delivery. `generation` is the group's current generation."""
        before = self._flights[-1].delivered if self._flights else None
        handled = self._handling.submit(self._handle, handle, batch)
        self._flights.append(Flight(batch, self._delivering.submit(self._deliver, handled, batch, generation, before)))

    def land(self) -> None:
        """Remove the oldest batch, which is now final."""
        self._flights.popleft()

    def abandon(self) -> list[Message]:
        """Remove all batches. Returns their messages in order, but without the messages of revoked partitions."""
        left = [message for flight in self._flights for message in flight.still_assigned(flight.batch)]
        self._flights.clear()
        return left

    def revoke(self, partitions: Set[tuple[str, int]]) -> None:
        """Record that these partitions, given as (topic, partition), were revoked while the batches were in flight."""
        for flight in self._flights:
            flight.revoked |= partitions

    def between_deliveries(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` in the delivery thread, because a Kafka client accepts only one transactional call at a time."""
        return self._delivering.submit(call)

    def close(self) -> None:
        """Wait for both threads to end."""
        self._handling.shutdown()
        self._delivering.shutdown()

    def _handle(self, handle: Handler, batch: list[Message]) -> Outcome:
        with health.call(f"{self._group} handler"), _HANDLE.time():
            return handle(batch)

    def _deliver(
        self, handled: Future[Outcome], batch: list[Message], generation: object, before: Future[Delivered] | None
    ) -> Delivered:
        if before and before.exception():
            raise Outage("the previous batch was not delivered")
        outcome = handled.result()
        began = time.monotonic()
        with health.call(f"{self._group} finish"):
            dead = [*outcome.dead, *outcome.finish()] if outcome.finish else outcome.dead
        finished = batch[: outcome.done]
        offsets = next_offsets(finished)
        if finished or outcome.outputs or dead:
            try:
                self._delivery.deliver([*outcome.outputs, *dead], offsets, generation)
            except Outage:
                self.in_doubt = True
                raise
        if outcome.delivered:
            outcome.delivered()
        took_s = time.monotonic() - began
        rest = batch[outcome.done :] if outcome.keep is None else outcome.keep
        self._report(outcome, finished=finished, records=len(batch) - len(rest), dead=dead, took_s=took_s)
        return Delivered(offsets, rest, outcome.again_in_s)

    def _report(
        self, outcome: Outcome, *, finished: Sequence[Message], records: int, dead: Sequence[Record], took_s: float
    ) -> None:
        if dead:
            self._log.warning("dead_letters", records=len(dead), first_reason=reason_of(dead[0]))
        if finished:
            metrics.BATCH.observe(len(finished))
            _DELIVER.observe(took_s)
        metrics.RECORDS_IN.inc(records)
        metrics.RECORDS_OUT.inc(len(outcome.outputs))
        metrics.DEAD_LETTERS.inc(len(dead))
        self._flow.add(
            records=records,
            dead_letters=len(dead),
            delivery_ms=round(took_s * 1000),
            ages_ms=_ages_ms(finished[:: len(finished) // _AGES + 1]),
        )


def _ages_ms(messages: Sequence[Message]) -> list[float]:
    """Return the milliseconds since each message was written."""
    now_ms = time.time() * 1000
    return [max(0.0, now_ms - message.timestamp()[1]) for message in messages]  # not negative, even if clocks differ
