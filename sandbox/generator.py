"""A stream of card payments that looks like the real one, in the payments API's columns; the same for the same seed.

What is modelled: how often each category is paid for by morning and by afternoon, what it costs (quantiles of the
amounts, legitimate and fraudulent), when frauds happen, and that a stolen card is hit about ten times in a day or two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from shared.records import FEATURES, RAW_COLUMNS, format_time

MEAN_GAP_S = 28.0  # the Sparkov test set: 555,719 rows in half a year
FRAUD_RATE = 0.0038
_HITS_A_VICTIM = 9.7
_DAY_S = 86_400

# Weights of the hours: legitimate payments by half-day, frauds by late evening, night and the rest.
_LEGITIMATE_HOURS = np.repeat([176.0, 242.0], 12)
_FRAUD_HOURS = np.array([0.34 / 4] * 4 + [0.15 / 18] * 18 + [0.51 / 2] * 2)
_LEVELS = np.array([0.0, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 1.0])


@dataclass(frozen=True)
class _Category:
    name: str
    legitimate: tuple[float, float]  # weight in hours 0-11, 12-23
    fraudulent: tuple[float, float, float]  # weight in hours 0-3, 4-21, 22-23
    amounts: tuple[float, ...]  # legitimate, at _LEVELS without the two ends
    fraud_amounts: tuple[float, ...]


_CATEGORIES = (
    _Category("entertainment", (67, 261), (5, 3, 7), (1.3, 5.9, 17, 49, 79, 131, 295), (356, 438, 485, 505, 558, 575, 609)),
    _Category("food_dining", (37, 306), (5, 4, 13), (1.4, 3.9, 12, 40, 67, 98, 185), (96, 103, 111, 120, 132, 137, 140)),
    _Category("gas_transport", (546, 12), (32, 2, 1), (35, 46, 54, 63, 74, 83, 105), (6.6, 7.3, 8, 10, 11.4, 13.3, 21)),
    _Category("grocery_net", (188, 5), (10, 1, 1), (14, 27, 40, 52, 68, 90, 118), (7.2, 7.8, 8.6, 12, 14, 15, 19)),
    _Category("grocery_pos", (517, 14), (95, 24, 20), (31, 55, 79, 104, 139, 196, 236), (258, 277, 293, 310, 330, 343, 365)),
    _Category("health_fitness", (8, 329), (1, 3, 15), (1.8, 6.3, 15, 42, 76, 109, 186), (17, 18, 19, 20, 22, 23, 24)),
    _Category("home", (10, 481), (1, 7, 16), (1.4, 10, 22, 45, 78, 111, 228), (218, 229, 239, 255, 273, 290, 405)),
    _Category("kids_pets", (9, 418), (1, 4, 14), (2, 8.6, 22, 46, 71, 104, 218), (5.5, 17, 18, 19.5, 21, 22, 24)),
    _Category("misc_net", (221, 42), (19, 10, 46), (1.2, 2.5, 4.4, 9.5, 95, 185, 848), (596, 672, 726, 788, 855, 897, 971)),
    _Category("misc_pos", (189, 120), (10, 3, 6), (1.1, 2.5, 5.6, 13, 46, 137, 475), (7.1, 7.4, 8.2, 9.5, 692, 755, 809)),
    _Category("personal_care", (8, 355), (1, 1, 19), (1.4, 4.5, 11, 29, 69, 101, 203), (17, 19, 20, 21, 22, 23, 45)),
    _Category("shopping_net", (169, 191), (18, 18, 78), (1.1, 2, 3.8, 8.5, 77, 157, 767), (808, 867, 944, 993, 1054, 1115, 1229)),
    _Category("shopping_pos", (178, 246), (13, 11, 38), (1, 2.2, 4.1, 8, 48, 147, 714), (627, 733, 786, 862, 949, 1008, 1070)),
    _Category("travel", (4, 149), (1, 3, 3), (1.3, 2.2, 3.4, 6.5, 9.1, 470, 826), (4.5, 4.9, 6.2, 9.5, 9.8, 10.3, 10.7)),
)  # fmt: skip
_MERCHANTS_A_CATEGORY = 50

_FIRST = {
    "F": "Amy Angela Carla Denise Elaine Fiona Gloria Heather Irene Julia Karen Laura Monica Nina Olivia Paula".split(),
    "M": "Aaron Brian Carlos Derek Edward Frank George Henry Ian James Kevin Louis Martin Nathan Oscar Peter".split(),
}
_LAST = (
    "Abbott Barker Castro Dalton Ellis Farmer Griffith Hardy Ingram Jensen Keller Lawson Maddox Norris Osborne Parsons "
    "Quinn Ramsey Sutton Tucker Underwood Vaughn Walters Yates Zimmer"
).split()
_STREETS = "Oak Maple Cedar Pine Elm Walnut Chestnut Willow Birch Spruce Hickory Juniper".split()
_STREET_ENDS = "Street Avenue Road Lane Drive Court Trail Parkway".split()
_TOWNS = "Clear Fair Green High Lake Mill Oak Pine Red River Rock Spring Stone White Wood".split()
_TOWN_ENDS = "field ford haven hill land mont port ton view ville water wood".split()
_JOBS = (
    "Accountant|Architect|Baker|Chemist|Civil engineer|Dentist|Designer, graphic|Economist|Editor|Electrician|"
    "Film editor|Geologist|Journalist|Lawyer|Librarian|Musician|Nurse|Pharmacist|Physicist|Pilot|Sales executive|"
    "Surveyor|Teacher, primary school|Translator"
).split("|")
# The middle of each state, in degrees.
_STATES = {
    "AL": (32.8, -86.8), "AZ": (34.3, -111.7), "CA": (37.2, -119.5), "CO": (39.0, -105.5), "FL": (28.6, -82.4),
    "GA": (32.6, -83.4), "IL": (40.0, -89.2), "KS": (38.5, -98.4), "KY": (37.5, -85.3), "MI": (44.3, -85.4),
    "MN": (46.3, -94.3), "MO": (38.4, -92.5), "NC": (35.6, -79.4), "NE": (41.5, -99.8), "NY": (42.9, -75.5),
    "OH": (40.3, -82.8), "OK": (35.6, -97.5), "OR": (43.9, -120.6), "PA": (40.9, -77.8), "TX": (31.5, -99.3),
    "VA": (37.5, -78.9), "WA": (47.4, -120.4),
}  # fmt: skip


def transactions(
    *,
    seed: int,
    start: datetime,
    fraud_rate: float = FRAUD_RATE,
    cards: int = 1000,
    mean_gap_s: float = MEAN_GAP_S,
) -> Iterator[list[Any]]:
    """Rows in RAW_COLUMNS' order, by time, without end; on average `mean_gap_s` seconds apart."""
    world = np.random.default_rng(seed)
    customers = [_customer(world) for _ in range(cards)]
    merchants = [[_merchant(world) for _ in range(_MERCHANTS_A_CATEGORY)] for _ in _CATEGORIES]
    day = start.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start_ms = int(start.timestamp() * 1000)
    payments_a_day = _DAY_S / mean_gap_s
    stolen = _hits(world, cards, payments_a_day * fraud_rate)  # the day before's, of which some fall on the first day
    while True:
        new = _hits(world, cards, payments_a_day * fraud_rate)
        frauds = np.concatenate([stolen[stolen[:, 1] == 1], new[new[:, 1] == 0]])
        stolen = new
        for row in _day(
            world, customers, merchants, frauds, day, int(world.poisson(payments_a_day * (1 - fraud_rate)))
        ):
            if row[-1] >= start_ms:
                yield row
        day += timedelta(days=1)


