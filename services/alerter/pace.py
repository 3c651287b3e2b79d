"""Decides whether an alarm is mailed immediately or gathered into a digest."""

import time
from collections.abc import Callable
from math import inf


class Pace:
    """A token bucket that holds up to `burst` tokens and gains one token every `window_s` seconds.

    A mail about a single alarm uses up one token.

    https://en.wikipedia.org/wiki/Token_bucket
    """

    def __init__(self, *, burst: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.burst = burst
        self._window_s = window_s
        self._clock = clock
        self._tokens = float(burst)
        self._counted_at = clock()
        self._due: float | None = None  # when the current digest is due; None if there is none

    def allows_single(self) -> bool:
        """Return whether an alarm may be mailed on its own.

        This requires that a token is left and that no digest is being gathered.
        """
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._counted_at) / self._window_s)
        self._counted_at = now
        return self._due is None and self._tokens >= 1

    def single_sent(self) -> None:
        """Use up a token, because a mail about a single alarm was sent."""
        self._tokens -= 1

    def gather_s(self, *, at_most_s: float = inf) -> float:
        """Return the seconds until the digest is due. If no digest is being gathered, start a new digest's time window.

        The window lasts `window_s` or `at_most_s` seconds, whichever is less.
        """
        now = self._clock()
        if self._due is None:
            self._due = now + min(self._window_s, at_most_s)
        return max(0.0, self._due - now)

    def digest_sent(self) -> None:
        """Stop gathering, because the digest was sent or is not needed."""
        self._due = None
