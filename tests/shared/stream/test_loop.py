"""The stream loop, on the embedded broker: what a handler is given, and what is committed when."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from conftest import Rig, until
from structlog.testing import capture_logs

from shared.dead_letters import dead_letter
from shared.errors import Outage
from shared.kafka.clients import consumer
from shared.kafka.messages import Record
from shared.settings import StreamSettings
from shared.stream.delivery import AtLeastOnce, Delivery
from shared.stream.flight import Handler, Outcome
from shared.stream.loop import Stream

SETTINGS = StreamSettings(max_batch_size=10, max_batch_wait_ms=200, backoff_initial_seconds=0.1)


def make_stream(
    rig: Rig,
    shutdown: Event,
    *,
    settings: StreamSettings = SETTINGS,
    delivery: Delivery | None = None,
    make_consumer: Callable[[], Any] | None = None,
    **properties: str,
) -> Stream:
    return Stream(
        make_consumer=make_consumer or (lambda _: consumer({**rig.properties, **properties}, group=rig.topic_1)),
        group=rig.topic_1,
        topic=rig.topic_1,
        delivery=delivery or AtLeastOnce(properties=rig.properties, shutdown=shutdown),
        settings=settings,
        shutdown=shutdown,
    )


@contextmanager
def streaming(
    rig: Rig, handle: Handler, *, settings: StreamSettings = SETTINGS, ahead: bool = False, **properties: str
) -> Iterator[Event]:
    """A stream over topic_1 in a thread of its own; yields its shutdown event, and sets it at the end."""
    shutdown = Event()
    stream = make_stream(rig, shutdown, settings=settings, **properties)
    thread = threading.Thread(target=stream.run, args=[handle], kwargs={"ahead": ahead})
    thread.start()
    try:
        yield shutdown
    finally:
        shutdown.set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def committed(rig: Rig) -> Callable[[], int]:
    """How many records of topic_1 the group has committed."""
    client = consumer(rig.properties, group=rig.topic_1)
    partitions = [TopicPartition(rig.topic_1, number) for number in range(4)]
    return lambda: sum(max(0, each.offset) for each in client.committed(partitions, timeout=10))


def numbers(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


class Recorder:
    """An observer that notes each call with its partitions and offsets."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def assigned(self, partitions: Sequence[TopicPartition]) -> None:
        self.calls += [("assigned", each.partition, 0) for each in partitions]

    def final(self, offsets: Sequence[TopicPartition]) -> None:
        self.calls += [("final", each.partition, each.offset) for each in offsets]

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        self.calls += [("revoked", each.partition, 0) for each in partitions]


def test_an_observer_sees_partitions_assigned_then_final_then_revoked(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(12), key=b"one card")
    shutdown, recorder = Event(), Recorder()
    stream = Stream(
        make_consumer=lambda _: consumer(rig.properties, group=rig.topic_1),
        group=rig.topic_1,
        topic=rig.topic_1,
        delivery=AtLeastOnce(properties=rig.properties, shutdown=shutdown),
        settings=SETTINGS,
        shutdown=shutdown,
        observers=[recorder],
    )
    thread = threading.Thread(target=stream.run, args=[lambda batch: Outcome(len(batch))])
    thread.start()
    until(lambda: committed() == 12)
    shutdown.set()
    thread.join(20)

    (partition,) = {place for call, place, _ in recorder.calls if call == "final"}
    seen = [(call, offset) for call, place, offset in recorder.calls if place == partition]
    assert seen == [("assigned", 0), ("final", 10), ("final", 12), ("revoked", 0)]


def test_batches_are_full_at_backlog_and_in_order(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(30), key=b"one card")
    batches: list[list[bytes]] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        batches.append([message.value() for message in batch])
        return Outcome(len(batch))

    with streaming(rig, handle):
        until(lambda: committed() == 30)

    assert [len(batch) for batch in batches] == [10, 10, 10]
    assert [value for batch in batches for value in batch] == numbers(30)


def test_what_a_handler_leaves_over_is_handed_to_it_again(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(12), key=b"one card")
    finished: list[bytes] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        finished.extend(message.value() for message in batch[:3])
        return Outcome(min(3, len(batch)), [Record(rig.topic_2, batch[0].value(), None, [])])

    with streaming(rig, handle):
        until(lambda: committed() == 12)

    assert finished == numbers(12)
    assert len(rig.read(rig.topic_2, 4)) == 4


