"""Dead letters: bad messages, kept on `<topic>.dlq` with their original bytes and where they came from."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Self, TypeVar

from confluent_kafka import Message

from shared.errors import Outage, Poison
from shared.kafka.messages import Headers, Record, coordinates, headers
from shared.settings import StreamSettings

SUFFIX = ".dlq"
_MAX_REASON = 1000
_WINDOW = 1000  # rows

T = TypeVar("T")
R = TypeVar("R")


class Limit:
    """Distinguishes bad rows from a broken model, table or mail server, which refuses row after row.

    The limit is exceeded if `consecutive` rows in a row are refused, or a larger share than `ratio` of the last
    thousand rows. A refused row is one that could be read, but was not accepted.
    """

    def __init__(self, *, ratio: float, consecutive: int) -> None:
        self._ratio = ratio
        self._consecutive = consecutive
        self._refused: deque[bool] = deque(maxlen=_WINDOW)

    @classmethod
    def from_settings(cls, settings: StreamSettings) -> Self:
        """Make a limit from DEAD_LETTER_LIMIT_RATIO and DEAD_LETTER_LIMIT_CONSECUTIVE."""
        return cls(ratio=settings.dead_letter_limit_ratio, consecutive=settings.dead_letter_limit_consecutive)

    def check(self, results: Sequence[object]) -> None:
        """Count the results of a batch, in order; a result that is Poison is a refused row.

        Raises Outage if the limit is exceeded. The batch is then not counted, since it will be redelivered.
        """
        refused = [isinstance(result, Poison) for result in results]
        if not any(refused):
            self._refused.extend(refused)
            return
        seen = [*self._refused, *refused][-_WINDOW:]
        longest = max(len(list(run)) for was_refused, run in groupby(seen) if was_refused)
        if longest >= self._consecutive or (len(seen) >= self._consecutive and sum(seen) > self._ratio * len(seen)):
            first = next(result for result in results if isinstance(result, Poison))
            raise Outage(f"{sum(refused)} of {len(refused)} rows refused, too many to be bad rows: {first}")
        self._refused.extend(refused)


def refusal(topic: str, reason: str, *, by: str) -> Headers:
    """Headers for a dead letter: the record's topic, the group that refused the record, the reason and the time."""
    return [
        ("dlq-reason", reason[:_MAX_REASON].encode()),
        ("dlq-topic", topic.encode()),
        ("dlq-group", by.encode()),
        ("dlq-at-ms", str(time.time_ns() // 1_000_000).encode()),
    ]


def reason_of(letter: Record) -> str:
    """Why a record became a dead letter, as its headers say."""
    found = dict(letter.headers)["dlq-reason"]
    return found.decode() if isinstance(found, bytes) else str(found)


def dead_letter(message: Message, reason: str, *, group: str) -> Record:
    """Make a dead letter of `message`: its value, key, headers and coordinates, the refusing group, and the reason."""
    topic, partition, offset = coordinates(message)
    original = [header for header in headers(message) if not header[0].startswith("dlq-")]
    return Record(
        topic=f"{topic}{SUFFIX}",
        value=message.value(),
        key=message.key(),
        headers=[
            *original,
            *refusal(topic, reason, by=group),
            ("dlq-partition", str(partition).encode()),
            ("dlq-offset", str(offset).encode()),
            ("dlq-timestamp-ms", str(message.timestamp()[1]).encode()),
        ],
    )


def isolate(rows: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R | Poison]:
    """Call `work` on all rows at once; if it raises Poison, halve the rows until each bad row is alone.

    Returns one entry per row, in order: the result or the Poison. n rows with one bad row among them cost about
    2 log2(n) calls. Any other exception is passed on.
    """
    try:
        return list(work(rows))
    except Poison as poison:
        if len(rows) == 1:
            return [poison]
        middle = len(rows) // 2
        return isolate(rows[:middle], work) + isolate(rows[middle:], work)
