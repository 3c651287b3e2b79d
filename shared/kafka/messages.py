"""Defines records to write, and functions that read consumed messages."""

from operator import methodcaller

import msgspec
from confluent_kafka import Message

from shared.errors import Poison

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
    """Return a consumed message's headers, or an empty list if it has none.

    Raises Poison if the name of a header is not UTF-8, which Kafka allows.
    """
    try:
        # In confluent-kafka 2.16, the method then returns a list with gaps while an exception is set. Python notices
        # the exception only if the method is not called directly, and another call would return the list.
        found = _read(message) or []
    except (SystemError, UnicodeError):
        message.set_headers(_UNREADABLE)
        found = _UNREADABLE
    if found is _UNREADABLE:
        raise Poison("the name of a header is not UTF-8")
    return list(found.items()) if isinstance(found, dict) else found


def readable_headers(message: Message) -> Headers:
    """Return a consumed message's headers, or an empty list if it has none or if they cannot be read."""
    try:
        return headers(message)
    except Poison:
        return []


_read = methodcaller("headers")
_UNREADABLE: Headers = [("unreadable", None)]


def says_nothing(message: Message) -> bool:
    """Return whether this is an empty record, written only so that its Kafka transaction gets a marker.

    Readers skip such records.
    """
    return message.value() is None and readable_headers(message) == NOTHING
