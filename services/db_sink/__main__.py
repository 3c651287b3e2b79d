"""The db_sink: stores each transaction from topic_2 and its prediction in PostgreSQL, exactly once."""

from collections.abc import Sequence
from threading import Event

import sqlalchemy as sa
import structlog
from confluent_kafka import Message
from msgspec.structs import asdict

from services.db_sink.settings import SinkSettings
from services.db_sink.table import Row, connect, copy_text, migrate, upsert
from shared import metrics, service
from shared.errors import Outage, Poison, SettingsError
from shared.kafka.messages import headers
from shared.provenance import Provenance, from_headers
from shared.records import REFERENCE, Prediction, decode_prediction
from shared.stream import sink

log = structlog.get_logger()

_GOOD = Row(Prediction(**asdict(REFERENCE), prediction=0), Provenance())


class Table(sink.Sink[Row]):
    """Stores rows in the table of transactions. Storing is idempotent, because rows are upserted by identity."""

    place = "the database's schema"

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def open(self) -> None:
        migrate(self._engine)
        log.info("schema_ready")

    def read(self, message: Message) -> Row:
        return Row(decode_prediction(message.value()), from_headers(headers(message)))

    def prepare(self, rows: Sequence[Row]) -> bytes:
        return copy_text(rows)

    def store(self, prepared: bytes) -> None:
        upsert(self._engine, prepared)

    def check(self) -> None:
        try:
            upsert(self._engine, copy_text([_GOOD]), keep=False)
        except Poison as poison:
            raise Outage(str(poison)) from None

    def stored(self, rows: int) -> None:
        metrics.ROWS.inc(rows)

    def close(self) -> None:
        self._engine.dispose()


def serve(settings: SinkSettings, shutdown: Event) -> None:
    """Migrate the schema, then store transactions until shutdown. Raises SettingsError if a setting is invalid."""
    try:
        engine = connect(settings.database_url.get_secret_value())
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL: {error}") from None
    sink.run(Table(engine), settings, group=settings.db_sink_group, topic=settings.topic_2, shutdown=shutdown)


if __name__ == "__main__":
    service.run("db_sink", SinkSettings, serve)
