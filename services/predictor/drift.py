"""Detects drift: compares a sliding window of live rows with the profile of the model's training data.

The main measure is the population stability index (Siddiqi, Credit Risk Scorecards, Wiley 2006, chapter 9). The index
is the sum of (live - expected) * ln(live / expected) over the bins of a feature. `live` is the share of the window's
rows that are in the bin, and `expected` is the share according to the profile. The profile has one set of shares for
each quarter of the day (six hours). The expected shares are the weighted average of the profile's four sets. The weight
of a quarter of the day is the number of rows in the window that are from that quarter.
"""

from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import structlog

from services.predictor.scoring import Seen
from shared import metrics
from shared.privacy import without_digits
from shared.profile import QUARTERS, Names, Numbers, Profile, numbers_of, quarters_of
from shared.records import REFERENCE

log = structlog.get_logger()

_CHUNK = 250  # rows that enter and leave the window together
_FEATURES = QUARTERS + 2  # index of the first feature's counts; the counts of quarters and of two flags precede them
_SMOOTHING = 0.5  # rows added to every bin, because the logarithm of an empty bin would be infinite

# Each limit is the largest accepted share of the rows.
_LIMITS = {"outside_range": 0.05, "unknown": 0.005, "fraud_rate": 0.1, "milliseconds": 0.005}
_BACK_BELOW = 0.8  # drift ends only below this share of the limit, so that a value close to the limit is logged once


class Finding(NamedTuple):
    """The value of one measure for one feature, over the whole window."""

    feature: str
    measure: str  # psi, outside_range or unknown for a feature; fraud_rate or milliseconds for all rows together
    value: float


class _Feature(NamedTuple):
    name: str
    stray: str  # the measure that counts values outside all bins: outside_range or unknown
    shares: np.ndarray  # shape: (quarters of the day, bins)
    bins_of: Callable[[Sequence[Any]], np.ndarray]  # returns the values' bins (n,); `bins` means no bin

    @property
    def bins(self) -> int:
        return int(self.shares.shape[1])


