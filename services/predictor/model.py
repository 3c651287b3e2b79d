"""A model in memory: which columns it wants, and what it says of a batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from shared.errors import Poison, without_digits
from shared.records import FEATURES, Transaction

# For these, predict() is the class of the highest predict_proba(): one call answers both. For others, it need not be
# (a support vector machine with Platt scaling, a tuned decision threshold), and predict() has the word.
_LABEL_IS_LIKELIEST = (
    DecisionTreeClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    LogisticRegression,
    RandomForestClassifier,
)

# A transaction that any model of this project's data must be able to score; nobody's.
REFERENCE = Transaction(
    trans_date_trans_time="2024-05-17 13:45:12",
    cc_num=4000000000000002,
    merchant="fraud_Kirlin and Sons",
    category="grocery_pos",
    amt=104.32,
    first="Ada",
    last="Miller",
    gender="F",
    street="12 Example Street",
    city="Springfield",
    state="NC",
    zip=28372,
    lat=34.69,
    long=-79.18,
    city_pop=14783,
    job="Engineer",
    dob="1975-04-02",
    trans_num="00000000000000000000000000000000",
    unix_time=1715953512,
    merch_lat=34.38,
    merch_long=-78.62,
    is_fraud=0,
)


class UnusableModel(Exception):
    """This model cannot be served; the message says why."""


class Score(NamedTuple):
    """What the model says of one transaction."""

    label: int  # 1 is fraud
    probability: float | None  # of fraud; None if the model gives none


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as it was logged, ready to score."""

    name: str
    version: str
    estimator: Any
    columns: tuple[str, ...]
    threshold: float | None  # of the probability of fraud, if one was logged with the model


def make_model(
    *, name: str, version: str, estimator: Any, columns: Iterable[str] | None, metadata: Mapping[str, Any]
) -> Model:
    """Make an estimator ready: its input columns from the signature or its own names, one thread, smoke-tested.

    `columns` are the signature's. Raises UnusableModel.
    """
    wanted = tuple(columns if columns is not None else getattr(estimator, "feature_names_in_", ()))
    if not wanted:
        raise UnusableModel("it names no input columns: log it with a signature, or fit it on a DataFrame")
    if unknown := [column for column in wanted if column not in FEATURES]:
        raise UnusableModel(f"it wants columns that transactions do not have: {', '.join(map(str, unknown))}")
    _use_one_thread(estimator)
    threshold = metadata.get("threshold")
    model = Model(
        name=name,
        version=version,
        estimator=estimator,
        columns=wanted,
        threshold=None if threshold is None else float(threshold),
    )
    try:
        score(model, [REFERENCE])
    except Poison as poison:
        raise UnusableModel(f"it fails on the reference transaction: {poison}") from None
    return model


def score(model: Model, transactions: Sequence[Transaction]) -> list[Score]:
    """Score a batch, in order, in one call of the model. Raises Poison if the model raises."""
    try:
        frame = _frame(transactions, model.columns)
        labels, probabilities = _predict(model, frame)
    except Exception as error:  # whatever a user's model raises is about these rows, or about the model
        raise Poison(without_digits(f"{type(error).__name__}: {error}")) from None
    if probabilities is None:
        return [Score(label, None) for label in labels.tolist()]
    return [Score(*pair) for pair in zip(labels.tolist(), probabilities.tolist(), strict=True)]


def _predict(model: Model, frame: pd.DataFrame) -> tuple[Any, Any]:
    """Labels (n,) of 0 and 1, and the probabilities of fraud (n,) or None."""
    classes = list(getattr(model.estimator, "classes_", []))
    if not hasattr(model.estimator, "predict_proba") or 1 not in classes:
        return _labels(model.estimator.predict(frame)), None
    likelihoods = np.asarray(model.estimator.predict_proba(frame))
    probabilities = likelihoods[:, classes.index(1)]
    if model.threshold is not None:
        return (probabilities >= model.threshold).astype(int), probabilities
    if isinstance(_final_step(model.estimator), _LABEL_IS_LIKELIEST):
        return _labels(np.asarray(classes)[likelihoods.argmax(axis=1)]), probabilities
    return _labels(model.estimator.predict(frame)), probabilities


def _labels(predicted: Any) -> Any:
    labels = np.asarray(predicted).astype(int)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("the model predicts labels other than 0 and 1")
    return labels


def _frame(transactions: Sequence[Transaction], columns: Sequence[str]) -> pd.DataFrame:
    """The raw columns (n, len(columns)), in the model's order."""
    return pd.DataFrame({column: list(map(attrgetter(column), transactions)) for column in columns})


def _final_step(estimator: Any) -> Any:
    steps = getattr(estimator, "steps", None)
    return steps[-1][1] if steps else estimator


def _use_one_thread(estimator: Any) -> None:
    """Models logged with n_jobs=-1 are slower on small batches; replicas, not threads, use more cores."""
    if hasattr(estimator, "get_params"):
        jobs = [name for name in estimator.get_params() if name == "n_jobs" or name.endswith("__n_jobs")]
        estimator.set_params(**dict.fromkeys(jobs, 1))
