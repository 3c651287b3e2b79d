"""Measure how the cost per row changes with the number of partitions, replicas, waiting rows and existing rows."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import predictor, sink
from benchmarks.load import Bench
from benchmarks.measure import Bar, Figure, Section, side_by_side

PARTITIONS = (1, 3, 6, 12)
REPLICAS = (1, 2, 3, 4)
_TOGETHER = 0.9  # share of the backlog to measure; at the end, replicas run out of work one by one
BACKLOGS = (10_000, 100_000, 1_000_000)
TABLES = (100_000, 1_000_000, 10_000_000)
_COLUMNS = ("us a row", "CPU s a million")
_BUSY = "% of the machine"
_EXPONENT = "exponent"
_FIRST = "The first column is the number of"


def with_partitions(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Measure one predictor with an increasing number of partitions."""
    sources = {number: bench.backlog(rows, partitions=number) for number in PARTITIONS}
    variants = {number: partial(predictor.drained, bench, source, rows) for number, source in sources.items()}
    settings = f"Conditions: one predictor, exactly-once delivery, {rows:,} rows, Apache Kafka. {_FIRST} partitions"
    return _grown("Partitions", settings, variants, rounds=rounds)


def with_replicas(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Measure the cost per row with an increasing number of predictors."""
    source = bench.backlog(rows)
    most = int(_TOGETHER * rows)
    variants = {number: partial(predictor.drained, bench, source, most, replicas=number) for number in REPLICAS}
    settings = (
        f"{_FIRST} predictors. The predictors read {rows:,} rows, of which the first {_TOGETHER:.0%} are measured. "
        "Conditions: 6 partitions, exactly-once delivery, Apache Kafka on the same cores as the predictors"
    )
    section = _grown("Predictors", settings, variants, rounds=rounds)
    one, two = section.rows["1"], section.rows["2"]
    bars = [
        Bar("speed, two predictors / one predictor", one["us a row"].over(two["us a row"]), 1.5),
        Bar("two predictors: % of the machine", two[_BUSY], 90),
        Bar(
            "CPU per row, two predictors / one predictor",
            two["CPU s a million"].over(one["CPU s a million"]),
            1.1,
            at_most=True,
        ),
    ]
    return replace(section, bars=bars)


def with_backlog(bench: Bench, *, rounds: int) -> Section:
    """Measure one predictor with backlogs of increasing size."""
    sources = {rows: bench.backlog(rows, partitions=6) for rows in BACKLOGS}
    variants = {rows: partial(predictor.drained, bench, source, rows) for rows, source in sources.items()}
    settings = "Conditions: one predictor, exactly-once delivery, 6 partitions, Apache Kafka. "
    return _grown("Backlog", f"{settings}{_FIRST} rows in the backlog", variants, rounds=rounds)


def with_table(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Measure the db_sink with indexed tables of increasing size."""
    with sink.filled(bench, rows, TABLES) as into:
        settings = f"The db_sink adds {rows:,} rows. PostgreSQL 18 has its default settings. "
        return _grown("Existing rows", f"{settings}{_FIRST} rows that the table already has", into, rounds=rounds)


def draw(sections: Sequence[Section], path: Path) -> None:
    """Write an SVG chart with one panel per section.

    Each panel shows how the cost per row depends on the quantity that the section varies, for example the number of
    partitions. Both axes are logarithmic.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    size = (3.2 * len(sections), 3.2)
    figure, axes = pyplot.subplots(1, len(sections), figsize=size, layout="constrained", squeeze=False)
    for axis, section in zip(axes[0], sections, strict=True):
        grown = {label: row for label, row in section.rows.items() if label != _EXPONENT}
        sizes = [float(label.replace(",", "")) for label in grown]
        for name in _COLUMNS:
            medians = [row[name].median for row in grown.values()]
            exponent = section.rows[_EXPONENT][name].median
            axis.loglog(sizes, medians, "o-", label=f"{name}, exponent {exponent:+.2f}")
        axis.set(title=section.title, ylim=(1, 300), xticks=sizes, xticklabels=list(grown))
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(path)


def _grown(
    title: str, settings: str, variants: Mapping[int, Callable[[], dict[str, float]]], *, rounds: int
) -> Section:
    found = side_by_side({f"{size:,}": partial(_cost, work) for size, work in variants.items()}, rounds=rounds)
    sizes = [math.log(size) for size in variants]
    exponents = {}
    for name in _COLUMNS:
        of_rounds = zip(*(row[name].values for row in found.values()), strict=True)
        exponents[name] = Figure(tuple(_slope(sizes, costs) for costs in of_rounds))
    return Section(title, settings, (*_COLUMNS, _BUSY), {**found, _EXPONENT: exponents})


def _slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit cost = a * size**b by least squares, and return the exponent b.

    `sizes` contains the logarithms of the sizes, and `costs` contains the costs themselves.
    """
    return statistics.linear_regression(sizes, [math.log(cost) for cost in costs]).slope


def _cost(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    found = work()
    return {"us a row": 1e6 / found["rows/s"], **{name: found[name] for name in ("CPU s a million", _BUSY)}}
