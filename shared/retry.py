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

from shared.errors import Outage

log = structlog.get_logger()

_REMINDER_S = 60.0

T = TypeVar("T")


def delay_s(attempt: int, *, initial_s: float, max_s: float) -> float:
    """Seconds to wait before try `attempt` + 1, `attempt` counted from 0."""
    ceiling = min(max_s, initial_s * 2.0 ** min(attempt, 30))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads load, guards nothing


def until_over(
    step: Callable[[], T],
    *,
    shutdown: Event,
    initial_s: float,
    max_s: float,
    wait: Callable[[float], object] | None = None,
) -> T:
    """What `step` returns, tried again while it raises Outage. Raises that Outage once shutdown is set.

    `wait(seconds)` passes the time between tries; without it, the shutdown event does.
    """
    attempt, began, reminded = 0, time.monotonic(), 0.0
    while True:
        try:
            result = step()
        except Outage as outage:
            if shutdown.is_set():
                raise
            now = time.monotonic()
            if attempt == 0 or now - reminded >= _REMINDER_S:
                reminded = now
                log.warning("outage", reason=str(outage), seconds=round(now - began, 1))
            (wait or shutdown.wait)(delay_s(attempt, initial_s=initial_s, max_s=max_s))
            attempt += 1
        else:
            if attempt:
                log.info("outage_over", seconds=round(time.monotonic() - began, 1), attempts=attempt)
            return result
