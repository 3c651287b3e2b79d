"""Defines records to write, and functions that read consumed messages."""

import msgspec
from confluent_kafka import Message

Headers = list[tuple[str, str | bytes | None]]
NOTHING: Headers = [("nothing", b"")]  # headers of an empty record, written only to give its Kafka transaction a marker


class Record(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A record to write to Kafka."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: Headers


def coordinates(message: Message) -> tuple[str, int, int]:
    """Return the topic, partition and offset of a consumed message."""
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    if topic is None or partition is None or offset is None:
        raise ValueError("not a consumed message")
    return topic, partition, offset


def headers(message: Message) -> Headers:
    """Return a consumed message's headers, or an empty list if it has none."""
    found = message.headers() or []
    return list(found.items()) if isinstance(found, dict) else found


def says_nothing(message: Message) -> bool:
    """Return whether this is an empty record, written only so that its Kafka transaction gets a marker.

    Readers skip such records.
    """
    return message.value() is None and message.headers() == NOTHING