def training_frame(*, rows: int, seed: int, start: datetime, fraud_rate: float = FRAUD_RATE) -> pd.DataFrame:
    """`rows` transactions in the training file's columns, their frauds labelled."""
    frame = pd.DataFrame(
        islice(transactions(seed=seed, start=start, fraud_rate=fraud_rate), rows), columns=list(RAW_COLUMNS)
    )
    frame["unix_time"] = frame.pop("current_time") // 1000
    frame["trans_date_trans_time"] = frame["unix_time"].map(format_time)
    return frame[list(FEATURES)]


def _day(
    world: np.random.Generator,
    customers: Sequence[Sequence[Any]],
    merchants: Sequence[Sequence[str]],
    frauds: np.ndarray,
    day: datetime,
    legitimate: int,
) -> Iterator[list[Any]]:
    """One day's payments in order. `frauds` (n, 2) holds the card and the day of each hit."""
    count = legitimate + len(frauds)
    is_fraud = np.arange(count) >= legitimate
    hour = np.concatenate([_draw(world, _LEGITIMATE_HOURS, legitimate), _draw(world, _FRAUD_HOURS, len(frauds))])
    times_ms = hour * 3_600_000 + world.integers(0, 3_600_000, count)
    card = np.concatenate([world.integers(0, len(customers), legitimate), frauds[:, 0]]).astype(int)
    category = np.empty(count, dtype=int)
    amount = np.empty(count)
    for period, chosen in enumerate((hour < 12, hour >= 12)):
        mask = chosen & ~is_fraud
        category[mask] = _draw(world, np.array([c.legitimate[period] for c in _CATEGORIES]), int(mask.sum()))
    for period, chosen in enumerate((hour < 4, (hour >= 4) & (hour < 22), hour >= 22)):
        mask = chosen & is_fraud
        category[mask] = _draw(world, np.array([c.fraudulent[period] for c in _CATEGORIES]), int(mask.sum()))
    level = world.random(count)
    for number, each in enumerate(_CATEGORIES):
        for fraud, quantiles in ((False, each.amounts), (True, each.fraud_amounts)):
            mask = (category == number) & (is_fraud == fraud)
            ends = (max(1.0, quantiles[0] * 0.8), *quantiles, quantiles[-1] * 1.6)
            amount[mask] = np.exp(np.interp(level[mask], _LEVELS, np.log(ends)))
    merchant = world.integers(0, _MERCHANTS_A_CATEGORY, count)
    away = world.uniform(-1, 1, (count, 2))
    order = np.argsort(times_ms, kind="stable")
    times = (times_ms + int(day.timestamp() * 1000)).tolist()
    numbers = [world.bytes(16).hex() for _ in range(count)]
    amounts = np.round(amount, 2).tolist()
    for i in order.tolist():
        cc_num, first, last, gender, street, city, state, zip_code, lat, long, city_pop, job, dob = customers[card[i]]
        kind = category[i]
        yield [
            cc_num, merchants[kind][merchant[i]], _CATEGORIES[kind].name, amounts[i], first, last, gender, street, city,
            state, zip_code, lat, long, city_pop, job, dob, numbers[i], round(lat + away[i, 0].item(), 6),
            round(long + away[i, 1].item(), 6), int(is_fraud[i]), times[i],
        ]  # fmt: skip


