"""Where everything stands, asked of Kafka, MLflow and the database alone: no service has to answer."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import sqlalchemy as sa
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, TopicMetadata  # type: ignore[attr-defined]
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fraudctl import letters
from fraudctl.labels import transaction
from services.alerter.settings import AlerterSettings
from services.db_sink.settings import SinkSettings
from services.db_sink.table import connect, versions
from services.predictor.settings import PredictorSettings
from shared.dead_letters import SUFFIX
from shared.errors import Outage, SettingsError
from shared.kafka.clients import DENIED, admin, consumer
from shared.kafka.messages import coordinates, says_nothing
from shared.kafka.offsets import ends, newest_ms
from shared.kafka.topics import away
from shared.records import format_time
from shared.settings import kafka_properties, load
from training import aliases

_TIMEOUT_S = 10.0
FIRST_S = 20.0  # a new broker makes its topics of groups and transactions when it is first asked for any
_ASKED_AT_ONCE = 10
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
    leaderless: Sequence[int] = ()  # of these partitions, nothing is known
    records: int = 0  # offsets, of which some may be marks of transactions
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
    topic_1, topic_2 = settings.predictor.topic_1, settings.predictor.topic_2
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        asked_models = pool.submit(answer, lambda: _models(settings.predictor))
        asked_database = pool.submit(answer, lambda: _database(engine))
        topics = readers = None
        names = [name + suffix for name in (topic_1, topic_2) for suffix in ("", SUFFIX)]
        known = answer(lambda: _known(properties, names))
        if known is not None:
            asked_topics = [
                pool.submit(answer, partial(_topic, properties, name, found, now_ms=now_ms))
                for name, found in known.items()
            ]
            asked_readers = [
                pool.submit(answer, partial(_reader, properties, service, group, topic, known[topic], now_ms=now_ms))
                for service, group, topic in settings.readers
            ]
            topics = [topic for asked in asked_topics if (topic := asked.result())]
            readers = [reader for asked in asked_readers if (reader := asked.result())]
        models, database = asked_models.result(), asked_database.result()
    alert = None
    if readers and database and database.schema:
        alert = answer(lambda: _last_alert(engine, readers, now_ms=now_ms))
    engine.dispose()
    status = Status(topics, readers, models, database, alert, problems)
    found = _problems(status, source=topic_1, stall_seconds=settings.predictor.stall_seconds)
    return replace(status, problems=[*sorted(problems), *found])


def show(status: Status) -> RenderableType:
    """For people; what is not healthy first, since a terminal may be too low for all."""
    parts: list[RenderableType] = [Text(f"unhealthy: {problem}") for problem in status.problems] or [Text("healthy")]
    if status.readers:
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
    return Group(*parts)


def _problems(status: Status, *, source: str, stall_seconds: float) -> Iterator[str]:
    for topic in status.topics or ():
        if not topic.partitions:
            yield f"{topic.name}: missing: fraudctl topics create"
        elif topic.leaderless:
            yield f"{topic.name}: no leader of partitions {', '.join(map(str, topic.leaderless))}: is a broker away?"
        elif topic.name == source and not topic.records:
            yield f"producer: nothing on {topic.name}: is it running?"
        if topic.name == source and (quiet_s := topic.newest_seconds or 0.0) > _QUIET_S:
            yield f"producer: nothing new on {topic.name} for {quiet_s / 60:,.0f} min: is it running?"
    for reader in status.readers or ():
        name = f"{reader.service} (group {reader.group} on {reader.topic})"
        if not reader.members:
            behind = f"{reader.lag:,} behind, and " if reader.partitions else ""
            yield f"{name}: {behind}nobody reads: is it running?"
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


def _known(properties: Mapping[str, str], names: Sequence[str]) -> dict[str, TopicMetadata]:
    """What the brokers say of each topic by its name: whether it is hidden, they say of no other. Raises Outage."""
    client = consumer(properties, group=_GROUP)  # which creates none
    try:
        return {name: client.list_topics(name, timeout=_TIMEOUT_S).topics[name] for name in names}
    except KafkaException as error:
        raise away(properties, error) from None
    finally:
        client.close()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Have what is in the way name the topic or the group. Raises Outage."""
    try:
        yield
    except KafkaException as error:
        raise Outage(f"Kafka: {name}: {error.args[0].str()}") from None
    except Outage as outage:
        raise outage if name in str(outage) else Outage(f"{name}: {outage}") from None


