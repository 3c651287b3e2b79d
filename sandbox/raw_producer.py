"""Writes records as a client in C may: the names of their headers are any bytes, which Python clients refuse."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import confluent_kafka

from sandbox.processes import StandInError

_END, _TOPIC, _PARTITION, _VALUE, _KEY, _FLAGS, _HEADER = 0, 1, 3, 4, 5, 7, 9  # rd_kafka_vtype_t
_COPY = 2  # RD_KAFKA_MSG_F_COPY
_PRODUCER = 0  # rd_kafka_type_t
_TIMEOUT_MS = 20_000


class RawProducer:
    """A producer of librdkafka, the library in C below the Python client."""

    def __init__(self, properties: Mapping[str, str]) -> None:
        """Raises ValueError if a property is unknown or wrong."""
        self._library = _librdkafka()
        error = ctypes.create_string_buffer(512)
        configuration = self._library.rd_kafka_conf_new()
        for name, value in {**properties, "log_level": "0"}.items():
            if self._library.rd_kafka_conf_set(configuration, name.encode(), value.encode(), error, len(error)):
                raise ValueError(error.value.decode())
        self._client = self._library.rd_kafka_new(_PRODUCER, configuration, error, len(error))
        if not self._client:
            raise ValueError(error.value.decode())

    def write(
        self,
        topic: str,
        value: bytes | None,
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        key: bytes = b"",
        partition: int = -1,
    ) -> None:
        """Put a record into the queue. The names of headers must not contain zero bytes.

        Raises StandInError if the record is larger than the property `message.max.bytes`.
        """
        arguments: list[Any] = [_TOPIC, topic.encode(), _PARTITION, ctypes.c_int32(partition)]
        arguments += [_VALUE, value, ctypes.c_size_t(len(value or b"")), _FLAGS, _COPY]
        arguments += [_KEY, key, ctypes.c_size_t(len(key))] if key else []
        for name, content in headers:
            arguments += [_HEADER, name, content, ctypes.c_ssize_t(len(content))]
        failed = self._library.rd_kafka_producev(self._client, *arguments, _END)
        if failed:
            raise StandInError(f"librdkafka refused the record, with error {failed}")

    def close(self) -> None:
        """Wait until everything is written, and end the client. Raises StandInError if that takes too long."""
        late = self._library.rd_kafka_flush(self._client, _TIMEOUT_MS)
        self._library.rd_kafka_destroy(self._client)
        if late:
            raise StandInError("the records were not written in time")


def _librdkafka() -> ctypes.CDLL:
    """The library that the Python client has brought along."""
    beside = Path(confluent_kafka.__file__).parent.with_name("confluent_kafka.libs")
    library = ctypes.CDLL(str(next(beside.glob("librdkafka-*.so*"))))
    library.rd_kafka_conf_new.restype = library.rd_kafka_new.restype = ctypes.c_void_p
    library.rd_kafka_conf_set.argtypes = [ctypes.c_void_p, *[ctypes.c_char_p] * 3, ctypes.c_size_t]
    library.rd_kafka_new.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    library.rd_kafka_producev.argtypes = [ctypes.c_void_p]
    library.rd_kafka_flush.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.rd_kafka_destroy.argtypes = [ctypes.c_void_p]
    return library
