"""Dead letters: bad messages kept with their original bytes and where they came from, on `<topic>.dlq`."""

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
    """Tells rows that are bad from a model, a table or a mail server that is: the latter refuses row after row.

    Such are `consecutive` refusals in a row, or a share above `ratio` of the last thousand rows. A refusal is a row
    that could be read and was then not accepted.
    """

    def __init__(self, *, ratio: float, consecutive: int) -> None:
        self._ratio = ratio
        self._consecutive = consecutive
        self._refused: deque[bool] = deque(maxlen=_WINDOW)

    @classmethod
    def from_settings(cls, settings: StreamSettings) -> Self:
        """The limit that DEAD_LETTER_LIMIT_RATIO and DEAD_LETTER_LIMIT_CONSECUTIVE set."""
        return cls(ratio=settings.dead_letter_limit_ratio, consecutive=settings.dead_letter_limit_consecutive)

    def check(self, results: Sequence[object]) -> None:
        """Take in what became of the rows of a batch, in order: those that are Poison were refused.

        Raises Outage if it is not the rows; these are then not taken in, since they are to come again.
        """
        refused = [isinstance(result, Poison) for result in results]
        if not any(refused):
            self._refused.extend(refused)
            return
        seen = [*self._refused, *refused][-_WINDOW:]
        longest = max(len(list(run)) for was_refused, run in groupby(seen) if was_refused)
        if longest >= self._consecutive or (len(seen) >= self._consecutive and sum(seen) > self._ratio * len(seen)):
            first = next(result for result in results if isinstance(result, Poison))
            raise Outage(f"{sum(refused)} of {len(refused)} rows refused, it is not the rows: {first}")
        self._refused.extend(refused)


def refusal(topic: str, reason: str, *, by: str) -> Headers:
    """The headers that say which topic a dead letter belongs to, who refused it, why and when."""
    return [
        ("dlq-reason", reason[:_MAX_REASON].encode()),
        ("dlq-topic", topic.encode()),
        ("dlq-group", by.encode()),
        ("dlq-at-ms", str(time.time_ns() // 1_000_000).encode()),
    ]


def reason_of(letter: Record) -> str:
    """Why it is a dead letter."""
    found = dict(letter.headers)["dlq-reason"]
    return found.decode() if isinstance(found, bytes) else str(found)


def dead_letter(message: Message, reason: str, *, group: str) -> Record:
    """The record that keeps `message`: its value, key and headers, its coordinates, who refused it and why."""
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
    """Work on all rows at once; where that raises Poison, halve until the poisonous rows stand alone.

    Returns a result or the Poison for each row, in order. n rows with one poisonous among them cost about 2 log2(n)
    calls. Any other exception passes through.
    """
    try:
        return list(work(rows))
    except Poison as poison:
        if len(rows) == 1:
            return [poison]
        middle = len(rows) // 2
        return isolate(rows[:middle], work) + isolate(rows[middle:], work)
