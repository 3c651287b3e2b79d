"""The bench: writes a backlog for services to process, and measures the speed, CPU and memory of these services."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from itertools import islice
from pathlib import Path
from threading import Event

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from benchmarks.measure import Bar, Figure, Section
from rehearsal.stack import Stack, service
from sandbox.embedded import EmbeddedBroker
from sandbox.generator import FRAUD_RATE, transactions
from sandbox.processes import Process, StandInError
from shared.kafka import topics
from shared.kafka.clients import admin, consumer, producer
from shared.kafka.messages import Record
from shared.records import RAW_COLUMNS, Transaction, encode_transaction, read_split
from shared.stream.delivery import enqueue

PARTITIONS = 6
_START = datetime(2024, 5, 17, 18, tzinfo=UTC)  # shortly before the hours with the most frauds
_TIMEOUT_S = 180.0
_LOOK_S = 0.03
_COORDINATOR_MOVES = (KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_LOAD_IN_PROGRESS)
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """The speed of processes that worked on a backlog, and the resources they used."""

    rows_per_s: float
    cpu_s_per_million: float
    peak_rss_mb: float
    machine_busy: float  # share of all cores' time that was busy, with any process

    def quantities(self) -> dict[str, float]:
        """Return each quantity under the name of its column in the tables."""
        return {
            "rows/s": self.rows_per_s,
            "CPU s a million": self.cpu_s_per_million,
            "MB": self.peak_rss_mb,
            "% of the machine": 100 * self.machine_busy,
        }


def _at_once() -> bool:
    return True


@cache
def backlog(rows: int, *, fraud_rate: float = FRAUD_RATE) -> tuple[Transaction, ...]:
    """Return generated transactions. Every call returns the same transactions."""
    stream = transactions(seed=1, start=_START, fraud_rate=fraud_rate)
    table = {"columns": RAW_COLUMNS, "index": [], "data": list(islice(stream, rows))}
    return tuple(read_split(msgspec.json.encode(table)).transactions)


def topic_1_records(topic: str, rows: int) -> Iterator[Record]:
    """Yield the backlog as the records that the producer would write to topic_1."""
    for transaction in backlog(rows):
        yield Record(topic, encode_transaction(transaction), transaction.key, [])


@dataclass(frozen=True)
class Bench:
    """A running stack to measure on, and a folder for logs and other files."""

    stack: Stack
    directory: Path

    @property
    def properties(self) -> Mapping[str, str]:
        """Settings for Kafka clients."""
        return self.stack.properties

    def topics(self, *kinds: str, partitions: int = PARTITIONS) -> list[str]:
        """Create one topic for each name prefix in `kinds`, and return the names of the topics."""
        names = [f"{kind}-{uuid.uuid4().hex[:8]}" for kind in kinds]
        if isinstance(self.stack.broker, EmbeddedBroker):
            topics.use(self.properties, names)
        else:
            topics.create(self.properties, names, partitions=partitions)
        return names

    def fill(self, records: Iterator[Record]) -> None:
        """Write the records and wait until all are acknowledged."""
        client = producer(self.properties)
        enqueue(client, records, Event())
        client.flush()

    def backlog(self, rows: int, *, partitions: int = PARTITIONS) -> str:
        """Create a topic, write the backlog to it, and return its name."""
        (topic,) = self.topics("backlog", partitions=partitions)
        self.fill(topic_1_records(topic, rows))
        return topic

    def service(self, name: str, settings: Mapping[str, str], *, replica: int = 1) -> Process:
        """Create a process for this service in a new folder, without starting the process."""
        directory = self.directory / uuid.uuid4().hex[:8]
        directory.mkdir()
        environment = self.stack.addresses.environment() | {"REPLICA": "one"} | dict(settings)
        return service(name, directory, environment, replica=replica)

    @contextmanager
    def committed(self, group: str, topic: str) -> Iterator[Callable[[], int]]:
        """Yield a function that returns how many of the topic's records the group has committed."""
        # With read_committed, the broker would withhold offsets while an open Kafka transaction changes them.
        reader = Consumer({**self.properties, "group.id": group, "isolation.level": "read_uncommitted"})
        partitions = self._partitions(topic)
        try:
            yield lambda: _committed(reader, partitions)
        finally:
            reader.close()

    @contextmanager
    def written(self, topic: str) -> Iterator[Callable[[], int]]:
        """Yield a function that returns the number of records on the topic, including transaction markers."""
        reader = consumer(self.properties, group="benchmarks")
        partitions = self._partitions(topic)
        try:
            yield lambda: sum(reader.get_watermark_offsets(each, timeout=10)[1] for each in partitions)
        finally:
            reader.close()

    def _partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(end.topic, end.partition) for end in topics.ends(self.properties, [topic])]

    def drain(
        self, processes: Sequence[Process], *, group: str, topic: str, rows: int, at_most_s: float = 60.0
    ) -> Usage:
        """Start the processes, measure how their group consumes the topic, and stop the processes.

        Raises StandInError if a process fails.
        """
        with self.committed(group, topic) as committed:
            for process in processes:
                process.spawn()
            # Replicas join one after another, so start measuring when the last one has partitions.
            several = len(processes) > 1
            begun = partial(_all_share, admin(self.properties), group, len(processes)) if several else _at_once
            usage = watch(processes, committed, rows=rows, at_most_s=at_most_s, begun=begun)
        for process in processes:
            if process.stop() != 0:
                raise StandInError(f"{process.name} failed: {process.last_line()}")
        return usage


