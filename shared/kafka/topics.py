"""Creates and checks topics and their dead-letter topics."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic

from shared.dead_letters import SUFFIX
from shared.errors import Outage
from shared.kafka.clients import MAX_RECORD_BYTES, admin, consumer

T = TypeVar("T")

PARTITIONS = 6
_TIMEOUT_S = 10.0
_COPIES = 3
_DAY_MS = 86_400_000
_RECORDS = {"cleanup.policy": "delete", "compression.type": "producer", "retention.ms": str(7 * _DAY_MS)}
_LETTERS = _RECORDS | {"retention.ms": str(30 * _DAY_MS), "max.message.bytes": str(MAX_RECORD_BYTES)}
_WHY = {
    "cleanup.policy": "so the broker keeps only the last record of each card",
    "compression.type": "so the broker decompresses the producers' compressed records",
    "retention.ms": "so records may be deleted before they are read",
    "max.message.bytes": "too little for a dead letter, which is larger than the record it contains",
    "min.insync.replicas": "so if one broker fails, records are lost or all writing stops",
}


def create(
    properties: Mapping[str, str],
    names: Sequence[str],
    *,
    partitions: int = PARTITIONS,
    replication: int | None = None,
    letters: bool = True,
) -> list[str]:
    """Create missing topics and, with `letters`, missing dead-letter topics. Returns the names of the created topics.

    Existing topics are not changed. `replication` defaults to 3, or to the number of brokers if there are fewer than 3.
    Several processes may call this at once. Raises Outage if the broker refuses or does not answer, and SettingsError
    if the properties are wrong.
    """
    client = admin(properties)
    try:
        known = client.list_topics(timeout=_TIMEOUT_S)
        copies = replication or min(_COPIES, len(known.brokers))
        absent = [
            NewTopic(
                name,
                num_partitions=partitions,
                replication_factor=copies,
                config=settings | {"min.insync.replicas": str(_in_sync(copies))},
            )
            for name, settings in _settings(names, letters=letters).items()
            if name not in known.topics
        ]
        created = [name for name, done in client.create_topics(absent).items() if _new(name, done)] if absent else []
        deadline = time.monotonic() + _TIMEOUT_S
        while created and not _known(client, created) and time.monotonic() < deadline:
            time.sleep(0.1)
    except KafkaException as error:
        raise away(properties, error) from None
    return created


def check(
    properties: Mapping[str, str], names: Sequence[str], *, partitions: int = 1, letters: bool = True
) -> list[str]:
    """Check the topics without changing them. Returns a line for each problem, with the remedy.

    Raises Outage if the broker refuses or does not answer.
    """
    client = admin(properties)
    wanted = _settings(names, letters=letters)
    try:
        known = client.list_topics(timeout=_TIMEOUT_S)
        there = [name for name in wanted if name in known.topics and known.topics[name].partitions]
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in there]
        asked = client.describe_configs(resources, request_timeout=_TIMEOUT_S) if there else {}
        found = {
            resource.name: {name: entry.value or "" for name, entry in _result(resource.name, answer).items()}
            for resource, answer in asked.items()
        }
    except KafkaException as error:
        raise away(properties, error) from None
    lines = [f"{name}: missing, or hidden by ACLs. Run fraudctl topics create" for name in wanted if name not in there]
    for name in there:
        layout = [len(partition.replicas) for partition in known.topics[name].partitions.values()]
        lines += [
            f"{name}: {problem}"
            for problem in (
                *_layout_problems(layout, partitions=partitions, brokers=len(known.brokers)),
                *_settings_problems(name, found[name], wanted[name], copies=min(layout)),
            )
        ]
    return lines


def _settings(names: Sequence[str], *, letters: bool) -> dict[str, dict[str, str]]:
    """For each topic name, return the settings with which the topic is created."""
    kinds = (("", _RECORDS), (SUFFIX, _LETTERS))[: 1 + letters]
    return {name + suffix: settings for name in names for suffix, settings in kinds}


def _in_sync(copies: int) -> int:
    """Return `min.insync.replicas` for this many replicas.

    With several replicas, writing continues while one broker is down.
    """
    return 2 if copies >= _COPIES else 1


def _layout_problems(copies: Sequence[int], *, partitions: int, brokers: int) -> Iterator[str]:
    if len(copies) < partitions:
        yield (
            f"{len(copies)} partitions, not {partitions}. Adding partitions moves cards to other partitions, so wait"
            " until the services have no lag on the topic, then run kafka-topics.sh --alter --partitions"
        )
    if min(copies) < min(_COPIES, brokers):
        yield (
            f"only {min(copies)} of {min(_COPIES, brokers)} possible replicas, so one lost disk loses records."
            " Add replicas with kafka-reassign-partitions.sh"
        )


def _settings_problems(name: str, found: Mapping[str, str], wanted: Mapping[str, str], *, copies: int) -> Iterator[str]:
    in_sync = int(found["min.insync.replicas"])
    enough = {
        "cleanup.policy": found["cleanup.policy"] == wanted["cleanup.policy"],
        "compression.type": found["compression.type"] != "uncompressed",
        "retention.ms": not 0 <= int(found["retention.ms"]) < int(wanted["retention.ms"]),
        "max.message.bytes": int(found["max.message.bytes"]) >= int(wanted.get("max.message.bytes", 0)),
        "min.insync.replicas": _in_sync(copies) <= in_sync <= copies,
    }
    target = {**wanted, "min.insync.replicas": str(_in_sync(copies))}
    for setting in (setting for setting, fits in enough.items() if not fits):
        yield (
            f"{setting} is {found[setting]}, {_WHY[setting]}. Run kafka-configs.sh --alter --entity-type topics"
            f" --entity-name {name} --add-config {setting}={target[setting]}"
        )


def use(properties: Mapping[str, str], names: Sequence[str]) -> None:
    """Create topics and dead-letter topics on a broker that creates topics when they are first used.

    Raises Outage if the broker does not answer.
    """
    client = admin(properties)  # a consumer's metadata request does not create topics
    for name in names:
        for suffix in ("", SUFFIX):
            client.list_topics(name + suffix, timeout=_TIMEOUT_S)
    ends(properties, names)


def ends(properties: Mapping[str, str], names: Sequence[str]) -> list[TopicPartition]:
    """Wait until all partitions of these topics have leaders, and return the end offset of each partition.

    Raises Outage if the broker does not answer in time.
    """
    reader = consumer(properties, group="fraudctl")
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while True:
            try:
                return [end for name in names for end in _ends(reader, name)]
            except KafkaException as error:
                if time.monotonic() > deadline:
                    raise away(properties, error) from None
                time.sleep(0.1)
    finally:
        reader.close()


def _ends(reader: Consumer, name: str) -> Iterator[TopicPartition]:
    for partition in sorted(reader.list_topics(name, timeout=_TIMEOUT_S).topics[name].partitions):
        _, end = reader.get_watermark_offsets(TopicPartition(name, partition), timeout=_TIMEOUT_S)
        yield TopicPartition(name, partition, end)


def away(properties: Mapping[str, str], error: KafkaException) -> Outage:
    """Make an Outage from this error. The message of the Outage names the brokers."""
    return Outage(f"Kafka at {properties['bootstrap.servers']}: {error.args[0].str() or error.args[0].name()}")


def _known(client: AdminClient, names: Sequence[str]) -> bool:
    """Return whether the broker knows the topics. A broker needs a moment to learn of new topics."""
    topics = client.list_topics(timeout=_TIMEOUT_S).topics
    return all(name in topics and topics[name].partitions for name in names)


def _new(name: str, done: Future[None]) -> bool:
    try:
        _result(name, done)
    except KafkaException as exception:
        if exception.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
        return False
    return True


def _result(name: str, done: Future[T]) -> T:
    """Return the result of a request about a topic. Raises KafkaException with the topic's name in the error."""
    try:
        return done.result()
    except KafkaException as exception:
        error = exception.args[0]
        raise KafkaException(KafkaError(error.code(), f"{name}: {error.str()}")) from None
