"""How far behind a consumer says it is."""

from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from shared import metrics
from shared.stream import lag
from shared.stream.lag import Lag

PLACE = TopicPartition("orders", 0)


class Broker:
    """A consumer of one partition, of which `end` is the next offset."""

    def __init__(self) -> None:
        self.end = 0

    def assignment(self) -> list[TopicPartition]:
        return [PLACE]

    def get_watermark_offsets(self, place: TopicPartition, **_: object) -> tuple[int, int]:
        assert place == PLACE
        return 0, self.end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock in seconds that only the test advances."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(lag.time, "monotonic", lambda: now.s)
    monkeypatch.setattr(lag.time, "time", lambda: now.s)
    return now


def oldest_s(group: str) -> float:
    return float(metrics.OLDEST.labels(group, "orders", "0")._value.get())


def test_the_marks_of_transactions_are_no_lag() -> None:
    broker, lag_of_orders = Broker(), Lag("marks", "orders")
    lag_of_orders.final([TopicPartition("orders", 0, 10)])
    lag_of_orders.reached_end(0, 11)  # a mark lies between
    broker.end = 11

    lag_of_orders.measure(broker, [], paused=False)  # type: ignore[arg-type]

    assert lag_of_orders.records == 0
    assert oldest_s("marks") == 0


def test_what_goes_on_is_young_and_what_stands_still_grows_old(clock: Any) -> None:
    broker, lag_of_orders = Broker(), Lag("steady", "orders")
    for offset in range(0, 600, 10):  # each time, there is a mark that the end was not lag_of_orders behind yet
        broker.end = offset + 11
        lag_of_orders.final([TopicPartition("orders", 0, offset + 10)])
        lag_of_orders.measure(broker, [], paused=False)  # type: ignore[arg-type]
        clock.s += 1
    assert lag_of_orders.records == 1
    assert oldest_s("steady") <= 1

    for _ in range(60):
        clock.s += 1
        lag_of_orders.measure(broker, [], paused=True)  # type: ignore[arg-type]
    assert oldest_s("steady") >= 59
