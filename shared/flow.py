"""The flow in the log: at most one line a second, however fast the records come."""

import time
from collections import Counter

import structlog

log = structlog.get_logger()


class Flow:
    """Adds counts up and logs them as one `event`, with the running total of the first."""

    def __init__(self, event: str) -> None:
        self._event = event
        self._since = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._total = 0

    def add(self, **counts: int) -> None:
        """Add, for example `records=1000, dead_letters=2`."""
        self._counts.update(counts)
        self._total += next(iter(counts.values()))
        self.report_if_due()

    def report_if_due(self) -> None:
        """Log what has not been logged yet, if the last line is a second old."""
        if time.monotonic() - self._since >= 1.0:
            self.report()

    def report(self) -> None:
        """Log what has not been logged yet, if there is anything."""
        if any(self._counts.values()):
            log.info(self._event, **self._counts, total=self._total)
            self._counts.clear()
            self._since = time.monotonic()
