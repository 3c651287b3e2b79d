"""Partitions that change hands on Apache Kafka while a batch of theirs is in flight."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

import pytest
from confluent_kafka import Consumer, Message, TopicPartition
from conftest import Rig, until
from structlog.testing import capture_logs

from shared.kafka.clients import consumer
from shared.kafka.messages import Record
from shared.kafka.topics import PARTITIONS
from shared.settings import StreamSettings
from shared.stream.delivery import AtLeastOnce
from shared.stream.flight import Handler, Outcome
from shared.stream.loop import Stream

pytestmark = pytest.mark.kafka


class Gated(AtLeastOnce):
    """Nothing is delivered until the gate opens."""

    gate: Event

    def deliver(
        self, records: Sequence[Record], offsets: Sequence[TopicPartition] = (), generation: object = None
    ) -> None:
        assert self.gate.wait(30)
        super().deliver(records, offsets, generation)


@contextmanager
def streaming(rig: Rig, handle: Handler, client: Consumer, gate: Event) -> Iterator[None]:
    shutdown = Event()
    delivery = Gated(properties=rig.properties, shutdown=shutdown)
    delivery.gate = gate
    stream = Stream(
        make_consumer=lambda _: client,
        group=rig.topic_1,
        topic=rig.topic_1,
        delivery=delivery,
        settings=StreamSettings(max_batch_size=10),
        shutdown=shutdown,
    )
    thread = Thread(target=lambda: stream.run(handle, ahead=True))
    thread.start()
    try:
        yield
    finally:
        gate.set()
        shutdown.set()
        thread.join(30)
        assert not thread.is_alive()


def test_what_is_in_flight_is_committed_before_its_partitions_go_to_another(apache_rig: Rig) -> None:
    def put(numbers: Iterable[int]) -> None:
        for number in numbers:
            apache_rig.put(apache_rig.topic_1, [str(number).encode()], key=str(number).encode())

    put(range(40))
    batches: list[list[bytes]] = []
    gate = Event()
    gate.set()

    def handle(batch: Sequence[Message]) -> Outcome:
        batches.append([message.value() or b"" for message in batch])
        return Outcome(len(batch))

    def client() -> Consumer:
        return consumer(apache_rig.properties, group=apache_rig.topic_1)

    def committed() -> int:
        places = [TopicPartition(apache_rig.topic_1, number) for number in range(PARTITIONS)]
        return sum(max(0, each.offset) for each in onlooker.committed(places, timeout=10))

    first, second, onlooker, opened = client(), client(), client(), Event()
    opened.set()  # the second delivers at once, however its records fall into batches
    with ExitStack() as both, capture_logs() as logs:
        both.enter_context(streaming(apache_rig, handle, first, gate))
        until(lambda: committed() == 40, what="the partitions' first batches, each of which is alone")
        gate.clear()
        batches.clear()
        put(range(40, 80))
        until(lambda: len(batches) >= 2, what="two batches in flight")
        both.enter_context(streaming(apache_rig, handle, second, opened))
        until(lambda: [line["event"] for line in logs].count("assigned") == 2, what="a group of two")
        time.sleep(2)  # longer than the first lets pass until it looks up, and finds that it is to give some away
        began = time.monotonic()
        gate.set()
        # Nothing is asked of the clients here: a client lets the call of another thread wait, perhaps for ever.
        until(lambda: [line["partitions"] for line in logs if line["event"] == "revoked"], what="some given away")
        until(lambda: sum(map(len, batches)) >= 40, what="all of it")
        assert time.monotonic() - began < 10  # it does not wait until the group considers anyone dead

    assert sorted((value for batch in batches for value in batch), key=int) == [
        str(number).encode() for number in range(40, 80)
    ]
    onlooker.close()
