"""Records as they are written, and what is read of consumed messages."""

import msgspec
from confluent_kafka import Message

Headers = list[tuple[str, str | bytes | None]]
NOTHING: Headers = [("nothing", b"")]  # marks a record that only serves to write a transaction's marker


class Record(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A record to be written."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: Headers


def coordinates(message: Message) -> tuple[str, int, int]:
    """Topic, partition and offset of a consumed message."""
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    if topic is None or partition is None or offset is None:
        raise ValueError("not a consumed message")
    return topic, partition, offset


def headers(message: Message) -> Headers:
    """A consumed message's headers; an empty list if it has none."""
    found = message.headers() or []
    return list(found.items()) if isinstance(found, dict) else found


def says_nothing(message: Message) -> bool:
    """Whether the record only serves a transaction's marker: readers skip it."""
    return message.value() is None and message.headers() == NOTHING
