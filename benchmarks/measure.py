"""Makes comparisons fair: all variants are measured in every round, and ratios are calculated within a round."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A quantity, with one value for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the range of the values, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / abs(self.median) if self.median else 0.0

    def over(self, other: "Figure") -> "Figure":
        """Return the ratio of this figure to another figure, round by round."""
        return Figure(tuple(mine / its for mine, its in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Bar:
    """A limit for the median of a quantity: a minimum or, with `at_most`, a maximum."""

    what: str
    seen: Figure
    bar: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """Whether the median is within the limit."""
        return self.seen.median <= self.bar if self.at_most else self.seen.median >= self.bar


@dataclass(frozen=True)
class Section:
    """A table of figures, the settings of the measurement, and the limits for the figures."""

    title: str
    settings: str
    columns: Sequence[str]
    rows: Mapping[str, Mapping[str, Figure]]
    bars: Sequence[Bar] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        """Return the section for the JSON report, with the values of every round."""
        return {
            "title": self.title,
            "settings": self.settings,
            "rows": {label: {name: figure.values for name, figure in row.items()} for label, row in self.rows.items()},
            "bars": [
                {"what": each.what, "seen": each.seen.values, "median": each.seen.median, "bar": each.bar}
                | {"at_most": each.at_most, "reached": each.reached}
                for each in self.bars
            ],
        }


def side_by_side(
    variants: Mapping[str, Callable[[], Mapping[str, float]]], *, rounds: int
) -> dict[str, dict[str, Figure]]:
    """Run all variants in every round, and return a figure for each variant and each quantity.

    Every second round runs the variants in reverse order, so that a slow minute of the machine does not always affect
    the same variant. A variant is a function that returns a value for each quantity. A warm-up round runs first and is
    not counted.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            quantities = variants[name]()
            if number >= 0:
                found[name].append(quantities)
    return {
        name: {quantity: Figure(tuple(each[quantity] for each in runs)) for quantity in runs[0]}
        for name, runs in found.items()
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the p50, p99 and p99.9 of two or more values."""
    cuts = statistics.quantiles(values, n=1000, method="inclusive")
    return {"p50": cuts[499], "p99": cuts[989], "p99.9": cuts[998]}
