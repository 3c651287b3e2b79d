"""Ways of logging a model, as people have: each is trained here, logged to a registry, and knows its own answers."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle
import mlflow
import mlflow.pyfunc
import mlflow.sklearn
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature, infer_signature
from mlflow.pyfunc.model import PythonModel
from mlflow.types.schema import ColSpec, Schema
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import TunedThresholdClassifierCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, LabelEncoder, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from sandbox.generator import training_frame
from shared.records import FEATURES

cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUMBERS = ["amt", "lat", "long", "city_pop", "merch_lat", "merch_long"]
TEXTS = ["category", "gender", "state"]
MIXED = [*NUMBERS, *TEXTS]
ALL = [name for name in FEATURES if name != "is_fraud"]

Cast = Callable[[pd.DataFrame], pd.DataFrame]
Own = Callable[[pd.DataFrame], tuple[Any, Any]]
"""What the model itself answers to these rows: labels (n,) and probabilities (n,), or None."""


@dataclass(frozen=True)
class Kept:
    """A model that has been logged."""

    own: Own | None = None
    refused: str = ""  # the reason, where it is not served


@cache
def history() -> tuple[pd.DataFrame, pd.Series]:
    """Transactions to train with, and whether each is a fraud."""
    frame = training_frame(seed=3, rows=3000)
    return frame, frame.pop("is_fraud").astype(int)


def by_chance(estimator: Any, columns: Sequence[str], threshold: float | None = None, cast: Any = None) -> Own:
    """The answers of an estimator with predict_proba, given these columns as they were when it was trained."""

    def own(rows: pd.DataFrame) -> tuple[Any, Any]:
        given = rows[list(columns)] if cast is None else cast(rows[list(columns)])
        chances = estimator.predict_proba(given)[:, 1]
        labels = estimator.predict(given) if threshold is None else chances >= threshold
        return np.asarray(labels).astype(float), chances

    return own


def _log(flavor: Any, model: Any, name: str, signature: Any, threshold: Any = None, **more: Any) -> None:
    with mlflow.start_run():
        flavor.log_model(
            model,
            name="model",
            signature=signature,
            registered_model_name=name,
            pip_requirements=[],
            metadata=None if threshold is None else {"threshold": threshold},
            **more,
        )


def _sklearn(model: Any, name: str, signature: Any, threshold: Any = None, **more: Any) -> None:
    _log(mlflow.sklearn, model, name, signature, threshold, serialization_format="cloudpickle", **more)


def _pyfunc(model: Any, name: str, signature: Any, threshold: Any = None, **more: Any) -> None:
    with mlflow.start_run():
        mlflow.pyfunc.log_model(
            name="model",
            python_model=model,
            signature=signature,
            registered_model_name=name,
            pip_requirements=[],
            metadata=None if threshold is None else {"threshold": threshold},
            **more,
        )


def pipeline_of_raw_columns(name: str, _: Path) -> Kept:
    """One-hot columns beside scaled numbers, from the raw columns."""
    rows, fraud = history()
    one_hot = ("text", OneHotEncoder(handle_unknown="ignore"), TEXTS)
    model = make_pipeline(
        ColumnTransformer([one_hot, ("numbers", StandardScaler(), NUMBERS)]), LogisticRegression(max_iter=300)
    ).fit(rows[MIXED], fraud)
    _sklearn(model, name, infer_signature(rows[MIXED].head()), threshold=0.3)
    return Kept(by_chance(model, MIXED, 0.3))


def fitted_on_numbers_logged_with_all(name: str, _: Path) -> Kept:
    """The signature has all columns, and the model was fitted on the numeric ones."""
    rows, fraud = history()
    numbers = [each for each in ALL if rows[each].dtype.kind in "if"]
    model = RandomForestClassifier(20, n_jobs=-1, random_state=0).fit(rows[numbers], fraud)
    _sklearn(model, name, infer_signature(rows[ALL].head()))
    return Kept(by_chance(model, numbers))


def boosting_of_categories(name: str, _: Path) -> Kept:
    """Columns with the data type category of pandas."""
    rows, fraud = history()
    cast = _categories
    model = HistGradientBoostingClassifier(max_iter=20, categorical_features="from_dtype").fit(cast(rows[MIXED]), fraud)
    _sklearn(model, name, infer_signature(cast(rows[MIXED]).head()), threshold=0.2)
    return Kept(by_chance(model, MIXED, 0.2, cast))


def narrow_numbers(name: str, _: Path) -> Kept:
    """Numbers of 32 bits."""
    rows, fraud = history()

    def cast(given: pd.DataFrame) -> pd.DataFrame:
        return given.astype(dict.fromkeys(NUMBERS, "float32") | {"city_pop": "int32"})

    model = GradientBoostingClassifier(n_estimators=20, random_state=0).fit(cast(rows[NUMBERS]), fraud)
    _sklearn(model, name, infer_signature(cast(rows[NUMBERS]).head()), threshold=0.2)
    return Kept(by_chance(model, NUMBERS, 0.2, cast))


def resampled(name: str, _: Path) -> Kept:
    """A pipeline of imbalanced-learn."""
    from imblearn.over_sampling import RandomOverSampler
    from imblearn.pipeline import make_pipeline as make_resampled

    rows, fraud = history()
    model = make_resampled(RandomOverSampler(random_state=0), RandomForestClassifier(10, random_state=0))
    model.fit(rows[NUMBERS], fraud)
    _sklearn(model, name, infer_signature(rows[NUMBERS].head()))
    return Kept(by_chance(model, NUMBERS))


def xgboost_of_numbers(name: str, _: Path) -> Kept:
    """XGBoost with scikit-learn's interface."""
    from xgboost import XGBClassifier

    rows, fraud = history()
    model = XGBClassifier(n_estimators=20).fit(rows[NUMBERS], fraud)
    _log(mlflow.xgboost, model, name, infer_signature(rows[NUMBERS].head()), threshold=0.3)
    return Kept(by_chance(model, NUMBERS, 0.3))


