"""Makes profiles, which are the distributions of a model's features in the training data.

A profile is logged with its model. The predictor compares live data with the profile.

Distributions depend on the hour, because people do not buy at night what they buy at noon. A profile therefore has
separate shares for each quarter of the day (six hours). A profile covers only legitimate payments, because frauds are
far more frequent in training data than in live data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

BINS = 10
QUARTERS = 4
_MOST_CATEGORIES = 50
_PRIOR_ROWS = 100


class Numbers(msgspec.Struct, frozen=True):
    """A numeric feature's distribution over BINS bins, each with about a tenth of the rows.

    `edges` separate the bins. There are fewer than BINS bins if a value is so frequent that several edges coincide.
    """

    low: float
    high: float
    edges: list[float]
    shares: list[list[float]]  # shape: (quarters of the day, len(edges) + 1)


class Names(msgspec.Struct, frozen=True):
    """A categorical feature's distribution over its known values."""

    known: list[str]
    shares: list[list[float]]  # shape: (quarters of the day, len(known))


class Profile(msgspec.Struct, frozen=True):
    """The distribution of each feature in the training data, by the feature's name."""

    numbers: dict[str, Numbers]
    names: dict[str, Names]


def make_profile(columns: Mapping[str, Sequence[Any]], times: Sequence[str]) -> Profile:
    """Make a profile of n legitimate payments.

    `columns` has the n raw values of each feature, and `times` has the n values of trans_date_trans_time.

    For a date of birth, the year is used. Text columns with many different values, such as names, are left out.
    """
    quarters = quarters_of(times)
    numbers, names = {}, {}
    for feature, values in columns.items():
        if feature == "dob" or not isinstance(values[0], str):
            found = numbers_of(feature, values)
            edges = np.unique(np.quantile(found, np.linspace(0, 1, BINS + 1)[1:-1]))
            bins = np.searchsorted(edges, found, side="right")
            shares = _shares(bins, quarters, len(edges) + 1)
            numbers[feature] = Numbers(float(found.min()), float(found.max()), edges.tolist(), shares)
        elif len(known := sorted(set(values))) <= _MOST_CATEGORIES:
            codes = {name: code for code, name in enumerate(known)}
            names[feature] = Names(known, _shares(np.array([codes[value] for value in values]), quarters, len(known)))
    return Profile(numbers, names)


def quarters_of(times: Sequence[str]) -> np.ndarray:
    """For each time, return the quarter of the day that it falls in (0 to 3), as an array of shape (n,).

    Times are written as `YYYY-MM-DD HH:MM:SS`.
    """
    return np.array([int(time[11:13]) * QUARTERS // 24 for time in times])


def numbers_of(feature: str, values: Sequence[Any]) -> np.ndarray:
    """Return a feature's values as an array of numbers, of shape (n,). A date of birth becomes its year."""
    return np.array([int(value[:4]) for value in values] if feature == "dob" else values, dtype=float)


def _shares(bins: np.ndarray, quarters: np.ndarray, count: int) -> list[list[float]]:
    """Return each bin's share in each quarter of the day.

    To smooth the shares, _PRIOR_ROWS rows are added to each quarter. The added rows are distributed over the
    bins like the rows of the whole day.
    """
    whole = np.bincount(bins, minlength=count)
    found = [np.bincount(bins[quarters == quarter], minlength=count) for quarter in range(QUARTERS)]
    mixed = [each + _PRIOR_ROWS * whole / whole.sum() for each in found]  # a few rows may differ from their quarter
    return [np.round(each / each.sum(), 5).tolist() for each in mixed]