def test_what_is_redelivered_later_comes_with_what_has_arrived_since(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(3), key=b"one card")
    batches: list[list[bytes]] = []
    at: list[float] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        at.append(time.monotonic())
        batches.append([message.value() for message in batch])
        return Outcome(0, again_in_s=2.0) if len(batches) == 1 else Outcome(len(batch))

    with streaming(rig, handle):
        until(lambda: batches, what="the first batch")
        rig.put(rig.topic_1, numbers(5)[3:], key=b"one card")
        until(lambda: committed() == 5)

    assert batches == [numbers(3), numbers(5)]
    assert at[1] - at[0] >= 2


def test_a_full_batch_does_not_wait(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(3), key=b"one card")
    batches: list[int] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        batches.append(len(batch))
        return Outcome(0, again_in_s=3600) if len(batches) == 1 else Outcome(len(batch))

    with streaming(rig, handle):
        until(lambda: batches == [3], what="the first batch")
        rig.put(rig.topic_1, numbers(12)[3:], key=b"one card")
        until(lambda: committed() == 12)

    assert batches[:2] == [3, 10]


def test_what_is_kept_is_redelivered_and_the_rest_is_committed_with_it(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(6), key=b"one card")
    batches: list[list[bytes]] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        batches.append([message.value() for message in batch])
        if len(batches) == 1:
            return Outcome(0, keep=[batch[1], batch[-1]], again_in_s=0.5)
        assert committed() == 0
        return Outcome(len(batch))

    with streaming(rig, handle):
        until(lambda: committed() == 6)

    assert batches == [numbers(6), [b"1", b"5"]]


def test_stopped_while_it_waits_it_leaves_its_batch_to_the_next(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(3), key=b"one card")
    gathering = Event()

    def gather(batch: Sequence[Message]) -> Outcome:
        gathering.set()
        return Outcome(0, keep=batch[-1:], again_in_s=3600)

    with streaming(rig, gather):
        assert gathering.wait(20)
    assert committed() == 0

    batches: list[list[bytes]] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        batches.append([message.value() for message in batch])
        return Outcome(len(batch))

    with streaming(rig, handle):
        until(lambda: committed() == 3)
    assert batches == [numbers(3)]


def test_an_outage_after_the_wait_is_one_like_any_other(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(4), key=b"one card")
    batches: list[list[bytes]] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        batches.append([message.value() for message in batch])
        if len(batches) == 1:
            return Outcome(1, keep=batch[2:], again_in_s=0.3)
        if len(batches) == 2:
            raise Outage("away")
        return Outcome(len(batch))

    with streaming(rig, handle):
        until(lambda: committed() == 4)

    assert batches == [numbers(4), [b"2", b"3"], [b"2", b"3"]]


def test_in_an_outage_the_batch_is_redelivered_and_nothing_is_committed(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(5), key=b"one card")
    over = Event()
    tries: list[int] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        tries.append(len(batch))
        if not over.is_set():
            raise Outage("away")
        return Outcome(len(batch))

    with streaming(rig, handle):
        until(lambda: len(tries) >= 3)
        assert committed() == 0
        rig.put(rig.topic_1, numbers(5), key=b"one card")
        over.set()
        until(lambda: committed() == 10)

    assert tries[0] == 5


def test_stopped_in_an_outage_it_leaves_its_batch_to_the_next(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(5), key=b"one card")
    tried = Event()

    def away(_batch: Sequence[Message]) -> Outcome:
        tried.set()
        raise Outage("away")

    with streaming(rig, away):
        assert tried.wait(20)
    assert committed() == 0

    with streaming(rig, lambda batch: Outcome(len(batch))):
        until(lambda: committed() == 5)


def test_a_handler_may_take_longer_than_the_group_waits_for_a_poll(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(1), key=b"one card")
    handed_over, go_on = Event(), Event()
    handled: list[bytes] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        handled.extend(message.value() for message in batch)
        handed_over.set()
        go_on.wait(20)
        return Outcome(len(batch))

    patience = {"max.poll.interval.ms": "2000", "session.timeout.ms": "2000", "heartbeat.interval.ms": "500"}
    with streaming(rig, handle, **patience):
        assert handed_over.wait(20)
        threading.Timer(3, go_on.set).start()  # longer than the two seconds: the length is the point
        until(lambda: committed() == 1)
        rig.put(rig.topic_1, [b"next"], key=b"one card")
        until(lambda: committed() == 2)

    assert handled == [b"0", b"next"]


def test_what_was_done_is_in_the_log_soon_though_nothing_follows(rig: Rig) -> None:
    rig.put(rig.topic_1, numbers(3), key=b"one card")

    with capture_logs() as lines, streaming(rig, lambda batch: Outcome(len(batch))) as shutdown:
        until(lambda: any(line.get("records") == 3 for line in lines), timeout_s=30, what="a line on the records")
        assert not shutdown.is_set()


