"""What is said while records cannot be written."""

from pathlib import Path
from threading import Event, Thread

import pytest
from conftest import until
from structlog.testing import capture_logs

from sandbox.embedded import EmbeddedBroker
from shared.errors import Outage
from shared.kafka.messages import Record
from shared.stream.delivery import AtLeastOnce, ExactlyOnce

pytestmark = pytest.mark.server


def test_a_broker_that_stays_connected_and_acknowledges_nothing_is_an_outage(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as broker, capture_logs() as lines:
        deliver = AtLeastOnce(properties={"bootstrap.servers": broker.bootstrap}, shutdown=Event())
        record = Record("topic_2.dlq", b"kept", None, [])
        deliver.deliver([record])
        broker.suspend()
        writing = Thread(target=deliver.deliver, args=[[record]])
        writing.start()

        until(lambda: lines, what="a word on it")
        broker.resume()

        writing.join()
        deliver.close()
    assert [line["event"] for line in lines] == ["outage", "outage_over"]
    assert lines[0]["reason"] == "the broker acknowledges no records"


def test_a_client_that_does_not_return_is_an_outage_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    over, made = Event(), []

    class Hangs:  # as librdkafka may, now and then, whatever limit it is given
        def __init__(self) -> None:
            made.append(self)

        def init_transactions(self, *_: float) -> None:
            over.wait()

    monkeypatch.setattr("shared.stream.delivery._STUCK_S", 0.1)
    monkeypatch.setattr("shared.stream.delivery.make_producer", lambda *_, **__: Hangs())
    deliver = ExactlyOnce(properties={}, transactional_id="producer-1", shutdown=Event())

    for _ in range(2):
        with pytest.raises(Outage, match="cannot use Kafka transactions with the ID producer-1: the client hung"):
            deliver.open()

    over.set()
    assert len(made) == 2
