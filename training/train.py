"""Fits the model, measures it on cards that it has not seen, and registers it."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import cloudpickle
import mlflow
import msgspec
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from sklearn.calibration import CalibrationDisplay
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    PrecisionRecallDisplay,
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    precision_score,
    recall_score,
)
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from shared.profile import Profile, make_profile
from shared.records import FEATURES, REFERENCE
from training import aliases, features
from training.aliases import Alias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET_PRECISION = 0.9
_TIME = "trans_date_trans_time"
_FORMS = {_TIME: r"\d{4}-[01]\d-[0-3]\d [0-2]\d:[0-5]\d:[0-5]\d", "dob": r"\d{4}-[01]\d-[0-3]\d"}
_HELD_OUT = 0.3
_LEAST_ROWS = 20  # minimum number of frauds, and of legitimate rows, in each part of a split by time
_TOP = 100
_PACKAGES = ("cloudpickle", "numpy", "pandas", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A fitted pipeline for the raw columns, with its threshold and its results on held-out rows."""

    pipeline: Pipeline
    threshold: float
    labels: np.ndarray  # (n,) 0 or 1, for the held-out rows
    probabilities: np.ndarray  # (n,) of fraud; the model was not trained on these rows
    held_out: str  # describes the held-out rows
    profile: Profile

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics on the held-out rows. Metrics that depend on a threshold use `threshold`."""
        alarms = self.probabilities >= self.threshold
        (true_negatives, false_positives), (false_negatives, true_positives) = confusion_matrix(self.labels, alarms)
        top = self.labels[np.argsort(-self.probabilities, kind="stable")[:_TOP]]
        return {
            "average_precision": float(average_precision_score(self.labels, self.probabilities)),
            "precision": float(precision_score(self.labels, alarms, zero_division=0.0)),
            "recall": float(recall_score(self.labels, alarms)),
            f"precision_at_{_TOP}": float(top.mean()),
            "true_positives": float(true_positives),
            "false_positives": float(false_positives),
            "false_negatives": float(false_negatives),
            "true_negatives": float(true_negatives),
        }


def build_pipeline(*, seed: int) -> Pipeline:
    """Return an estimator that computes the features and applies gradient boosting.

    The estimator's input is a frame of the raw columns.
    """
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
    """Return the lowest threshold that reaches the target precision on these rows.

    `labels` (n,) are 0 or 1, and `probabilities` (n,) are the probabilities of fraud. If no threshold reaches the
    target, returns the threshold with the highest precision, because few alarms are better than many false alarms.
    """
    precision, _, thresholds = precision_recall_curve(labels, probabilities)
    reaching = np.flatnonzero(precision[:-1] >= target_precision)
    return float(thresholds[reaching[0] if len(reaching) else precision[:-1].argmax()])


def fit(frame: pd.DataFrame, *, seed: int, target_precision: float = TARGET_PRECISION) -> Trained:
    """Train on labelled transactions with the training file's columns. Rows without a label are ignored.

    The metrics come from a model that has not seen the held-out cards. Where the labels allow it, this model has not
    seen the held-out period either. The returned model is trained on all rows.

    Raises ValueError if the training rows or the held-out rows have no frauds, or have only frauds.
    """
    frame = frame.dropna(subset=["is_fraud"])
    labels = frame["is_fraud"].to_numpy(dtype=int)
    if len(np.unique(labels)) < 2 or frame["cc_num"].nunique() < 2:
        raise ValueError("training needs frauds and legitimate transactions, on several cards")
    raw = frame[features.RAW]
    known, unseen, held_out = split(frame, labels, seed=seed)
    probabilities = _fitted(raw[known], labels[known], seed).predict_proba(raw[unseen])[:, 1]
    legitimate = raw[labels == 0]
    return Trained(
        pipeline=_fitted(raw, labels, seed),
        threshold=choose_threshold(labels[unseen], probabilities, target_precision=target_precision),
        labels=labels[unseen],
        probabilities=probabilities,
        held_out=held_out,
        profile=make_profile(
            {name: legitimate[name].tolist() for name in features.RAW if name != _TIME}, legitimate[_TIME].tolist()
        ),
    )


def split(frame: pd.DataFrame, labels: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the mask (n,) of training rows, the mask (n,) of held-out rows, and a description of the held-out rows.

    No card has rows in both parts. If enough frauds and legitimate rows remain in both parts, the rows are also split
    by time. In this case, only the last part of the period is held out. Otherwise, the rows are split by card alone.
    For example, a split by time is impossible if a file's frauds and legitimate rows are from different years.

    Raises ValueError if, after the split by card, one part has no frauds or only frauds.
    """
    cards = GroupShuffleSplit(n_splits=1, test_size=_HELD_OUT, random_state=seed)
    unseen = np.zeros(len(frame), dtype=bool)
    unseen[next(cards.split(frame, groups=frame["cc_num"]))[1]] = True
    times = frame[_TIME].astype(str)
    later = (times >= times.sort_values().iloc[int(len(times) * (1 - _HELD_OUT))]).to_numpy()
    by_time = (~unseen & ~later, unseen & later)
    if all(min(np.bincount(labels[part], minlength=2)) >= _LEAST_ROWS for part in by_time):
        return *by_time, f"{_HELD_OUT:.0%} of the cards, in the last {_HELD_OUT:.0%} of the time"
    if any(len(np.unique(labels[part])) < 2 for part in (~unseen, unseen)):
        raise ValueError(
            "training needs frauds on more cards, because the training rows or the held-out rows contain no frauds"
        )
    return ~unseen, unseen, f"{_HELD_OUT:.0%} of the cards"