def test_a_broken_handler_ends_the_service_and_commits_nothing(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(5), key=b"one card")

    def handle(_batch: Sequence[Message]) -> Outcome:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_stream(rig, Event()).run(handle)

    assert committed() == 0


class Counting:
    """A consumer that counts its partitions, and the messages it gave out."""

    def __init__(self, client: Consumer) -> None:
        self._client = client
        self.given = self.partitions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def poll(self, timeout: float) -> Message | None:
        message = self._client.poll(timeout)
        self.given += message is not None
        self.partitions = len(self._client.assignment())  # here, because the client lets another thread's call wait
        return message


def test_what_a_rebalance_brings_in_an_outage_waits_on_the_broker(rig: Rig) -> None:
    for number in range(20):
        rig.put(rig.topic_1, numbers(250), key=str(number).encode())
    client = Counting(consumer(rig.properties, group=rig.topic_1))
    shutdown = Event()

    def away(_batch: Sequence[Message]) -> Outcome:
        raise Outage("away")

    stream = make_stream(rig, shutdown, make_consumer=lambda _: client)
    with streaming(rig, away):
        thread = threading.Thread(target=stream.run, args=[away])
        thread.start()
        until(lambda: client.partitions > 0, what="a part of the partitions")
    try:
        until(lambda: client.partitions == 4, what="all partitions, once the other left")
        until(lambda: client.given > 0, what="the first messages")
        time.sleep(2)  # long enough to fetch thousands
        assert client.given < 500
    finally:
        shutdown.set()
        thread.join(20)


class Losing:
    """A consumer that learns, once `lost` is set, that its partitions are others'."""

    def __init__(self, client: Consumer) -> None:
        self._client = client
        self.lost = Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def subscribe(self, names: list[str], **callbacks: Any) -> None:
        self._on_lost = callbacks["on_lost"]
        self._client.subscribe(names, **callbacks)

    def poll(self, timeout: float) -> Message | None:
        if self.lost.is_set():
            self.lost.clear()
            self._on_lost(self._client, self._client.assignment())
        return self._client.poll(timeout)


def test_it_says_so_when_what_waited_in_an_outage_is_anothers(rig: Rig) -> None:
    rig.put(rig.topic_1, numbers(3), key=b"one")
    client = Losing(consumer(rig.properties, group=rig.topic_1))
    shutdown, tried, idle = Event(), Event(), Event()

    def away(_batch: Sequence[Message]) -> Outcome:
        idle.clear()
        tried.set()
        raise Outage("away")

    stream = make_stream(rig, shutdown, make_consumer=lambda _: client)
    thread = threading.Thread(target=stream.run, args=[away], kwargs={"idle": idle.set})
    thread.start()
    try:
        assert tried.wait(20)
        tried.clear()
        assert tried.wait(20)
        assert not idle.is_set()
        client.lost.set()
        assert idle.wait(10)
    finally:
        shutdown.set()
        thread.join(20)


class Through:
    """A delivery that hands everything on to another."""

    def __init__(self, inner: Delivery) -> None:
        self._inner = inner

    def open(self) -> None:
        self._inner.open()

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        self._inner.deliver(records, offsets, generation)

    def commit(self, client: Consumer, offsets: Sequence[TopicPartition]) -> None:
        self._inner.commit(client, offsets)

    def release(self, places: Sequence[tuple[str, int]]) -> None:
        self._inner.release(places)

    def undo(self, place: TopicPartition, generation: object) -> None:
        self._inner.undo(place, generation)

    def close(self) -> None:
        self._inner.close()


class AnswerLost(Through):
    """A delivery whose first answer is lost on its way: what it was given is final all the same."""

    def __init__(self, inner: Delivery, client: Consumer) -> None:
        super().__init__(inner)
        self._client = client
        self._lost = False

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        super().deliver(records, offsets, generation)
        if not self._lost:
            self._client.commit(offsets=list(offsets), asynchronous=False)
            self._lost = True
            raise Outage("the answer was lost")


