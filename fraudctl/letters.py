"""Lists dead letters, shows them, and replays each of them exactly once.

Kafka records cannot be changed. Therefore, a replayed letter is marked by a small record that is written to the same
partition. A letter is older than its mark, so retention deletes the letter first.
"""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from rich.table import Table
from rich.text import Text

from fraudctl.call import CallError, parse_since
from fraudctl.readable import readable_header, readable_key, readable_value
from shared.dead_letters import CUT, SUFFIX
from shared.errors import Outage, Poison
from shared.kafka import offsets
from shared.kafka.clients import DENIED, producer
from shared.kafka.messages import Headers, coordinates, readable_headers
from shared.kafka.offsets import read_to_end
from shared.kafka.topics import ends
from shared.records import format_time, read_topic_1
from shared.settings import ServiceSettings

UNCONFIRMED = 1000  # replaying more letters than this requires --yes

_MARK = "dlq-replayed"
_TRANSACTIONAL_ID = "fraudctl-dead-letters"
_GROUP = "fraudctl"
_TIMEOUT_S = 15.0
_OPEN_S = 60.0  # brokers abort a service's abandoned transaction within twenty seconds
_TRANSACTION_LETTERS = 1000
_MOST_BYTES = "100000000"  # the broker decides, which counts compressed bytes
_TRANSACTION_BYTES = 16 * 1024 * 1024  # small, because the broker aborts a Kafka transaction after ten seconds
_FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})

_ID = re.compile(r"(.+):(\d{1,10}):(\d{1,19})", re.ASCII).fullmatch
_NUMBER = re.compile(r"\d{1,18}", re.ASCII).fullmatch
_EPOCH_MS = re.compile(r"\d{1,13}", re.ASCII).fullmatch


class Fenced(CallError):
    """Another replay has started, and has fenced this replay."""

    exit_code = 1


class LetterId(NamedTuple):
    """The topic, partition and offset of a dead letter."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.partition}:{self.offset}"


class Letter(NamedTuple):
    """A dead letter: the original record, and why, when and by which consumer group it was rejected."""

    id: LetterId
    value: bytes | None
    key: bytes | None
    headers: Headers
    at_ms: int  # time of the rejection, in epoch milliseconds
    replayed_at_ms: int | None = None

    @property
    def topic(self) -> str:
        """The topic that the rejected record came from."""
        return self._header("dlq-topic") or self.id.topic.removesuffix(SUFFIX)

    @property
    def reason(self) -> str:
        """Why the record was rejected."""
        return self._header("dlq-reason")

    @property
    def group(self) -> str:
        """The consumer group that rejected the record."""
        return self._header("dlq-group")

    @property
    def cut(self) -> bool:
        """Whether the letter has only a part of the rejected record, because the record was too large."""
        return bool(_NUMBER(self.whole_bytes))

    @property
    def whole_bytes(self) -> str:
        """The number of bytes of the rejected record's value, if the letter is cut."""
        return self._header(CUT)

    @property
    def original_headers(self) -> Headers:
        """The headers of the rejected record."""
        return [header for header in self.headers if not header[0].startswith("dlq-")]

    @property
    def origin(self) -> TopicPartition | None:
        """Where the rejected record is, or None if it was never on a topic."""
        partition, offset = self._header("dlq-partition"), self._header("dlq-offset")
        known = _NUMBER(partition) and _NUMBER(offset)
        return TopicPartition(self.topic, int(partition), int(offset)) if known else None

    @property
    def digest(self) -> str:
        """The SHA-256 of the rejected record's whole value, if the letter is cut."""
        return self._header("dlq-value-sha256")

    def _header(self, name: str) -> str:
        return _text(dict(self.headers).get(name))


class Selection(NamedTuple):
    """A filter that selects the dead letters of `topics` that match all the other fields."""

    topics: Sequence[str]  # topics of the original records
    ids: Collection[LetterId] = ()
    reason: str = ""
    since_ms: int = 0  # in epoch milliseconds

    def matches(self, letter: Letter) -> bool:
        """Whether the letter matches all fields except `topics`."""
        return (
            (not self.ids or letter.id in self.ids)
            and self.reason.casefold() in letter.reason.casefold()
            and letter.at_ms >= self.since_ms
        )


