"""Queries Kafka, MLflow and the database for `fraudctl status`, which works even if every service is down."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, TopicMetadata  # type: ignore[attr-defined]
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fraudctl import database, letters, registry
from services import catalogue
from services.db_sink.settings import DatabaseSettings
from shared.dead_letters import SUFFIX
from shared.errors import Outage
from shared.kafka.clients import DENIED, admin, consumer
from shared.kafka.messages import coordinates, says_nothing
from shared.kafka.offsets import begins, ends, newest_ms
from shared.kafka.topics import away
from shared.records import format_time
from shared.settings import RegistrySettings, ServiceSettings, kafka_properties, load

_TIMEOUT_S = 10.0
COORDINATOR_S = 20.0  # a new broker creates its internal topics only for the first group or Kafka transaction
_PARALLEL = 10
_GROUP = "fraudctl"
_MAX_LETTERS_READ = 10_000
# Temporary errors while a group's coordinator is being created, loaded or moved.
PASSING = frozenset(
    {KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.NOT_COORDINATOR}
)
_QUIET_S = 900.0  # as in the alert rule NoTransactions
_MAX_ROWS_COUNTED = 1_000_000  # counting more rows takes longer than an operator waits

T = TypeVar("T")


class Settings(NamedTuple):
    """The settings of all systems and services that `status` covers."""

    common: ServiceSettings
    registry: RegistrySettings
    database: DatabaseSettings
    services: Mapping[str, ServiceSettings]  # by service name; only services with a consumer group


class ConfiguredGroup(NamedTuple):
    """A consumer group in a service's settings, and the topic that the group reads."""

    service: str
    group: str
    topic: str


def configured_groups(services: Mapping[str, ServiceSettings]) -> list[ConfiguredGroup]:
    """Return the consumer groups in these services' settings, in the order of the data flow."""
    return [
        ConfiguredGroup(service.name, getattr(settings, group.setting), getattr(settings, group.topic))
        for service, group in catalogue.readers()
        if (settings := services.get(service.name))
        if group.only_with is None or getattr(settings, group.only_with)
    ]


@dataclass(frozen=True)
class Partition:
    """A group's progress in a partition, and the member that the partition is assigned to."""

    partition: int
    lag: int  # number of offsets from the first unprocessed record to the end
    oldest_seconds: float  # age of the first unprocessed record
    member: str | None
    deleted_unread: int = 0  # offsets that the broker has deleted before the group read them
    beyond_end: bool = False  # the group's next offset is beyond the end, as after the topic was deleted and made again


