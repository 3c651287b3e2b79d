"""The flow in the log."""

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from shared import flow
from shared.flow import Flow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass, in seconds."""
    now = [100.0]
    monkeypatch.setattr(flow.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_second_is_one_line_with_rate_lag_and_latency(clock: Callable[[float], None]) -> None:
    with capture_logs() as lines:
        flow_of_records = Flow("processed", levels=lambda: {"lag": 12})
        for _ in range(10):
            clock(0.25)
            flow_of_records.add(records=10, dead_letters=1, ages_ms=[7.0])
        flow_of_records.report()

    assert len(lines) == 3
    assert lines[0] == {
        "event": "processed", "log_level": "info", "records": 40, "dead_letters": 4,
        "per_s": 40, "lag": 12, "p99_ms": 7, "total": 40,
    }  # fmt: skip
    assert lines[-1]["total"] == 100


def test_idle_is_silence_and_does_not_lower_the_rate(clock: Callable[[float], None]) -> None:
    with capture_logs() as lines:
        flow_of_records = Flow("processed")
        for _ in range(100):
            clock(0.5)
            flow_of_records.report_if_due()
        flow_of_records.add(records=50)
        clock(1.0)
        flow_of_records.report_if_due()

    assert [(line["records"], line["per_s"]) for line in lines] == [(50, 50)]


def test_p99_is_the_smallest_that_99_of_100_do_not_exceed() -> None:
    with capture_logs() as lines:
        flow_of_records = Flow("processed")
        flow_of_records.add(records=1, ages_ms=map(float, range(1, 101)))
        flow_of_records.report()

    assert lines[0]["p99_ms"] == 99
