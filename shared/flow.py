"""Logs a flow of records: at most one line per second, however fast the records arrive."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import structlog

log = structlog.get_logger()


class Flow:
    """Adds up counts, and logs the sums as one `event`.

    Each line also has the rate (`per_s`) and the running total (`total`) of the first count, the values that `levels()`
    returns, and `names`.
    """

    def __init__(self, event: str, *, levels: Callable[[], Mapping[str, int]] = dict, **names: str) -> None:
        self._event = event
        self._names = names
        self._levels = levels
        self._since = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._ages_ms: list[float] = []
        self._total = 0

    def add(self, *, ages_ms: Iterable[float] = (), **counts: int) -> None:
        """Add counts, such as `records=1000, dead_letters=2`, and the current ages of some of the records."""
        self._counts.update(counts)
        self._ages_ms += ages_ms
        self._total += next(iter(counts.values()))
        self.report_if_due()

    def report_if_due(self) -> None:
        """Log the counts that are not logged yet, if a second has passed since the last line."""
        if time.monotonic() - self._since >= 1.0:
            self.report()

    def report(self) -> None:
        """Log the counts that are not logged yet, if there are any."""
        now = time.monotonic()
        if any(self._counts.values()):
            per_s = round(next(iter(self._counts.values())) / max(now - self._since, 0.001))
            ages = {"p99_ms": round(_p99(self._ages_ms))} if self._ages_ms else {}
            levels = {**self._levels(), **ages, "total": self._total}
            log.info(self._event, **self._counts, per_s=per_s, **levels, **self._names)
            self._counts.clear()
            self._ages_ms.clear()
        self._since = now


def _p99(values: list[float]) -> float:
    """Return the 99th percentile (nearest rank): the smallest value v such that at least 99 % of values are <= v."""
    return sorted(values)[-(-99 * len(values) // 100) - 1]