@dataclass(frozen=True)
class Reader:
    """A consumer group's members and progress."""

    service: str
    group: str
    topic: str
    members: Sequence[str]
    partitions: Sequence[Partition]

    @property
    def lag(self) -> int:
        """The sum of all partitions' lags."""
        return sum(each.lag for each in self.partitions)

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest unprocessed record."""
        return max((each.oldest_seconds for each in self.partitions), default=0.0)


@dataclass(frozen=True)
class Topic:
    """A topic's state.

    `dead_letters` is the number of letters not replayed yet. `dead_letters` is None for topics that are not dead-letter
    topics.
    """

    name: str
    partitions: int
    leaderless: Sequence[int] = ()  # partitions without a leader; nothing else is known about them
    records: int = 0  # number of offsets, including the offsets of transaction markers
    newest_seconds: float | None = None  # age of the newest record; None if there is no record
    dead_letters: int | None = None
    counted: bool = True  # False: dead_letters is an upper bound


@dataclass(frozen=True)
class Database:
    """The rows in the table and the version of its schema."""

    rows: int
    counted: bool  # False: `rows` is an estimate
    confirmed: int
    schema: str | None
    newest_schema: str | None


@dataclass(frozen=True)
class Models:
    """The model versions that have the aliases champion and challenger."""

    name: str
    champion: str | None
    challenger: str | None


@dataclass(frozen=True)
class Alert:
    """The newest predicted fraud that is in the database and that the alerter has processed."""

    trans_num: str
    unix_time: int
    predicted_at: str  # UTC


@dataclass(frozen=True)
class Status:
    """The result of `look`. A field is None if the system that it describes did not respond."""

    topics: Sequence[Topic] | None
    readers: Sequence[Reader] | None
    models: Models | None
    database: Database | None
    last_alert: Alert | None
    problems: Sequence[str]

    def report(self) -> dict[str, object]:
        """Return the status as a dictionary for JSON."""
        return {"healthy": not self.problems, **asdict(self)}


def load_settings() -> Settings:
    """Return the settings that `look` needs. Raises SettingsError if a setting is missing or invalid."""
    services = {service.name: load(service.settings) for service, _ in catalogue.readers()}
    return Settings(load(ServiceSettings), load(RegistrySettings), load(DatabaseSettings), services)


def look(settings: Settings) -> Status:
    """Query Kafka, MLflow and the database in parallel. A system that does not respond is listed under `problems`.

    Raises SettingsError if a setting is invalid.
    """
    properties = kafka_properties(settings.common)
    address = database.Address(settings.database.database_url.get_secret_value())
    problems: list[str] = []

    def answer(ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except Outage as outage:
            problems.append(str(outage))
            return None

    now_ms = time.time() * 1000
    with ThreadPoolExecutor(_PARALLEL) as pool:
        asked_models = pool.submit(answer, lambda: _models(settings.registry))
        asked_database = pool.submit(answer, lambda: _database(address))
        topics = readers = None
        names = [name + suffix for name in _topic_names(settings.common) for suffix in ("", SUFFIX)]
        known = answer(lambda: _known(properties, names))
        if known is not None:
            asked_topics = [
                pool.submit(answer, partial(_topic, properties, name, found, now_ms=now_ms))
                for name, found in known.items()
            ]
            asked_readers = [
                pool.submit(answer, partial(_reader, properties, group, known[group.topic], now_ms=now_ms))
                for group in configured_groups(settings.services)
            ]
            topics = [topic for asked in asked_topics if (topic := asked.result())]
            readers = [reader for asked in asked_readers if (reader := asked.result())]
        models, stored = asked_models.result(), asked_database.result()
    alert = None
    if readers and stored and stored.schema:
        alert = answer(lambda: _last_alert(address, readers, now_ms=now_ms))
    status = Status(topics, readers, models, stored, alert, problems)
    found = _problems(status, sources=_sources(settings.common), stall_seconds=settings.common.stall_seconds)
    return replace(status, problems=[*sorted(problems), *found])


def _topic_names(settings: ServiceSettings) -> list[str]:
    """Return every topic that a service writes or reads, in the order of the data flow."""
    written = [service.writes for service in catalogue.SERVICES if service.writes]
    read = [group.topic for _, group in catalogue.readers()]
    return [getattr(settings, topic) for topic in dict.fromkeys((*written, *read))]


def _sources(settings: ServiceSettings) -> dict[str, str]:
    """For each topic that a service fills with transactions from outside, return the name of this service."""
    return {
        getattr(settings, service.writes): service.name
        for service in catalogue.SERVICES
        if service.writes and not service.groups
    }


def show(status: Status) -> RenderableType:
    """Format the status for a terminal. Problems are shown first, because the rest may not fit on the screen."""
    parts: list[RenderableType] = [Text(f"unhealthy: {problem}") for problem in status.problems] or [Text("healthy")]
    if status.readers:
        table = Table("group", "topic", "partition", "lag", "oldest", "assigned to")
        for reader in status.readers:
            for each in reader.partitions:
                cells = (
                    reader.group,
                    reader.topic,
                    str(each.partition),
                    f"{each.lag:,}",
                    f"{each.oldest_seconds:.0f} s",
                )
                table.add_row(*map(Text, cells), Text(each.member or "none"))
        parts.append(table)
    for topic in status.topics or ():
        letters = "" if topic.dead_letters is None else f", {_number(topic.dead_letters, topic.counted)} dead letters"
        newest = "" if topic.newest_seconds is None else f", newest record {topic.newest_seconds:,.0f} s old"
        parts.append(Text(f"{topic.name}: {topic.partitions} partitions{letters}{newest}"))
    if models := status.models:
        aliases = f"champion {models.champion or 'none'}, challenger {models.challenger or 'none'}"
        parts.append(Text(f"model {models.name}: {aliases}"))
    if stored := status.database:
        rows = _number(stored.rows, stored.counted, approximately="about ")
        parts.append(Text(f"database: {rows} rows, {stored.confirmed:,} with a confirmed label"))
    if alert := status.last_alert:
        parts.append(Text(f"last alert: {alert.trans_num}, predicted {alert.predicted_at} UTC"))
    return Group(*parts)


def _problems(status: Status, *, sources: Mapping[str, str], stall_seconds: float) -> Iterator[str]:
    for topic in status.topics or ():
        source = sources.get(topic.name)
        if not topic.partitions:
            yield f"{topic.name} does not exist. Run `fraudctl topics create`."
        elif topic.leaderless:
            without = ", ".join(map(str, topic.leaderless))
            yield f"{topic.name}: no leader for partitions {without}. Check that every broker runs."
        elif source and not topic.records:
            yield f"{source}: {topic.name} is empty. Check that the {source} runs."
        if source and (quiet_s := topic.newest_seconds or 0.0) > _QUIET_S:
            yield f"{source}: no new record on {topic.name} for {quiet_s / 60:,.0f} min. Check that the {source} runs."
    for reader in status.readers or ():
        name = f"{reader.service} (group {reader.group} on {reader.topic})"
        if not reader.members:
            lag = f"lag {reader.lag:,}, and " if reader.partitions else ""
            yield f"{name}: {lag}no member is running. Start the {reader.service}."
        late = [each for each in reader.partitions if each.oldest_seconds > stall_seconds]
        if late:
            where = ", ".join(str(each.partition) for each in late)
            yield f"{name}: its oldest record has waited {reader.oldest_seconds:.0f} s (partitions {where})"
        if deleted := sum(each.deleted_unread for each in reader.partitions):
            remedy = f"Raise retention.ms of {reader.topic}."
            yield f"{name}: {deleted:,} records were deleted before they were read. {remedy}"
        if beyond := [str(each.partition) for each in reader.partitions if each.beyond_end]:
            yield (
                f"{name}: its position is beyond the end of partitions {', '.join(beyond)}. {reader.topic} was probably"
                f" deleted and made again. The {reader.service} reads it from its beginning as soon as it runs."
            )
    if status.models and not status.models.champion:
        yield (
            f"no version of {status.models.name} has the alias champion."
            " Run `fraudctl train` or `fraudctl promote VERSION`."
        )
    if (stored := status.database) and stored.schema != stored.newest_schema:
        yield (
            f"database: the schema version is {stored.schema or 'none'}, the newest is {stored.newest_schema}."
            " Run `fraudctl migrate`, or restart the db_sink."
        )


def _known(properties: Mapping[str, str], names: Sequence[str]) -> dict[str, TopicMetadata]:
    """Return each topic's metadata. Raises Outage.

    Topics are requested by name, because a list of all topics omits the topics that this login has no access to.
    """
    client = consumer(properties, group=_GROUP)  # unlike a producer, a consumer does not create missing topics
    try:
        return {name: client.list_topics(name, timeout=_TIMEOUT_S).topics[name] for name in names}
    except KafkaException as error:
        raise away(properties, error) from None
    finally:
        client.close()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Convert Kafka's errors to Outage, with the name of the topic or group in the message."""
    try:
        yield
    except KafkaException as error:
        raise Outage(f"Kafka: {name}: {error.args[0].str()}") from None
    except Outage as outage:
        raise outage if name in str(outage) else Outage(f"{name}: {outage}") from None


