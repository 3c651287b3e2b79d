"""Records to write, and helpers that read consumed messages."""

import msgspec
from confluent_kafka import Message

Headers = list[tuple[str, str | bytes | None]]
NOTHING: Headers = [("nothing", b"")]  # headers of an empty record, written only so that its transaction has a marker


class Record(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A record to write to Kafka."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: Headers


def coordinates(message: Message) -> tuple[str, int, int]:
    """The topic, partition and offset of a consumed message."""
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    if topic is None or partition is None or offset is None:
        raise ValueError("not a consumed message")
    return topic, partition, offset


def headers(message: Message) -> Headers:
    """A consumed message's headers; an empty list if it has none."""
    found = message.headers() or []
    return list(found.items()) if isinstance(found, dict) else found


def says_nothing(message: Message) -> bool:
    """Whether the record is empty and was written only for its transaction's marker. Readers skip such records."""
    return message.value() is None and message.headers() == NOTHING
