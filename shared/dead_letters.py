"""Dead letters: bad messages, kept on `<topic>.dlq` with their original bytes, their origin and the reason."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Self, TypeVar

import structlog
from confluent_kafka import Message

from shared.errors import Outage, Poison
from shared.kafka.messages import Headers, Record, coordinates, headers
from shared.settings import StreamSettings

log = structlog.get_logger()

SUFFIX = ".dlq"
MOST_BYTES = 1_200_000  # of a dead letter; by default, topics accept records of up to 1 MiB
_KEPT_BYTES = 512 * 1024  # of the value, in a dead letter that would be larger
_MAX_REASON = 1000
_WINDOW = 1000  # rows
_REMINDER_S = 60.0

CUT = "dlq-value-bytes"  # the header that only cut dead letters have
_OWN = "dlq-"  # the start of the names of the headers that are not the original record's

T = TypeVar("T")
R = TypeVar("R")


class Limit:
    """Detects that rows are refused because the model, table or mail server is broken, not because the rows are bad.

    The limit is exceeded if `consecutive` rows in succession are refused, or if the refused share of the last thousand
    rows exceeds `ratio`. A row counts as refused if it could be read but was not accepted. Then a reference decides,
    which is known to be good: if it is refused as well, the rows are not the cause.
    """

    def __init__(self, *, ratio: float, consecutive: int) -> None:
        self._ratio = ratio
        self._consecutive = consecutive
        self._refused: deque[bool] = deque(maxlen=_WINDOW)
        self._reported = -_REMINDER_S  # monotonic time

    @classmethod
    def from_settings(cls, settings: StreamSettings) -> Self:
        """Make a limit from DEAD_LETTER_LIMIT_RATIO and DEAD_LETTER_LIMIT_CONSECUTIVE."""
        return cls(ratio=settings.dead_letter_limit_ratio, consecutive=settings.dead_letter_limit_consecutive)

    def check(self, results: Sequence[object], *, reference: Callable[[], None]) -> None:
        """Count the results of a batch, in order. Each Poison in `results` counts as a refused row.

        If the limit is exceeded, call `reference()`, which raises Outage if even something good is refused. The batch
        is then not counted, because it will be redelivered. Otherwise, the rows are the cause, which is logged.
        """
        refused = [isinstance(result, Poison) for result in results]
        if any(refused) and self._exceeded([*self._refused, *refused][-_WINDOW:]):
            first = next(result for result in results if isinstance(result, Poison))
            counts = f"{sum(refused)} of {len(refused)} rows refused"
            try:
                reference()
            except Outage as outage:
                raise Outage(
                    f"{counts}, too many for bad rows to be the cause. First refusal: {first}. Check: {outage}"
                ) from None
            if time.monotonic() - self._reported >= _REMINDER_S:
                self._reported = time.monotonic()
                log.error("many_rows_refused", rows=counts, first_reason=str(first), check="a good row is accepted")
        self._refused.extend(refused)

    def _exceeded(self, seen: Sequence[bool]) -> bool:
        longest = max(len(list(run)) for was_refused, run in groupby(seen) if was_refused)
        return longest >= self._consecutive or (len(seen) >= self._consecutive and sum(seen) > self._ratio * len(seen))


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
    group that refused the message, and the reason. If the message's headers cannot be read, they are left out.
    """
    try:
        original = [header for header in headers(message) if not header[0].startswith(_OWN)]
    except Poison as unreadable:
        original = []
        reason = reason if str(unreadable) in reason else f"{reason}; {unreadable}"
    return _letter(message, reason, group=group, original=original)


def unparsed(message: Message, reason: str, *, group: str) -> Record:
    """Make a dead letter of a message of which nothing may be parsed, not even its headers. They are left out."""
    return _letter(message, reason, group=group, original=[])


def _letter(message: Message, reason: str, *, group: str, original: Headers) -> Record:
    topic, partition, offset = coordinates(message)
    own = [
        *refusal(topic, reason, by=group),
        ("dlq-partition", str(partition).encode()),
        ("dlq-offset", str(offset).encode()),
        ("dlq-timestamp-ms", str(message.timestamp()[1]).encode()),
    ]
    return fit(Record(f"{topic}{SUFFIX}", message.value(), message.key(), [*original, *own]))


def fit(letter: Record, most_bytes: int = MOST_BYTES) -> Record:
    """Cut a dead letter that is larger than `most_bytes`, and say so in its headers.

    At most the first 512 KB of the value are kept. Headers contain the whole value's size in bytes and its SHA-256. A
    large key and large headers are left out. The original record is still on its topic, at the letter's coordinates.
    """
    value, key = letter.value or b"", letter.key or b""
    around = len(key) + sum(len(name.encode()) + len(content or b"") for name, content in letter.headers)
    if len(value) + around <= most_bytes:
        return letter
    kept = min(_KEPT_BYTES, most_bytes // 2)
    headers = letter.headers
    if around > most_bytes // 4:
        key = b""
        headers = [header for header in headers if header[0].startswith(_OWN)]
    if CUT not in dict(headers):
        digest = hashlib.sha256(value).hexdigest().encode()
        headers = [*headers, (CUT, str(len(value)).encode()), ("dlq-value-sha256", digest)]
    return Record(letter.topic, value[:kept], key or None, headers)


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