def xgboost_of_categories(name: str, _: Path) -> Kept:
    """XGBoost with columns of the data type category, one of them of numbers."""
    from xgboost import XGBClassifier

    rows, fraud = history()

    def cast(given: pd.DataFrame) -> pd.DataFrame:
        return given.astype({each: pd.CategoricalDtype(sorted(rows[each].unique())) for each in TEXTS})

    model = XGBClassifier(n_estimators=20, enable_categorical=True).fit(cast(rows[MIXED]), fraud)
    _log(mlflow.xgboost, model, name, infer_signature(rows[MIXED].head()))
    return Kept(by_chance(model, MIXED, None, cast))


def lightgbm_of_categories(name: str, _: Path) -> Kept:
    """LightGBM with columns of the data type category."""
    from lightgbm import LGBMClassifier

    rows, fraud = history()
    columns = [*MIXED, "zip"]
    known = {each: sorted(rows[each].unique()) for each in [*TEXTS, "zip"]}

    def cast(given: pd.DataFrame) -> pd.DataFrame:
        kept = {each: given[each].where(given[each].isin(its)) for each, its in known.items()}
        return given.assign(**{each: pd.Categorical(its, known[each]) for each, its in kept.items()})

    model = LGBMClassifier(n_estimators=20, verbose=-1).fit(cast(rows[columns]), fraud)
    _log(mlflow.lightgbm, model, name, infer_signature(rows[columns].head()), threshold=0.05)
    return Kept(by_chance(model, columns, 0.05, cast))


def lightgbm_booster(name: str, _: Path) -> Kept:
    """LightGBM's own interface, which predicts probabilities."""
    import lightgbm

    rows, fraud = history()
    model = lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(rows[NUMBERS], fraud), 20)
    _log(mlflow.lightgbm, model, name, infer_signature(rows[NUMBERS].head()), threshold=0.4)

    def own(given: pd.DataFrame) -> tuple[Any, Any]:
        chances = np.asarray(model.predict(given[NUMBERS]))
        return chances >= 0.4, chances

    return Kept(own)