def _hits(world: np.random.Generator, cards: int, expected: float) -> np.ndarray:
    """The hits on the cards stolen on one day, (n, 2): card, and 0 or 1 for that day or the next."""
    victims = world.integers(0, cards, world.poisson(expected / _HITS_A_VICTIM))
    hits = np.repeat(victims, world.poisson(_HITS_A_VICTIM, len(victims)))
    return np.column_stack([hits, world.integers(0, 2, len(hits))])


def _draw(world: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    return world.choice(len(weights), size=count, p=weights / weights.sum())


def _customer(world: np.random.Generator) -> list[Any]:
    """cc_num, first, last, gender, street, city, state, zip, lat, long, city_pop, job, dob."""
    gender = str(world.choice(["F", "M"]))
    state = str(world.choice(list(_STATES)))
    latitude, longitude = _STATES[state]
    digits = int(world.choice([12, 13, 14, 15, 16, 19], p=[0.07, 0.07, 0.10, 0.16, 0.50, 0.10]))
    born = datetime(1934, 1, 1, tzinfo=UTC) + timedelta(days=int(world.triangular(0, 16_000, 25_500)))
    return [
        int("".join(map(str, [world.integers(1, 10), *world.integers(0, 10, digits - 1)]))),
        _one(world, _FIRST[gender]),
        _one(world, _LAST),
        gender,
        f"{world.integers(1, 9999)} {_one(world, _STREETS)} {_one(world, _STREET_ENDS)}",
        _one(world, _TOWNS) + _one(world, _TOWN_ENDS),
        state,
        int(world.integers(1001, 99_900)),
        round(latitude + float(world.uniform(-1.5, 1.5)), 4),
        round(longitude + float(world.uniform(-1.5, 1.5)), 4),
        int(np.exp(world.normal(7.9, 2.3)).clip(25, 2_900_000)),
        _one(world, _JOBS),
        born.date().isoformat(),
    ]


def _merchant(world: np.random.Generator) -> str:
    """A merchant's name; in the Sparkov set every one begins with `fraud_`, whatever the payment."""
    a, b, c = world.choice(_LAST, 3, replace=False).tolist()
    return str(world.choice([f"fraud_{a}, {b} and {c}", f"fraud_{a}-{b}", f"fraud_{a} {c} Group", f"fraud_{b} LLC"]))


def _one(world: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(world.integers(len(words)))]