@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_made_final_without_an_answer_is_not_handled_again(
    rig: Rig, committed: Callable[[], int], ahead: bool
) -> None:
    rig.put(rig.topic_1, numbers(25), key=b"one card")
    handled: list[list[bytes]] = []
    shutdown = Event()
    client = consumer(rig.properties, group=rig.topic_1)

    def handle(batch: Sequence[Message]) -> Outcome:
        done = len(batch) if ahead else min(4, len(batch))
        handled.append([message.value() or b"" for message in batch[:done]])
        return Outcome(done)

    delivery = AnswerLost(AtLeastOnce(properties=rig.properties, shutdown=shutdown), client)
    stream = make_stream(rig, shutdown, delivery=delivery, make_consumer=lambda _: client)
    thread = threading.Thread(target=stream.run, args=[handle], kwargs={"ahead": ahead})
    thread.start()
    until(lambda: committed() == 25, what="all of it committed")
    shutdown.set()
    thread.join(20)

    if ahead and handled[1] in handled[2:]:  # it was handled while the answer was lost, and had to wait its turn
        del handled[1]
    assert [value for batch in handled for value in batch] == numbers(25)


class Gated(Through):
    """A delivery that waits for a gate, which is open at first, and perhaps fails once behind it."""

    def __init__(self, inner: Delivery) -> None:
        super().__init__(inner)
        self.fails = False
        self.gate = Event()
        self.gate.set()

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        assert self.gate.wait(20)
        if self.fails:
            self.fails = False
            raise Outage("away")
        super().deliver(records, offsets, generation)


@pytest.mark.parametrize("fails", [False, True], ids=["final", "in vain"])
def test_ahead_the_next_batch_is_handled_while_one_is_made_final(
    rig: Rig, committed: Callable[[], int], fails: bool
) -> None:
    rig.put(rig.topic_1, numbers(10), key=b"one card")
    handled: list[int] = []
    shutdown = Event()

    def handle(batch: Sequence[Message]) -> Outcome:
        handled.append(len(batch))
        return Outcome(len(batch), [Record(rig.topic_2, message.value(), b"one card", []) for message in batch])

    delivery = Gated(AtLeastOnce(properties=rig.properties, shutdown=shutdown))
    stream = make_stream(rig, shutdown, delivery=delivery)
    thread = threading.Thread(target=lambda: stream.run(handle, ahead=True))
    thread.start()
    until(lambda: committed() == 10, what="the first batch, which is alone")
    delivery.gate.clear()
    delivery.fails = fails
    rig.put(rig.topic_1, numbers(35)[10:], key=b"one card")
    until(lambda: len(handled) == 3, what="another batch behind the one that is held back")
    assert committed() == 10
    delivery.gate.set()
    until(lambda: committed() == 35, what="all of it committed")
    shutdown.set()
    thread.join(20)

    assert [message.value() for message in rig.read(rig.topic_2, 35)] == numbers(35)


def test_ahead_no_batch_overtakes_one_that_waits(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(35), key=b"one card")
    tries = 0

    def handle(batch: Sequence[Message]) -> Outcome:
        nonlocal tries
        if batch[0].value() == b"10" and (tries := tries + 1) < 3:
            raise Outage("away")
        return Outcome(len(batch), [Record(rig.topic_2, message.value(), b"one card", []) for message in batch])

    with streaming(rig, handle, ahead=True):
        until(lambda: committed() == 35, what="all of it committed")

    assert [message.value() for message in rig.read(rig.topic_2, 35)] == numbers(35)


def test_what_finishes_a_batch_is_done_in_order_and_before_its_offsets(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(35), key=b"one card")
    finished: list[tuple[list[bytes], int]] = []
    tries = 0

    def handle(batch: Sequence[Message]) -> Outcome:
        def finish() -> Sequence[Record]:
            nonlocal tries
            if batch[0].value() == b"10" and (tries := tries + 1) < 3:
                raise Outage("away")
            finished.append(([message.value() for message in batch], committed()))
            return [dead_letter(batch[0], "for example", group="g")]

        return Outcome(len(batch), dead=[dead_letter(batch[1], "for example", group="g")], finish=finish)

    with streaming(rig, handle, ahead=True):
        until(lambda: committed() == 35, what="all of it committed")

    assert [value for batch, _ in finished for value in batch] == numbers(35)
    assert all(before <= int(batch[0]) for batch, before in finished)
    letters = {message.value() for message in rig.read(f"{rig.topic_1}.dlq", 8)}
    assert letters == {b"0", b"1", b"10", b"11", b"20", b"21", b"30", b"31"}


def test_a_handler_learns_that_its_batch_is_delivered_only_once_it_is(rig: Rig) -> None:
    rig.put(rig.topic_1, numbers(1))
    steps: list[str] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        def finish() -> Sequence[Record]:
            steps.append("finish")
            if len(steps) < 3:
                raise Outage("away")
            return []

        return Outcome(len(batch), finish=finish, delivered=lambda: steps.append("delivered"))

    with streaming(rig, handle):
        until(lambda: "delivered" in steps, what="the delivery")

    assert steps == ["finish", "finish", "finish", "delivered"]


