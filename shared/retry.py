"""Retries during an outage, with capped exponential backoff, and logs how long the outage lasted.

Up to half of each wait is random, so that the clients of a failed dependency do not all retry at the same moment. The
formula is "Equal Jitter" in https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
"""

import random
import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

import structlog

from shared import health, metrics
from shared.errors import Outage

log = structlog.get_logger()

_REMINDER_S = 60.0

T = TypeVar("T")


def delay_s(attempt: int, *, initial_s: float, max_s: float) -> float:
    """Return the seconds to wait after try number `attempt` has failed. The first try has the number 0."""
    ceiling = min(max_s, initial_s * 2.0 ** min(attempt, 30))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads load, not for security


class OutageLog:
    """Logs an outage when it starts, every minute while it lasts, and when it ends. Also updates the outage metrics.

    `waits_for` names what the service cannot work without, for example "a model". During the outage, /ready shows this
    name with the reason, and reports the service as not ready. If `waits_for` is None, /ready does not show the outage.
    `waiting()` returns the size of the backlog. The backlog's largest size is logged when the outage ends.
    `names` contains fields to add to each log line.
    """

    def __init__(self, waits_for: str | None = None, *, waiting: Callable[[], int] | None = None, **names: str) -> None:
        self._waits_for = waits_for
        self._waiting = waiting
        self._names = names
        self._began: float | None = None  # monotonic time, like _counted and _reminded
        self._counted = self._reminded = 0.0
        self._failures = self._most_waiting = 0
        self._reason = ""

    @property
    def under_way(self) -> bool:
        """Whether an outage has started and has not ended yet."""
        return self._began is not None

    def failed(self, reason: str, **more: object) -> None:
        """Record a failed try, which starts or continues an outage. `more` contains extra fields for the log line."""
        now = time.monotonic()
        if self._began is None:
            self._began = self._counted = now
            self._reminded = now - _REMINDER_S
            self._failures = self._most_waiting = 0
            metrics.OUTAGES.inc()
            metrics.OUTAGES_UNDER_WAY.inc()
        self._failures += 1
        self._reason = reason
        if self._waits_for:
            health.waits_for(self._waits_for, reason)
        self.remind(**more)

    def remind(self, **more: object) -> None:
        """If an outage is under way and has not been logged for a minute, log the outage again."""
        if self._began is None:
            return
        now = time.monotonic()
        self._count(now)
        if now - self._reminded >= _REMINDER_S:
            self._reminded = now
            log.warning("outage", reason=self._reason, seconds=round(now - self._began, 1), **self._names, **more)

    def over(self) -> None:
        """Record a successful try, which ends the outage if one is under way."""
        if self._began is None:
            return
        now = time.monotonic()
        self._count(now)
        metrics.OUTAGES_UNDER_WAY.dec()
        if self._waits_for:
            health.has(self._waits_for)
        waited = {"waited": self._most_waiting} if self._waiting else {}
        log.info("outage_over", seconds=round(now - self._began, 1), failures=self._failures, **self._names, **waited)
        self._began = None

    def _count(self, now: float) -> None:
        metrics.OUTAGE_SECONDS.inc(now - self._counted)
        self._counted = now
        if self._waiting:
            self._most_waiting = max(self._most_waiting, self._waiting())


def retry_outages(
    step: Callable[[], T],
    *,
    shutdown: Event,
    initial_s: float,
    max_s: float,
    wait: Callable[[float], object] | None = None,
    outage_log: OutageLog,
) -> T:
    """Call `step` until it does not raise Outage, and return its result. After `shutdown` is set, raises the Outage.

    Between tries, `wait(seconds)` is called. The default `wait` returns when the time has passed or `shutdown` is set.
    """
    attempt = 0
    while True:
        try:
            result = step()
        except Outage as outage:
            if shutdown.is_set():
                raise
            outage_log.failed(str(outage))
            (wait or shutdown.wait)(delay_s(attempt, initial_s=initial_s, max_s=max_s))
            attempt += 1
        else:
            outage_log.over()
            return result
