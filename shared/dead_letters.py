"""Dead letters: bad messages, kept on `<topic>.dlq` with their original bytes, their origin and the reason."""

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
    """Detects that rows are refused because the model, table or mail server is broken, not because the rows are bad.

    The limit is exceeded if `consecutive` rows in succession are refused, or if the refused share of the last thousand
    rows exceeds `ratio`. A row counts as refused if it could be read but was not accepted.
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
        """Count the results of a batch, in order. Each Poison in `results` counts as a refused row.

        Raises Outage if the limit is exceeded. The batch is then not counted, because it will be redelivered.
        """
        refused = [isinstance(result, Poison) for result in results]
        if not any(refused):
            self._refused.extend(refused)
            return
        seen = [*self._refused, *refused][-_WINDOW:]
        longest = max(len(list(run)) for was_refused, run in groupby(seen) if was_refused)
        if longest >= self._consecutive or (len(seen) >= self._consecutive and sum(seen) > self._ratio * len(seen)):
            first = next(result for result in results if isinstance(result, Poison))
            counts = f"{sum(refused)} of {len(refused)} rows refused"
            raise Outage(f"{counts}, too many for bad rows to be the cause. First refusal: {first}")
        self._refused.extend(refused)


def refusal(topic: str, reason: str, *, by: str) -> Headers:
    """Make the headers of a dead letter: the topic, the group that refused the record, the reason and the time."""
    return [
        ("dlq-reason", reason[:_MAX_REASON].encode()),
        ("dlq-topic", topic.encode()),
        ("dlq-group", by.encode()),
        ("dlq-at-ms", str(time.time_ns() // 1_000_000).encode()),
    ]


def reason_of(letter: Record) -> str:
    """Return why a record became a dead letter, according to the headers of the dead letter."""
    found = dict(letter.headers)["dlq-reason"]
    return found.decode() if isinstance(found, bytes) else str(found)


def dead_letter(message: Message, reason: str, *, group: str) -> Record:
    """Make a dead letter of `message`.

    The dead letter has the message's value, key and headers. Further headers contain the message's coordinates, the
    group that refused the message, and the reason.
    """
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
    """Call `work` on all rows at once. If `work` raises Poison, halve the rows until each bad row is alone.

    Returns one entry per row, in order: either the row's result or its Poison. If one of n rows is bad, `work` is
    called about 2 log2(n) times. Exceptions other than Poison are not caught.
    """
    try:
        return list(work(rows))
    except Poison as poison:
        if len(rows) == 1:
            return [poison]
        middle = len(rows) // 2
        return isolate(rows[:middle], work) + isolate(rows[middle:], work)
