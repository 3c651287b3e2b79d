"""A record that ends the process, on the embedded broker: a handler's exception ends the stream as a crash ends it."""

from collections.abc import Callable, Sequence
from threading import Event, Thread

import pytest
from confluent_kafka import Message, TopicPartition
from conftest import Rig, dead_letter_topic, until

from shared.errors import Outage
from shared.kafka.clients import consumer
from shared.settings import StreamSettings
from shared.stream import suspects
from shared.stream.delivery import AtLeastOnce
from shared.stream.flight import Handler, Outcome
from shared.stream.loop import Stream
from shared.stream.suspects import REASON, Announced

SETTINGS = StreamSettings(
    max_batch_size=10, max_batch_wait_ms=200, backoff_initial_seconds=0.05, backoff_max_seconds=0.1
)
KILLER = b"13"


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "_FIRST_DELAY_S", 0.1)


class Crash(Exception):
    """Ends the stream, as the end of the process would."""


def numbers(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


def make_stream(rig: Rig, shutdown: Event) -> Stream:
    return Stream(
        make_consumer=lambda _: consumer(rig.properties, group=rig.topic_1),
        group=rig.topic_1,
        topic=rig.topic_1,
        delivery=AtLeastOnce(properties=rig.properties, shutdown=shutdown),
        settings=SETTINGS,
        shutdown=shutdown,
    )


class Life:
    """One life of a process after another, in which batches of at most ten are handled."""

    def __init__(self, rig: Rig, killer: bytes | None = KILLER) -> None:
        self._rig = rig
        self.killer = killer
        self.handled: list[bytes] = []
        self.batches: list[list[bytes]] = []

    def handle(self, batch: Sequence[Message]) -> Outcome:
        values = [message.value() or b"" for message in batch]
        self.batches.append(values)
        if self.killer in values:
            raise Crash
        self.handled += values
        return Outcome(len(batch))

    def crash(self) -> None:
        """Live until the killer is handled."""
        with pytest.raises(Crash):
            make_stream(self._rig, Event()).run(self.handle)

    def stop_once(self, done: Callable[[], object], handle: Handler | None = None) -> None:
        """Live until `done()`, and stop as after SIGTERM."""
        shutdown = Event()
        stream = make_stream(self._rig, shutdown)

        def idle() -> None:
            if done():
                shutdown.set()

        stream.run(handle or self.handle, ahead=True, idle=idle)


@pytest.fixture
def announced(rig: Rig) -> Callable[[], list[tuple[int, str]]]:
    """What is committed for the partitions that have committed offsets: offset and metadata."""
    client = consumer(rig.properties, group=rig.topic_1)
    partitions = [TopicPartition(rig.topic_1, number) for number in range(4)]

    def read() -> list[tuple[int, str]]:
        found = client.committed(partitions, timeout=10)
        return [(each.offset, each.metadata or "") for each in found if each.offset >= 0]

    return read


@pytest.mark.parametrize("metadata", ["", "starts=1", "starts=x until=1 survived=1 alone=1", "5", "\u0663", None])
def test_what_another_tool_wrote_beside_an_offset_announces_nothing(metadata: str | None) -> None:
    assert Announced.parse(metadata) == Announced()
    assert str(Announced()) == ""


def test_an_announcement_is_read_as_it_was_written() -> None:
    announced = Announced(4, 17, 12, 2)

    assert Announced.parse(str(announced)) == announced


def test_normal_operation_leaves_nothing_beside_the_offsets(
    rig: Rig, announced: Callable[[], list[tuple[int, str]]]
) -> None:
    rig.put(rig.topic_1, numbers(30), key=b"one")
    life = Life(rig, killer=None)

    life.stop_once(lambda: len(life.handled) == 30)

    assert life.batches == [numbers(30)[at : at + 10] for at in (0, 10, 20)]
    assert announced() == [(30, "")]


def test_a_record_that_ends_the_process_is_set_aside_and_its_neighbours_are_handled_in_order(
    rig: Rig, announced: Callable[[], list[tuple[int, str]]]
) -> None:
    rig.put(rig.topic_1, numbers(40), key=b"one")
    life = Life(rig)

    life.crash()
    assert announced() == [(10, "")]  # the first batch was through
    for starts in 1, 2, 3:
        life.crash()
        assert announced() == [(10, f"starts={starts} until=19 survived=-1 alone=0")]
    for alone in 1, 2, 3:
        life.crash()
        assert announced() == [(13, f"starts=3 until=19 survived=-1 alone={alone}")]
        assert life.batches[-1] == [KILLER]
    life.stop_once(lambda: len(life.handled) == 39)

    assert life.handled == [each for each in numbers(40) if each != KILLER]
    (letter,) = rig.read(dead_letter_topic(rig.topic_1), 1)
    assert letter.value() == KILLER
    assert dict(letter.headers() or [])["dlq-reason"] == REASON.encode()
    assert dict(letter.headers() or [])["dlq-offset"] == b"13"
    assert announced() == [(40, "")]


def test_a_record_is_not_set_aside_for_what_ends_the_process_otherwise(rig: Rig) -> None:
    rig.put(rig.topic_1, numbers(40), key=b"one")
    life = Life(rig)

    for _ in range(4):
        life.crash()
    for killer in b"10", b"10", b"11":  # never three times with the same
        life.killer = killer
        life.crash()
    life.killer = None
    life.stop_once(lambda: len(life.handled) == 40)

    assert life.handled == numbers(40)


def test_a_start_that_is_stopped_in_an_orderly_way_is_not_counted(
    rig: Rig, announced: Callable[[], list[tuple[int, str]]]
) -> None:
    rig.put(rig.topic_1, numbers(5), key=b"one")
    tried = Event()

    def later(_batch: Sequence[Message]) -> Outcome:
        tried.set()
        return Outcome(0, again_in_s=30)

    shutdown = Event()
    stream = make_stream(rig, shutdown)
    thread = Thread(target=stream.run, args=[later])
    thread.start()
    until(tried.is_set, what="a batch that is handled and kept")
    until(lambda: announced() == [(0, "starts=1 until=4 survived=-1 alone=0")], what="an announcement")
    shutdown.set()
    thread.join(30)

    assert announced() == [(0, "")]


def test_an_outage_while_a_record_is_alone_is_not_its_fault(
    rig: Rig, announced: Callable[[], list[tuple[int, str]]]
) -> None:
    rig.put(rig.topic_1, numbers(3), key=b"one")
    life = Life(rig, killer=b"0")
    for _ in range(3):
        life.crash()

    def away(_batch: Sequence[Message]) -> Outcome:
        raise Outage("away")

    shutdown = Event()
    stream = make_stream(rig, shutdown)
    thread = Thread(target=stream.run, args=[away])
    thread.start()
    until(lambda: announced() == [(0, "starts=3 until=2 survived=-1 alone=1")], what="a record alone")
    until(lambda: announced() == [(0, "starts=3 until=2 survived=-1 alone=0")], what="that this is taken back")
    shutdown.set()
    thread.join(30)
    assert not thread.is_alive()
