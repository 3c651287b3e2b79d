"""What the services need goes away: none exits, everything arrives in the end, and SIGTERM still stops them."""

import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread

import pytest
import sqlalchemy as sa
from confluent_kafka import Message, Producer, TopicPartition
from conftest import Rig, until
from pipeline import pipeline
from rich.console import Console
from structlog.testing import capture_logs

from rehearsal import demo
from rehearsal.demo import Scene
from sandbox.apache import ApacheKafka
from sandbox.mailbox import Mailbox
from sandbox.registry import Registry
from shared.kafka import topics
from shared.kafka.clients import consumer
from shared.settings import StreamSettings
from shared.stream.delivery import ExactlyOnce
from shared.stream.flight import Outcome
from shared.stream.loop import Stream

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(400), pytest.mark.server]

AWAY_S = 12.0


def passing(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield


def outages(scene: Scene) -> Iterator[None]:
    parts = scene.stack
    assert parts.database is not None
    parts.api.stop()  # before the services start: the API is down from the start
    yield from passing(AWAY_S)
    parts.api.start()
    yield from passing(3)
    for part in (parts.mailbox, parts.database, parts.registry):
        part.stop()
        yield from passing(AWAY_S)
        part.start()
        yield from passing(3)


@pytest.mark.usefixtures("forking")
def test_nobody_exits_and_the_ledger_balances(trained_directory: Path, apache_rig: Rig) -> None:
    del apache_rig  # asks for Apache Kafka, so that its absence is dealt with in one place
    options = demo.Options(
        transactions=3000,
        rate=50.0,
        source=None,
        fraud_rate=0.02,
        broker="apache",
        database=None,
        work_dir=trained_directory,
    )

    ledger = demo.run(options, Console(file=io.StringIO()), scenario=outages)  # raises if a service ended

    assert ledger.balanced
    assert ledger.served == ledger.topic_1 == ledger.topic_2 == ledger.rows == 3000
    assert ledger.dead_letters == 0
    assert ledger.emails == ledger.mailed_frauds == ledger.predicted_frauds > 20
    names = ("producer", "alerter", "db_sink")
    logs = {name: (trained_directory / "logs" / f"{name}.log").read_text() for name in names}
    for name in names:
        assert "event='outage'" in logs[name]
        assert "event='outage_over'" in logs[name]
    assert not any("Traceback" in log for log in logs.values())


@pytest.mark.parametrize("silent", [False, True], ids=["dead", "silent"])
def test_sigterm_while_the_broker_is_away_stops_them_and_what_they_leave_arrives_later(
    apache_rig: Rig, engine: sa.Engine, registry: Registry, mailbox: Mailbox, silent: bool
) -> None:
    rig, everything = apache_rig, 15_000
    with ApacheKafka(rig.directory / "own") as broker:
        rig.properties = {"bootstrap.servers": broker.bootstrap, "socket.timeout.ms": "10000"}  # a minute by default
        lines = (f"{name}={value}\n" for name, value in rig.properties.items())
        (rig.directory / "client.properties").write_text("".join(lines))
        topics.create(rig.properties, [rig.topic_1, rig.topic_2])
        with pipeline(rig, engine=engine, registry=registry, mailbox=mailbox, MAX_BATCH_SIZE="100") as running:
            running.let_in(everything)
            until(lambda: "event='processed'" in running.logs()["db_sink"], what="work under way")
            broker.suspend() if silent else broker.kill()
            running.let_in(100)  # the producer, too, has something to write
            # The client waits for an answer, and then ten seconds for the next connection's.
            until(lambda: all("event='outage'" in log for log in running.logs().values()), what="four outages")

            exits = running.stop(10)

            assert exits == dict.fromkeys(exits, 0)
            broker.resume() if silent else broker.start()
            running.start_again()
            running.wait_through(timeout_s=120)
            assert running.stop(10) == exits


class Ending(ExactlyOnce):
    """A delivery whose `undo` ends what somebody else holds back, as it would what the broker forgot to end of ours."""

    other: Producer

    def undo(self, place: TopicPartition, generation: object) -> None:
        super().undo(place, generation)
        self.other.abort_transaction(10)


def test_offsets_that_a_forgotten_transaction_holds_back_are_had_again(
    apache_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, group = apache_rig, f"held-{apache_rig.topic_1}"
    monkeypatch.setattr("shared.stream.committed._FORGOTTEN_S", 1.0)
    rig.put(rig.topic_1, [b"1", b"2", b"3"], key=b"one card")
    places = [TopicPartition(rig.topic_1, number, 0) for number in range(6)]
    reader = consumer(rig.properties, group=group)
    other = Producer({**rig.properties, "transactional.id": f"other-{group}", "transaction.timeout.ms": 120_000})
    other.init_transactions(30)
    other.begin_transaction()
    other.send_offsets_to_transaction(places, reader.consumer_group_metadata(), 30)
    shutdown = Event()
    delivery = Ending(properties=rig.properties, transactional_id=f"own-{group}", shutdown=shutdown)
    delivery.other = other
    stream = Stream(
        make_consumer=lambda _: consumer(rig.properties, group=group),
        group=group,
        topic=rig.topic_1,
        delivery=delivery,
        settings=StreamSettings(),
        shutdown=shutdown,
    )
    handled: list[bytes | None] = []

    def handle(batch: Sequence[Message]) -> Outcome:
        handled.extend(message.value() for message in batch)
        return Outcome(len(batch))

    thread = Thread(target=stream.run, args=[handle])
    with capture_logs() as logs:
        thread.start()
        try:
            until(lambda: len(handled) == 3, what="all of it handled")
            until(
                lambda: sum(max(0, each.offset) for each in reader.committed(places, timeout=10)) == 3, what="a commit"
            )
        finally:
            shutdown.set()
            thread.join(20)
            reader.close()
    assert handled == [b"1", b"2", b"3"]
    assert [line["place"].split()[0] for line in logs if line["event"] == "offsets_held_back"] == [rig.topic_1]
