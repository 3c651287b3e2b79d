"""Everything the services need goes away for twenty seconds, one after the other; then the ledger must balance."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Rig
from rich.console import Console

from fraudctl import demo
from fraudctl.demo import Scene

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(400)]

AWAY_S = 20.0


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
    for part in (parts.registry, parts.mailbox, parts.database):
        part.stop()
        yield from passing(AWAY_S)
        part.start()
        yield from passing(3)


def test_nobody_exits_and_the_ledger_balances(tmp_path: Path, apache_rig: Rig) -> None:
    del apache_rig  # asks for Apache Kafka, so that its absence is dealt with in one place
    options = demo.Options(
        transactions=5000,
        rate=60.0,
        source=None,
        fraud_rate=0.02,
        broker="apache",
        database=None,
        work_dir=tmp_path,
    )

    ledger = demo.run(options, Console(file=io.StringIO()), scenario=outages)  # raises if a service ended

    assert ledger.balanced
    assert ledger.served == ledger.topic_1 == ledger.topic_2 == ledger.rows == 5000
    assert ledger.dead_letters == 0
    assert ledger.emails == ledger.mailed_frauds == ledger.predicted_frauds > 20
    logs = {name: (tmp_path / "logs" / f"{name}.log").read_text() for name in ("producer", "alerter", "db_sink")}
    for name in ("producer", "alerter", "db_sink"):
        assert "event='outage'" in logs[name]
        assert "event='outage_over'" in logs[name]
    assert not any("Traceback" in log for log in logs.values())