def test_ahead_an_outage_is_logged_once_and_retried_ever_more_rarely(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(35), key=b"one card")
    over = Event()
    tries: list[float] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        def finish() -> Sequence[Record]:
            if not over.is_set():
                tries.append(time.monotonic())
                raise Outage("away")
            return []

        return Outcome(len(batch), finish=finish)

    settings = StreamSettings(max_batch_size=10, backoff_initial_seconds=0.05, backoff_max_seconds=2)
    with capture_logs() as logs, streaming(rig, handle, settings=settings, ahead=True):
        until(lambda: len(tries) >= 6, what="some tries")
        over.set()
        until(lambda: committed() == 35, what="all of it committed")

    assert tries[5] - tries[0] > 0.4
    said = [line["event"] for line in logs]
    assert said.count("outage") == said.count("outage_over") == said.count("paused") == said.count("resumed") == 1


class Fenced:
    """A consumer whose place in the group somebody else takes after the first message."""

    def __init__(self, client: Consumer) -> None:
        self._client = client
        self.given = 0
        self.broker_there, self.closing, self.closed = Event(), Event(), Event()
        self.broker_there.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def poll(self, timeout: float) -> Any:
        self.given += 1
        return self._client.poll(timeout) if self.given == 1 else FatalMessage()

    def close(self) -> None:
        self.closing.set()
        self.broker_there.wait(60)
        self._client.close()
        self.closed.set()


class FatalMessage:
    def error(self) -> KafkaError:
        return KafkaError(KafkaError._FATAL, "fenced")


def test_a_lost_consumer_is_replaced_and_the_stream_goes_on(rig: Rig, committed: Callable[[], int]) -> None:
    first = Fenced(consumer(rig.properties, group=rig.topic_1))
    consumers: list[Any] = [first]
    shutdown = Event()

    def make_consumer(_: object) -> Any:
        return consumers.pop() if consumers else consumer(rig.properties, group=rig.topic_1)

    thread = threading.Thread(
        target=make_stream(rig, shutdown, make_consumer=make_consumer).run, args=[lambda batch: Outcome(len(batch))]
    )
    thread.start()
    until(first.closed.is_set, what="the end of the first consumer")
    rig.put(rig.topic_1, numbers(30), key=b"one card")
    until(lambda: committed() == 30, what="all of it committed")
    shutdown.set()
    thread.join(20)
    assert not thread.is_alive()


def test_a_lost_consumer_that_cannot_close_holds_no_shutdown_up(rig: Rig) -> None:
    lost = Fenced(consumer(rig.properties, group=rig.topic_1))
    lost.broker_there.clear()
    consumers: list[Any] = [consumer(rig.properties, group=rig.topic_1), lost]
    shutdown = Event()
    stream = make_stream(rig, shutdown, make_consumer=lambda _: consumers.pop())
    thread = threading.Thread(target=stream.run, args=[lambda batch: Outcome(len(batch))])
    thread.start()
    try:
        assert lost.closing.wait(20)
        shutdown.set()
        thread.join(10)
        assert not thread.is_alive()
    finally:
        lost.broker_there.set()
        assert lost.closed.wait(20)


class NotAtFirst(Through):
    """A delivery whose offsets cannot be committed the first times."""

    def __init__(self, inner: Delivery) -> None:
        super().__init__(inner)
        self.tries = 0

    def commit(self, client: Consumer, offsets: Sequence[TopicPartition]) -> None:
        self.tries += 1
        if self.tries < 3:
            raise Outage("waiting for coordinator")
        super().commit(client, offsets)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_commit_is_tried_again_and_its_batch_is_not(rig: Rig, committed: Callable[[], int], ahead: bool) -> None:
    rig.put(rig.topic_1, numbers(35), key=b"one card")
    handled: list[bytes] = []
    shutdown = Event()

    def handle(batch: Sequence[Message]) -> Outcome:
        handled.extend(message.value() or b"" for message in batch)
        return Outcome(len(batch))

    delivery = NotAtFirst(AtLeastOnce(properties=rig.properties, shutdown=shutdown))
    stream = make_stream(rig, shutdown, delivery=delivery)
    thread = threading.Thread(target=stream.run, args=[handle], kwargs={"ahead": ahead})
    thread.start()
    until(lambda: committed() == 35, what="all of it committed")
    shutdown.set()
    thread.join(20)

    assert handled == numbers(35)