class Replayed(NamedTuple):
    """The number of letters that were replayed, and the number of letters that were skipped."""

    replayed: int
    skipped: int  # letters that were replayed before


def select(
    settings: ServiceSettings,
    *,
    ids: Collection[str] = (),
    topic: str | None = None,
    reason: str = "",
    since: str | None = None,
) -> Selection:
    """Return the filter for these command-line options. Raises CallError if an option is invalid."""
    known = (settings.topic_1, settings.topic_2)
    if ids:
        wanted = {parse_id(each, known) for each in ids}
        return Selection(sorted({each.topic.removesuffix(SUFFIX) for each in wanted}), wanted)
    return Selection(
        known if topic is None else (parse_topic(topic, known),),
        reason=reason,
        since_ms=0 if since is None else parse_since(since, now_ms=time.time_ns() // 1_000_000),
    )


def parse_id(text: str, topics: Sequence[str]) -> LetterId:
    """Parse an ID such as `topic_1.dlq:3:17`. Raises CallError if the ID is malformed or names an unknown topic."""
    found = _ID(text)
    if not found:
        raise CallError(f"{text!r} is not the ID of a dead letter. An example of an ID is {topics[0]}{SUFFIX}:3:17.")
    return LetterId(parse_topic(found[1], topics) + SUFFIX, int(found[2]), int(found[3]))


def parse_topic(text: str, topics: Sequence[str]) -> str:
    """Return the topic's name without the dead-letter suffix. Raises CallError if the topic is unknown."""
    name = text.removesuffix(SUFFIX)
    if name not in topics:
        raise CallError(f"there is no topic {text!r}. Choose from: {', '.join(topics)}")
    return name


def read(properties: Mapping[str, str], selection: Selection) -> list[Letter]:
    """Return the selected dead letters, oldest first.

    Raises CallError if a topic or an ID does not exist, and Outage if Kafka does not respond.
    """
    letters: dict[str, Letter] = {}
    marks: dict[str, int] = {}
    starts = [
        TopicPartition(end.topic, end.partition, 0)
        for end in _ends(properties, [topic + SUFFIX for topic in selection.topics])
    ]
    for message in read_to_end(properties, starts, group=_GROUP):
        letter = _letter(message)
        if marked := dict(letter.headers).get(_MARK):
            marks[f"{letter.id.topic}:{_text(marked)}"] = letter.at_ms
        elif selection.matches(letter):
            letters[str(letter.id)] = letter
    for wanted in selection.ids:
        if str(wanted) not in letters:
            raise CallError(f"there is no dead letter {wanted}. List them with `fraudctl dead-letters list`.")
    found = (letter._replace(replayed_at_ms=marks.get(name)) for name, letter in letters.items())
    return sorted(found, key=lambda letter: (letter.at_ms, letter.id))


def replay(
    properties: Mapping[str, str],
    selection: Selection,
    *,
    limit: int | None = None,
    confirmed: bool = False,
    corrected: bytes | None = None,
) -> Replayed:
    """Put the selected dead letters back on their topics, each exactly once, and mark them as replayed.

    Letters that are already marked are skipped. At most `limit` letters are replayed, oldest first. Replaying more than
    `UNCONFIRMED` letters requires `confirmed`. If `corrected` is given, it replaces the value of each letter.

    Raises Fenced if another replay has started, and Outage if Kafka fails. Any other CallError is raised before
    anything is written.
    """
    names = [topic + SUFFIX for topic in selection.topics]
    _ends(properties, [*names, *selection.topics])
    client = producer({**properties, "message.max.bytes": _MOST_BYTES}, transactional_id=_TRANSACTIONAL_ID)
    # 1. Fence any other replay. The broker then aborts the open transaction of that replay.
    try:
        client.init_transactions(_TIMEOUT_S)
    except KafkaException as exception:
        raise _verdict(exception, [_TRANSACTIONAL_ID]) from None
    # 2. Wait for open Kafka transactions, because records behind them are invisible. Then read all letters and marks.
    _wait_for_open_transactions(properties, names)
    letters = read(properties, selection)
    waiting = [letter for letter in letters if letter.replayed_at_ms is None]
    chosen = waiting[:limit]
    if len(chosen) > UNCONFIRMED and not confirmed:
        raise CallError(
            f"{len(chosen):,} dead letters would be replayed. Add --yes to replay more than {UNCONFIRMED:,}."
        )
    if corrected is not None:
        chosen = [_corrected(letter, corrected) for letter in chosen]
    else:
        chosen = [_whole(properties, letter) if letter.cut else letter for letter in chosen]
    # 3. Write each record and its mark in the same Kafka transaction.
    replayed = 0
    for batch in batches(chosen):
        _write(client, batch, done=replayed)
        replayed += len(batch)
    return Replayed(replayed, len(letters) - len(waiting))


def batches(letters: Iterable[Letter]) -> Iterator[list[Letter]]:
    """Split the letters, without reordering, into batches that are small enough for one Kafka transaction each."""
    batch: list[Letter] = []
    size = 0
    for letter in letters:
        length = len(letter.value or b"")
        if batch and (len(batch) == _TRANSACTION_LETTERS or size + length > _TRANSACTION_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(letter)
        size += length
    if batch:
        yield batch


def save(letter: Letter, path: Path) -> None:
    """Write the letter's value to a new file that only the current user can read.

    Raises CallError if the letter has no value, and OSError if the file exists already or cannot be written.
    """
    if letter.value is None:
        raise CallError(f"{letter.id} has no value to save")
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(letter.value)


def overview(letters: Iterable[Letter]) -> Table:
    """Return a table of the letters."""
    table = Table()
    table.add_column("id", no_wrap=True)
    table.add_column("when (UTC)")
    table.add_column("rejected by", overflow="fold")
    table.add_column("reason", overflow="fold", ratio=1)
    table.add_column("replayed")
    for letter in letters:
        replayed = "no" if letter.replayed_at_ms is None else _time(letter.replayed_at_ms)
        row = (
            str(letter.id),
            _time(letter.at_ms),
            letter.group,
            readable_header("dlq-reason", letter.reason),
            replayed,
        )
        table.add_row(*map(Text, row))
    return table


def totals(letters: Sequence[Letter]) -> list[str]:
    """Return the number of letters as a line of text. If there are several reasons, a line for each reason follows."""
    if not letters:
        return ["no dead letters"]
    reasons = Counter(map(_reason, letters))
    kinds = [f"{count:7,}  {reason}" for reason, count in reasons.most_common()] if len(reasons) > 1 else []
    return [counted(len(letters)), *kinds]


def counted(number: int) -> str:
    """Return the number with its noun: `1 dead letter`, `2 dead letters`."""
    return f"{number:,} dead letter{'' if number == 1 else 's'}"


def description(letter: Letter) -> str:
    """Describe a letter in lines of text, with card numbers and birth dates masked."""
    replayed = "no" if letter.replayed_at_ms is None else f"{_time(letter.replayed_at_ms)} UTC"
    whole = f" of {int(letter.whole_bytes):,}" if letter.cut else ""
    size = "" if letter.value is None else f" ({len(letter.value):,}{whole} bytes)"
    return "\n".join(
        [
            f"{letter.id}, rejected {_time(letter.at_ms)} UTC, replayed: {replayed}",
            "",
            "headers:",
            *(f"  {readable_header('', name)}: {readable_header(name, value)}" for name, value in letter.headers),
            f"key: {readable_key(letter.key)}",
            f"value{size}:",
            readable_value(letter.value),
        ]
    )


def _letter(message: Message) -> Letter:
    found = readable_headers(message)
    at = _text(dict(found).get("dlq-at-ms"))
    return Letter(
        LetterId(*coordinates(message)),
        message.value(),
        message.key(),
        found,
        int(at) if _EPOCH_MS(at) else message.timestamp()[1],
    )


def _write(client: Producer, letters: Sequence[Letter], *, done: int) -> None:
    """Write the letters and their marks in one Kafka transaction.

    `done` is the number of letters that are already replayed. The error message contains this number.

    Raises Fenced if another replay has started, and Outage if Kafka fails.
    """
    try:
        client.begin_transaction()
        for letter in letters:
            _enqueue(client, letter.topic, letter.value, letter.key, letter.original_headers)
            mark: Headers = [
                (_MARK, f"{letter.id.partition}:{letter.id.offset}".encode()),
                ("dlq-at-ms", str(time.time_ns() // 1_000_000).encode()),
            ]
            _enqueue(client, letter.id.topic, None, None, mark, partition=letter.id.partition)
        client.commit_transaction(_TIMEOUT_S)
    except KafkaException as exception:
        problem = exception
        try:
            client.abort_transaction(_TIMEOUT_S)
        except KafkaException as another:
            if another.args[0].code() in _FENCED:
                problem = another
        names = {name for letter in letters for name in (letter.topic, letter.id.topic)}
        raise _verdict(problem, [_TRANSACTIONAL_ID, *sorted(names)], replayed=done) from None


def _enqueue(
    client: Producer,
    topic: str,
    value: bytes | None,
    key: bytes | None,
    headers: Headers,
    *,
    partition: int = -1,  # -1: the record's key decides
) -> None:
    while True:
        try:
            return client.produce(topic, value=value, key=key, headers=headers, partition=partition)
        except BufferError:
            client.poll(1.0)


def _verdict(exception: KafkaException, used: Sequence[str], *, replayed: int = 0) -> Exception:
    error = exception.args[0]
    if error.code() in _FENCED:
        return Fenced(f"another replay has started and continues where this one stopped, after {counted(replayed)}")
    reason = f"no response within {_TIMEOUT_S:.0f} s" if error.code() == KafkaError._TIMED_OUT else error.str()
    if error.code() in DENIED:
        reason = f"{', '.join(used)}: {reason}"
    return Outage(f"Kafka: {reason} (replayed before that: {counted(replayed)})")


def _wait_for_open_transactions(properties: Mapping[str, str], names: Sequence[str]) -> None:
    """Wait until every record written so far is committed or aborted. Raises Outage if the wait takes too long.

    Consumers do not see records behind an open Kafka transaction.
    """
    partitions = [TopicPartition(end.topic, end.partition) for end in ends(properties, names)]
    written = offsets.ends(properties, partitions, committed=False)
    deadline = time.monotonic() + _OPEN_S
    while any(end.offset < written[end.topic, end.partition] for end in ends(properties, names)):
        if time.monotonic() > deadline:
            raise Outage(
                f"Kafka: a transaction on {' or '.join(names)} has been open for {_OPEN_S:.0f} s."
                " Find it with `kafka-transactions.sh find-hanging`, and end it with `kafka-transactions.sh abort`."
            )
        time.sleep(0.2)


def _ends(properties: Mapping[str, str], names: Sequence[str]) -> list[TopicPartition]:
    """For every partition of these topics, return the offset at which the committed records end.

    Raises CallError if a topic is missing or is hidden from this login, and Outage if Kafka does not respond.
    """
    found = ends(properties, names)
    for name in names:
        if not any(end.topic == name for end in found):
            raise CallError(
                f"there is no topic {name}, or this login has no access to it. Run `fraudctl topics check`."
            )
    return found


def _whole(properties: Mapping[str, str], letter: Letter) -> Letter:
    """Return the letter with the value, key and headers of the rejected record itself, which is read again.

    Raises CallError if the record is no longer on its topic, and Outage if Kafka does not respond.
    """
    place = letter.origin
    record = offsets.read_at(properties, place, group=_GROUP) if place else None
    value = (record.value() if record else None) or b""
    if record is None or hashlib.sha256(value).hexdigest() != letter.digest:
        where = f"{place.topic} {place.partition}:{place.offset}" if place else "Kafka"
        raise CallError(
            f"{letter.id} has only the first part of its record, and the record is not at {where} any more."
            " Replay it alone, with the whole value in a file: --value FILE"
        )
    return letter._replace(value=value, key=record.key(), headers=readable_headers(record))


def _corrected(letter: Letter, value: bytes) -> Letter:
    """Return the letter with its value replaced.

    If the letter has no key and the new value is a single valid transaction, the letter gets this transaction's key.
    """
    key = letter.key
    if key is None:
        with suppress(Poison):
            rows = read_topic_1(value)
            key = rows.transactions[0].key if len(rows.transactions) == 1 and not rows.bad else None
    return letter._replace(value=value, key=key)


def _reason(letter: Letter) -> str:
    return readable_header("dlq-reason", letter.reason)


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value or ""


def _time(epoch_ms: int) -> str:
    return format_time(epoch_ms // 1000)
