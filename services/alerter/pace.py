"""When to send mails: the first alarms singly and at once; in a flood, one digest a window."""

import time
from collections.abc import Callable
from math import inf


class Pace:
    """A token bucket of `burst` tokens, refilled by one every `window_s` seconds. A single mail takes a token.

    https://en.wikipedia.org/wiki/Token_bucket
    """

    def __init__(self, *, burst: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.burst = burst
        self._window_s = window_s
        self._clock = clock
        self._tokens = float(burst)
        self._counted_at = clock()
        self._due: float | None = None  # when the digest being gathered is to be sent

    def allows_single(self) -> bool:
        """Whether an alarm may be mailed singly: a token is left, and no digest is being gathered."""
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._counted_at) / self._window_s)
        self._counted_at = now
        return self._due is None and self._tokens >= 1

    def single_sent(self) -> None:
        """Note that a single mail was accepted."""
        self._tokens -= 1

    def gather_s(self, *, at_most_s: float = inf) -> float:
        """Seconds until the digest is due; the first call starts its window, of `at_most_s` seconds or fewer."""
        now = self._clock()
        if self._due is None:
            self._due = now + min(self._window_s, at_most_s)
        return max(0.0, self._due - now)

    def digest_sent(self) -> None:
        """Note that the digest was accepted, or that none is needed."""
        self._due = None
