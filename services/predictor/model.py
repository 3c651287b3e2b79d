"""Makes a model from a loaded estimator, and scores batches of transactions with the model."""

import gzip
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import structlog
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from services.predictor.compiled import TOLERANCE, Compiled, NotCompiled
from shared.errors import Poison
from shared.privacy import without_digits
from shared.profile import Profile
from shared.records import FEATURES, REFERENCE, Transaction, read_topic_1

log = structlog.get_logger()

_RECORDED = Path(__file__).with_name("recorded.jsonl.gz")
_NUMBERS = frozenset({"cc_num", "amt", "zip", "lat", "long", "city_pop", "unix_time", "merch_lat", "merch_long"})

# Models that need no column names get an array, because building a DataFrame takes longer than scoring a small batch.
warnings.filterwarnings("ignore", message="X does not have valid feature names")

# For these models, predict() returns the class with the highest probability, so calling predict_proba() is enough. For
# other models, predict() and predict_proba() may disagree, for example after Platt scaling or with a tuned decision
# threshold. For those models, predict() is called as well.
_LABEL_IS_LIKELIEST = (
    Compiled,
    DecisionTreeClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    LogisticRegression,
    RandomForestClassifier,
)


class UnusableModel(Exception):
    """The model cannot be served. The message gives the reason."""