def catboost_of_numbers(name: str, _: Path) -> Kept:
    """CatBoost, which lets nobody set its parameters after the training."""
    from catboost import CatBoostClassifier

    rows, fraud = history()
    model = CatBoostClassifier(iterations=20, verbose=False, allow_writing_files=False, thread_count=1)
    model.fit(rows[NUMBERS], fraud)
    _log(mlflow.catboost, model, name, infer_signature(rows[NUMBERS].head()), threshold=0.3)
    return Kept(by_chance(model, NUMBERS, 0.3))


def catboost_of_texts(name: str, _: Path) -> Kept:
    """CatBoost with text columns, and numbers as text."""
    from catboost import CatBoostClassifier

    rows, fraud = history()
    columns = [*MIXED, "zip"]

    def cast(given: pd.DataFrame) -> pd.DataFrame:
        return given.astype({"zip": str})

    model = CatBoostClassifier(
        iterations=20, verbose=False, allow_writing_files=False, thread_count=1, cat_features=[*TEXTS, "zip"]
    ).fit(cast(rows[columns]), fraud)
    _log(mlflow.catboost, model, name, infer_signature(cast(rows[columns]).head()))
    return Kept(by_chance(model, columns, None, cast))


class Network(PythonModel):
    """A small neural network with 32 bits, which returns a column."""

    def __init__(self) -> None:
        dice = np.random.default_rng(0)
        self.first, self.second = dice.normal(size=(6, 16)).astype("f4"), dice.normal(size=(16, 1)).astype("f4")

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> Any:  # noqa: ARG002
        rows = (model_input[NUMBERS].to_numpy() / [100, 90, 180, 1e6, 90, 180]).astype("f4")
        return 1 / (1 + np.exp(-np.tanh(rows @ self.first) @ self.second))


def neural_network(name: str, _: Path) -> Kept:
    """As Keras returns probabilities."""
    rows, _fraud = history()
    model = Network()
    _pyfunc(model, name, infer_signature(rows[NUMBERS].head()), threshold=0.7)

    def own(given: pd.DataFrame) -> tuple[Any, Any]:
        chances = model.predict(None, given).ravel()
        return chances >= 0.7, chances

    return Kept(own)


class Asked(PythonModel):
    """A model that MLflow alone knows how to ask."""

    def __init__(self, answer: Callable[[pd.DataFrame], Any]) -> None:
        self.answer = answer

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> Any:  # noqa: ARG002
        return self.answer(model_input)


def _chance(rows: pd.DataFrame) -> pd.Series:
    return 1 / (1 + np.exp((100 - rows["amt"]) / 30))


def own_columns(name: str, _: Path) -> Kept:
    """A table of labels and probabilities, with a decision of its own."""
    rows, _fraud = history()

    def answer(given: pd.DataFrame) -> pd.DataFrame:
        chances = _chance(given)
        return pd.DataFrame({"prediction": (chances > 0.35).astype(int), "probability": chances})

    _pyfunc(Asked(answer), name, infer_signature(rows[["amt"]].head()))
    return Kept(lambda given: (_chance(given) > 0.35, _chance(given)))


def both_classes(name: str, _: Path) -> Kept:
    """Probabilities of both classes."""
    rows, _fraud = history()

    def answer(given: pd.DataFrame) -> Any:
        return np.column_stack([1 - _chance(given), _chance(given)])

    _pyfunc(Asked(answer), name, infer_signature(rows[["amt"]].head()), threshold=0.6)
    return Kept(lambda given: (_chance(given) >= 0.6, _chance(given)))


def sorted_answers(name: str, _: Path) -> Kept:
    """Answers in the order of the amounts, with the index of the rows."""
    rows, _fraud = history()
    _pyfunc(Asked(lambda given: _chance(given.sort_values("amt"))), name, infer_signature(rows[["amt"]].head()), 0.6)
    return Kept(lambda given: (_chance(given) >= 0.6, _chance(given)))


