"""Waiting between tries: exponential, capped, half of it jitter.

Formula: "Equal Jitter" in https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
Many clients of one dead dependency come back at different moments, and none at once.
"""

import random


def delay_s(attempt: int, *, initial_s: float, max_s: float) -> float:
    """Seconds to wait before try `attempt` + 1, `attempt` counted from 0."""
    ceiling = min(max_s, initial_s * 2.0 ** min(attempt, 30))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads load, guards nothing
