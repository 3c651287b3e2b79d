"""Waiting out an outage: capped exponential backoff, half of it jitter; said at its start, every minute, at its end.

Formula: "Equal Jitter" in https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
Many clients of one dead dependency come back at different moments, and none at once.
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
    """Seconds to wait before try `attempt` + 1, `attempt` counted from 0."""
    ceiling = min(max_s, initial_s * 2.0 ** min(attempt, 30))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads load, guards nothing


class Spell:
    """An outage: in the log when it begins, each minute while it lasts and when it is over; in the metrics throughout.

    `waits_for` is what /ready calls it, where the service cannot do its work meanwhile; `waiting()` counts what piles
    up, of which the most is told; `names` stand on each of its lines.
    """

    def __init__(self, waits_for: str | None = None, *, waiting: Callable[[], int] | None = None, **names: str) -> None:
        self._waits_for = waits_for
        self._waiting = waiting
        self._names = names
        self._began: float | None = None
        self._told = self._reminded = 0.0  # monotonic
        self._tries = self._waited = 0
        self._reason = ""

    def lasts(self, reason: str, **more: object) -> None:
        """Tell of a try that failed."""
        now = time.monotonic()
        if self._began is None:
            self._began = self._told = now
            self._reminded = now - _REMINDER_S
            self._tries = self._waited = 0
            metrics.OUTAGES.inc()
            metrics.OUTAGES_UNDER_WAY.inc()
        self._tries += 1
        self._reason = reason
        if self._waits_for:
            health.waits_for(self._waits_for, reason)
        self.goes_on(**more)

    def goes_on(self, **more: object) -> None:
        """Tell, if it has begun and is not over, that nothing was tried meanwhile."""
        if self._began is None:
            return
        now = time.monotonic()
        self._count(now)
        if now - self._reminded >= _REMINDER_S:
            self._reminded = now
            log.warning("outage", reason=self._reason, seconds=round(now - self._began, 1), **self._names, **more)

    def over(self) -> None:
        """Tell of one that did not, whether or not there was an outage before it."""
        if self._began is None:
            return
        now = time.monotonic()
        self._count(now)
        metrics.OUTAGES_UNDER_WAY.dec()
        if self._waits_for:
            health.has(self._waits_for)
        waited = {"waited": self._waited} if self._waiting else {}
        log.info("outage_over", seconds=round(now - self._began, 1), failures=self._tries, **self._names, **waited)
        self._began = None

    @property
    def under_way(self) -> bool:
        """Whether it has begun and is not over."""
        return self._began is not None

    def _count(self, now: float) -> None:
        metrics.OUTAGE_SECONDS.inc(now - self._told)
        self._told = now
        if self._waiting:
            self._waited = max(self._waited, self._waiting())


def until_over(
    step: Callable[[], T],
    *,
    shutdown: Event,
    initial_s: float,
    max_s: float,
    wait: Callable[[float], object] | None = None,
    spell: Spell,
) -> T:
    """What `step` returns, tried again while it raises Outage. Raises that Outage once shutdown is set.

    `wait(seconds)` passes the time between tries; without it, the shutdown event does.
    """
    attempt = 0
    while True:
        try:
            result = step()
        except Outage as outage:
            if shutdown.is_set():
                raise
            spell.lasts(str(outage))
            (wait or shutdown.wait)(delay_s(attempt, initial_s=initial_s, max_s=max_s))
            attempt += 1
        else:
            spell.over()
            return result
