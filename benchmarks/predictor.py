"""How many rows a second one predictor turns into predictions: a backlog on Apache Kafka, exactly once.

The predictor is the service itself, as a process; its champion is the gradient boosting of `fraudctl train`. Each round
has topics and a consumer group of its own with the same backlog, and is timed by the records' own timestamps: from the
first prediction that was written to the last. Beside it, in the same round, the same backlog is only copied by a plain
consumer and an idempotent producer without a model, a decoder or a transaction: what the broker and the client allow.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import msgspec
from confluent_kafka import TopicPartition
from rich.console import Console
from rich.table import Table

from fraudctl import topics
from sandbox.generator import transactions
from sandbox.processes import StandInError
from sandbox.stack import Stack, local_stack, service
from shared.kafka import consumer, producer
from shared.records import RAW_COLUMNS, Transaction, encode_transaction, read_split

PARTITIONS = 6
_START = datetime(2024, 5, 17, tzinfo=UTC)
_TIMEOUT_S = 120.0


def main() -> int:
    """Run the rounds, print the table. Exit code 0, or 1 where Apache Kafka cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000, help="backlog of each round")
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--report", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fraud-alarm-bench-") as directory:
        try:
            with local_stack(Path(directory), broker="apache") as stack:
                backlog = _backlog(arguments.rows)
                rounds = []
                for number in range(1, arguments.rounds + 1):
                    rounds.append(_round(stack, Path(directory), backlog, batch_size=arguments.batch_size))
                    console.print(
                        f"round {number}: " + ", ".join(f"{k} {v:,.0f} rows/s" for k, v in rounds[-1].items())
                    )
        except StandInError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    table = Table("", "median rows/s", "of the plain copy", title=f"{arguments.rows:,} rows, exactly once")
    for name, rate in medians.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / medians['plain copy']:.0%}")
    console.print(table)
    if arguments.report:
        arguments.report.write_text(json.dumps({"rounds": rounds, "median": medians}, indent=2) + "\n")
    return 0


def _backlog(rows: int) -> list[Transaction]:
    table = {"columns": RAW_COLUMNS, "index": [], "data": list(islice(transactions(seed=1, start=_START), rows))}
    return list(read_split(msgspec.json.encode(table)).transactions)


def _round(stack: Stack, directory: Path, backlog: Sequence[Transaction], *, batch_size: int) -> dict[str, float]:
    name = uuid.uuid4().hex[:8]
    source, predicted, copied = f"in-{name}", f"out-{name}", f"copy-{name}"
    topics.create(stack.properties, [source, predicted, copied], partitions=PARTITIONS)
    _fill(stack.properties, source, backlog)
    process = service(
        "predictor",
        directory,
        stack.addresses.environment()
        | {
            "TOPIC_1": source,
            "TOPIC_2": predicted,
            "PREDICTOR_GROUP": name,
            "REPLICA": name,
            "DELIVERY": "exactly_once",
            "MAX_BATCH_SIZE": str(batch_size),
        },
    )
    with process:
        predictor = _rate(stack.properties, predicted, len(backlog), first_batch=batch_size)
    return {"predictor": predictor, "plain copy": _copy(stack.properties, source, copied, len(backlog))}


def _fill(properties: Mapping[str, str], topic: str, backlog: Sequence[Transaction]) -> None:
    client = producer(properties)
    for transaction in backlog:
        client.produce(topic, value=encode_transaction(transaction), key=transaction.key)
        client.poll(0)
    client.flush()


def _rate(properties: Mapping[str, str], topic: str, rows: int, *, first_batch: int) -> float:
    """Rows a second from the first committed record of a topic to the last, by the records' timestamps.

    The first batch is not counted: its work was done before its first timestamp. Read after the last one is there, so
    that this reader takes nothing from the one that is measured.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    while sum(end.offset for end in topics.ends(properties, [topic])) < rows:
        if time.monotonic() > deadline:
            raise StandInError(f"no {rows} predictions after {_TIMEOUT_S:.0f} s")
        time.sleep(0.5)
    reader = consumer(properties, group="benchmark")
    reader.assign([TopicPartition(end.topic, end.partition, 0) for end in topics.ends(properties, [topic])])
    stamps: list[int] = []
    while len(stamps) < rows and time.monotonic() < deadline:
        stamps += [message.timestamp()[1] for message in reader.consume(10_000, 1.0) if message.error() is None]
    reader.close()
    if len(stamps) != rows:
        raise StandInError(f"{len(stamps)} predictions for {rows} rows")
    return 1000 * (rows - first_batch) / (max(stamps) - min(stamps))


def _copy(properties: Mapping[str, str], source: str, target: str, rows: int) -> float:
    reader, writer = consumer(properties, group="copy"), producer(properties)
    reader.assign([TopicPartition(end.topic, end.partition, 0) for end in topics.ends(properties, [source])])
    began, done = time.monotonic(), 0
    while done < rows:
        for message in reader.consume(1000, 0.5):
            writer.produce(target, value=message.value(), key=message.key())
            done += 1
        writer.flush()
    reader.close()
    return rows / (time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