Suite = Callable[[Bench, int], Section]
"""A function that measures on the given bench, with the given number of rounds."""


def _all_share(client: AdminClient, group: str, members: int) -> bool:
    """Return whether exactly `members` members of the group have partitions."""
    (description,) = client.describe_consumer_groups([group]).values()
    try:
        found = description.result().members
    except KafkaException as error:
        if error.args[0].code() in _COORDINATOR_MOVES:
            return False
        raise
    return sum(bool(member.assignment.topic_partitions) for member in found) == members


def _committed(reader: Consumer, partitions: list[TopicPartition]) -> int:
    try:
        return sum(max(each.offset, 0) for each in reader.committed(partitions, timeout=10))
    except KafkaException as error:
        if error.args[0].code() in _COORDINATOR_MOVES:
            return 0
        raise


def watch(
    processes: Sequence[Process],
    count: Callable[[], int],
    *,
    rows: int,
    at_most_s: float = 60.0,
    begun: Callable[[], bool] = _at_once,
) -> Usage:
    """Measure the processes until the last row is processed, or until `at_most_s` seconds have passed.

    The measurement begins once the first rows are processed and `begun` returns True.

    `count` returns the number of rows processed so far. Raises StandInError if a process exits, if no rows are
    processed, or if all rows are processed before the measurement begins.
    """
    first, began = _first(processes, count, begun)
    cpu, machine = sum(map(cpu_s, processes)), _machine()
    done, now = first, began
    while done < rows and now - began < at_most_s:
        time.sleep(_LOOK_S)
        done, now = count(), time.monotonic()
    spent = sum(map(cpu_s, processes)) - cpu
    peak = max(rss_mb(process, peak=True) for process in processes)
    if done == first:
        raise StandInError(f"{rows:,} rows are too few to measure: all were processed before the measurement began")
    busy, all_of_it = (after - before for before, after in zip(machine, _machine(), strict=True))
    return Usage((done - first) / (now - began), 1e6 * spent / (done - first), peak, busy / all_of_it)


def _first(processes: Sequence[Process], count: Callable[[], int], begun: Callable[[], bool]) -> tuple[int, float]:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        if count() and begun():
            return count(), time.monotonic()
        for process in processes:
            if not process.running:
                raise StandInError(f"{process.name} exited unexpectedly: {process.last_line()}")
        time.sleep(_LOOK_S)
    raise StandInError(f"nothing was processed in {_TIMEOUT_S:.0f} s: {processes[0].last_line()}")


def cpu_s(process: Process) -> float:
    """Return the user and system CPU time, in seconds, that the process and its children have used so far."""
    total = 0
    for pid in family(process):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def family(process: Process) -> list[int]:
    """Return the numbers of the process and its children. A predictor's children are its model hosts."""
    own = process.pid or 0
    children = Path(f"/proc/{own}/task").glob("*/children")
    return [own, *(int(child) for text in children for child in text.read_text().split())]


def _machine() -> tuple[int, int]:
    """Return the busy clock ticks and all clock ticks since boot, each summed over all cores."""
    user, nice, system, idle, iowait, *others = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    total = user + nice + system + idle + iowait + sum(others)
    return total - idle - iowait, total


def memory_bar(service: str, seen: Figure) -> Bar:
    """Return a Bar with the upper limit, in MB, for a service's memory."""
    return Bar(f"{service}, MB", seen, 450 if service.startswith("predictor") else 110, at_most=True)


def rss_mb(process: Process, *, peak: bool = False) -> float:
    """Return the resident memory of the process and its children in MB, now or, with `peak`, the highest so far.

    Memory that several processes share, such as libraries, is counted once for each.
    """
    wanted = "VmHWM:" if peak else "VmRSS:"
    total = 0
    for pid in family(process):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in status if line.startswith(wanted))
    return total / 1024


def together_mb(process: Process) -> float:
    """Return the memory in MB that the process and its children take together: what they share is counted once.

    Raises OSError if one of them has just ended.
    """
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in family(process))
    return sum(int(line.split()[1]) for lines in rollups for line in lines if line.startswith("Pss:")) / 1024
