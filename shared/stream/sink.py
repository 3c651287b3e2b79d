"""The frame of a service that stores what it reads: a sink reads, prepares and stores; the rest is the same for all."""

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
    """Where records end up. A record may be stored more than once, so storing must be idempotent."""

    place = "storage"  # its name on /ready while it is not open

    def open(self) -> None:
        """Make the storage ready. Raises Outage: it is retried."""

    @abstractmethod
    def read(self, message: Message) -> Row:
        """What is stored of a message. Pure; raises Poison if the message can never be stored."""

    def prepare(self, rows: Sequence[Row]) -> Any:
        """What `store` takes of a batch: the rows, or a form that is faster to store. Pure: it runs ahead."""
        return rows

    @abstractmethod
    def store(self, prepared: Any) -> None:
        """Store all rows of a batch or none. Raises Poison if a row is refused for good, Outage for anything else."""

    def stored(self, rows: int) -> None:
        """Count rows that were stored."""

    def close(self) -> None:
        """Disconnect."""


def run(sink: Sink[Any], settings: StreamSettings, *, group: str, topic: str, shutdown: Event) -> None:
    """Store everything on the topic until shutdown, at least once. Raises SettingsError."""
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
    """Prepare a batch; its `finish` stores it. A message that cannot be read or stored becomes a dead letter."""
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
        limit.check(results)
        sink.stored(results.count(None))
        return [
            dead_letter(message, str(result), group=group)
            for message, result in zip(sources, results, strict=True)
            if isinstance(result, Poison)
        ]

    return Outcome(len(messages), dead=dead, finish=finish if rows else None)