def _led(name: str, found: TopicMetadata) -> list[TopicPartition]:
    """Return the partitions that have a leader."""
    return [TopicPartition(name, each) for each in sorted(found.partitions) if found.partitions[each].leader >= 0]


def _reader(
    properties: Mapping[str, str], configured: ConfiguredGroup, found: TopicMetadata, *, now_ms: float
) -> Reader:
    """Query the group's members, and the group's progress in each partition that has a leader. Raises Outage."""
    service, group, topic = configured
    client = admin(properties)
    places = _led(topic, found)
    with _naming(group):
        described = _with_coordinator(lambda: answered(client.describe_consumer_groups([group])[group]))
        following = _with_coordinator(lambda: _committed(client, group, places)) if places else {}
        ended = ends(properties, places, committed=True) if places else {}
        begun = begins(properties, places) if places else {}
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
        offset, begin, end = following[partition], begun[topic, partition], ended[topic, partition]
        deleted = begin - offset if 0 < offset < begin else 0
        partitions.append(
            Partition(partition, lag, round(oldest_s, 1), held.get(partition), deleted, beyond_end=offset > end)
        )
    return Reader(service, group, topic, [_name(member) for member in described.members], partitions)


def _with_coordinator(ask: Callable[[], T]) -> T:
    """Call `ask` until the group's coordinator is ready, and return the result of `ask`.

    Raises KafkaException for any other error, and if the coordinator takes too long.
    """
    deadline = time.monotonic() + COORDINATOR_S
    while True:
        try:
            return ask()
        except KafkaException as error:
            if error.args[0].code() not in PASSING or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def answered(future: Future[T]) -> T:
    """Wait for the result of a request about a group.

    Raises KafkaException if the request fails or takes too long.

    The time limit is enforced here because librdkafka aborts the process if its own `request_timeout` expires while it
    looks for the group's coordinator.
    """
    try:
        return future.result(COORDINATOR_S)
    except TimeoutError:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from None


