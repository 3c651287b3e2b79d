"""The stream loop, on the embedded broker: what a handler is given, and what is committed when."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
from confluent_kafka import Consumer, Message, TopicPartition
from conftest import Rig, until

from shared.delivery import AtLeastOnce
from shared.errors import Outage
from shared.kafka import Record, consumer
from shared.settings import StreamSettings
from shared.stream import Handler, Outcome, Stream

SETTINGS = StreamSettings(max_batch_size=10, max_batch_wait_ms=200, backoff_initial_seconds=0.1)


@contextmanager
def streaming(rig: Rig, handle: Handler, *, settings: StreamSettings = SETTINGS, **properties: str) -> Iterator[Event]:
    """A stream over topic_1 in a thread of its own; yields its shutdown event, and sets it at the end."""
    shutdown = Event()
    client = consumer({**rig.properties, **properties}, group=rig.topic_1)
    delivery = AtLeastOnce(consumer=client, properties=rig.properties, shutdown=shutdown)
    stream = Stream(
        consumer=client, topic=rig.topic_1, handle=handle, delivery=delivery, settings=settings, shutdown=shutdown
    )
    thread = threading.Thread(target=stream.run)
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


def test_in_an_outage_the_batch_comes_again_and_nothing_is_committed(rig: Rig, committed: Callable[[], int]) -> None:
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

    patience = {"max.poll.interval.ms": "3000", "session.timeout.ms": "3000", "heartbeat.interval.ms": "500"}
    with streaming(rig, handle, **patience):
        assert handed_over.wait(20)
        threading.Timer(5, go_on.set).start()  # longer than the three seconds: the length is the point
        until(lambda: committed() == 1)
        rig.put(rig.topic_1, [b"next"], key=b"one card")
        until(lambda: committed() == 2)

    assert handled == [b"0", b"next"]


def test_a_broken_handler_ends_the_service_and_commits_nothing(rig: Rig, committed: Callable[[], int]) -> None:
    rig.put(rig.topic_1, numbers(5), key=b"one card")
    client = consumer(rig.properties, group=rig.topic_1)
    shutdown = Event()

    def handle(_batch: Sequence[Message]) -> Outcome:
        raise ZeroDivisionError

    delivery = AtLeastOnce(consumer=client, properties=rig.properties, shutdown=shutdown)
    stream = Stream(
        consumer=client, topic=rig.topic_1, handle=handle, delivery=delivery, settings=SETTINGS, shutdown=shutdown
    )
    with pytest.raises(ZeroDivisionError):
        stream.run()

    assert committed() == 0


class Counting:
    """A consumer that counts the messages it gave out."""

    def __init__(self, client: Consumer) -> None:
        self._client = client
        self.given = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def poll(self, timeout: float) -> Message | None:
        message = self._client.poll(timeout)
        self.given += message is not None
        return message


def test_what_a_rebalance_brings_in_an_outage_waits_on_the_broker(rig: Rig) -> None:
    for number in range(20):
        rig.put(rig.topic_1, numbers(250), key=str(number).encode())
    client = Counting(consumer(rig.properties, group=rig.topic_1))
    shutdown = Event()

    def away(_batch: Sequence[Message]) -> Outcome:
        raise Outage("away")

    delivery = AtLeastOnce(consumer=client, properties=rig.properties, shutdown=shutdown)
    stream = Stream(
        consumer=client, topic=rig.topic_1, handle=away, delivery=delivery, settings=SETTINGS, shutdown=shutdown
    )
    with streaming(rig, away):
        thread = threading.Thread(target=stream.run)
        thread.start()
        until(lambda: client.assignment(), what="a part of the partitions")
    try:
        until(lambda: len(client.assignment()) == 4, what="all partitions, once the other left")
        until(lambda: client.given > 0, what="the first messages")
        time.sleep(2)  # long enough to fetch thousands
        assert client.given < 500
    finally:
        shutdown.set()
        thread.join(20)