def sorted_answers_without_index(name: str, _: Path) -> Kept:
    """Answers in the order of the amounts, and nobody can know."""
    rows, _fraud = history()

    def answer(given: pd.DataFrame) -> Any:
        return _chance(given.sort_values("amt")).to_numpy()

    _pyfunc(Asked(answer), name, infer_signature(rows[["amt"]].head()), 0.6)
    return Kept(refused="depends on the others of a batch")


def times(name: str, _: Path) -> Kept:
    """Times as times."""
    signature = ModelSignature(Schema([ColSpec("datetime", "trans_date_trans_time"), ColSpec("datetime", "dob")]))

    def answer(given: pd.DataFrame) -> Any:
        when, born = given["trans_date_trans_time"], given["dob"]
        return ((when.dt.hour < 6) & ((when - born).dt.days > 40 * 365)).astype(int)

    _pyfunc(Asked(answer), name, signature)
    names = ["trans_date_trans_time", "dob"]
    return Kept(lambda given: (answer(given[names].apply(pd.to_datetime)), None))


def cards_and_zips(name: str, _: Path) -> Kept:
    """Card numbers of 64 bits, and postal codes as text."""
    signature = ModelSignature(Schema([ColSpec("long", "cc_num"), ColSpec("string", "zip")]))

    def answer(given: pd.DataFrame) -> Any:
        return ((given["cc_num"] % 10 > 6) & given["zip"].str.endswith(("1", "3", "7"))).astype(int)

    _pyfunc(Asked(answer), name, signature)
    return Kept(lambda given: (answer(given.astype({"zip": str})), None))


def optional_columns(name: str, _: Path) -> Kept:
    """Columns that may be missing, and one that always is."""
    optional = [ColSpec("long", "zip", required=False), ColSpec("string", "device", required=False)]

    def answer(given: pd.DataFrame) -> Any:
        assert "device" not in given
        return (given["zip"] % 3 == 0).astype(int)

    _pyfunc(Asked(answer), name, ModelSignature(Schema([ColSpec("double", "amt"), *optional])))
    return Kept(lambda given: (answer(given), None))


def exported_to_onnx(name: str, _: Path) -> Kept:
    """A pipeline in ONNX, which returns labels and a dictionary of probabilities."""
    import mlflow.onnx
    from skl2onnx import to_onnx

    rows, fraud = history()
    narrow = rows[NUMBERS].astype("f4")
    model = RandomForestClassifier(25, random_state=0).fit(narrow, fraud)
    graph = to_onnx(model, narrow.to_numpy()[:1])
    signature = infer_signature(narrow.head())
    with mlflow.start_run():
        mlflow.onnx.log_model(graph, name="model", signature=signature, registered_model_name=name, pip_requirements=[])
    return Kept(by_chance(model, NUMBERS, None, lambda given: given.astype("f4")))


def calibrated(name: str, _: Path) -> Kept:
    """Calibrated probabilities, of which the most likely class need not be the label."""
    rows, fraud = history()
    model = CalibratedClassifierCV(GaussianNB(), method="isotonic", cv=3).fit(rows[NUMBERS], fraud)
    _sklearn(model, name, infer_signature(rows[NUMBERS].head()))
    return Kept(by_chance(model, NUMBERS))


def tuned(name: str, _: Path) -> Kept:
    """A threshold of the model's own."""
    rows, fraud = history()
    model = TunedThresholdClassifierCV(DecisionTreeClassifier(max_depth=4, random_state=0), cv=3, scoring="f1")
    model.fit(rows[NUMBERS], fraud)
    _sklearn(model, name, infer_signature(rows[NUMBERS].head()))
    return Kept(by_chance(model, NUMBERS))


def classes_as_text(name: str, _: Path) -> Kept:
    """Classes that are called '0' and '1', with a threshold."""
    rows, fraud = history()
    model = RandomForestClassifier(20, random_state=0).fit(rows[NUMBERS], fraud.astype(str))
    _sklearn(model, name, infer_signature(rows[NUMBERS].head()), threshold=0.15)
    return Kept(by_chance(model, NUMBERS, 0.15))


