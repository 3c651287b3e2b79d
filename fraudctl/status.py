"""Where everything stands, asked of Kafka, MLflow and the database alone: no service has to answer."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, TypeVar

import sqlalchemy as sa
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fraudctl import letters
from fraudctl.labels import transaction
from fraudctl.topics import away
from services.alerter.__main__ import AlerterSettings
from services.db_sink.__main__ import SinkSettings
from services.db_sink.table import connect, versions
from services.predictor.__main__ import PredictorSettings
from shared.dead_letters import SUFFIX
from shared.errors import Outage, SettingsError
from shared.kafka import admin, consumer, coordinates, ends, newest_ms, says_nothing
from shared.records import format_time
from shared.settings import kafka_properties, load
from training import aliases

_TIMEOUT_S = 10.0
_GROUP = "fraudctl"
_MOST_LETTERS_READ = 10_000
# Of a group that one may ask about, while its coordinator is made, loads or moves.
PASSING = frozenset(
    {KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.NOT_COORDINATOR}
)
_QUIET_S = 900.0  # as the alert NoTransactions has it
_COUNTED_ROWS = 1_000_000  # counting more takes longer than anybody waits

T = TypeVar("T")


class Settings(NamedTuple):
    """Those of the services that are asked about."""

    predictor: PredictorSettings
    alerter: AlerterSettings
    sink: SinkSettings

    @property
    def readers(self) -> list[tuple[str, str, str]]:
        """Service, group and topic of all that is configured."""
        topic_2 = self.predictor.topic_2
        return [
            ("predictor", self.predictor.predictor_group, self.predictor.topic_1),
            *([("alerter", self.alerter.alerter_group, topic_2)] if self.alerter.smtp_host else []),
            *([("alerter", self.alerter.webhook_group, topic_2)] if self.alerter.webhook_url else []),
            ("db_sink", self.sink.db_sink_group, topic_2),
        ]


@dataclass(frozen=True)
class Partition:
    """How far a group is in a partition, and who has it."""

    partition: int
    lag: int  # offsets up to the end, from the first record that is not processed
    oldest_seconds: float  # since that was written
    member: str | None


@dataclass(frozen=True)
class Reader:
    """A consumer group."""

    service: str
    group: str
    topic: str
    members: Sequence[str]
    partitions: Sequence[Partition]

    @property
    def lag(self) -> int:
        """Of all partitions."""
        return sum(each.lag for each in self.partitions)

    @property
    def oldest_seconds(self) -> float:
        """How long the oldest record has waited."""
        return max((each.oldest_seconds for each in self.partitions), default=0.0)


@dataclass(frozen=True)
class Topic:
    """A topic; of one for dead letters, how many wait to be put back."""

    name: str
    partitions: int
    newest_seconds: float | None = None  # since its newest record was written, if there is any
    dead_letters: int | None = None
    counted: bool = True  # and not merely bounded, since they are too many


@dataclass(frozen=True)
class Database:
    """What the table holds."""

    rows: int
    counted: bool
    confirmed: int
    schema: str | None
    newest_schema: str | None


@dataclass(frozen=True)
class Models:
    """The versions that bear the aliases."""

    name: str
    champion: str | None
    challenger: str | None


@dataclass(frozen=True)
class Alert:
    """The newest fraud in the database that was predicted before all that the alerter has yet to read."""

    trans_num: str
    unix_time: int
    predicted_at: str  # UTC


@dataclass(frozen=True)
class Status:
    """What was found; None where nobody answered."""

    topics: Sequence[Topic] | None
    readers: Sequence[Reader] | None
    models: Models | None
    database: Database | None
    last_alert: Alert | None
    problems: Sequence[str]  # what is not healthy

    def report(self) -> dict[str, object]:
        """As it goes into JSON."""
        return {"healthy": not self.problems, **asdict(self)}


def settings() -> Settings:
    """Raises SettingsError."""
    return Settings(load(PredictorSettings), load(AlerterSettings), load(SinkSettings))


def look(settings: Settings) -> Status:
    """Ask all at once; who does not answer hides nothing of the others. Raises SettingsError."""
    properties = kafka_properties(settings.predictor)
    try:
        engine = connect(settings.sink.database_url.get_secret_value())
    except ValueError as error:
        raise SettingsError(f"DATABASE_URL: {error}") from None
    problems: list[str] = []

    def answer(ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except Outage as outage:
            problems.append(str(outage))
            return None

    now_ms = time.time() * 1000
    with ThreadPoolExecutor(3) as pool:
        asked_models = pool.submit(answer, lambda: _models(settings.predictor))
        asked_database = pool.submit(answer, lambda: _database(engine))
        names = (settings.predictor.topic_1, settings.predictor.topic_2)
        topics = answer(lambda: _topics(properties, names, now_ms=now_ms))
        readers = None
        if topics is not None:
            readers = answer(lambda: _readers(properties, settings.readers, now_ms=now_ms))
        models, database = asked_models.result(), asked_database.result()
    alert = None
    if readers and database and database.schema:
        alert = answer(lambda: _last_alert(engine, readers, now_ms=now_ms))
    engine.dispose()
    status = Status(topics, readers, models, database, alert, problems)
    return replace(status, problems=[*problems, *_problems(status, stall_seconds=settings.predictor.stall_seconds)])


def show(status: Status) -> RenderableType:
    """For people."""
    parts: list[RenderableType] = []
    if status.readers is not None:
        table = Table("group", "topic", "partition", "lag", "oldest", "held by")
        for reader in status.readers:
            for each in reader.partitions:
                cells = (
                    reader.group,
                    reader.topic,
                    str(each.partition),
                    f"{each.lag:,}",
                    f"{each.oldest_seconds:.0f} s",
                )
                table.add_row(*map(Text, cells), Text(each.member or "nobody"))
        parts.append(table)
    for topic in status.topics or ():
        letters = "" if topic.dead_letters is None else f", {_number(topic.dead_letters, topic.counted)} dead letters"
        newest = "" if topic.newest_seconds is None else f", the newest record {topic.newest_seconds:,.0f} s old"
        parts.append(Text(f"{topic.name}: {topic.partitions} partitions{letters}{newest}"))
    if status.models:
        models = status.models
        told = f"champion {models.champion or 'none'}, challenger {models.challenger or 'none'}"
        parts.append(Text(f"model {models.name}: {told}"))
    if status.database:
        database = status.database
        rows = _number(database.rows, database.counted, approximately="about ")
        parts.append(Text(f"database: {rows} rows, {database.confirmed:,} with a confirmed label"))
    if alert := status.last_alert:
        parts.append(Text(f"last alert: {alert.trans_num}, predicted {alert.predicted_at} UTC"))
    parts += [Text(f"unhealthy: {problem}") for problem in status.problems] or [Text("healthy")]
    return Group(*parts)


def _problems(status: Status, *, stall_seconds: float) -> Iterator[str]:
    for topic in status.topics or ():
        if not topic.partitions:
            yield f"{topic.name}: missing: fraudctl topics create"
    if status.topics and (quiet_s := status.topics[0].newest_seconds or 0.0) > _QUIET_S:
        yield f"producer: nothing new on {status.topics[0].name} for {quiet_s / 60:,.0f} min: is it running?"
    for reader in status.readers or ():
        name = f"{reader.service} (group {reader.group} on {reader.topic})"
        if not reader.members:
            yield f"{name}: {reader.lag:,} behind, and nobody reads: is it running?"
        late = [each for each in reader.partitions if each.oldest_seconds > stall_seconds]
        if late:
            where = ", ".join(str(each.partition) for each in late)
            yield f"{name}: its oldest record has waited {reader.oldest_seconds:.0f} s (partitions {where})"
    if status.models and not status.models.champion:
        yield f"no version of {status.models.name} is champion: fraudctl train or promote"
    if status.database and status.database.schema != status.database.newest_schema:
        yield (
            f"database: its schema is {status.database.schema or 'none'}, not {status.database.newest_schema}:"
            " fraudctl migrate, or the db_sink when it starts"
        )


def _readers(properties: Mapping[str, str], readers: Sequence[tuple[str, str, str]], *, now_ms: float) -> list[Reader]:
    client = admin(properties)
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return [_reader(client, properties, *each, now_ms=now_ms) for each in readers]
        except KafkaException as error:
            if error.args[0].code() not in PASSING or time.monotonic() > deadline:
                raise away(properties, error) from None
            time.sleep(0.2)


def _reader(
    client: AdminClient, properties: Mapping[str, str], service: str, group: str, topic: str, *, now_ms: float
) -> Reader:
    """Raises KafkaException, Outage."""
    try:
        described = client.describe_consumer_groups([group], request_timeout=_TIMEOUT_S)[group].result()
    except KafkaException as error:
        if error.args[0].code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
            raise
        raise Outage(f"Kafka: {group}: {error.args[0].str()}") from None
    held = {
        place.partition: _name(member)
        for member in described.members
        for place in member.assignment.topic_partitions
        if place.topic == topic
    }
    known = client.list_topics(timeout=_TIMEOUT_S).topics
    places = [TopicPartition(topic, each) for each in sorted(known[topic].partitions)] if topic in known else []
    following = _committed(client, group, places) if places else {}
    ended = ends(properties, places, committed=True) if places else {}
    behind = [
        TopicPartition(topic, partition, offset)
        for partition, offset in following.items()
        if offset < ended[topic, partition]
    ]
    firsts = _firsts(properties, behind) if behind else {}
    partitions = []
    for partition in following:
        first = firsts.get(partition)
        lag = ended[topic, partition] - coordinates(first)[2] if first else 0
        oldest_s = max(0.0, now_ms - first.timestamp()[1]) / 1000 if first else 0.0
        partitions.append(Partition(partition, lag, round(oldest_s, 1), held.get(partition)))
    return Reader(service, group, topic, [_name(member) for member in described.members], partitions)


def _committed(client: AdminClient, group: str, places: list[TopicPartition]) -> dict[int, int]:
    """Where a group goes on in each partition: at the beginning if it has not committed yet. Raises KafkaException."""
    asked = client.list_consumer_group_offsets(
        [ConsumerGroupTopicPartitions(group, places)], request_timeout=_TIMEOUT_S
    )
    try:
        answered = {place.partition: place.offset for place in asked[group].result().topic_partitions}
    except KafkaException as error:
        if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise
        answered = {}
    return {place.partition: max(0, answered.get(place.partition, 0)) for place in places}


def _firsts(properties: Mapping[str, str], places: Collection[TopicPartition]) -> dict[int, Message]:
    """The first record of each partition from these offsets on; none where only marks of transactions are left."""
    reader = consumer({**properties, "enable.partition.eof": "true"}, group=_GROUP)
    unread = {place.partition for place in places}
    firsts: dict[int, Message] = {}
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        reader.assign(list(places))
        while unread:
            if time.monotonic() > deadline:
                raise Outage(f"Kafka at {properties['bootstrap.servers']}: no records in {_TIMEOUT_S:.0f} s")
            for message in reader.consume(1000, 0.1):
                error, partition = message.error(), message.partition()
                if partition not in unread or (error and error.code() != KafkaError._PARTITION_EOF):
                    continue
                if error is None and says_nothing(message):
                    continue
                if error is None:
                    firsts[partition] = message
                    reader.pause([TopicPartition(*coordinates(message))])
                unread.discard(partition)
    except KafkaException as error:
        raise away(properties, error) from None
    finally:
        reader.close()
    return firsts


def _topics(properties: Mapping[str, str], names: Sequence[str], *, now_ms: float) -> list[Topic]:
    """Each with its dead letters', the first of `names` first."""
    client = consumer(properties, group=_GROUP)
    try:
        known = client.list_topics(timeout=_TIMEOUT_S).topics
        records: dict[str, list[int]] = {}
        for name in (name + suffix for name in names for suffix in ("", SUFFIX)):
            places = [TopicPartition(name, partition) for partition in known[name].partitions] if name in known else []
            marks = [client.get_watermark_offsets(place, timeout=_TIMEOUT_S) for place in places]
            records[name] = [end - begin for begin, end in marks]
    except KafkaException as error:
        raise away(properties, error) from None
    finally:
        client.close()
    return [_topic(properties, name, each, now_ms=now_ms) for name, each in records.items()]


