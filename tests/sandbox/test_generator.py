"""The generated stream has the known properties of the real one."""

from collections import defaultdict
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from sandbox.generator import ROUND_THE_CLOCK, training_frame, transactions
from shared.records import FEATURES, RAW_COLUMNS, format_time, read_split

START = datetime(2024, 5, 17, 20, 0, tzinfo=UTC)
DAY_MS = 86_400_000
# Median amounts, fraudulent and legitimate.
MEDIANS = {
    "shopping_net": (997, 9), "shopping_pos": (867, 8), "misc_net": (792, 10), "entertainment": (499, 48),
    "grocery_pos": (310, 105), "home": (253, 46), "food_dining": (119, 39), "personal_care": (21, 28),
    "health_fitness": (20, 43), "kids_pets": (19, 47), "grocery_net": (13, 50), "gas_transport": (11, 63),
    "travel": (10, 6), "misc_pos": (9, 16),
}  # fmt: skip


def take(count: int, *, seed: int = 1, **options: Any) -> list[list[Any]]:
    return list(islice(transactions(seed=seed, start=START, **options), count))


def frame(count: int, **options: Any) -> pd.DataFrame:
    return pd.DataFrame(take(count, **options), columns=list(RAW_COLUMNS))


@pytest.fixture(scope="module")
def many_frauds() -> pd.DataFrame:
    made = frame(60_000, fraud_rate=0.2, cards=5000)
    made["hour"] = made["current_time"] // 3_600_000 % 24
    return made


def test_the_same_seed_gives_the_same_stream_and_another_seed_another() -> None:
    assert take(500) == take(500)
    assert take(500) != take(500, seed=2)


def test_every_row_is_one_that_the_services_accept() -> None:
    table = {"columns": RAW_COLUMNS, "index": list(range(5000)), "data": take(5000)}

    rows = read_split(msgspec.json.encode(table))

    assert len(rows.transactions) == 5000
    assert not rows.bad


def test_it_begins_at_its_start_and_goes_on_in_time() -> None:
    times = [row[-1] for row in take(20_000, mean_gap_s=60)]

    start_ms = START.timestamp() * 1000
    assert start_ms <= times[0] < start_ms + 3_600_000
    assert times == sorted(times)
    assert (times[-1] - times[0]) / len(times) / 1000 == pytest.approx(60, rel=0.1)


@pytest.mark.parametrize(("fraud_rate", "rows"), [(0.0038, 200_000), (0.05, 50_000)])
def test_frauds_are_as_frequent_as_asked_for(fraud_rate: float, rows: int) -> None:
    assert np.mean([row[-2] for row in take(rows, fraud_rate=fraud_rate)]) == pytest.approx(fraud_rate, rel=0.4)


def test_without_frauds_there_are_none() -> None:
    assert not any(row[-2] for row in take(10_000, fraud_rate=0.0))


def test_frauds_come_late_in_the_evening_and_at_night(many_frauds: pd.DataFrame) -> None:
    hours = many_frauds.loc[many_frauds["is_fraud"] == 1, "hour"]

    assert (hours >= 22).mean() == pytest.approx(0.51, abs=0.04)
    assert (hours < 4).mean() == pytest.approx(0.34, abs=0.04)


def test_round_the_clock_frauds_have_the_same_share_in_each_hour() -> None:
    made = frame(60_000, fraud_rate=0.2, fraud_hours=ROUND_THE_CLOCK)

    shares = made.groupby(made["current_time"] // 3_600_000 % 24)["is_fraud"].mean()
    assert shares.to_numpy() == pytest.approx(np.full(24, 0.2), abs=0.05)


def test_legitimate_payments_come_more_often_after_noon(many_frauds: pd.DataFrame) -> None:
    hours = many_frauds.loc[many_frauds["is_fraud"] == 0, "hour"]

    assert 0.53 < (hours >= 12).mean() < 0.65


@pytest.mark.parametrize("category", MEDIANS)
def test_the_amounts_are_those_of_the_category(many_frauds: pd.DataFrame, category: str) -> None:
    chosen = many_frauds[many_frauds["category"] == category]
    fraud, legitimate = MEDIANS[category]

    assert chosen.loc[chosen["is_fraud"] == 1, "amt"].median() == pytest.approx(fraud, rel=0.25)
    assert chosen.loc[chosen["is_fraud"] == 0, "amt"].median() == pytest.approx(legitimate, rel=0.25)
    assert chosen["amt"].min() >= 1


def test_a_stolen_card_is_hit_about_ten_times_within_two_days() -> None:
    hits = defaultdict(list)
    for row in take(60_000, cards=5000, fraud_rate=0.02):
        if row[-2]:
            hits[row[0]].append(row[-1])

    spans_ms = [max(times) - min(times) for times in hits.values()]
    assert 7 < np.mean([len(times) for times in hits.values()]) < 13
    assert np.mean([span <= 2 * DAY_MS for span in spans_ms]) > 0.95


def test_a_card_belongs_to_one_customer_for_good() -> None:
    holder = ["first", "last", "gender", "street", "city", "state", "zip", "lat", "long", "city_pop", "job", "dob"]
    made = frame(20_000, cards=300)

    assert made["cc_num"].nunique() == 300
    assert (made.groupby("cc_num")[holder].nunique() == 1).all(axis=None)


def test_card_numbers_are_exact_and_of_all_the_lengths_there_are() -> None:
    numbers = {row[0] for row in take(20_000)}

    assert {type(number) for number in numbers} == {int}
    assert {len(str(number)) for number in numbers} == {11, 12, 13, 14, 15, 16, 19}


def test_every_payment_has_a_number_of_its_own() -> None:
    numbers = frame(20_000)["trans_num"]

    assert numbers.is_unique
    assert numbers.str.fullmatch("[0-9a-f]{32}").all()


def test_merchants_are_near_their_customers_and_named_as_in_the_sparkov_set() -> None:
    made = frame(20_000)

    assert (made["lat"] - made["merch_lat"]).abs().max() <= 1.000_001
    assert (made["long"] - made["merch_long"]).abs().max() <= 1.000_001
    assert made["merchant"].str.startswith("fraud_").all()
    assert (made.groupby("merchant")["category"].nunique() < made["category"].nunique()).all()


def test_a_training_frame_is_in_the_training_files_columns() -> None:
    made = training_frame(rows=3000, seed=1, start=START, fraud_rate=0.05)

    assert tuple(made.columns) == FEATURES
    assert len(made) == 3000
    assert made["trans_date_trans_time"].tolist() == [format_time(seconds) for seconds in made["unix_time"]]
    assert set(made["is_fraud"]) == {0, 1}
