"""Run benchmark suites, print tables, and write JSON. Exit with code 1 if a target is not reached."""

import argparse
import gc
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console

from benchmarks import flood, growth, idle, latency, loop, misbehaving, predictor, sink, stages, swap
from benchmarks.guard import GUARD, guarded
from benchmarks.load import Bench, Suite
from benchmarks.measure import Section
from benchmarks.report import save, show, versions
from rehearsal.stack import local_stack
from sandbox.processes import StandInError

EMBEDDED: dict[str, Suite] = {
    "ceiling": lambda bench, rounds: predictor.against_its_ceiling(bench, rounds=rounds),
}
APACHE: dict[str, Suite] = {
    "guarantees": lambda bench, rounds: predictor.guarantees(bench, rounds=rounds, rows=200_000),
    "logging": lambda bench, rounds: predictor.logging(bench, rounds=rounds, rows=300_000),
    "compiled": lambda bench, rounds: predictor.compiled_scoring(bench, rounds=rounds),
    "batches": lambda bench, rounds: predictor.batch_sizes(bench, rounds=rounds, rows=100_000),
    "loops": lambda bench, rounds: loop.loops(bench, rounds=rounds, rows=500_000),
    "scoring": lambda bench, rounds: loop.scoring(bench, rounds=rounds, rows=200_000),
    "producer": lambda bench, rounds: stages.producing(bench, rounds=rounds, rows=100_000),
    "alerter": lambda bench, rounds: stages.alerting(bench, rounds=rounds, mails=1000),
    "sink": lambda bench, rounds: sink.throughput(bench, rounds=rounds, rows=200_000),
    "table": lambda bench, rounds: sink.full_table(bench, rounds=rounds, rows=100_000, there=5_000_000),
    "latency": lambda bench, rounds: latency.latencies(bench, rounds=rounds, rates=(100, 500, 2000, 5000), seconds=12),
    "flood": lambda bench, rounds: flood.flood(bench, rounds=rounds, frauds=5000),
    "swaps": lambda bench, rounds: swap.swaps(bench, rounds=rounds, rate=2000, moves=20),
    "misbehaving": lambda bench, rounds: misbehaving.misbehaving(bench, rounds=rounds, rate=500),
    "catching-up": lambda bench, rounds: latency.catching_up(bench, rounds=rounds, rows=360_000),
    "idle": lambda bench, rounds: idle.idle(bench, rounds=rounds, seconds=10),
    "partitions": lambda bench, rounds: growth.with_partitions(bench, rounds=rounds, rows=100_000),
    "replicas": lambda bench, rounds: growth.with_replicas(bench, rounds=rounds, rows=800_000),
    "backlog": lambda bench, rounds: growth.with_backlog(bench, rounds=rounds),
    "growing-table": lambda bench, rounds: growth.with_table(bench, rounds=rounds, rows=100_000),
}


def main() -> int:
    """Run the chosen suites, with one stack for each kind of broker. Returns the exit code."""
    names = [*EMBEDDED, *APACHE]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"Suites to run: {', '.join(names)}. Default: all.")
    parser.add_argument(
        "--guard",
        action="store_true",
        help="Run only the guard, which compares measured ratios with the ratios in guard.json.",
    )
    parser.add_argument("--rounds", type=int, default=5, help="Number of times each variant is measured. Default: 5.")
    parser.add_argument(
        "--report",
        type=Path,
        help="JSON file for the measurements. Tables (.md) and a chart (.svg) are saved in the same folder.",
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.suites if name not in names]:
        parser.error(f"unknown suite {', '.join(unknown)}. The suites are: {', '.join(names)}.")
    chosen = arguments.suites or names
    gc.disable()  # garbage collection would pause the measuring process
    sys.setswitchinterval(0.0002)
    console = Console()
    console.print(", ".join(f"{name} {number}" for name, number in versions().items()))
    sections: dict[str, Section] = {}
    try:
        if arguments.guard:
            with ExitStack() as stack:
                bench = started(stack, "apache")
                return guarded((partial(suite, bench, arguments.rounds) for suite in GUARD.values()), console)
        for broker, suites in (("embedded", EMBEDDED), ("apache", APACHE)):
            if wanted := {name: suite for name, suite in suites.items() if name in chosen}:
                with ExitStack() as stack:
                    bench = started(stack, broker)
                    for name, measure in wanted.items():
                        sections[name] = measure(bench, arguments.rounds)
                        show(sections[name], console)
                        if arguments.report:
                            save(sections, arguments.report)
    except StandInError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130  # the exit code of a shell after SIGINT; the figures so far have been saved
    return int(not all(bar.reached for section in sections.values() for bar in section.bars))


def started(stack: ExitStack, broker: str) -> Bench:
    """Start a stack with both models in its registry and with commit timestamps enabled in its database."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fraud-alarm-bench-")))
    parts = stack.enter_context(local_stack(directory, broker=broker))
    predictor.register_forest(parts.registry.uri)
    with sa.create_engine(parts.addresses.database_url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET track_commit_timestamp = on"))
    assert parts.database
    parts.database.stop()
    parts.database.start()
    return Bench(parts, directory)