class Score(NamedTuple):
    """The prediction for one transaction."""

    label: int  # 1 is fraud
    probability: float | None  # probability of fraud; None if the model provides no probabilities


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is ready to score transactions."""

    name: str
    version: str
    estimator: Any
    columns: tuple[str, ...]
    threshold: float | None  # the lowest probability that counts as fraud; None if no threshold was logged
    profile: Profile | None  # profile of the training data; None if no readable profile was logged
    as_array: bool  # whether the estimator's input is an array of numbers, not a DataFrame
    logged_at: float  # time at which the model was logged, in epoch seconds
    digest: str = ""  # SHA-256 of the model's files; empty if the model was not loaded from files


def make_model(
    *,
    name: str,
    version: str,
    estimator: Any,
    columns: Iterable[str] | None,
    metadata: Mapping[str, Any],
    logged_at: float,
    compiled: bool,
    shutdown: Event | None = None,
) -> Model:
    """Make a model that uses one thread, and test that it can score the recorded transactions.

    `columns` are the input columns in the model's signature (default: the estimator's `feature_names_in_`). If
    `compiled` is true, the model's trees are compiled. The original model is returned if compiling is impossible, if
    compiling would change scores, or if `shutdown` interrupts the compilation.

    Raises UnusableModel if the test fails, if the input columns are unknown, or if transactions lack an input column.
    """
    wanted = tuple(columns if columns is not None else getattr(estimator, "feature_names_in_", ()))
    if not wanted:
        raise UnusableModel("its input columns are unknown: log the model with a signature, or fit it on a DataFrame")
    if unknown := [column for column in wanted if column not in FEATURES]:
        raise UnusableModel(f"it needs columns that transactions do not have: {', '.join(map(str, unknown))}")
    _use_one_thread(estimator)
    threshold = metadata.get("threshold")
    model = Model(
        name=name,
        version=version,
        estimator=estimator,
        columns=wanted,
        threshold=None if threshold is None else float(threshold),
        profile=_profile(metadata),
        logged_at=logged_at,
        as_array=isinstance(estimator, _LABEL_IS_LIKELIEST)
        and set(wanted) <= _NUMBERS
        and tuple(getattr(estimator, "feature_names_in_", wanted)) == wanted,
    )
    try:
        score(model, [REFERENCE, *recorded()])
    except Poison as poison:
        raise UnusableModel(f"it fails on the recorded transactions: {poison}") from None
    return _compiled(model, shutdown) if compiled else model


def _profile(metadata: Mapping[str, Any]) -> Profile | None:
    """Read the profile of the training data. Returns None if the profile is missing or unreadable.

    Scoring works without a profile.
    """
    text = metadata.get("reference_profile")
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=Profile)
    except (msgspec.MsgspecError, TypeError) as error:
        log.warning("reference_profile_unreadable", reason=str(error))
        return None


def _compiled(model: Model, shutdown: Event | None) -> Model:
    """Compile the model.

    Returns the original model if compiling fails, or if it changes the scores of the recorded transactions.
    """
    try:
        threshold = 0.5 if model.threshold is None else model.threshold
        compiled = replace(model, estimator=Compiled(model.estimator, threshold=threshold, shutdown=shutdown))
        wanted, found = score(model, recorded()), score(compiled, recorded())
        difference = max(
            abs((one.probability or 0.0) - (other.probability or 0.0)) for one, other in zip(wanted, found, strict=True)
        )
        if difference > TOLERANCE or [each.label for each in wanted] != [each.label for each in found]:
            raise NotCompiled(
                f"the compiled model and the original score differently: probabilities differ by up to {difference:.1e}"
            )
    except Exception as reason:  # compiling is optional, so a failure is only logged
        log.info("scoring_not_compiled", model=model.name, version=model.version, reason=str(reason))
        return model
    log.info("scoring_compiled", model=model.name, version=model.version)
    return compiled


@cache
def recorded() -> Sequence[Transaction]:
    """Return several hundred transactions of made-up people.

    A model is usable only if it can score all of these transactions.
    """
    return [row for line in gzip.open(_RECORDED) for row in read_topic_1(line).transactions]


def score(model: Model, transactions: Sequence[Transaction]) -> list[Score]:
    """Score the transactions, in order. Raises Poison if the model fails or returns invalid predictions."""
    try:
        rows = _array(transactions, model.columns) if model.as_array else _frame(transactions, model.columns)
        labels, probabilities = _predict(model, rows)
        if len(labels) != len(transactions):
            raise ValueError("the model does not return one prediction for each row")
        if probabilities is not None and np.isnan(probabilities).any():
            raise ValueError("the model returns a probability that is not a number")
    except Exception as error:  # a user's model may raise any exception, because of the rows or a bug
        raise Poison(without_digits(f"{type(error).__name__}: {error}")) from None
    if probabilities is None:
        return [Score(label, None) for label in labels.tolist()]
    return list(map(Score, labels.tolist(), probabilities.tolist()))


def _predict(model: Model, rows: pd.DataFrame | np.ndarray) -> tuple[Any, Any]:
    """Return two arrays of shape (n,): the labels (0 or 1) and the probabilities of fraud.

    If the model provides no probabilities, the second result is None.
    """
    classes = list(getattr(model.estimator, "classes_", []))
    if not hasattr(model.estimator, "predict_proba") or 1 not in classes:
        return _from_predict(model.estimator.predict(rows), model.threshold)
    by_class = np.asarray(model.estimator.predict_proba(rows))
    probabilities = by_class[:, classes.index(1)]
    if model.threshold is not None:
        return (probabilities >= model.threshold).astype(int), probabilities
    if isinstance(_final_step(model.estimator), _LABEL_IS_LIKELIEST):
        return _labels(np.asarray(classes)[by_class.argmax(axis=1)]), probabilities
    return _labels(model.estimator.predict(rows)), probabilities


def _from_predict(predicted: Any, threshold: float | None) -> tuple[Any, Any]:
    """Return labels and probabilities, given the result of predict().

    If there is a threshold, predict() must return probabilities.
    """
    if threshold is None:
        return _labels(predicted), None
    probabilities = np.asarray(predicted, dtype=float).ravel()
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("the model was logged with a threshold, but does not return probabilities")
    return (probabilities >= threshold).astype(int), probabilities


def _labels(predicted: Any) -> Any:
    labels = np.asarray(predicted).ravel().astype(float)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(
            "the model returns labels that are neither zero nor one;"
            " if they are probabilities, log the model with a threshold"
        )
    return labels.astype(int)


def _frame(transactions: Sequence[Transaction], columns: Sequence[str]) -> pd.DataFrame:
    """Return the transactions as a DataFrame of shape (n, len(columns)), with the columns in the given order."""
    return pd.DataFrame({column: list(map(attrgetter(column), transactions)) for column in columns})


def _array(transactions: Sequence[Transaction], columns: Sequence[str]) -> np.ndarray:
    """Return the transactions as an array of shape (n, len(columns)), with the columns in the given order."""
    values = list(map(attrgetter(*columns), transactions))
    return np.array(values, dtype=float).reshape(len(transactions), len(columns))


def _final_step(estimator: Any) -> Any:
    steps = getattr(estimator, "steps", None)
    return steps[-1][1] if steps else estimator


def _use_one_thread(estimator: Any) -> None:
    """Set n_jobs to 1, because more threads are slower on small batches. To use more cores, run more replicas."""
    if hasattr(estimator, "get_params"):
        jobs = [name for name in estimator.get_params() if name == "n_jobs" or name.endswith("__n_jobs")]
        estimator.set_params(**dict.fromkeys(jobs, 1))
