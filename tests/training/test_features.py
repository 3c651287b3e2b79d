"""The features of a transaction."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from sandbox.generator import training_frame
from training import features
from training.features import FEATURES, RAW, make_features


@pytest.fixture
def raw() -> pd.DataFrame:
    return training_frame(rows=50, seed=2, start=datetime(2024, 5, 17, tzinfo=UTC))


def one(**changes: object) -> dict[str, float]:
    """The features of a payment by their names."""
    payment: dict[str, object] = {
        "trans_date_trans_time": "2024-05-17 22:59:59", "category": "travel", "amt": 0.0, "lat": 0.0, "long": 0.0,
        "city_pop": 0, "dob": "1984-05-17", "merch_lat": 0.0, "merch_long": 0.0,
    }  # fmt: skip
    return dict(zip(FEATURES, make_features(pd.DataFrame([payment | changes]))[0].tolist(), strict=True))


def test_the_hour_is_the_one_of_the_payment_in_utc() -> None:
    assert one()["hour"] == 22
    assert one(trans_date_trans_time="2024-05-17 00:00:00")["hour"] == 0


def test_the_age_is_that_on_the_day_of_the_payment() -> None:
    assert one()["age_years"] == pytest.approx(40, abs=0.01)
    assert one(trans_date_trans_time="2004-05-17 00:00:00")["age_years"] == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(
    ("lat", "long", "merch_lat", "merch_long", "distance_km"),
    [
        (48.8566, 2.3522, 51.5074, -0.1278, 343.6),  # Paris, London
        (34.0, -79.0, 34.0, -79.0, 0.0),
        (0.0, 179.5, 0.0, -179.5, 111.2),  # over the date line
        (90.0, 0.0, -90.0, 0.0, 20015.1),  # from pole to pole
    ],
)
def test_the_distance_is_that_over_the_globe(
    lat: float, long: float, merch_lat: float, merch_long: float, distance_km: float
) -> None:
    found = one(lat=lat, long=long, merch_lat=merch_lat, merch_long=merch_long)["distance_km"]

    assert found == pytest.approx(distance_km, rel=0.001)


def test_an_unknown_category_is_missing_and_a_known_one_is_not() -> None:
    assert np.isnan(one(category="space_flights")["category"])
    assert len({one(category=name)["category"] for name in features.CATEGORIES}) == 14


def test_a_refund_is_no_error() -> None:
    assert one(amt=-12.5)["log_amt"] == 0


@pytest.mark.parametrize(
    ("wrong", "named"), [({"trans_date_trans_time": "yesterday, at noon"}, "at"), ({"dob": "unknown"}, "unknown")]
)
def test_an_invalid_time_is_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        one(**wrong)


def test_only_the_needed_columns_matter_in_any_order(raw: pd.DataFrame) -> None:
    np.testing.assert_array_equal(make_features(raw), make_features(raw[RAW[::-1]]))


def test_a_row_by_itself_has_the_features_it_has_in_a_batch(raw: pd.DataFrame) -> None:
    together = make_features(raw)

    alone = [make_features(raw.iloc[[i]])[0] for i in range(len(raw))]

    np.testing.assert_array_equal(together, alone)


def test_identifiers_and_the_raw_time_are_not_used() -> None:
    assert not {"cc_num", "trans_num", "unix_time", "first", "last", "street", "zip"} & set(RAW)
