"""Records as they are written, and what is read of consumed messages."""

import msgspec
from confluent_kafka import Message

Headers = list[tuple[str, str | bytes | None]]
NOTHING: Headers = [("nothing", b"")]  # of a record that was written for the sake of its transaction alone


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
    """A consumed message's headers; none is an empty list."""
    found = message.headers() or []
    return list(found.items()) if isinstance(found, dict) else found


def says_nothing(message: Message) -> bool:
    """Whether it is a record without a message, which readers pass over."""
    return message.value() is None and message.headers() == NOTHING
