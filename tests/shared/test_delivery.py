"""What is said while records cannot be written."""

import os
import signal
from pathlib import Path
from threading import Event, Thread

from conftest import until
from structlog.testing import capture_logs

from sandbox.embedded import EmbeddedBroker
from shared.delivery import AtLeastOnce
from shared.kafka import Record


def test_a_broker_that_stays_connected_and_acknowledges_nothing_is_an_outage(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as broker, capture_logs() as lines:
        assert broker.pid
        deliver = AtLeastOnce(properties={"bootstrap.servers": broker.bootstrap}, shutdown=Event())
        record = Record("topic_2.dlq", b"kept", None, [])
        deliver.deliver([record])
        os.kill(broker.pid, signal.SIGSTOP)
        writing = Thread(target=deliver.deliver, args=[[record]])
        writing.start()

        until(lambda: lines, what="a word on it")
        os.kill(broker.pid, signal.SIGCONT)

        writing.join()
        deliver.close()
    assert [line["event"] for line in lines] == ["outage", "outage_over"]
    assert lines[0]["reason"] == "not written yet: the broker acknowledges nothing"