def _topic(properties: Mapping[str, str], name: str, records: Sequence[int], *, now_ms: float) -> Topic:
    """Of dead letters, with those that were not put back yet; of too many to be read, with how many there are at most.

    Raises Outage.
    """
    if not records:
        return Topic(name, 0)
    newest = None
    with suppress(Outage):  # of a topic that was just made, it may not be known yet; who is away is told of by others
        newest = newest_ms(properties, [TopicPartition(name, partition) for partition in range(len(records))])
    topic = Topic(name, len(records), None if newest is None else round(max(0.0, now_ms - newest) / 1000, 1))
    if not name.endswith(SUFFIX):
        return topic
    if sum(records) > _MOST_LETTERS_READ:
        return replace(topic, dead_letters=sum(records), counted=False)
    found = letters.read(properties, letters.Selection([name.removesuffix(SUFFIX)]))
    return replace(topic, dead_letters=sum(letter.replayed_at_ms is None for letter in found))


def _models(settings: PredictorSettings) -> Models:
    settings.log_in()
    uri, name = settings.mlflow_tracking_uri, settings.model_name
    champion, challenger = (
        aliases.bearer(aliases.Alias(uri, name, alias)) for alias in (settings.model_alias, "challenger")
    )
    return Models(name, champion, challenger)


