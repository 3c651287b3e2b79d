"""A model in memory: making it from a loaded estimator, and scoring batches with it."""

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

# Models that need no column names get an array, because building a frame takes longer than scoring a small batch.
warnings.filterwarnings("ignore", message="X does not have valid feature names")

# For these models, predict() returns the class with the highest predict_proba(), so calling the latter is enough. For
# others the two may disagree (after Platt scaling or with a tuned decision threshold), so predict() is called as well.
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
    """The model cannot be served. The message is the reason."""


class Score(NamedTuple):
    """The prediction for one transaction."""

    label: int  # 1 is fraud
    probability: float | None  # of fraud; None if the model does not provide probabilities


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is ready to score."""

    name: str
    version: str
    estimator: Any
    columns: tuple[str, ...]
    threshold: float | None  # the lowest probability that counts as fraud, if one was logged with the model
    profile: Profile | None  # of the training data, if one was logged with the model
    as_array: bool  # whether its input is an array of numbers, not a frame
    logged_at: float  # epoch seconds
    digest: str = ""  # SHA-256 of its files, if it was loaded from the registry


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
    """A model that uses one thread and has scored the recorded transactions. Raises UnusableModel if it cannot.

    `columns` are the signature's input columns (default: the estimator's `feature_names_in_`). If `compiled` is true,
    trees are compiled, unless that is impossible or would change a label, or `shutdown` is set meanwhile.
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
    """The profile of the training data, or None if it is missing or unreadable. Scoring works without it."""
    text = metadata.get("reference_profile")
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=Profile)
    except (msgspec.MsgspecError, TypeError) as error:
        log.warning("reference_profile_unreadable", reason=str(error))
        return None


def _compiled(model: Model, shutdown: Event | None) -> Model:
    """The compiled model, or the original if compiling fails or changes the scores of the recorded transactions."""
    try:
        threshold = 0.5 if model.threshold is None else model.threshold
        compiled = replace(model, estimator=Compiled(model.estimator, threshold=threshold, shutdown=shutdown))
        wanted, found = score(model, recorded()), score(compiled, recorded())
        difference = max(
            abs((one.probability or 0.0) - (other.probability or 0.0)) for one, other in zip(wanted, found, strict=True)
        )
        if difference > TOLERANCE or [each.label for each in wanted] != [each.label for each in found]:
            raise NotCompiled(f"compiling would change its labels, or its probabilities by up to {difference:.1e}")
    except Exception as reason:  # compiling is optional, so no failure matters
        log.info("scoring_not_compiled", model=model.name, version=model.version, reason=str(reason))
        return model
    log.info("scoring_compiled", model=model.name, version=model.version)
    return compiled


@cache
def recorded() -> Sequence[Transaction]:
    """Several hundred transactions of made-up people. A model is usable only if it can score them all."""
    return [row for line in gzip.open(_RECORDED) for row in read_topic_1(line).transactions]


def score(model: Model, transactions: Sequence[Transaction]) -> list[Score]:
    """The scores of the transactions, in order. Raises Poison if the model fails or its predictions are invalid."""
    try:
        rows = _array(transactions, model.columns) if model.as_array else _frame(transactions, model.columns)
        labels, probabilities = _predict(model, rows)
        if len(labels) != len(transactions):
            raise ValueError("the model does not return one prediction for each row")
        if probabilities is not None and np.isnan(probabilities).any():
            raise ValueError("the model returns a probability that is not a number")
    except Exception as error:  # a user's model may raise anything, because of these rows or of a bug
        raise Poison(without_digits(f"{type(error).__name__}: {error}")) from None
    if probabilities is None:
        return [Score(label, None) for label in labels.tolist()]
    return list(map(Score, labels.tolist(), probabilities.tolist()))


def _predict(model: Model, rows: pd.DataFrame | np.ndarray) -> tuple[Any, Any]:
    """Labels (n,), each 0 or 1, and probabilities of fraud (n,), or None if the model does not provide them."""
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
    """Labels and probabilities from predict() alone, which must return probabilities if there is a threshold."""
    if threshold is None:
        return _labels(predicted), None
    probabilities = np.asarray(predicted, dtype=float).ravel()
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("the model was logged with a threshold, but does not return probabilities")
    return (probabilities >= threshold).astype(int), probabilities


def _labels(predicted: Any) -> Any:
    labels = np.asarray(predicted).ravel().astype(float)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("the model returns labels that are neither zero nor one; log a threshold for probabilities")
    return labels.astype(int)


def _frame(transactions: Sequence[Transaction], columns: Sequence[str]) -> pd.DataFrame:
    """The transactions as a frame (n, len(columns)), with the columns in the given order."""
    return pd.DataFrame({column: list(map(attrgetter(column), transactions)) for column in columns})


def _array(transactions: Sequence[Transaction], columns: Sequence[str]) -> np.ndarray:
    """The transactions as an array (n, len(columns)), with the columns in the given order."""
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