def register(trained: Trained, of: Alias) -> str:
    """Log the pipeline and its threshold to MLflow, give the new version the alias, and return the version's number.

    Raises Outage if the registry fails.
    """
    mlflow.set_tracking_uri(of.tracking_uri)
    cloudpickle.register_pickle_by_value(features)  # the artifact must load without this package
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    try:
        mlflow.set_experiment(of.name)
        with mlflow.start_run(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = pd.DataFrame([msgspec.structs.asdict(REFERENCE)])[features.RAW]  # contains no customer's data
            learner = trained.pipeline.named_steps["trees"].get_params()
            mlflow.log_params({**learner, "threshold": trained.threshold, "held_out": trained.held_out})
            mlflow.set_tags({f"version.{package}": version(package) for package in _PACKAGES})
            mlflow.log_metrics(trained.metrics)
            for name_of, figure in curves(trained).items():
                mlflow.log_figure(figure, f"{name_of}.png")
            logged = mlflow.sklearn.log_model(
                trained.pipeline,
                name="model",
                serialization_format=mlflow.sklearn.SERIALIZATION_FORMAT_CLOUDPICKLE,
                pip_requirements=[f"{package}=={version(package)}" for package in _PACKAGES],
                signature=infer_signature(example, trained.pipeline.predict(example)),
                input_example=example,
                metadata={
                    "threshold": trained.threshold,
                    "reference_profile": msgspec.json.encode(trained.profile).decode(),
                },
                registered_model_name=of.name,
            )
        number = str(logged.registered_model_version)
    except MlflowException as error:
        raise aliases.away(of.tracking_uri, error) from None
    finally:
        cloudpickle.unregister_pickle_by_value(features)
    aliases.move(of, number)
    return number


def curves(trained: Trained) -> dict[str, "Figure"]:
    """Return plots of the results on the held-out rows: a mapping from the plot's name to the plot."""
    from matplotlib.figure import Figure

    labels, probabilities = trained.labels, trained.probabilities
    found = {}
    for name, draw in {
        "precision_recall": lambda axes: PrecisionRecallDisplay.from_predictions(labels, probabilities, ax=axes),
        "calibration": lambda axes: CalibrationDisplay.from_predictions(labels, probabilities, n_bins=10, ax=axes),
        "confusion_matrix": lambda axes: ConfusionMatrixDisplay.from_predictions(
            labels, probabilities >= trained.threshold, display_labels=["legitimate", "fraud"], ax=axes
        ),
    }.items():
        figure = Figure(figsize=(5, 5), layout="constrained")
        draw(figure.add_subplot())  # type: ignore[no-untyped-call]
        found[name] = figure
    return found


def _fitted(raw: pd.DataFrame, labels: np.ndarray, seed: int) -> Pipeline:
    return build_pipeline(seed=seed).fit(raw, labels)


def read(sources: Sequence[str]) -> pd.DataFrame:
    """Read the rows of training files, in the order of `sources`, which are paths or URLs.

    The unnamed first column of a file is optional.

    Raises OSError if a file cannot be opened, and ValueError if a file is not in the training format.
    """
    frames = []
    for source in sources:
        try:
            frame = pd.read_csv(source, dtype={"cc_num": str})
        except ImportError as error:  # the package for a protocol such as s3:// is missing
            raise ValueError(f"{source}: {error}") from None
        except OSError as error:
            raise error if error.filename and error.strerror else OSError(f"{source}: {error}") from None
        except pd.errors.EmptyDataError:
            raise ValueError(f"{source}: the file is empty") from None
        except UnicodeDecodeError:
            raise ValueError(f"{source}: not a text file in UTF-8") from None
        except pd.errors.ParserError:
            raise ValueError(f"{source}: not a CSV file whose lines have as many values as its header") from None
        except Exception as error:  # the transports raise their own errors
            raise ValueError(f"{source}: {error or type(error).__name__}") from None
        if absent := [name for name in FEATURES if name not in frame]:
            raise ValueError(f"{source}: columns missing: {', '.join(absent)}")
        if frame[features.RAW].isna().any(axis=None):
            raise ValueError(f"{source}: empty values in columns that the model learns from")
        for name, form in _FORMS.items():
            if wrong := int((~frame[name].astype(str).str.fullmatch(form)).sum()):
                wanted = "YYYY-MM-DD HH:MM:SS" if name == _TIME else "YYYY-MM-DD"
                raise ValueError(f"{source}: in {wrong:,} rows, {name} does not have the form {wanted}")
        frames.append(frame[list(FEATURES)])
    return pd.concat(frames, ignore_index=True)


def together(frame: pd.DataFrame, confirmed: pd.DataFrame) -> pd.DataFrame:
    """Return the training rows and the confirmed rows in one frame.

    A confirmed row replaces the training row of the same transaction.
    """
    rows = pd.concat([frame, confirmed.dropna(subset=["is_fraud"])], ignore_index=True)
    return rows.drop_duplicates(["trans_num", "unix_time"], keep="last", ignore_index=True)