def classes_as_truth(name: str, _: Path) -> Kept:
    """Classes that are called False and True, in the format skops."""
    rows, fraud = history()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows[NUMBERS], fraud.astype(bool))
    signature = infer_signature(rows[NUMBERS].head())
    _log(mlflow.sklearn, model, name, signature, threshold=0.15, serialization_format="skops")
    return Kept(by_chance(model, NUMBERS, 0.15))


def voting(name: str, _: Path) -> Kept:
    """Several models at once, on all cores, logged so that MLflow returns probabilities."""
    rows, fraud = history()
    members = [("bayes", GaussianNB()), ("tree", DecisionTreeClassifier(max_depth=3))]
    model = VotingClassifier(members, voting="soft", n_jobs=-1).fit(rows[NUMBERS], fraud)
    _sklearn(model, name, infer_signature(rows[NUMBERS].head()), threshold=0.3, pyfunc_predict_fn="predict_proba")
    return Kept(by_chance(model, NUMBERS, 0.3))


def own_function(name: str, _: Path) -> Kept:
    """A pipeline that begins with a function of one's own, and ends with XGBoost."""
    from xgboost import XGBClassifier

    rows, fraud = history()
    columns = ["amt", "trans_date_trans_time", "category"]
    codes = {each: number for number, each in enumerate(sorted(rows["category"].unique()))}

    def features(given: pd.DataFrame) -> Any:
        hours = given["trans_date_trans_time"].str[11:13].astype(int)
        return np.column_stack([np.log1p(given["amt"]), hours, given["category"].map(codes)]).astype(float)

    model = make_pipeline(FunctionTransformer(features), XGBClassifier(n_estimators=20)).fit(rows[columns], fraud)
    _sklearn(model, name, infer_signature(rows[columns].head()), threshold=0.3)
    return Kept(by_chance(model, columns, 0.3))


class Rule:
    """A class of somebody's own with scikit-learn's methods, and a decision of its own."""

    def __init__(self, dear: float) -> None:
        self.dear = dear

    def predict_proba(self, rows: pd.DataFrame) -> Any:
        chances = 1 / (1 + np.exp((self.dear - rows["amt"].to_numpy()) / 30))
        return np.column_stack([1 - chances, chances])

    def predict(self, rows: pd.DataFrame) -> Any:
        return (self.predict_proba(rows)[:, 1] > 0.8).astype(int)


def own_class(name: str, _: Path) -> Kept:
    """A class of one's own, which does not name its classes."""
    rows, _fraud = history()
    model = Rule(float(rows["amt"].median()))
    _sklearn(model, name, infer_signature(rows[["amt"]].head()))
    return Kept(by_chance(model, ["amt"]))


def model_from_code(name: str, directory: Path) -> Kept:
    """A model that is a program."""
    (directory / "model.py").write_text(
        "import mlflow\n\nclass Dear(mlflow.pyfunc.PythonModel):\n    def predict(self, context, model_input):\n"
        "        return (model_input['amt'] > 80).astype(int)\n\nmlflow.models.set_model(Dear())\n"
    )
    rows, _fraud = history()
    _pyfunc(str(directory / "model.py"), name, infer_signature(rows[["amt"]].head()))
    return Kept(lambda given: (given["amt"] > 80, None))


def encoder_inside(name: str, _: Path) -> Kept:
    """An encoder that is fitted anew for each batch."""
    rows, fraud = history()

    def encode(given: pd.DataFrame) -> Any:
        return given.apply(LabelEncoder().fit_transform)

    model = DecisionTreeClassifier(max_depth=8).fit(encode(rows[TEXTS]), fraud)

    def answer(given: pd.DataFrame) -> Any:
        return model.predict_proba(encode(given))[:, 1]

    _pyfunc(Asked(answer), name, infer_signature(rows[TEXTS].head()), threshold=0.1)
    return Kept(refused="depends on the others of a batch")


