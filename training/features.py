"""Computes the model's features from the raw columns. This module is part of the model's artifact.

Identifiers, `unix_time` and the date are not used as features. In the training file, `unix_time` is seven years off.
The date only shows which part of the file a row comes from, not whether the row is fraud.
"""

import numpy as np
import pandas as pd

RAW = ["trans_date_trans_time", "category", "amt", "lat", "long", "city_pop", "dob", "merch_lat", "merch_long"]
FEATURES = ["category", "log_amt", "hour", "age_years", "log_city_pop", "distance_km"]
CATEGORIES = [
    "entertainment",
    "food_dining",
    "gas_transport",
    "grocery_net",
    "grocery_pos",
    "health_fitness",
    "home",
    "kids_pets",
    "misc_net",
    "misc_pos",
    "personal_care",
    "shopping_net",
    "shopping_pos",
    "travel",
]
_EARTH_RADIUS_KM = 6371.0


def make_features(raw: pd.DataFrame) -> np.ndarray:
    """From n rows with the columns RAW, compute the features: an array (n, 6) with the columns FEATURES.

    An unknown category becomes NaN.

    Raises ValueError for an invalid time or date of birth.
    """
    times, births = raw["trans_date_trans_time"].tolist(), raw["dob"].tolist()
    hours = np.array([int(time[11:13]) for time in times], dtype=float)
    paid = np.array([time[:10] for time in times], dtype="datetime64[D]")
    born = np.array([str(birth)[:10] for birth in births], dtype="datetime64[D]")
    codes = {name: float(code) for code, name in enumerate(CATEGORIES)}
    return np.column_stack(
        [
            np.array([codes.get(name, np.nan) for name in raw["category"].tolist()]),
            np.log1p(np.maximum(raw["amt"].to_numpy(dtype=float), 0.0)),
            hours,
            (paid - born).astype(float) / 365.25,
            np.log1p(raw["city_pop"].to_numpy(dtype=float)),
            _distance_km(*(raw[name].to_numpy(dtype=float) for name in ("lat", "long", "merch_lat", "merch_long"))),
        ]
    )


def _distance_km(lat_1: np.ndarray, long_1: np.ndarray, lat_2: np.ndarray, long_2: np.ndarray) -> np.ndarray:
    """For each pair of points, return the great-circle distance in km. The coordinates are in degrees.

    If a latitude does not exist, the distance may be NaN.

    Uses the haversine formula (Sinnott, Sky and Telescope 68, 1984).
    """
    lat_1, long_1, lat_2, long_2 = (np.radians(degrees) for degrees in (lat_1, long_1, lat_2, long_2))
    with np.errstate(invalid="ignore", over="ignore"):
        a = np.sin((lat_2 - lat_1) / 2) ** 2 + np.cos(lat_1) * np.cos(lat_2) * np.sin((long_2 - long_1) / 2) ** 2
        distance: np.ndarray = 2 * _EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(a, 1.0)))
    return distance
