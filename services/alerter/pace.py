"""How many mails: some at once, each by itself; in a flood, one in each window, with all that came in it."""

import time
from collections.abc import Callable
from math import inf


class Pace:
    """A token bucket: `burst` tokens, one of which comes back in each window of `window_s` seconds.

    https://en.wikipedia.org/wiki/Token_bucket
    """

    def __init__(self, *, burst: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.burst = burst
        self._window_s = window_s
        self._clock = clock
        self._tokens = float(burst)
        self._counted_at = clock()
        self._due: float | None = None  # when what is being gathered is to go out

    def lets_one_go(self) -> bool:
        """Whether an alarm may go out by itself: there is a token, and nothing is being gathered."""
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._counted_at) / self._window_s)
        self._counted_at = now
        return self._due is None and self._tokens >= 1

    def one_went(self) -> None:
        """It was accepted."""
        self._tokens -= 1

    def gather_s(self, *, at_most_s: float = inf) -> float:
        """Seconds for which alarms are still to be gathered; the first that is starts the window."""
        now = self._clock()
        if self._due is None:
            self._due = now + min(self._window_s, at_most_s)
        return max(0.0, self._due - now)

    def all_went(self) -> None:
        """What was gathered was accepted."""
        self._due = None