class Window:
    """Counts how many of the most recent rows are in each bin of a profile.

    The window has `rows` rows, rounded up to whole chunks.
    """

    def __init__(self, profile: Profile, *, rows: int) -> None:
        self._features = [
            *(_of_numbers(name, each) for name, each in profile.numbers.items()),
            *(_of_names(name, each) for name, each in profile.names.items()),
        ]
        self._waiting: list[Seen] = []
        self._chunks: deque[np.ndarray] = deque(maxlen=-(-rows // _CHUNK))

    def add(self, rows: Sequence[Seen]) -> bool:
        """Add rows. A full window drops its oldest rows. Returns whether the window is full and has changed."""
        self._waiting += rows
        counted = 0
        while len(self._waiting) - counted >= _CHUNK:
            self._chunks.append(self._count(self._waiting[counted : counted + _CHUNK]))
            counted += _CHUNK
        del self._waiting[:counted]
        return counted > 0 and len(self._chunks) == self._chunks.maxlen

    def findings(self) -> list[Finding]:
        """Return two findings for all rows together, and two findings per feature. The window must not be empty."""
        rows, counts = _CHUNK * len(self._chunks), np.sum(self._chunks, axis=0)
        quarters, (frauds, in_milliseconds) = counts[:QUARTERS], counts[QUARTERS:_FEATURES]
        found = [
            Finding("prediction", "fraud_rate", frauds / rows),
            Finding("unix_time", "milliseconds", in_milliseconds / rows),
        ]
        start = _FEATURES
        for feature in self._features:
            bins, stray = counts[start : start + feature.bins], counts[start + feature.bins]
            found.append(Finding(feature.name, "psi", psi(bins, quarters @ feature.shares)))
            found.append(Finding(feature.name, feature.stray, stray / rows))
            start += feature.bins + 1
        return found

    def _count(self, rows: Sequence[Seen]) -> np.ndarray:
        """Return one array with the counts of rows per quarter of the day, per flag, and per feature and bin."""
        transactions = [row.transaction for row in rows]
        quarters = quarters_of(list(map(attrgetter("trans_date_trans_time"), transactions)))
        flags = [sum(row.fraud for row in rows), sum(row.in_milliseconds for row in rows)]
        features = [
            np.bincount(each.bins_of(list(map(attrgetter(each.name), transactions))), minlength=each.bins + 1)
            for each in self._features
        ]
        return np.concatenate([np.bincount(quarters, minlength=QUARTERS), flags, *features])


def _of_numbers(name: str, known: Numbers) -> _Feature:
    edges = np.array(known.edges)

    def bins_of(values: Sequence[Any]) -> np.ndarray:
        numbers = numbers_of(name, values)
        within = (numbers >= known.low) & (numbers <= known.high)
        return np.where(within, np.searchsorted(edges, numbers, side="right"), len(edges) + 1)

    return _Feature(name, "outside_range", np.array(known.shares), bins_of)


def _of_names(name: str, known: Names) -> _Feature:
    codes = {each: code for code, each in enumerate(known.known)}

    def bins_of(values: Sequence[Any]) -> np.ndarray:
        return np.array([codes.get(value, len(codes)) for value in values])

    return _Feature(name, "unknown", np.array(known.shares), bins_of)


def psi(live: np.ndarray, expected: np.ndarray) -> float:
    """Return the population stability index of the live and the expected counts, which have the shape (bins,).

    The index is 0 if the shares are equal.
    """
    if not live.sum():
        return 0.0
    live_share, expected_share = _smoothed(live), _smoothed(expected)
    return float(((live_share - expected_share) * np.log(live_share / expected_share)).sum())


def _smoothed(counts: np.ndarray) -> np.ndarray:
    smooth = counts + _SMOOTHING
    shares: np.ndarray = smooth / smooth.sum()
    return shares


def _window(profile: Profile | None, *, rows: int) -> Window:
    """Make a window for the profile. If the profile does not fit transactions, the window has no features."""
    try:
        trial = Window(profile or Profile({}, {}), rows=_CHUNK)
        trial.add([Seen(REFERENCE, False, False)] * _CHUNK)
        trial.findings()
    except Exception as error:  # a user may have logged a wrong profile with the model
        log.warning("reference_profile_unusable", reason=without_digits(f"{type(error).__name__}: {error}"))
        return Window(Profile({}, {}), rows=rows)
    return Window(profile or Profile({}, {}), rows=rows)


class Monitor:
    """Logs when a measure of the live data exceeds its limit, and when it falls back below the limit."""

    def __init__(
        self, profile: Profile | None, *, psi_limit: float, rows: int, before: "Monitor | None" = None
    ) -> None:
        """`before` is the previous model's monitor. Drift that `before` has already logged is not logged again."""
        self._rows = rows
        self._window = _window(profile, rows=rows)
        self._limits = _LIMITS | {"psi": psi_limit}
        self._beyond: set[tuple[str, str]] = before._beyond if before else set()
        metrics.DRIFT.clear()
        metrics.DRIFT_BEYOND.set(len(self._beyond))

    def add(self, rows: Sequence[Seen]) -> None:
        """Add rows, and log measures that cross their limits."""
        if self._window.add(rows):
            for finding in self._window.findings():
                self._judge(finding)

    def _judge(self, finding: Finding) -> None:
        feature, measure, value = finding
        limit = self._limits[measure]
        metrics.DRIFT.labels(feature, measure).set(value)
        fields = {"feature": feature, "measure": measure, "value": round(value, 3), "limit": limit, "rows": self._rows}
        if (feature, measure) not in self._beyond and value > limit:
            self._beyond.add((feature, measure))
            log.warning("drift", **fields)
        elif (feature, measure) in self._beyond and value < _BACK_BELOW * limit:
            self._beyond.remove((feature, measure))
            log.info("drift_over", **fields)
        metrics.DRIFT_BEYOND.set(len(self._beyond))
