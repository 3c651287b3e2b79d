"""The db_sink: every transaction with its prediction into PostgreSQL, once."""

from collections.abc import Sequence
from threading import Event

import sqlalchemy as sa
import structlog
from confluent_kafka import Message

from services.db_sink.settings import SinkSettings
from services.db_sink.table import Row, connect, copy_text, migrate, upsert
from shared import metrics, service
from shared.dead_letters import Limit, dead_letter, isolate
from shared.errors import Outage, Poison, SettingsError
from shared.kafka.clients import consumer
from shared.kafka.messages import Record, headers
from shared.provenance import from_headers
from shared.records import decode_prediction
from shared.retry import Spell, until_over
from shared.settings import kafka_properties
from shared.stream.delivery import AtLeastOnce
from shared.stream.loop import Outcome, Stream

log = structlog.get_logger()


def serve(settings: SinkSettings, shutdown: Event) -> None:
    """Migrate the schema, then store until shutdown."""
    properties = kafka_properties(settings)
    try:
        engine = connect(settings.database_url.get_secret_value())
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL: {error}") from None
    stream = Stream(
        make_consumer=lambda on_error: consumer(
            properties, group=settings.db_sink_group, replica=settings.replica, on_error=on_error
        ),
        group=settings.db_sink_group,
        topic=settings.topic_2,
        delivery=AtLeastOnce(properties=properties, shutdown=shutdown),
        settings=settings,
        shutdown=shutdown,
    )
    try:
        until_over(
            lambda: migrate(engine),
            shutdown=shutdown,
            initial_s=settings.backoff_initial_seconds,
            max_s=settings.backoff_max_seconds,
            spell=Spell("the database's schema"),
        )
    except Outage:
        stream.close()
        return
    log.info("schema_ready")
    limit = Limit(ratio=settings.dead_letter_limit_ratio, consecutive=settings.dead_letter_limit_consecutive)
    stream.run(lambda messages: prepare(messages, engine, group=settings.db_sink_group, limit=limit), ahead=True)
    engine.dispose()


def prepare(messages: Sequence[Message], engine: sa.Engine, *, group: str, limit: Limit) -> Outcome:
    """Make the batch ready to be stored; a message that cannot be read or that PostgreSQL rejects is a dead letter."""
    rows: list[Row] = []
    sources: list[Message] = []
    dead = []
    for message in messages:
        try:
            rows.append(_row(message))
            sources.append(message)
        except Poison as poison:
            dead.append(dead_letter(message, str(poison), group=group))
    text = copy_text(rows)

    def store() -> Sequence[Record]:
        try:
            upsert(engine, text)
            results: Sequence[Poison | None] = [None] * len(sources)
        except Poison:
            results = isolate(sources, lambda part: _store_part(engine, part))
        limit.check(results)
        metrics.ROWS.inc(results.count(None))
        return [
            dead_letter(message, str(result), group=group)
            for message, result in zip(sources, results, strict=True)
            if isinstance(result, Poison)
        ]

    return Outcome(len(messages), dead=dead, finish=store if rows else None)


def _row(message: Message) -> Row:
    return Row(decode_prediction(message.value()), from_headers(headers(message)))


def _store_part(engine: sa.Engine, messages: Sequence[Message]) -> Sequence[None]:
    upsert(engine, copy_text(map(_row, messages)))
    return [None] * len(messages)


if __name__ == "__main__":
    service.run("db_sink", SinkSettings, serve)
