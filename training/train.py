"""The model: how it is made, how good it is on cards it never saw, and how it gets into the registry."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

# It would tell its makers of its use, from a thread that changes the environment under a request's feet.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import cloudpickle
import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.tracking import MlflowClient
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score, precision_recall_curve, precision_score, recall_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from sandbox.generator import training_frame
from shared.errors import Outage
from shared.records import FEATURES
from training import features

TARGET_PRECISION = 0.9
_HELD_OUT = 0.3
_GENERATED_ROWS = 30_000
_GENERATED_FRAUD_RATE = 0.02
_GENERATED_START = datetime(2024, 1, 1, tzinfo=UTC)
_PACKAGES = ("cloudpickle", "numpy", "pandas", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A fitted pipeline over the raw columns, its threshold, and how it did on the held-out cards."""

    pipeline: Pipeline
    threshold: float
    metrics: dict[str, float]
    example: pd.DataFrame


def build_pipeline(*, seed: int) -> Pipeline:
    """Feature making and gradient boosting in one estimator whose input is a frame of the raw columns."""
    trees = HistGradientBoostingClassifier(
        learning_rate=0.1,
        max_iter=100,
        max_leaf_nodes=15,
        min_samples_leaf=30,
        l2_regularization=1.0,
        categorical_features=[features.FEATURES.index("category")],
        random_state=seed,
    )
    return Pipeline([("features", FunctionTransformer(features.make_features)), ("trees", trees)])


def choose_threshold(labels: np.ndarray, probabilities: np.ndarray, *, target_precision: float) -> float:
    """The lowest threshold (n labels of 0 and 1, n probabilities) that reaches the precision.

    Where none does, the one with the highest precision: few alarms rather than false ones.
    """
    precision, _, thresholds = precision_recall_curve(labels, probabilities)
    reaching = np.flatnonzero(precision[:-1] >= target_precision)
    return float(thresholds[reaching[0] if len(reaching) else precision[:-1].argmax()])


def fit(frame: pd.DataFrame, *, seed: int, target_precision: float = TARGET_PRECISION) -> Trained:
    """Train on labelled transactions in the training file's columns; rows without a label are left out.

    Measured on cards that the measured model never saw; the model returned has learnt from all. Raises ValueError if
    either part of the cards has no frauds, or nothing but frauds.
    """
    frame = frame.dropna(subset=["is_fraud"])
    labels = frame["is_fraud"].to_numpy(dtype=int)
    if len(np.unique(labels)) < 2 or frame["cc_num"].nunique() < 2:
        raise ValueError("training needs frauds and legitimate transactions, on several cards")
    raw = frame[features.RAW]
    split = GroupShuffleSplit(n_splits=1, test_size=_HELD_OUT, random_state=seed)
    known, unseen = next(split.split(raw, groups=frame["cc_num"]))
    if any(len(np.unique(labels[part])) < 2 for part in (known, unseen)):
        raise ValueError("training needs frauds on more cards: none are left to learn from, or to measure on")
    probabilities = _fitted(raw.iloc[known], labels[known], seed).predict_proba(raw.iloc[unseen])[:, 1]
    threshold = choose_threshold(labels[unseen], probabilities, target_precision=target_precision)
    predicted = (probabilities >= threshold).astype(int)
    return Trained(
        pipeline=_fitted(raw, labels, seed),
        threshold=threshold,
        metrics={
            "average_precision": float(average_precision_score(labels[unseen], probabilities)),
            "precision": float(precision_score(labels[unseen], predicted, zero_division=0.0)),
            "recall": float(recall_score(labels[unseen], predicted, zero_division=0.0)),
        },
        example=raw.head(3),
    )


def register(trained: Trained, *, tracking_uri: str, name: str, alias: str) -> str:
    """Log the pipeline and its threshold to MLflow, give the new version the alias, and return its number.

    Raises Outage if the registry does not do it.
    """
    mlflow.set_tracking_uri(tracking_uri)
    cloudpickle.register_pickle_by_value(features)  # the artifact must load where this package is not installed
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    try:
        mlflow.set_experiment(name)
        with mlflow.start_run(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mlflow.log_params({**trained.pipeline.named_steps["trees"].get_params(), "threshold": trained.threshold})
            mlflow.log_metrics(trained.metrics)
            logged = mlflow.sklearn.log_model(
                trained.pipeline,
                name="model",
                serialization_format=mlflow.sklearn.SERIALIZATION_FORMAT_CLOUDPICKLE,
                pip_requirements=[f"{package}=={version(package)}" for package in _PACKAGES],
                signature=infer_signature(trained.example, trained.pipeline.predict(trained.example)),
                input_example=trained.example,
                metadata={"threshold": trained.threshold},
                registered_model_name=name,
            )
        number = str(logged.registered_model_version)
        MlflowClient().set_registered_model_alias(name, alias, number)
    except MlflowException as error:
        raise _away(tracking_uri, error) from None
    finally:
        cloudpickle.unregister_pickle_by_value(features)
    return number


def _fitted(raw: pd.DataFrame, labels: np.ndarray, seed: int) -> Pipeline:
    return build_pipeline(seed=seed).fit(raw, labels)


def version_of(*, tracking_uri: str, name: str, alias: str) -> str | None:
    """The version that bears the alias, or None. Raises Outage if the registry does not answer."""
    try:
        return str(MlflowClient(tracking_uri).get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise _away(tracking_uri, error) from None


def _away(tracking_uri: str, error: MlflowException) -> Outage:
    return Outage(f"MLflow at {tracking_uri}: {str(error).splitlines()[0]}")


def read(sources: Sequence[str]) -> pd.DataFrame:
    """Training files (paths or URLs, with or without the unnamed first column), one after the other.

    Raises OSError for what cannot be opened, ValueError for what is not in the training format.
    """
    frames = []
    for source in sources:
        try:
            frame = pd.read_csv(source, dtype={"cc_num": str})
        except ValueError as error:  # pandas' own words do not name the file
            raise ValueError(f"{source}: {error}") from None
        if absent := [name for name in FEATURES if name not in frame]:
            raise ValueError(f"{source}: columns missing: {', '.join(absent)}")
        if frame[features.RAW].isna().any(axis=None):
            raise ValueError(f"{source}: empty values in the columns that the model learns from")
        frames.append(frame[list(FEATURES)])
    return pd.concat(frames, ignore_index=True)


def generate(*, seed: int) -> pd.DataFrame:
    """Generated transactions to train on, with more frauds than there are in life."""
    return training_frame(rows=_GENERATED_ROWS, seed=seed, start=_GENERATED_START, fraud_rate=_GENERATED_FRAUD_RATE)
