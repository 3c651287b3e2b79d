"""Finds the record that makes the process end whenever it is handled, and sets it aside.

A crash in C code, or a process that is out of memory, leaves no exception behind. Therefore, before a partition's first
batch is handed over, the loop announces it in the metadata of the partition's committed offset. The next commit clears
the metadata. If the process ends first, the next process finds the announcement.

After three starts that ended like this, the records of the announced batch are handed over one at a time, each of them
announced. A record becomes a dead letter only after the process has ended three times while this record alone was
announced. Processes that are killed for other reasons therefore cost no record.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import structlog
from confluent_kafka import Consumer, Message, TopicPartition

from shared.errors import Outage
from shared.kafka.messages import coordinates
from shared.stream.committed import CommittedOffsets, Place

log = structlog.get_logger()

_STARTS = 3  # that ended before the first batch was through, until records are handed over one at a time
_ALONE = 3  # times that the process ended with a record alone, until the record becomes a dead letter
_FIRST_DELAY_S = 2.0  # after the process ended with a record alone, doubled each time
_WAIT_S = 5.0
_PAUSE_S = 0.2
_ANNOUNCED = re.compile(r"starts=(\d{1,6}) until=(\d{1,19}) survived=(-?\d{1,19}) alone=(\d{1,6})", re.ASCII).fullmatch

REASON = f"the process ended {_ALONE} times while it handled this record alone"


class Announced(NamedTuple):
    """What the metadata of a partition's committed offset says about the processes that ended at this offset."""

    starts: int = 0  # number of processes that were handed a batch from this offset on
    until: int = -1  # offset of the last record of that batch
    survived: int = -1  # records up to this offset were handed over one at a time, and the process went on
    alone: int = 0  # number of processes that were handed the record after `survived` alone

    @classmethod
    def parse(cls, metadata: str | None) -> "Announced":
        """Read the metadata. Anything that no announcement has written counts as none."""
        found = _ANNOUNCED(metadata or "")
        return cls(*map(int, found.groups())) if found else cls()

    def __str__(self) -> str:
        """Format for the metadata. Without a start, the metadata is empty."""
        return "starts={} until={} survived={} alone={}".format(*self) if self.starts else ""


class _Trial:
    """A partition whose first batch since it was assigned was handed over, or is about to be."""

    def __init__(self, committed: int, found: Announced) -> None:
        self.committed = committed  # offset
        self.found = found  # what is restored if an announcement is taken back
        self.announced: Announced | None = None
        self.not_before = time.monotonic() + (_FIRST_DELAY_S * 2 ** (found.alone - 1) if found.alone else 0)

    @property
    def one_at_a_time(self) -> bool:
        return self.found.starts >= _STARTS


class Admitted(NamedTuple):
    """What to hand over next: some of the first messages that wait, or none yet."""

    messages: list[Message]
    condemned: bool = False  # whether this is a single message that must become a dead letter, unparsed
    wait_s: float = 0.0


