"""Generates realistic card payments with the payments API's columns. The same seed gives the same rows.

The generator models each category's share before and after noon, the hours of frauds, and the quantiles of legitimate
and of fraudulent amounts. It also models stolen cards. Each stolen card is used about ten times within a day or two.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.privacy import passes_luhn
from shared.records import FEATURES, RAW_COLUMNS, format_time

if TYPE_CHECKING:
    import pandas as pd

MEAN_GAP_S = 28.0  # as in the Sparkov test set: 555,719 rows in half a year
FRAUD_RATE = 0.0038
TRAINING_ROWS = 60_000
TRAINING_FRAUD_RATE = 0.05  # for the local stack; a threshold is only valid for the share of frauds in training
TRAINING_START = datetime(2024, 1, 1, tzinfo=UTC)
_HITS_A_VICTIM = 9.7
_DAY_S = 86_400

# Weights of the 24 hours. For legitimate payments, they differ by half-day. For frauds, by night, day and evening.
_LEGITIMATE_HOURS = np.repeat([176.0, 242.0], 12)
FRAUD_HOURS = np.array([0.34 / 4] * 4 + [0.15 / 18] * 18 + [0.51 / 2] * 2)
ROUND_THE_CLOCK = _LEGITIMATE_HOURS  # as `fraud_hours`, makes the share of frauds the same in each hour
_LEVELS = np.array([0.0, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 1.0])


@dataclass(frozen=True)
class _Category:
    name: str
    legitimate: tuple[float, float]  # weights in hours 0-11 and 12-23
    fraudulent: tuple[float, float, float]  # weights in hours 0-3, 4-21 and 22-23
    amounts: tuple[float, ...]  # quantiles of legitimate amounts, at _LEVELS[1:-1]
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
# The weight of each state among the customers, and the latitude and longitude of its centre in degrees.
_STATES = {
    "TX": (60, 31.7, -98.2), "NY": (60, 42.4, -75.2), "PA": (52, 40.7, -78.0), "CA": (36, 36.8, -119.8),
    "OH": (35, 40.4, -82.8), "IL": (31, 39.9, -89.2), "FL": (30, 27.9, -82.0), "MI": (30, 43.6, -84.7),
    "AL": (28, 32.9, -86.8), "MO": (27, 38.6, -92.4), "MN": (24, 45.8, -94.3), "VA": (23, 37.8, -78.4),
    "IA": (22, 42.0, -93.5), "GA": (21, 32.5, -83.4), "WI": (21, 44.1, -89.6), "KY": (20, 37.5, -85.0),
    "OK": (19, 35.6, -97.4), "IN": (19, 39.9, -86.3), "NE": (18, 41.3, -98.2), "AR": (18, 35.0, -92.3),
    "NC": (18, 35.6, -79.6), "SC": (18, 33.8, -81.1), "MD": (17, 39.1, -76.8), "OR": (17, 44.4, -121.8),
    "KS": (16, 38.5, -97.9), "NJ": (16, 40.2, -74.6), "WV": (15, 38.6, -80.7), "MS": (14, 32.7, -89.8),
    "TN": (13, 35.9, -86.5), "WY": (12, 42.8, -107.6), "LA": (12, 30.9, -91.4), "CO": (12, 39.3, -105.0),
    "NM": (11, 34.9, -106.1), "ME": (10, 44.4, -69.7), "WA": (9, 47.4, -120.4), "SD": (9, 44.3, -100.0),
    "MA": (9, 42.3, -71.8), "NH": (8, 43.4, -71.6), "ND": (8, 47.3, -100.6), "MT": (7, 46.6, -110.9),
    "UT": (7, 39.7, -111.3), "AZ": (6, 34.0, -111.8), "VT": (6, 44.0, -72.8), "CT": (5, 41.6, -72.7),
}  # fmt: skip
# How card numbers begin, for each number of digits. What is more frequent is there more often.
_CARDS = {
    12: "60 50 50 56 57 58 63 63 63 67 67 67 67",
    13: "40 41 42 43 44 45 46 47 48 49",
    14: "30 30 30 30 30 36 38",
    15: "1800 2131 34 37 37",
    16: "22 22 22 35 35 35 35 35 35 35 40 41 43 44 45 47 49 55 6011 6011 65 65",
    19: "40 41 42 43 44 45 46 47 48 49",
}
# Quantiles of a customer's town size and year of birth, at _LEVELS[1:-1].
_INHABITANTS = (60.0, 270.0, 740.0, 2_400.0, 19_000.0, 190_000.0, 1_530_000.0)
_BIRTH_YEARS = (1928.0, 1946.0, 1960.0, 1973.5, 1986.0, 1993.0, 2001.0)


def transactions(
    *,
    seed: int,
    start: datetime,
    fraud_rate: float = FRAUD_RATE,
    fraud_hours: np.ndarray = FRAUD_HOURS,
    cards: int = 1000,
    mean_gap_s: float = MEAN_GAP_S,
) -> Iterator[list[Any]]:
    """Yield an endless series of rows, sorted by time. The average gap between two rows is `mean_gap_s` seconds.

    The values of a row are in the order of RAW_COLUMNS. `fraud_hours` contains 24 weights, one for each
    hour of the day in UTC. The frauds are distributed over the day according to these weights.
    """
    drawn, customers, merchants = _population(seed, cards)
    world = deepcopy(drawn)
    day = start.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start_ms = int(start.timestamp() * 1000)
    payments_a_day = _DAY_S / mean_gap_s
    # Cards that were stolen the day before are used on the first day, too.
    stolen = _hits(world, cards, payments_a_day * fraud_rate)
    while True:
        new = _hits(world, cards, payments_a_day * fraud_rate)
        frauds = np.concatenate([stolen[stolen[:, 1] == 1], new[new[:, 1] == 0]])
        stolen = new
        legitimate = int(world.poisson(payments_a_day * (1 - fraud_rate)))
        for row in _day(world, customers, merchants, frauds, fraud_hours, day, legitimate):
            if row[-1] >= start_ms:
                yield row
        day += timedelta(days=1)


def training_frame(
    *,
    seed: int,
    rows: int = TRAINING_ROWS,
    start: datetime = TRAINING_START,
    fraud_rate: float = TRAINING_FRAUD_RATE,
    fraud_hours: np.ndarray = FRAUD_HOURS,
) -> "pd.DataFrame":
    """Generate labelled transactions with the training file's columns.

    `rows` is the number of transactions. By default, there are more frauds than in reality.
    """
    made = transactions(seed=seed, start=start, fraud_rate=fraud_rate, fraud_hours=fraud_hours)
    import pandas as pd  # importing pandas takes seconds, and serving a stream does not need it

    frame = pd.DataFrame(islice(made, rows), columns=list(RAW_COLUMNS))
    frame["unix_time"] = frame.pop("current_time") // 1000
    frame["trans_date_trans_time"] = frame["unix_time"].map(format_time)
    return frame[list(FEATURES)]


def _day(
    world: np.random.Generator,
    customers: Sequence[Sequence[Any]],
    merchants: Sequence[Sequence[str]],
    frauds: np.ndarray,
    fraud_hours: np.ndarray,
    day: datetime,
    legitimate: int,
) -> Iterator[list[Any]]:
    """Yield one day's payments, sorted by time.

    `frauds` has the shape (n, 2). Its first column contains the index of each fraud's card.
    """
    count = legitimate + len(frauds)
    is_fraud = np.arange(count) >= legitimate
    hour = np.concatenate([_draw(world, _LEGITIMATE_HOURS, legitimate), _draw(world, fraud_hours, len(frauds))])
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
    """Draw the cards that are stolen on one day, and return the frauds with these cards, as an array of shape (n, 2).

    The first column is the index of the card. The second column is 0 for a fraud on that day, and 1 for a fraud on the
    next day.
    """
    victims = world.integers(0, cards, world.poisson(expected / _HITS_A_VICTIM))
    hits = np.repeat(victims, world.poisson(_HITS_A_VICTIM, len(victims)))
    return np.column_stack([hits, world.integers(0, 2, len(hits))])


def _draw(world: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    return world.choice(len(weights), size=count, p=weights / weights.sum())


@cache
def _population(seed: int, cards: int) -> tuple[np.random.Generator, list[list[Any]], list[list[str]]]:
    """Draw the customers, and the merchants of each category. Also returns the generator, for further draws."""
    world = np.random.default_rng(seed)
    customers = [_customer(world) for _ in range(cards)]
    return world, customers, [[_merchant(world) for _ in range(_MERCHANTS_A_CATEGORY)] for _ in _CATEGORIES]


def _customer(world: np.random.Generator) -> list[Any]:
    """Draw a random customer: cc_num, first, last, gender, street, city, state, zip, lat, long, city_pop, job, dob."""
    gender = str(world.choice(["F", "M"]))
    state = list(_STATES)[_draw(world, np.array([weight for weight, _, _ in _STATES.values()], dtype=float), 1)[0]]
    _, latitude, longitude = _STATES[state]
    digits = int(world.choice([*_CARDS], p=[0.07, 0.07, 0.10, 0.16, 0.50, 0.10]))
    born = datetime(1, 1, 1) + timedelta(days=365.2425 * (_between(world.random(), _BIRTH_YEARS) - 1))
    return [
        _card([int(world.integers(1, 10)), *world.integers(0, 10, digits - 1).tolist()]),
        _one(world, _FIRST[gender]),
        _one(world, _LAST),
        gender,
        f"{world.integers(1, 9999)} {_one(world, _STREETS)} {_one(world, _STREET_ENDS)}",
        _one(world, _TOWNS) + _one(world, _TOWN_ENDS),
        state,
        int(world.integers(1001, 99_900)),
        round(latitude + float(world.uniform(-1.5, 1.5)), 4),
        round(longitude + float(world.uniform(-2.0, 2.0)), 4),
        round(float(np.exp(_between(world.random(), np.log(_INHABITANTS))))),
        _one(world, _JOBS),
        born.date().isoformat(),
    ]


def _card(digits: Sequence[int]) -> int:
    """Make a card number with a length and a first part as in the Sparkov set, where each number has a check digit.

    A number that begins with 60 has 11 digits, or 16.
    """
    starts = _CARDS[len(digits)].split()
    start = starts[(100 * digits[0] + 10 * digits[1] + digits[2]) % len(starts)]
    shorter = len(digits) == 12 and start == "60"
    text = start + "".join(map(str, digits[len(start) : -2 if shorter else -1]))
    return next(10 * int(text) + last for last in range(10) if passes_luhn(f"{text}{last}"))


def _between(level: float, quantiles: Sequence[float] | np.ndarray) -> float:
    """Return the quantile of a distribution at `level` (0 to 1).

    `quantiles` are the known quantiles of the distribution, one for each of _LEVELS[1:-1].
    """
    return float(np.interp(level, _LEVELS[1:-1], quantiles))


def _merchant(world: np.random.Generator) -> str:
    """Draw a merchant's name. As in the Sparkov set, every name begins with `fraud_`, even for legitimate payments."""
    a, b, c = world.choice(_LAST, 3, replace=False).tolist()
    return str(world.choice([f"fraud_{a}, {b} and {c}", f"fraud_{a}-{b}", f"fraud_{a} {c} Group", f"fraud_{b} LLC"]))


def _one(world: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(world.integers(len(words)))]
