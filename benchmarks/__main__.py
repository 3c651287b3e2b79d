"""Measure: `python -m benchmarks [SUITE...]` prints tables and writes JSON. Exit code 1 if a bar is not reached."""

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as in the predictor, before numpy is imported
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import sqlalchemy as sa
from confluent_kafka import libversion
from rich.console import Console
from rich.table import Table

from benchmarks import flood, growth, idle, latency, loop, predictor, sink, stages, swap
from benchmarks.load import Bench
from benchmarks.measure import Figure, Section
from rehearsal.stack import local_stack
from sandbox.apache import VERSION as KAFKA_VERSION
from sandbox.processes import StandInError

_PACKAGES = ("confluent-kafka", "msgspec", "numpy", "pandas", "scikit-learn", "psycopg2-binary", "sqlalchemy")


Suite = Callable[[Bench, int], Section]

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
    "catching-up": lambda bench, rounds: latency.catching_up(bench, rounds=rounds, rows=360_000),
    "idle": lambda bench, rounds: idle.idle(bench, rounds=rounds, seconds=10),
    "partitions": lambda bench, rounds: growth.with_partitions(bench, rounds=rounds, rows=100_000),
    "replicas": lambda bench, rounds: growth.with_replicas(bench, rounds=rounds, rows=800_000),
    "backlog": lambda bench, rounds: growth.with_backlog(bench, rounds=rounds),
    "growing-table": lambda bench, rounds: growth.with_table(bench, rounds=rounds, rows=100_000),
}
GROWTH = ("partitions", "replicas", "backlog", "growing-table")
# Ratios that a change must not lower, in a minute.
GUARD: dict[str, Suite] = {
    "ceiling": lambda bench, rounds: predictor.against_its_ceiling(
        bench, rounds=rounds, rows=60_000, guarantee="exactly_once"
    ),
    "sink": lambda bench, rounds: sink.against_postgres(bench, rounds=rounds, rows=60_000),
    "compiled": lambda bench, rounds: predictor.compiled_scoring(bench, rounds=rounds),
}
_COMMITTED = Path(__file__).with_name("guard.json")
_STILL_GOOD = 0.7  # of a committed ratio
_TRIES = 3


def main() -> int:
    """Run the suites, those of each broker on one stack."""
    names = [*EMBEDDED, *APACHE]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(names)}; all if none is named")
    parser.add_argument("--guard", action="store_true", help="a short run, against the ratios that are committed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, help="where the figures go as JSON; tables and a picture go beside it")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.suites if name not in names]:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = arguments.suites or names
    gc.disable()  # what measures must not pause
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
        return 130  # as a shell says it; what was measured so far is saved
    return int(not all(bar.reached for section in sections.values() for bar in section.bars))


def guarded(suites: Iterable[Callable[[], Section]], console: Console) -> int:
    """0 if every committed ratio is at 70 % of what it was, and no limit passed, in one try of three; else 1.

    What has fallen falls again; a minute in which somebody else had the processors does not come three times.
    """
    least = {what: _STILL_GOOD * ratio for what, ratio in json.loads(_COMMITTED.read_text()).items()}
    measured: set[str] = set()

    def holds(suite: Callable[[], Section]) -> bool:
        section = suite()
        show(section, console)
        good = all(bar.reached for bar in section.bars if bar.at_most)
        for bar in section.bars:
            if bar.what in least:
                measured.add(bar.what)
                fallen = bar.seen.median < least[bar.what]
                good = good and not fallen
                verdict = "[red]has fallen" if fallen else "[green]holds"
                console.print(f"{bar.what}: {bar.seen.median:.2f}, at least {least[bar.what]:.2f} {verdict}")
        return good

    held = [any(holds(suite) for _ in range(_TRIES)) for suite in suites]
    for what in least.keys() - measured:
        console.print(f"{what}: [red]not measured")
    return int(not all(held) or measured != least.keys())


def started(stack: ExitStack, broker: str) -> Bench:
    """A stack with both models, whose database tells when a row was committed."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fraud-alarm-bench-")))
    parts = stack.enter_context(local_stack(directory, broker=broker))
    predictor.register_forest(parts.registry.uri)
    with sa.create_engine(parts.addresses.database_url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET track_commit_timestamp = on"))
    assert parts.database
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
        cells = [_cell(row[name]) if name in row else "" for name in section.columns]
        table.add_row(label, *cells)
    console.print(table)
    for bar in section.bars:
        sign, verdict = ("<=" if bar.at_most else ">="), ("[green]reached" if bar.reached else "[red]not reached")
        console.print(f"  {bar.what}: {bar.seen.median:.2f} ({sign} {bar.bar:g}) {verdict}")


def save(sections: Mapping[str, Section], path: Path) -> None:
    """Write all figures of all rounds as JSON, their medians as Markdown, and the growth as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {name: section.as_json() for name, section in sections.items()}
    path.write_text(json.dumps({"versions": versions(), "sections": figures}, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(map(markdown, sections.values())))
    if grown := [sections[name] for name in GROWTH if name in sections]:
        growth.draw(grown, path.with_suffix(".svg"))


def markdown(section: Section) -> str:
    """A section's table and its bars."""
    lines = [f"### {section.title}", "", f"{section.settings}.", ""]
    lines += ["| | " + " | ".join(section.columns) + " |", "|---|" + "---:|" * len(section.columns)]
    for label, row in section.rows.items():
        cells = [_cell(row[name]) if name in row else "" for name in section.columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append("")
    if section.bars:
        lines += ["| ratio or time | bar | seen | |", "|---|---|---:|---|"]
        for bar in section.bars:
            sign, verdict = ("<=" if bar.at_most else ">="), ("" if bar.reached else "**not reached**")
            lines.append(
                f"| {bar.what} | {sign} {bar.bar:g} | {bar.seen.median:.3g} ±{bar.seen.spread:.0%} | {verdict} |"
            )
        lines.append("")
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    precise = ",.0f" if abs(figure.median) >= 100 else ".3g"
    return f"{figure.median:{precise}} ±{figure.spread:.0%}"


if __name__ == "__main__":
    sys.exit(main())