class Suspects:
    """The partitions of a consumer whose first batch since they were assigned is not through yet.

    A commit of offsets that are not the newest would rewind the group, and the broker accepts such a commit while a
    Kafka transaction with newer offsets is ending. Therefore, offsets are written back only right after they were read
    as stable, and while nothing of their partition is in flight.
    """

    def __init__(self, committed: CommittedOffsets, *, group: str) -> None:
        self._committed = committed
        self._log = log.bind(group=group)
        self._unproven: set[Place] = set()
        self._trials: dict[Place, _Trial] = {}
        self._failing_since: float | None = None  # monotonic time

    @property
    def on_trial(self) -> bool:
        """Whether a first batch is in flight or about to be. No other batch may then be in flight beside it."""
        return bool(self._trials)

    def among(self, messages: Sequence[Message]) -> bool:
        """Whether the first batch of one of these messages' partitions is not through yet."""
        unproven = {partition for _, partition in self._unproven}
        return bool(unproven) and not unproven.isdisjoint(map(Message.partition, messages))

    def admit(self, consumer: Consumer, messages: Sequence[Message]) -> Admitted:
        """Announce the partitions of the first messages that wait, and return those that may be handed over.

        Raises Outage if the announcement cannot be written.
        """
        firsts = {_place(message): message for message in reversed(messages) if _place(message) in self._unproven}
        try:
            self._look(consumer, {place: first for place, first in firsts.items() if place not in self._trials})
            admitted = self._choose(messages)
            if admitted.messages and not admitted.condemned:
                self._announce(consumer, admitted.messages)
        except Outage:
            # A group that is rebalancing accepts no commits for a moment.
            self._failing_since = self._failing_since or time.monotonic()
            if time.monotonic() - self._failing_since > _WAIT_S:
                raise
            return Admitted([], wait_s=_PAUSE_S)
        self._failing_since = None
        return admitted

    def final(self, offsets: Sequence[TopicPartition]) -> None:
        """Record that the batch before these offsets is through. Its commit cleared the announcement."""
        for each in offsets:
            place = each.topic, each.partition
            trial = self._trials.get(place)
            if trial and trial.one_at_a_time and each.offset <= trial.found.until:
                trial.committed, trial.announced, trial.not_before = each.offset, None, 0.0
                trial.found = Announced(trial.found.starts, trial.found.until)
            else:
                self._trials.pop(place, None)
                self._unproven.discard(place)

    def settled(self, committed: Mapping[Place, TopicPartition]) -> None:
        """Record the committed offsets after a delivery whose result was unknown."""
        trials = self._trials
        self.final(
            [each for place, each in committed.items() if place in trials and each.offset > trials[place].committed]
        )

    def survived(self, consumer: Consumer, messages: Sequence[Message]) -> None:
        """Record that the process handled these messages, which are to be handed over again, and went on."""
        if not self._trials:
            return
        for place, last in {_place(message): message for message in messages}.items():
            trial = self._trials.get(place)
            if trial and trial.one_at_a_time and trial.announced:
                _, _, offset = coordinates(last)
                trial.found = trial.found._replace(survived=offset, alone=0)
                self.take_back(consumer, [place])

    def take_back(self, consumer: Consumer, places: Iterable[Place] | None = None) -> None:
        """Take back what was announced (default: for all partitions), because the process is not about to end.

        If this fails, one more start is counted than there was, which costs nothing.
        """
        wanted = self._trials if places is None else places
        back = {place: trial for place in wanted if (trial := self._trials.get(place)) and trial.announced}
        for trial in back.values():
            trial.announced = None
        with suppress(Outage):
            self._write(consumer, {place: trial.found for place, trial in back.items()})

    def withdraw(self, consumer: Consumer) -> None:
        """Take back that a record is handed over alone, because something that it needs is unavailable."""
        self.take_back(consumer, [place for place, trial in self._trials.items() if trial.one_at_a_time])

    def assigned(self, partitions: Sequence[TopicPartition]) -> None:
        """Record that nothing of these partitions has been handed over yet."""
        self._unproven |= {(each.topic, each.partition) for each in partitions}

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        """Forget these partitions."""
        for each in partitions:
            self._trials.pop((each.topic, each.partition), None)
            self._unproven.discard((each.topic, each.partition))

    def _look(self, consumer: Consumer, firsts: Mapping[Place, Message]) -> None:
        """Read what earlier processes have announced for these partitions, given their first message."""
        for place, found in self._committed.read(consumer, firsts).items():
            _, _, first = coordinates(firsts[place])
            trial = _Trial(found.offset if found.offset >= 0 else first, Announced.parse(found.metadata))
            self._trials[place] = trial
            if trial.one_at_a_time:
                self._log.warning(
                    "one_record_at_a_time",
                    partition=place[1],
                    reason=f"the process ended {trial.found.starts} times before the first batch was through",
                    up_to_offset=trial.found.until,
                )

    def _choose(self, messages: Sequence[Message]) -> Admitted:
        """Return the first messages, up to the first that must be handed over alone.

        Messages that were handed over before, and are to be handed over again, accompany it.
        """
        chosen: list[Message] = []
        accompanied = False
        for message in messages:
            trial = self._trials.get(_place(message))
            _, _, offset = coordinates(message)
            if trial is None or not trial.one_at_a_time:
                if accompanied:
                    break
                chosen.append(message)
            elif offset <= trial.found.survived:
                if chosen and not accompanied:
                    break
                accompanied = True
                chosen.append(message)
            elif chosen and not accompanied:
                break
            elif trial.found.alone >= _ALONE:
                if chosen:
                    break
                self._log.error("record_set_aside", partition=message.partition(), offset=offset, reason=REASON)
                return Admitted([message], condemned=True)
            elif (wait_s := trial.not_before - time.monotonic()) > 0:
                # A process that is killed as soon as it starts must not be killed with the same record each time.
                return Admitted(chosen, wait_s=0.0 if chosen else wait_s)
            else:
                return Admitted([*chosen, message])
        return Admitted(chosen)

    def _announce(self, consumer: Consumer, messages: Sequence[Message]) -> None:
        announced = {}
        for place, last in {_place(message): message for message in messages}.items():
            trial = self._trials.get(place)
            if trial is None or trial.announced:
                continue
            _, _, offset = coordinates(last)
            if not trial.one_at_a_time:
                announced[place] = Announced(trial.found.starts + 1, max(offset, trial.found.until))
            elif offset > trial.found.survived:
                announced[place] = trial.found._replace(alone=trial.found.alone + 1)
        self._write(consumer, announced)
        for place, each in announced.items():
            self._trials[place].announced = each

    def _write(self, consumer: Consumer, wanted: Mapping[Place, Announced]) -> None:
        """Commit the committed offsets again, with this metadata. Raises Outage if that fails."""
        if not wanted:
            return
        offsets = []
        for place, found in self._committed.read(consumer, wanted).items():
            trial = self._trials[place]
            if found.offset < 0 or found.offset == trial.committed:
                offsets.append(TopicPartition(*place, trial.committed, str(wanted[place])))
        if offsets:
            self._committed.write(consumer, offsets)


def _place(message: Message) -> Place:
    topic, partition, _ = coordinates(message)
    return topic, partition