def _committed(client: AdminClient, group: str, places: list[TopicPartition]) -> dict[int, int]:
    """Return the group's committed offset in each partition, or 0 if nothing is committed. Raises KafkaException."""
    asked = client.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, places)])
    try:
        found = {place.partition: place.offset for place in answered(asked[group]).topic_partitions}
    except KafkaException as error:
        if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise
        found = {}
    return {place.partition: max(0, found.get(place.partition, 0)) for place in places}


def _firsts(properties: Mapping[str, str], places: Collection[TopicPartition]) -> dict[int, Message]:
    """For each of `places`, return the first record at or after the place's offset.

    The result is a mapping from partition to record. A partition is left out if it contains only Kafka's transaction
    markers from the place's offset on.
    """
    reader = consumer({**properties, "enable.partition.eof": "true"}, group=_GROUP)
    unread = {place.partition for place in places}
    firsts: dict[int, Message] = {}
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        reader.assign(list(places))
        while unread:
            if time.monotonic() > deadline:
                raise Outage(f"Kafka at {properties['bootstrap.servers']}: no records within {_TIMEOUT_S:.0f} s")
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
    """Query the topic's state. Raises Outage.

    The number of dead letters is an upper bound if there are too many to read, or if a partition has no leader.
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
        with suppress(Outage):  # Kafka may not know the newest time of a new topic yet
            newest = newest_ms(properties, places)
        if newest is not None:
            topic = replace(topic, newest_seconds=round(max(0.0, now_ms - newest) / 1000, 1))
        if not name.endswith(SUFFIX):
            return topic
        if leaderless or topic.records > _MAX_LETTERS_READ:
            return replace(topic, dead_letters=topic.records, counted=False)
        read = letters.read(properties, letters.Selection([name.removesuffix(SUFFIX)]))
    return replace(topic, dead_letters=sum(letter.replayed_at_ms is None for letter in read))


def _records(properties: Mapping[str, str], places: Sequence[TopicPartition]) -> int:
    """Return the number of offsets in these partitions. Raises KafkaException."""
    client = consumer(properties, group=_GROUP)
    try:
        marks = [client.get_watermark_offsets(place, timeout=_TIMEOUT_S) for place in places]
    finally:
        client.close()
    return sum(end - begin for begin, end in marks)


def _models(settings: RegistrySettings) -> Models:
    champion, challenger = (
        registry.version_with_alias(settings, alias) for alias in (settings.model_alias, "challenger")
    )
    return Models(settings.model_name, champion, challenger)


def _database(address: database.Address) -> Database:
    newest = database.newest_schema()
    with database.transaction(address, timeout_s=_TIMEOUT_S) as first:
        schema = database.schema(first)
        if schema is None:
            return Database(0, True, 0, None, newest)
        rows, counted = first(_ROWS, {"most": _MAX_ROWS_COUNTED})
        confirmed = first(_CONFIRMED).confirmed
    return Database(rows, counted, confirmed, schema, newest)


_ROWS = """
SELECT CASE WHEN reltuples > %(most)s THEN reltuples::bigint ELSE (SELECT count(*) FROM transactions) END AS rows,
  reltuples <= %(most)s AS counted
FROM pg_class WHERE oid = 'transactions'::regclass
"""
_CONFIRMED = "SELECT count(*) AS confirmed FROM transactions WHERE validated_at IS NOT NULL"
_LAST_ALERT = """
SELECT trans_num, unix_time, predicted_at FROM transactions
WHERE prediction = 1 AND predicted_at < to_timestamp(%(unread_since)s) ORDER BY unix_time DESC, trans_num LIMIT 1
"""


def _last_alert(address: database.Address, readers: Sequence[Reader], *, now_ms: float) -> Alert | None:
    waited_s = max((reader.oldest_seconds for reader in readers if reader.service == "alerter"), default=None)
    if waited_s is None:
        return None
    with database.transaction(address, timeout_s=_TIMEOUT_S) as first:
        row = first(_LAST_ALERT, {"unread_since": now_ms / 1000 - waited_s})
    return Alert(row.trans_num, row.unix_time, format_time(int(row.predicted_at.timestamp()))) if row else None


def _number(number: int, counted: bool, *, approximately: str = "at most ") -> str:
    return f"{'' if counted else approximately}{number:,}"


def _name(member: object) -> str:
    instance = getattr(member, "group_instance_id", None)
    host = str(getattr(member, "host", "")).removeprefix("/")
    return f"{instance} at {host}" if instance else host
