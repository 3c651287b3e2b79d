"""Runs the embedded broker: librdkafka's mock cluster in a process of its own, for machines without Java.

The broker speaks Kafka's protocol and stores nothing on disk. These limits were measured with librdkafka 2.16:

- The broker keeps about 5 MB (some 24,000 lz4 records) per partition, and silently drops older records. Therefore, the
  source must be throttled.
- Topics are created on first use, with 4 partitions. Administrative calls fail or time out.
- Kafka transactions do not work, although the broker accepts them: aborted records are visible, and offsets sent with a
  transaction are lost. Therefore, services need `DELIVERY=at_least_once`.
- The assignor `cooperative-sticky` leaves partitions unowned for many seconds. The assignor `range` works.
- A new record does not end a waiting fetch. Therefore, a consumer sees a record only at the end of its
  `fetch.wait.max.ms`.
- After a member joins or leaves a group, the group waits for other members, even if there are none. The wait lasts for
  the session timeout minus one second.
"""

import argparse
import ctypes
import signal
import sys
from pathlib import Path
from threading import Event

from confluent_kafka import cimpl

from sandbox.processes import Process, StandInError, python

CLIENT_SETTINGS = {
    "fetch.wait.max.ms": "10",
    "partition.assignment.strategy": "range",
    "session.timeout.ms": "3000",
    "heartbeat.interval.ms": "500",
}
KEPT_RECORDS_A_PARTITION = 24_000


class EmbeddedBroker(Process):
    """The mock cluster as a child process. Each start creates an empty broker on a new port."""

    description = "embedded broker: at least once, in memory only (exactly once needs Java 17 and Maven)"

    def __init__(self, directory: Path) -> None:
        self._address_file = directory / "address"
        super().__init__(
            "embedded broker",
            python("sandbox.embedded", "--address-file", str(self._address_file)),
            log=directory / "embedded.log",
            ready=self._address_file.exists,
        )

    def spawn(self) -> None:
        """Start an empty broker."""
        self._address_file.unlink(missing_ok=True)
        super().spawn()

    @property
    def bootstrap(self) -> str:
        """The broker's address, HOST:PORT. This address is available once the broker is ready."""
        return self._address_file.read_text()


def main() -> int:
    """Run a mock cluster until SIGTERM. When the cluster is ready, write its address to the file `--address-file`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address-file", type=Path, required=True)
    arguments = parser.parse_args()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    bootstrap = _start()
    partial = arguments.address_file.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(bootstrap)
    partial.rename(arguments.address_file)
    while not stop.wait(1.0):
        pass
    return 0


def _start() -> str:
    """Start a mock cluster of one broker, which runs until this process ends. Returns the broker's HOST:PORT.

    Uses librdkafka's C interface. The Python clients can start a mock cluster, too, but the groups of that cluster
    would wait 3 s for their first members.
    """
    c = ctypes.CDLL(cimpl.__file__)  # gives access to the librdkafka that the clients use
    pointer = ctypes.c_void_p
    c.rd_kafka_new.restype = c.rd_kafka_mock_cluster_new.restype = pointer
    c.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    producer, reason = 0, ctypes.create_string_buffer(512)
    handle = pointer(c.rd_kafka_new(producer, None, reason, ctypes.c_size_t(len(reason))))
    cluster = pointer(c.rd_kafka_mock_cluster_new(handle, 1)) if handle else None
    if not cluster:
        raise StandInError(f"librdkafka could not start its mock cluster: {reason.value.decode() or 'no reason given'}")
    c.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 0)
    bootstrap: bytes = c.rd_kafka_mock_cluster_bootstraps(cluster)
    return bootstrap.decode()


if __name__ == "__main__":
    sys.exit(main())
