"""Does live data still look like what the model learnt from? A sliding window of rows beside the model's own profile.

The measure is the population stability index (Siddiqi, Credit Risk Scorecards, Wiley 2006, chapter 9): over the bins of
a feature, the sum of (live - expected) * ln(live / expected), where what is expected is the mixture of the profile's
shares that the hours of the window call for.
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

_PIECE = 250  # rows that enter and leave the window together
_FEATURES = QUARTERS + 2  # where their counts begin, behind those of the quarters and of two marks
_HALF_A_ROW = 0.5  # in an empty bin, whose logarithm would be infinite


_LIMITS = {"outside_range": 0.05, "unknown": 0.005, "fraud_rate": 0.1, "milliseconds": 0.005}  # shares of the rows
_BACK = 0.8  # of its limit: what goes to and fro around it is told once


class Finding(NamedTuple):
    """One measure of one feature over the window."""

    feature: str
    measure: str  # psi, outside_range, unknown; of the rows themselves: fraud_rate, milliseconds
    value: float


class _Feature(NamedTuple):
    name: str
    stray: str  # the measure for values that lie in none of the bins
    shares: np.ndarray  # (quarters of the day, bins)
    bins_of: Callable[[Sequence[Any]], np.ndarray]  # of values, those that stray being in one bin more

    @property
    def bins(self) -> int:
        return int(self.shares.shape[1])


class Window:
    """The last rows beside a profile, counted in pieces."""

    def __init__(self, profile: Profile, *, rows: int) -> None:
        self._features = [
            *(_of_numbers(name, each) for name, each in profile.numbers.items()),
            *(_of_names(name, each) for name, each in profile.names.items()),
        ]
        self._waiting: list[Seen] = []
        self._pieces: deque[np.ndarray] = deque(maxlen=-(-rows // _PIECE))

    def add(self, rows: Sequence[Seen]) -> bool:
        """Count rows in; the oldest leave a full window. Returns whether it is full, and holds new ones."""
        self._waiting += rows
        counted = 0
        while len(self._waiting) - counted >= _PIECE:
            self._pieces.append(self._count(self._waiting[counted : counted + _PIECE]))
            counted += _PIECE
        del self._waiting[:counted]
        return counted > 0 and len(self._pieces) == self._pieces.maxlen

    def findings(self) -> list[Finding]:
        """How far each feature lies from what is to be expected at these hours."""
        rows, counts = _PIECE * len(self._pieces), np.sum(self._pieces, axis=0)
        quarters, (frauds, in_milliseconds) = counts[:QUARTERS], counts[QUARTERS:_FEATURES]
        found = [
            Finding("prediction", "fraud_rate", frauds / rows),
            Finding("unix_time", "milliseconds", in_milliseconds / rows),
        ]
        at = _FEATURES
        for feature in self._features:
            bins, stray = counts[at : at + feature.bins], counts[at + feature.bins]
            found.append(Finding(feature.name, "psi", psi(bins, quarters @ feature.shares)))
            found.append(Finding(feature.name, feature.stray, stray / rows))
            at += feature.bins + 1
        return found

    def _count(self, rows: Sequence[Seen]) -> np.ndarray:
        """Counts of the quarters of the day, of two marks, and of each feature's bins."""
        transactions = [row.transaction for row in rows]
        quarters = quarters_of(list(map(attrgetter("trans_date_trans_time"), transactions)))
        marks = [sum(row.fraud for row in rows), sum(row.in_milliseconds for row in rows)]
        features = [
            np.bincount(each.bins_of(list(map(attrgetter(each.name), transactions))), minlength=each.bins + 1)
            for each in self._features
        ]
        return np.concatenate([np.bincount(quarters, minlength=QUARTERS), marks, *features])


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
    """The population stability index of counts (bins,), live and expected; 0 where they have the same shares."""
    if not live.sum():
        return 0.0
    share, due = (_smoothed(each) for each in (live, expected))
    return float(((share - due) * np.log(share / due)).sum())


def _smoothed(counts: np.ndarray) -> np.ndarray:
    smooth = counts + _HALF_A_ROW
    shares: np.ndarray = smooth / smooth.sum()
    return shares


def _window(profile: Profile | None, *, rows: int) -> Window:
    """One on the profile, if that fits transactions: it may be of a user's own making."""
    try:
        tried = Window(profile or Profile({}, {}), rows=_PIECE)
        tried.add([Seen(REFERENCE, False, False)] * _PIECE)
        tried.findings()
    except Exception as error:
        log.warning("reference_profile_unusable", reason=without_digits(f"{type(error).__name__}: {error}"))
        return Window(Profile({}, {}), rows=rows)
    return Window(profile or Profile({}, {}), rows=rows)


class Monitor:
    """Says in the log when a measure of the live data passes its limit, and when it is back below it."""

    def __init__(
        self, profile: Profile | None, *, psi_limit: float, rows: int, before: "Monitor | None" = None
    ) -> None:
        """`before` is what watched until now, for another model: what it said and has not taken back still stands."""
        self._rows = rows
        self._window = _window(profile, rows=rows)
        self._limits = _LIMITS | {"psi": psi_limit}
        self._beyond: set[tuple[str, str]] = before._beyond if before else set()
        metrics.DRIFT.clear()
        metrics.DRIFT_BEYOND.set(len(self._beyond))

    def add(self, rows: Sequence[Seen]) -> None:
        """Count the rows in, and judge."""
        if self._window.add(rows):
            for finding in self._window.findings():
                self._judge(finding)

    def _judge(self, finding: Finding) -> None:
        feature, measure, value = finding
        limit = self._limits[measure]
        metrics.DRIFT.labels(feature, measure).set(value)
        about = {"feature": feature, "measure": measure, "value": round(value, 3), "limit": limit, "rows": self._rows}
        if (feature, measure) not in self._beyond and value > limit:
            self._beyond.add((feature, measure))
            log.warning("drift", **about)
        elif (feature, measure) in self._beyond and value < _BACK * limit:
            self._beyond.remove((feature, measure))
            log.info("drift_over", **about)
        metrics.DRIFT_BEYOND.set(len(self._beyond))
