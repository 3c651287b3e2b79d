"""Waiting out an outage."""

from collections.abc import Iterator
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from shared.errors import Outage
from shared.retry import OutageLog, delay_s, retry_outages


@given(st.integers(0, 10_000), st.floats(0.01, 10), st.floats(0.01, 1000))
def test_waits_grow_and_are_capped(attempt: int, initial_s: float, max_s: float) -> None:
    waited = delay_s(attempt, initial_s=initial_s, max_s=max_s)

    assert 0 < waited <= max_s
    assert waited >= min(max_s, initial_s) / 2


def test_an_outage_is_said_once_and_its_end_once() -> None:
    answers: Iterator[Outage | str] = iter([Outage("gone"), Outage("gone"), "back"])
    waits: list[float] = []

    def step() -> str:
        answer = next(answers)
        if isinstance(answer, Outage):
            raise answer
        return answer

    with capture_logs() as lines:
        result = retry_outages(
            step, shutdown=Event(), initial_s=0.1, max_s=1.0, wait=waits.append, outage_log=OutageLog(waiting=lambda: 7)
        )

    assert result == "back"
    assert [line["event"] for line in lines] == ["outage", "outage_over"]
    assert (lines[1]["failures"], lines[1]["waited"]) == (2, 7)
    assert len(waits) == 2


def test_shutdown_ends_the_waiting() -> None:
    shutdown = Event()

    def step() -> None:
        shutdown.set()
        raise Outage("gone")

    with pytest.raises(Outage):
        retry_outages(step, shutdown=shutdown, initial_s=100, max_s=100, outage_log=OutageLog())