def _with_threshold(threshold: Any) -> Callable[[str, Path], Kept]:
    def way(name: str, _: Path) -> Kept:
        rows, fraud = history()
        model = LogisticRegression().fit(rows[["amt"]], fraud)
        _sklearn(model, name, infer_signature(rows[["amt"]].head()), threshold=threshold)
        return Kept(refused="which is no number in (0, 1]")

    return way


def label_as_input(name: str, _: Path) -> Kept:
    """A model that is shown what it has to predict."""
    rows, fraud = history()
    given = rows[["amt"]].assign(is_fraud=fraud)
    _sklearn(DecisionTreeClassifier().fit(given, fraud), name, infer_signature(given.head()))
    return Kept(refused="one of its inputs is is_fraud")


def only_labels(name: str, _: Path) -> Kept:
    """A model without probabilities beside a threshold."""
    rows, fraud = history()
    _sklearn(LinearSVC().fit(rows[["lat"]], fraud), name, infer_signature(rows[["lat"]].head()), threshold=0.5)
    return Kept(refused="it has no predict_proba, so the threshold that it was logged with cannot be applied")


def labels_as_probabilities(name: str, _: Path) -> Kept:
    """Labels of 0.0 and 1.0 beside a threshold."""
    rows, _fraud = history()

    def answer(given: pd.DataFrame) -> Any:
        return (given["amt"] > 80).astype(float)

    _pyfunc(Asked(answer), name, infer_signature(rows[["amt"]].head()), threshold=0.5)
    return Kept(refused="it returns only 0 and 1, which are labels")


def outliers(name: str, _: Path) -> Kept:
    """Labels of -1 and 1."""
    rows, _fraud = history()
    _sklearn(
        IsolationForest(n_estimators=10, random_state=0).fit(rows[NUMBERS]), name, infer_signature(rows[NUMBERS].head())
    )
    return Kept(refused="a label that is neither 0 nor 1: -1")


def features_from_elsewhere(name: str, _: Path) -> Kept:
    """A column that somebody computes before the model is asked."""
    rows, fraud = history()
    given = rows[["amt"]].assign(amt_last_hour=1.0)
    _sklearn(DecisionTreeClassifier().fit(given, fraud), name, infer_signature(given.head()))
    return Kept(refused="it needs columns that transactions do not have: amt_last_hour")


def ordinal(name: str, _: Path) -> Kept:
    """Codes for texts, without a signature, but with the names that it was fitted with."""
    rows, fraud = history()
    encode = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    model = make_pipeline(
        ColumnTransformer([("codes", encode, TEXTS)], remainder="passthrough"),
        GradientBoostingClassifier(n_estimators=9),
    ).fit(rows[MIXED], fraud)
    _sklearn(model, name, None)
    return Kept(by_chance(model, MIXED))


def _categories(given: pd.DataFrame) -> pd.DataFrame:
    return given.astype(dict.fromkeys(TEXTS, "category"))


WAYS: dict[str, Callable[[str, Path], Kept]] = {
    way.__name__: way
    for way in (
        pipeline_of_raw_columns,
        fitted_on_numbers_logged_with_all,
        boosting_of_categories,
        narrow_numbers,
        resampled,
        xgboost_of_numbers,
        xgboost_of_categories,
        lightgbm_of_categories,
        lightgbm_booster,
        catboost_of_numbers,
        catboost_of_texts,
        neural_network,
        own_columns,
        both_classes,
        sorted_answers,
        times,
        cards_and_zips,
        optional_columns,
        exported_to_onnx,
        calibrated,
        tuned,
        classes_as_text,
        classes_as_truth,
        voting,
        own_function,
        own_class,
        model_from_code,
        ordinal,
        sorted_answers_without_index,
        encoder_inside,
        label_as_input,
        only_labels,
        labels_as_probabilities,
        outliers,
        features_from_elsewhere,
    )
} | {f"threshold {each}": _with_threshold(each) for each in (float("nan"), 30, -0.1, True, "0.5")}
