"""The common part of services that store records. Each service adds a Sink, which reads, prepares and stores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from threading import Event
from typing import Any, Generic, TypeVar

import structlog
from confluent_kafka import Message

from shared.dead_letters import Limit, dead_letter, isolate
from shared.errors import Outage, Poison
from shared.kafka.messages import Record
from shared.retry import OutageLog, retry_outages
from shared.settings import StreamSettings, kafka_properties
from shared.stream.delivery import AtLeastOnce
from shared.stream.flight import Outcome
from shared.stream.loop import open_stream

log = structlog.get_logger()

Row = TypeVar("Row")


class Sink(ABC, Generic[Row]):
    """Where a service stores records. A record may be stored more than once, so storing must be idempotent."""

    place = "storage"  # what the service waits for, as shown on /ready, until `open` returns

    def open(self) -> None:
        """Make the storage ready. After an Outage, this is called again."""

    @abstractmethod
    def read(self, message: Message) -> Row:
        """Make a row from a message, without side effects. Raises Poison if the message can never be stored."""

    def prepare(self, rows: Sequence[Row]) -> Any:
        """Return the argument of `store` for a batch: the rows, or another form of them that can be stored faster.

        This must not have side effects, because it may run before the previous batch is stored.
        """
        return rows

    @abstractmethod
    def store(self, prepared: Any) -> None:
        """Store all rows or none. Raises Poison if a row can never be stored, and Outage after any other failure."""

    def check(self) -> None:
        """Store a row that is known to be good, and undo that. Raises Outage if even this row is not accepted.

        This is called if many rows are refused. Without a check, rows are then not taken for the cause.
        """
        raise Outage("a good row cannot be tried")

    def stored(self, rows: int) -> None:
        """Count the rows that were stored."""

    def close(self) -> None:
        """Disconnect from the storage."""


def run(sink: Sink[Any], settings: StreamSettings, *, group: str, topic: str, shutdown: Event) -> None:
    """Store the topic's records until shutdown, each at least once. Raises SettingsError if a setting is wrong."""
    properties = kafka_properties(settings)
    delivery = AtLeastOnce(properties=properties, shutdown=shutdown)
    stream = open_stream(settings, properties, group=group, topic=topic, delivery=delivery, shutdown=shutdown)
    try:
        retry_outages(
            sink.open,
            shutdown=shutdown,
            initial_s=settings.backoff_initial_seconds,
            max_s=settings.backoff_max_seconds,
            outage_log=OutageLog(sink.place),
        )
    except Outage:
        stream.close()
        return
    limit = Limit.from_settings(settings)
    stream.run(lambda messages: handle(messages, sink, group=group, limit=limit), ahead=True)
    sink.close()


def handle(messages: Sequence[Message], sink: Sink[Any], *, group: str, limit: Limit) -> Outcome:
    """Prepare a batch. The outcome's `finish` stores the batch.

    Messages that cannot be read or stored become dead letters.
    """
    rows: list[Any] = []
    sources: list[Message] = []
    dead = []
    for message in messages:
        try:
            rows.append(sink.read(message))
            sources.append(message)
        except Poison as poison:
            dead.append(dead_letter(message, str(poison), group=group))
    prepared = sink.prepare(rows)

    def store_part(part: Sequence[Any]) -> Sequence[None]:
        sink.store(sink.prepare(part))
        return [None] * len(part)

    def finish() -> Sequence[Record]:
        results: Sequence[Poison | None] = [None] * len(rows)
        try:
            sink.store(prepared)
        except Poison:
            results = isolate(rows, store_part)
        limit.check(results, reference=sink.check)
        sink.stored(results.count(None))
        return [
            dead_letter(message, str(result), group=group)
            for message, result in zip(sources, results, strict=True)
            if isinstance(result, Poison)
        ]

    return Outcome(len(messages), dead=dead, finish=finish if rows else None)