def _led(name: str, found: TopicMetadata) -> list[TopicPartition]:
    """The partitions that can be asked about."""
    return [TopicPartition(name, each) for each in sorted(found.partitions) if found.partitions[each].leader >= 0]


def _reader(
    properties: Mapping[str, str], service: str, group: str, topic: str, found: TopicMetadata, *, now_ms: float
) -> Reader:
    """Raises Outage."""
    client = admin(properties)
    places = _led(topic, found)
    with _naming(group):
        described = _patiently(lambda: answered(client.describe_consumer_groups([group])[group]))
        following = _patiently(lambda: _committed(client, group, places)) if places else {}
        ended = ends(properties, places, committed=True) if places else {}
        behind = [
            TopicPartition(topic, partition, offset)
            for partition, offset in following.items()
            if offset < ended[topic, partition]
        ]
        firsts = _firsts(properties, behind) if behind else {}
    held = {
        place.partition: _name(member)
        for member in described.members
        for place in member.assignment.topic_partitions
        if place.topic == topic
    }
    partitions = []
    for partition in following:
        first = firsts.get(partition)
        lag = ended[topic, partition] - coordinates(first)[2] if first else 0
        oldest_s = max(0.0, now_ms - first.timestamp()[1]) / 1000 if first else 0.0
        partitions.append(Partition(partition, lag, round(oldest_s, 1), held.get(partition)))
    return Reader(service, group, topic, [_name(member) for member in described.members], partitions)


def _patiently(ask: Callable[[], T]) -> T:
    """Once more, while the group's coordinator is not there yet. Raises KafkaException."""
    deadline = time.monotonic() + FIRST_S
    while True:
        try:
            return ask()
        except KafkaException as error:
            if error.args[0].code() not in PASSING or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def answered(future: Future[T]) -> T:
    """What is answered about a group, waited for here. Raises KafkaException.

    librdkafka, where its own `request_timeout` ends while it looks for the group's coordinator, ends the process.
    """
    try:
        return future.result(FIRST_S)
    except TimeoutError:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from None


def _committed(client: AdminClient, group: str, places: list[TopicPartition]) -> dict[int, int]:
    """Where a group goes on in each partition: at the beginning if it has not committed yet. Raises KafkaException."""
    asked = client.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, places)])
    try:
        found = {place.partition: place.offset for place in answered(asked[group]).topic_partitions}
    except KafkaException as error:
        if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise
        found = {}
    return {place.partition: max(0, found.get(place.partition, 0)) for place in places}


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


def _topic(properties: Mapping[str, str], name: str, found: TopicMetadata, *, now_ms: float) -> Topic:
    """Of dead letters, with those that were not put back yet; of too many to be read, with how many there are at most.

    Raises Outage.
    """
    if found.error and found.error.code() in DENIED:
        raise Outage(f"Kafka: {name}: {found.error.str()}")
    places = _led(name, found)
    leaderless = sorted(set(found.partitions) - {place.partition for place in places})
    topic = Topic(name, len(found.partitions), leaderless)
    if not places:
        return topic
    with _naming(name):
        topic = replace(topic, records=_records(properties, places))
        newest = None
        with suppress(Outage):  # of a topic that was just made, it may not be known yet
            newest = newest_ms(properties, places)
        if newest is not None:
            topic = replace(topic, newest_seconds=round(max(0.0, now_ms - newest) / 1000, 1))
        if not name.endswith(SUFFIX):
            return topic
        if leaderless or topic.records > _MOST_LETTERS_READ:
            return replace(topic, dead_letters=topic.records, counted=False)
        read = letters.read(properties, letters.Selection([name.removesuffix(SUFFIX)]))
    return replace(topic, dead_letters=sum(letter.replayed_at_ms is None for letter in read))


def _records(properties: Mapping[str, str], places: Sequence[TopicPartition]) -> int:
    """Raises KafkaException."""
    client = consumer(properties, group=_GROUP)
    try:
        marks = [client.get_watermark_offsets(place, timeout=_TIMEOUT_S) for place in places]
    finally:
        client.close()
    return sum(end - begin for begin, end in marks)


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
