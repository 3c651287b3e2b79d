"""Live data beside what the model learnt from: each change raises its own signal, and chance raises none."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import REGISTRY
from scipy.stats import entropy
from structlog.testing import capture_logs

from sandbox.generator import training_frame, transactions
from services.predictor.drift import Monitor, psi
from services.predictor.scoring import Seen
from shared.profile import Profile, make_profile
from shared.records import RAW_COLUMNS, REFERENCE, Transaction, read_split
from training import train

ROWS = 1500


@pytest.fixture(scope="module")
def profile() -> Profile:
    return train.fit(training_frame(seed=1), seed=1).profile


@pytest.fixture(scope="module")
def live() -> list[Transaction]:
    """Half a month of other people's payments."""
    rows = islice(transactions(seed=5, start=datetime(2024, 5, 17, tzinfo=UTC)), 50_000)
    return list(read_split(msgspec.json.encode({"columns": RAW_COLUMNS, "data": list(rows)})).transactions)


def monitor(profile: Profile | None) -> Monitor:
    return Monitor(profile, psi_limit=0.25, rows=ROWS)


def signals(monitor: Monitor, rows: Sequence[Seen], *, batch: int = 100) -> list[tuple[str, str, str]]:
    """What the log says while the rows go by: event, feature and measure."""
    with capture_logs() as lines:
        for start in range(0, len(rows), batch):
            monitor.add(rows[start : start + batch])
    return [(line["event"], line["feature"], line["measure"]) for line in lines]


def seen(batch: Sequence[Transaction], **changes: Any) -> list[Seen]:
    return [Seen(msgspec.structs.replace(each, **changes), False, False) for each in batch]


def test_an_undrifted_stream_raises_none_in_50_000_rows(profile: Profile, live: list[Transaction]) -> None:
    assert signals(monitor(profile), seen(live)) == []


@pytest.mark.parametrize("start", [0, 7_000, 20_000])
def test_amounts_twice_as_high_raise_a_signal_within_2000_rows(
    profile: Profile, live: list[Transaction], start: int
) -> None:
    watch = monitor(profile)
    assert signals(watch, seen(live[start : start + 3000])) == []
    doubled = [
        Seen(msgspec.structs.replace(each, amt=2 * each.amt), False, False)
        for each in live[start + 3000 : start + 5000]
    ]

    assert signals(watch, doubled) == [("drift", "amt", "psi")]


def test_a_category_that_training_did_not_have_raises_a_signal(profile: Profile, live: list[Transaction]) -> None:
    watch = monitor(profile)
    rows = seen(live[:4000])
    rows[2000::50] = seen(live[2000:4000:50], category="space_flights")

    assert signals(watch, rows) == [("drift", "category", "unknown")]


def test_a_time_in_milliseconds_raises_a_signal(profile: Profile, live: list[Transaction]) -> None:
    watch = monitor(profile)
    rows = [Seen(each, False, number >= 2000) for number, each in enumerate(live[:4000])]

    assert signals(watch, rows) == [("drift", "unix_time", "milliseconds")]


def test_places_far_away_raise_a_signal(profile: Profile, live: list[Transaction]) -> None:
    found = signals(monitor(profile), seen(live[:2000], merch_lat=-33.9, merch_long=151.2))

    assert {("drift", "merch_lat", "outside_range"), ("drift", "merch_long", "outside_range")} <= set(found)


def test_a_model_that_calls_everything_a_fraud_raises_a_signal_without_any_profile(live: list[Transaction]) -> None:
    rows = [Seen(each, number >= 2000, False) for number, each in enumerate(live[:4000])]

    assert signals(monitor(None), rows) == [("drift", "prediction", "fraud_rate")]


def test_what_returns_is_reported_once(profile: Profile, live: list[Transaction]) -> None:
    watch = monitor(profile)
    rows = [*seen(live[:2000], category="space_flights"), *seen(live[2000:6000])]

    found = [each for each in signals(watch, rows) if each[1:] == ("category", "unknown")]

    assert found == [("drift", "category", "unknown"), ("drift_over", "category", "unknown")]


@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_the_size_of_the_batches_does_not_matter(profile: Profile, live: list[Transaction], batch: int) -> None:
    rows = seen(live[:4000], category="space_flights")

    assert signals(monitor(profile), rows, batch=batch) == [("drift", "category", "unknown")]


def test_a_profile_that_fits_no_transaction_is_reported_and_the_rest_is_watched(live: list[Transaction]) -> None:
    theirs = make_profile({"shoe_size": [42.0] * 100}, ["2024-05-17 12:00:00"] * 100)
    with capture_logs() as lines:
        watch = monitor(theirs)

    assert [line["event"] for line in lines] == ["reference_profile_unusable"]
    rows = [Seen(each, True, False) for each in live[:2000]]
    assert signals(watch, rows) == [("drift", "prediction", "fraud_rate")]


def test_the_measures_can_be_scraped(profile: Profile, live: list[Transaction]) -> None:
    watch = monitor(profile)
    signals(watch, seen(live[:2000], category="space_flights"))

    def scraped(feature: str, measure: str) -> float | None:
        return REGISTRY.get_sample_value("fraud_alarm_drift", {"feature": feature, "measure": measure})

    assert scraped("category", "unknown") == 1
    amounts = scraped("amt", "psi")
    assert amounts is not None
    assert 0 < amounts < 0.1
    monitor(None)  # another model has begun
    assert scraped("category", "unknown") is None


@pytest.mark.parametrize("seed", range(20))
def test_psi_is_the_relative_entropy_both_ways(seed: int) -> None:
    live, expected = np.random.default_rng(seed).integers(100, 100_000, size=(2, 10))

    assert psi(live, expected.astype(float)) == pytest.approx(
        entropy(live, expected) + entropy(expected, live), rel=0.02
    )


def test_psi_is_zero_for_the_same_shares_and_known_for_others() -> None:
    assert psi(np.array([20, 30, 50]), np.array([200.0, 300.0, 500.0])) == pytest.approx(0, abs=1e-3)
    # (0.4 - 0.2) ln 2 + (0.6 - 0.8) ln 0.75
    assert psi(np.array([4000, 6000]), np.array([2000.0, 8000.0])) == pytest.approx(0.1962, abs=1e-3)
    assert psi(np.array([0, 0]), np.array([1.0, 1.0])) == 0


def test_what_to_expect_depends_on_the_hour() -> None:
    night, noon = "2024-05-17 03:00:00", "2024-05-17 12:00:00"
    profile = make_profile({"category": ["travel"] * 1000 + ["home"] * 1000}, [night] * 1000 + [noon] * 1000)
    at_noon = [
        Seen(msgspec.structs.replace(REFERENCE, category="home", trans_date_trans_time=noon), False, False)
    ] * 2000
    at_night = [
        Seen(msgspec.structs.replace(REFERENCE, category="home", trans_date_trans_time=night), False, False)
    ] * 2000

    assert signals(monitor(profile), at_noon) == []
    assert signals(monitor(profile), at_night) == [("drift", "category", "psi")]


def test_a_profile_survives_its_journey(profile: Profile) -> None:
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile
    assert len(msgspec.json.encode(profile)) < 10_000