def _database(engine: sa.Engine) -> Database:
    schema, newest = versions(engine)
    if schema is None:
        return Database(0, True, 0, None, newest)
    with _briefly(engine) as connection:
        rows, counted = connection.execute(sa.text(_ROWS), {"most": _COUNTED_ROWS}).one()
        confirmed = connection.execute(sa.text(_CONFIRMED)).scalar_one()
    return Database(rows, counted, confirmed, schema, newest)


_ROWS = """
SELECT CASE WHEN reltuples > :most THEN reltuples::bigint ELSE (SELECT count(*) FROM transactions) END,
  reltuples <= :most
FROM pg_class WHERE oid = 'transactions'::regclass
"""
_CONFIRMED = "SELECT count(*) FROM transactions WHERE validated_at IS NOT NULL"
_LAST_ALERT = """
SELECT trans_num, unix_time, predicted_at FROM transactions
WHERE prediction = 1 AND predicted_at < to_timestamp(:unread_since) ORDER BY unix_time DESC, trans_num LIMIT 1
"""


def _last_alert(engine: sa.Engine, readers: Sequence[Reader], *, now_ms: float) -> Alert | None:
    waited_s = max((reader.oldest_seconds for reader in readers if reader.service == "alerter"), default=None)
    if waited_s is None:
        return None
    with _briefly(engine) as connection:
        row = connection.execute(sa.text(_LAST_ALERT), {"unread_since": now_ms / 1000 - waited_s}).one_or_none()
    return Alert(row.trans_num, row.unix_time, format_time(int(row.predicted_at.timestamp()))) if row else None


@contextmanager
def _briefly(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction in which no statement waits long, behind a lock for example. Raises Outage."""
    with transaction(engine) as connection:
        connection.execute(sa.text(f"SET LOCAL statement_timeout = '{_TIMEOUT_S:.0f}s'"))
        yield connection


def _number(number: int, counted: bool, *, approximately: str = "at most ") -> str:
    return f"{'' if counted else approximately}{number:,}"


def _name(member: object) -> str:
    instance = getattr(member, "group_instance_id", None)
    host = str(getattr(member, "host", "")).removeprefix("/")
    return f"{instance} at {host}" if instance else host
