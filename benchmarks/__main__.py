"""Measure: `python -m benchmarks [SECTION...]` prints tables and writes JSON. Exit code 1 if a bar is not reached."""

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as in the predictor, before numpy is imported

import sqlalchemy as sa
from confluent_kafka import libversion
from rich.console import Console
from rich.table import Table

from benchmarks import idle, latency, loop, predictor, sink
from benchmarks.load import Bench
from benchmarks.measure import Section
from sandbox.apache import VERSION as KAFKA_VERSION
from sandbox.processes import StandInError
from sandbox.stack import local_stack

_PACKAGES = ("confluent-kafka", "msgspec", "numpy", "pandas", "scikit-learn", "psycopg2-binary", "sqlalchemy")


@dataclass(frozen=True)
class Suite:
    """What can be asked for by name."""

    broker: str
    measure: Callable[[Bench, int], Section]


SUITES = {
    "ceiling": Suite("embedded", lambda bench, rounds: predictor.against_its_ceiling(bench, rounds=rounds)),
    "guarantees": Suite("apache", lambda bench, rounds: predictor.guarantees(bench, rounds=rounds, rows=200_000)),
    "batches": Suite("apache", lambda bench, rounds: predictor.batch_sizes(bench, rounds=rounds, rows=200_000)),
    "compiled": Suite("apache", lambda bench, rounds: predictor.compiled_scoring(bench, rounds=rounds, rows=100_000)),
    "replicas": Suite("apache", lambda bench, rounds: predictor.replicas(bench, rounds=rounds, rows=200_000)),
    "loops": Suite("apache", lambda bench, rounds: loop.loops(bench, rounds=rounds, rows=500_000)),
    "scoring": Suite("apache", lambda bench, rounds: loop.scoring(bench, rounds=rounds, rows=200_000)),
    "sink": Suite("apache", lambda bench, rounds: sink.throughput(bench, rounds=rounds, rows=200_000)),
    "table": Suite(
        "apache", lambda bench, rounds: sink.full_table(bench, rounds=rounds, rows=100_000, there=5_000_000)
    ),
    "latency": Suite(
        "apache",
        lambda bench, rounds: latency.latencies(bench, rounds=rounds, rates=(100, 500, 2000, 5000), seconds=20),
    ),
    "idle": Suite("apache", lambda bench, rounds: idle.idle(bench, rounds=rounds, seconds=10)),
}


def main() -> int:
    """Run the suites, each broker's in one stack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.suites if name not in SUITES]:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(SUITES)}")
    gc.disable()  # what measures must not pause
    sys.setswitchinterval(0.0002)
    wanted = {name: SUITES[name] for name in arguments.suites or SUITES}
    console = Console()
    console.print(", ".join(f"{name} {number}" for name, number in versions().items()))
    sections: dict[str, Section] = {}
    try:
        for broker in ("embedded", "apache"):
            if chosen := {name: suite for name, suite in wanted.items() if suite.broker == broker}:
                with ExitStack() as stack:
                    bench = started(stack, broker)
                    for name, suite in chosen.items():
                        sections[name] = suite.measure(bench, arguments.rounds)
                        show(sections[name], console)
                        if arguments.report:
                            save(sections, arguments.report)
    except StandInError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        return 1
    return 0 if all(bar.reached for section in sections.values() for bar in section.bars) else 1


def started(stack: ExitStack, broker: str) -> Bench:
    """A stack with both models, whose database tells when a row was committed."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fraud-alarm-bench-")))
    parts = stack.enter_context(local_stack(directory, broker=broker))
    predictor.register_forest(parts.registry.uri)
    with sa.create_engine(parts.addresses.database_url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET track_commit_timestamp = on"))
    assert parts.database  # noqa: S101 - the stack's own
    parts.database.stop()
    parts.database.start()
    return Bench(parts, directory)


def versions() -> dict[str, str]:
    """What was measured with."""
    return {
        "Python": platform.python_version(),
        "librdkafka": libversion()[0],
        "Apache Kafka": KAFKA_VERSION,
        "cores": str(os.cpu_count()),
        **{name: version(name) for name in _PACKAGES},
    }


def show(section: Section, console: Console) -> None:
    """Print a section: medians, and how far the rounds lie apart."""
    table = Table("", *section.columns, title=section.title, caption=section.settings)
    for label, row in section.rows.items():
        cells = [f"{row[name].median:,.1f} ±{row[name].spread:.0%}" if name in row else "" for name in section.columns]
        table.add_row(label, *cells)
    console.print(table)
    for bar in section.bars:
        sign, verdict = ("<=" if bar.at_most else ">="), ("[green]reached" if bar.reached else "[red]not reached")
        console.print(f"  {bar.what}: {bar.seen.median:.2f} ({sign} {bar.bar:g}) {verdict}")


def save(sections: dict[str, Section], path: Path) -> None:
    """Write all figures of all rounds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {name: section.as_json() for name, section in sections.items()}
    path.write_text(json.dumps({"versions": versions(), "sections": figures}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
