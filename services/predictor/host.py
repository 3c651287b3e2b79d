"""The model host: a process that loads one logged model, and scores batches of transactions with it.

The predictor starts this file as `python -I host.py`. The interpreter may be one with other packages than the
predictor's: it needs MLflow, NumPy, pandas and msgspec, of any version. The file imports nothing of this project,
because a model may bring modules of its own with any names, `shared` for example. Two versions of a model never share
a process, because MLflow does not remove the modules of one version before it loads the next one.

The predictor writes requests to standard input and reads replies from standard output. Each is a frame: its length as
four bytes, big-endian, and a msgpack object. The first request is `Load`, all others are `Score` or `Own`. The host
ends when its standard input ends.
"""

import ctypes
import errno
import gc
import importlib
import importlib.machinery
import os
import re
import resource
import signal
import struct
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread, get_native_id
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

LENGTH = struct.Struct(">I")
_SPARE_S = 5  # the predictor ends a host that is late, so a host ends itself only if the predictor is gone
_WITH_ESTIMATOR = ("sklearn", "lightgbm", "xgboost", "catboost")  # MLflow flavors
# Most models need these. To import them takes seconds, in which the predictor looks for the model.
_LIBRARIES = ("mlflow.pyfunc", "mlflow.sklearn", "sklearn.ensemble")
_NICE = 10
_LABEL = "is_fraud"
_NO_NAMES = re.compile(r"(Column_|f)?\d+").fullmatch  # what libraries call the columns of an array
_NO_LABEL = "the model returns a label that is neither 0 nor 1"
_NO_PROBABILITY = "the model was logged with a threshold, but does not return a probability"
_NOT_APPLIED = "the threshold that it was logged with cannot be applied"
_LONGEST = 500  # characters of an exception's text
_ALMOST = 1e-6  # how far a probability may be outside of [0, 1] because of rounding
_TRANSIENT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOSPC})
# The types of a signature, as MLflow and as NumPy name them
_TYPES: dict[str, Any] = {
    "long": np.int64,
    "int64": np.int64,
    "integer": np.int32,
    "int32": np.int32,
    "double": np.float64,
    "float64": np.float64,
    "float": np.float32,
    "float32": np.float32,
    "string": str,
    "str": str,
    "object": str,
    "datetime": "datetime64[ns]",
    "datetime64": "datetime64[ns]",
    "any": None,
}

# For these models, predict() returns the class with the highest probability, so calling predict_proba() is enough. For
# other models, predict() and predict_proba() may disagree, for example after Platt scaling or with a tuned decision
# threshold. For those models, predict() is called as well.
_LABEL_IS_LIKELIEST = {
    "Compiled",
    "DecisionTreeClassifier",
    "ExtraTreesClassifier",
    "GradientBoostingClassifier",
    "HistGradientBoostingClassifier",
    "LogisticRegression",
    "RandomForestClassifier",
}


class Load(msgspec.Struct, tag=True):
    """Load the model in `folder`, and try it on `rows`. Answered by Loaded or Refused."""

    folder: str
    columns: dict[str, str]  # a transaction's columns and their types: int, float or str
    rows: dict[str, list[Any]]  # the values of each column of a transaction
    threshold: float | None  # the lowest probability that counts as fraud
    compiled: bool  # whether to compile the model's trees
    seconds: float  # for this request
    memory_mb: int  # largest size of the host's data


class Score(msgspec.Struct, tag=True):
    """Score `rows`. Answered by Scored or Failed."""

    rows: list[list[Any]]  # the values of each of the model's columns
    seconds: float  # for this request


class Own(msgspec.Struct, tag=True):
    """Answer as Score, but let MLflow cast the rows, and call the model as it was logged."""

    rows: dict[str, list[Any]]  # the values of each column of a transaction
    seconds: float  # for this request


class Loaded(msgspec.Struct, tag=True):
    """The model can be served."""

    columns: list[str]
    not_compiled: str  # why its trees are not compiled; empty if they are, or if that was not asked for


class Refused(msgspec.Struct, tag=True):
    """The model cannot be served."""

    reason: str
    transient: bool  # whether the machine lacks disk space or file descriptors
    damaged: bool  # whether the model's files may be incomplete


class Scored(msgspec.Struct, tag=True):
    """One answer a row, in the order of the rows. The answers of rows in `faults` mean nothing."""

    labels: bytes  # one byte each, 0 or 1
    probabilities: bytes | None  # float64 each; None if the model returns no probabilities
    faults: dict[int, str]  # for each row that the model cannot be given, why


class Failed(msgspec.Struct, tag=True):
    """The model raised an exception, or returned something that is no prediction."""

    reason: str
    memory: bool  # whether memory was used up


Request = Load | Score | Own
Reply = Loaded | Refused | Scored | Failed


class Unusable(Exception):
    """The model cannot be served. The message gives the reason."""


class Fault(Exception):
    """Some rows cannot be given to the model. Maps the index of each such row to the reason."""

    def __init__(self, rows: dict[int, str]) -> None:
        super().__init__(next(iter(rows.values())))
        self.rows = rows


class Column(NamedTuple):
    """An input column of the model."""

    name: str
    type: str  # its type in the model's signature, `category`, or `any` if nothing is known
    cast: Callable[[list[Any]], Any]  # raises if a value cannot be cast


class Served:
    """A loaded model, and how it is asked."""

    def __init__(
        self,
        estimator: Any,
        columns: Sequence[Column],
        *,
        threshold: float | None,
        as_array: bool = False,
    ) -> None:
        """Raises Unusable if the model's answers cannot be predictions."""
        self.estimator = estimator
        self.columns = columns
        self._threshold = threshold
        self.as_array = as_array
        self._classes = _classes(estimator)
        if self._classes is None and threshold is not None and hasattr(estimator, "classes_"):
            raise Unusable(f"it has no predict_proba, so {_NOT_APPLIED}")

    def score(self, rows: Sequence[list[Any]]) -> Scored:
        """Score rows, of which the values of each column are given. Raises ValueError, or whatever the model raises."""
        faults: dict[int, str] = {}
        try:
            given = self._input(rows)
        except Fault as fault:
            faults = fault.rows
            rows = [[value for number, value in enumerate(column) if number not in faults] for column in rows]
            given = self._input(rows) if rows[0] else None
        labels, probabilities = self._ask(given, len(rows[0])) if rows[0] else (np.zeros(0), None)
        for number in sorted(faults):
            labels = np.insert(labels, number, 0)
            probabilities = None if probabilities is None else np.insert(probabilities, number, 0.0)
        return _scored(labels, probabilities, faults)

    def _input(self, rows: Sequence[list[Any]]) -> Any:
        """Return the rows as the estimator wants them: an array (n, columns) or a DataFrame. Raises Fault."""
        if self.as_array:
            return np.array(rows, dtype=float).T
        faults: dict[int, str] = {}
        data = {}
        for column, values in zip(self.columns, rows, strict=True):
            try:
                data[column.name] = column.cast(values)
            except Exception:  # of NumPy or pandas, which names neither the row nor the column
                faults |= _faults(column, values)
        if faults:
            raise Fault(faults)
        return _pandas().DataFrame(data)

    def _ask(self, given: Any, count: int) -> tuple[Any, Any]:
        """Return the labels (n,) and the probabilities of fraud (n,). The probabilities may be None."""
        if self._classes is None:
            return read_answer(self.estimator.predict(given), count, self._threshold)
        by_class = np.asarray(self.estimator.predict_proba(given))
        if by_class.shape != (count, 2):
            raise ValueError(f"predict_proba returns an array of shape {by_class.shape}, not {(count, 2)}")
        probabilities = _as_probabilities(by_class[:, self._classes.index(1)])
        if self._threshold is not None:
            return probabilities >= self._threshold, probabilities
        if type(_final_step(self.estimator)).__name__ in _LABEL_IS_LIKELIEST:
            return np.asarray(self._classes)[by_class.argmax(axis=1)], probabilities
        return read_answer(self.estimator.predict(given), count, None)[0], probabilities


def load(request: Load) -> tuple[Served, str]:
    """Load the model. Returns it, and why its trees are not compiled, which is empty if they are or need not be.

    Raises Unusable, or whatever MLflow and the model raise.
    """
    from mlflow.models import Model

    logged = Model.load(request.folder)
    return serve(_estimator(request.folder, logged), logged.signature, request)


def serve(estimator: Any, signature: Any, request: Load) -> tuple[Served, str]:
    """Find out how the estimator is to be asked. Returns the same as `load`, and raises Unusable."""
    _use_one_thread(estimator)
    names = _names(estimator, signature, request.columns)
    served = _first_that_works(estimator, names, _types(signature), request)
    if not request.compiled:
        return served, ""
    try:
        return _compiled(served, request), ""
    except Exception as reason:  # compiling is optional
        return served, str(reason) or type(reason).__name__


def own_answers(request: Own, loaded: Load) -> Scored:
    """Score the rows as MLflow's server would, except that a model with probabilities is asked for these.

    Raises whatever MLflow and the model raise.
    """
    import mlflow.pyfunc
    from mlflow.models import Model
    from mlflow.utils import proto_json_utils

    logged = Model.load(loaded.folder)
    estimator = _estimator(loaded.folder, logged)
    frame = _pandas().DataFrame(request.rows)
    names = _names(estimator, logged.signature, loaded.columns)
    frame = frame[names]
    if logged.signature is not None and logged.signature.inputs is not None:
        cast: Any = proto_json_utils.cast_df_types_according_to_schema
        frame = cast(frame.copy(), logged.signature.inputs)
    classes = _classes(estimator)
    if classes is None:
        asked = mlflow.pyfunc.load_model(loaded.folder)
        return _scored(*read_answer(asked.predict(frame), len(frame), loaded.threshold), {})
    probabilities = np.asarray(estimator.predict_proba(frame))[:, classes.index(1)]
    if loaded.threshold is not None:
        return _scored(probabilities >= loaded.threshold, probabilities, {})
    return _scored(read_answer(estimator.predict(frame), len(frame), None)[0], probabilities, {})


def read_answer(answer: Any, count: int, threshold: float | None) -> tuple[Any, Any]:
    """Return the labels (n,) and the probabilities (n,) that a model's answer to `count` rows contains.

    The answer may be an array, a list, a Series, a DataFrame, or a dictionary of these. The probabilities are None if
    there is no threshold and nothing in the answer is named a probability.

    Raises ValueError if the answer cannot be understood.
    """
    parts = _parts(answer, count)
    if len(parts) == 1:
        (values,) = parts.values()
        if threshold is None:
            return _as_labels(values), None
        probabilities = _as_probabilities(_of_fraud(values))
        return probabilities >= threshold, probabilities
    likely = [name for name in parts if "prob" in name or "score" in name or name in ("1", "1.0")]
    labels = [name for name in parts if any(word in name for word in ("label", "predict", "class", "fraud"))]
    labels = [name for name in labels if name not in likely]
    if len(likely) == 2:
        likely = [name for name in likely if name.endswith("1")]
    if len(likely) != 1 or (threshold is None and len(labels) != 1):
        raise ValueError(f"the model returns several columns, of which none is clearly the answer: {', '.join(parts)}")
    probabilities = _as_probabilities(_of_fraud(parts[likely[0]]))
    return _as_labels(parts[labels[0]]) if threshold is None else probabilities >= threshold, probabilities


def _parts(answer: Any, count: int) -> dict[str, Any]:
    """Return the arrays (n, ...) of an answer by their names, in lower case, in the order of the rows."""
    if isinstance(answer, Mapping):
        named = {str(name).lower(): _in_order(values, count) for name, values in answer.items()}
    elif hasattr(answer, "columns"):
        ordered = _in_order(answer, count)
        named = {str(name).lower(): ordered[name].to_numpy() for name in ordered.columns}
    else:
        named = {"": _in_order(answer, count)}
    arrays = {name: np.asarray(values) for name, values in named.items()}
    for values in arrays.values():
        if values.ndim == 0 or len(values) != count:
            raise ValueError("the model does not return one prediction for each row")
    if not arrays:
        raise ValueError("the model returns nothing")
    return arrays


def _in_order(answer: Any, count: int) -> Any:
    """Return a Series or DataFrame in the order of the rows, which are numbered from 0 in its index."""
    if not hasattr(answer, "iloc") or len(answer) != count:
        return answer
    index, rows = answer.index.tolist(), list(range(count))
    if index == rows:
        return answer
    if set(index) != set(rows):
        raise ValueError("the model returns predictions with an index that is not the index of the rows")
    return answer.sort_index()


def _of_fraud(values: Any) -> Any:
    """Return the probabilities of fraud (n,): the values themselves, or those of class 1 if there are two each."""
    if values.dtype == object and isinstance(values[0], Mapping):
        names = {str(name): name for name in values[0]}
        if sorted(names) != ["0", "1"]:
            raise ValueError(f"the model returns probabilities of the classes {', '.join(names)}, not of 0 and 1")
        return np.array([each[names["1"]] for each in values])
    if values.ndim == 2 and values.shape[1] == 2 and np.allclose(values.sum(axis=1), 1.0, atol=_ALMOST):
        return values[:, 1]
    return values


def _as_probabilities(values: Any) -> Any:
    values = _flat(values)
    try:
        probabilities = values if values.dtype.kind == "f" else values.astype(float)
    except (TypeError, ValueError):
        raise ValueError(f"{_NO_PROBABILITY}: {_first_text(values)}") from None
    within = (probabilities >= -_ALMOST) & (probabilities <= 1 + _ALMOST)
    if not within.all():
        raise ValueError(f"{_NO_PROBABILITY}: {probabilities[~within][0]:g}")
    return probabilities.clip(0.0, 1.0)


def _as_labels(values: Any) -> Any:
    values = _flat(values)
    try:
        labels = values.astype(float)
    except (TypeError, ValueError):
        raise ValueError(f"{_NO_LABEL}: {_first_text(values)}") from None
    neither = ~np.isin(labels, (0, 1))
    if neither.any():
        hint = "; if it is a probability, log the model with a threshold" if 0 < labels[neither][0] < 1 else ""
        raise ValueError(f"{_NO_LABEL}: {labels[neither][0]:g}{hint}")
    return labels


def _flat(values: Any) -> Any:
    if values.ndim > 1 and values.size != len(values):
        raise ValueError("the model does not return one prediction for each row")
    return values.ravel()


def _first_text(values: Any) -> str:
    return repr(str(values[0])[:20])


def _scored(labels: Any, probabilities: Any, faults: dict[int, str]) -> Scored:
    return Scored(
        labels.astype(np.uint8).tobytes(),
        None if probabilities is None else probabilities.astype(np.float64).tobytes(),
        faults,
    )


def _estimator(folder: str, logged: Any) -> Any:
    """Load the model itself if it has scikit-learn's interface, otherwise MLflow's wrapper of the model.

    Raises Unusable if MLflow has no wrapper for the model.
    """
    for flavor in _WITH_ESTIMATOR:
        if flavor in logged.flavors:
            found = importlib.import_module(f"mlflow.{flavor}").load_model(folder)
            if flavor == "sklearn" or hasattr(found, "classes_"):
                return found
    if "python_function" not in logged.flavors:
        raise Unusable("it was logged without the flavor python_function")
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(folder)


def _classes(estimator: Any) -> list[int] | None:
    """Return the order of the classes 0 and 1 in the result of predict_proba, or None if there is no predict_proba.

    Classes may also be text or truth values. A model that does not name its classes has them in ascending order. Raises
    Unusable for other classes than 0 and 1.
    """
    if not hasattr(estimator, "predict_proba"):
        return None
    if not hasattr(estimator, "classes_"):
        return [0, 1]
    try:
        classes = np.asarray(estimator.classes_).astype(float).tolist()
    except (TypeError, ValueError):
        classes = []
    if sorted(classes) != [0, 1]:
        shown = ", ".join(str(each)[:20] for each in list(estimator.classes_)[:5])
        raise Unusable(f"its classes are {shown}, not 0 and 1")
    return list(map(int, classes))


def _names(estimator: Any, signature: Any, known: Mapping[str, str]) -> list[str]:
    """Return the names of the input columns: those that the model was fitted with, otherwise those of its signature.

    Raises Unusable if there are none, or if transactions do not have them. Optional columns are left out in that case.
    """
    inputs: Any = signature.inputs if signature is not None else None
    logged = [str(name) for name in inputs.input_names()] if inputs is not None and inputs.has_input_names() else []
    names = _fitted_names(estimator)
    if logged and not set(names) <= {*known, _LABEL}:
        names = []  # those of features that the model computes from its inputs
    if not names and logged:
        optional = {str(each.name) for each in inputs.inputs if not getattr(each, "required", True)}
        names = [name for name in logged if name not in optional or (name in known and name != _LABEL)]
    if not names:
        raise Unusable("its input columns are unknown: log the model with a signature, or fit it on a DataFrame")
    if _LABEL in names:
        raise Unusable(f"one of its inputs is {_LABEL}, which is what it has to predict")
    if unknown := [name for name in names if name not in known]:
        raise Unusable(f"it needs columns that transactions do not have: {', '.join(unknown)}")
    return names


def _fitted_names(estimator: Any) -> list[str]:
    """Return the names of the columns that the model was fitted with, as its library keeps them."""
    for attribute in ("feature_names_in_", "feature_names_", "feature_name_"):
        with suppress(Exception):  # some libraries raise if there are no names
            names = [str(name) for name in getattr(estimator, attribute)]
            if not all(map(_NO_NAMES, names)):
                return names
    return []


def _types(signature: Any) -> dict[str, str]:
    """Return the types of the signature's input columns by name."""
    if signature is None or signature.inputs is None or not signature.inputs.has_input_names():
        return {}
    return {str(each.name): str(getattr(each.type, "name", each.type)) for each in signature.inputs.inputs}


def _first_that_works(estimator: Any, names: Sequence[str], types: Mapping[str, str], request: Load) -> Served:
    """Return the model with the columns cast in the first way with which it scores the rows of `request`.

    A signature does not say which columns had the data type `category` of pandas.
    """
    text = {
        name for name in names if request.columns[name] == "str" and _TYPES.get(types.get(name, "any")) in (None, str)
    }
    first = _categorical(estimator) & set(names)
    problems = []
    for categorical in dict.fromkeys(map(frozenset, (first, set(), text))):
        columns = [
            column_of(name, "category" if name in categorical else types.get(name, "any"), request.columns[name])
            for name in names
        ]
        as_array = _takes_arrays(estimator, columns, request.columns)
        served = Served(estimator, columns, threshold=request.threshold, as_array=as_array)
        try:
            _try(served, request)
        except Unusable as error:
            problems.append(error)
        else:
            return served
    raise problems[0]


def _try(served: Served, request: Load) -> None:
    """Raises Unusable if the model cannot score the rows, or if what it returns as probabilities are labels."""
    try:
        scored = served.score(_columns_of(served, request))
    except MemoryError:
        raise
    except Exception as error:
        raise Unusable(f"it fails on the recorded transactions: {reason_of(error)}") from None
    if scored.faults:
        raise Unusable(f"the recorded transactions do not fit its signature: {next(iter(scored.faults.values()))}")
    only_predicts = request.threshold is not None and _classes(served.estimator) is None
    if only_predicts and np.isin(np.frombuffer(scored.probabilities or b""), (0, 1)).all():
        raise Unusable(f"it returns only 0 and 1, which are labels, so {_NOT_APPLIED}")


def _columns_of(served: Served, request: Load) -> list[list[Any]]:
    return [request.rows[column.name] for column in served.columns]


def _categorical(estimator: Any) -> set[str]:
    """Return the columns that had the data type `category` of pandas when a model of gradient boosting was fitted."""
    model = _final_step(estimator)
    with suppress(Exception):  # other models have nothing of this
        if hasattr(model, "booster_") and model.booster_.pandas_categorical:
            features = model.booster_.dump_model()["feature_infos"]
            return {name for name, about in features.items() if about["values"]}
        booster = model.get_booster()
        if not booster.get_categories().empty():
            return {
                name for name, kind in zip(booster.feature_names, booster.feature_types, strict=True) if kind == "c"
            }
    return set()


def column_of(name: str, kind: str, source: str) -> Column:
    """Make a column that casts the values of a transaction's column as MLflow's server does.

    `kind` is a type of the signature, or `category`. `source` is the type in a transaction: int, float or str. Unlike
    in MLflow's server, an integer that is too large is no other integer, and an integer that is to be a time is in
    seconds.

    Raises Unusable for other types.
    """
    if kind == "category":
        return Column(name, kind, lambda values: _pandas().Categorical(values))
    if kind not in _TYPES:
        raise Unusable(f"its signature has the type {kind} for {name}, and transactions cannot be cast to this type")
    target = _TYPES[kind]
    if target is None or (target is str and source == "str"):
        return Column(name, kind, list)
    if target is str:
        return Column(name, kind, lambda values: list(map(str, values)))
    if isinstance(target, str):
        return Column(name, kind, lambda values: _times(values, source))
    return Column(name, kind, lambda values: _numbers(values, target))


def _numbers(values: list[Any], target: Any) -> Any:
    if isinstance(values[0], str):
        return _pandas().Series(values).astype(target)
    whole = isinstance(values[0], int) and target in (np.int64, np.int32)
    wide = np.array(values, dtype=np.int64 if whole else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = wide.astype(target)
    if (whole and (narrow != wide).any()) or not np.isfinite(narrow).all():
        raise OverflowError
    return narrow


def _times(values: list[Any], source: str) -> Any:
    return (
        _pandas().Series(_pandas().to_datetime(values, unit=None if source == "str" else "s")).astype("datetime64[ns]")
    )


def _faults(column: Column, values: list[Any]) -> dict[int, str]:
    found = {}
    for number, value in enumerate(values):
        try:
            column.cast([value])
        except Exception:
            found[number] = f"{column.name} cannot be cast to {column.type}, which the model's signature wants"
    return found


def _takes_arrays(estimator: Any, columns: Sequence[Column], types: Mapping[str, str]) -> bool:
    """Whether an array of float64 is as good as a DataFrame, which takes longer to make than a small batch to score."""
    names = [column.name for column in columns]
    return (
        type(estimator).__module__.startswith("sklearn.")
        and type(estimator).__name__ in _LABEL_IS_LIKELIEST
        and all(types[column.name] != "str" and column.type in ("any", "double", "long") for column in columns)
        and list(getattr(estimator, "feature_names_in_", names)) == names
    )


def _compiled(served: Served, request: Load) -> Served:
    """Return the model with compiled trees. Raises an exception if that is impossible, or would change its scores."""
    compiled = _module(Path(__file__).with_name("compiled.py"))
    estimator = compiled.Compiled(served.estimator, threshold=0.5 if request.threshold is None else request.threshold)
    fast = Served(estimator, served.columns, threshold=request.threshold, as_array=served.as_array)
    rows = _columns_of(served, request)
    wanted, found = served.score(rows), fast.score(rows)
    one, other = (np.frombuffer(each.probabilities or b"") for each in (wanted, found))
    difference = float(np.abs(one - other).max())
    if difference > compiled.TOLERANCE or wanted.labels != found.labels:
        raise Unusable(
            f"the compiled model and the original score differently: probabilities differ by up to {difference:.1e}"
        )
    return fast


def _module(file: Path) -> ModuleType:
    """Execute a file of Python, without making it known to the model's imports."""
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    importlib.machinery.SourceFileLoader(file.stem, str(file)).exec_module(module)
    return module


def _final_step(estimator: Any) -> Any:
    steps = getattr(estimator, "steps", None)
    return steps[-1][1] if steps else estimator


def _use_one_thread(estimator: Any) -> None:
    """Set n_jobs to 1, because more threads are slower on small batches. To use more cores, run more replicas."""
    with suppress(Exception):  # this only makes the model faster
        jobs = [name for name in estimator.get_params() if name == "n_jobs" or name.endswith("__n_jobs")]
        if jobs:
            estimator.set_params(**dict.fromkeys(jobs, 1))


def _pandas() -> Any:
    """Import pandas late, because the predictor imports this module for the structures alone."""
    import pandas as pd

    return pd


def reason_of(error: BaseException) -> str:
    """Return why something failed, with the first cause first."""
    if isinstance(error, Unusable):
        return str(error)
    chain = [error]
    while deeper := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        chain.append(deeper)
    missing = next((each for each in chain if isinstance(each, ModuleNotFoundError) and each.name), None)
    if missing:
        return f"it needs {missing.name}, which is not installed here"
    cause = _text(chain[-1])
    return cause if chain[-1] is error else f"{cause} (and therefore {_text(error)})"


def _text(error: BaseException) -> str:
    """Return an exception's type and message. MLflow writes the cause behind the word Error, at the end."""
    message = str(error)
    message = message.rpartition(" Error: ")[2] or message
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def main() -> None:
    """Answer requests until standard input ends, or the predictor does."""
    requests, replies = _take_pipes()
    _protect_the_predictor()
    warnings.simplefilter("ignore")
    _give_way(_NICE)
    importing = Thread(target=_import_libraries)
    importing.start()
    importing.join()
    try:
        _answer(requests, replies)
    finally:
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with whatever the model has started


def _answer(requests: BinaryIO, replies: BinaryIO) -> None:
    decode, encode = msgspec.msgpack.Decoder(Request).decode, msgspec.msgpack.Encoder().encode
    served: Any = None
    loaded: Any = None
    while head := requests.read(LENGTH.size):
        request = decode(requests.read(*LENGTH.unpack(head)))
        signal.setitimer(signal.ITIMER_REAL, request.seconds + _SPARE_S)
        try:
            if isinstance(request, Load):
                loaded = request
                resource.setrlimit(resource.RLIMIT_DATA, (request.memory_mb << 20,) * 2)
                served, not_compiled = load(request)
                _tidy()
                _give_way(0)
                reply: Reply = Loaded([column.name for column in served.columns], not_compiled)
            elif isinstance(request, Own):
                reply = own_answers(request, loaded)
            else:
                reply = served.score(request.rows)
        except BaseException as error:  # of the model, whose code may raise SystemExit, for example
            reply = _failure(error, request)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        body = encode(reply)
        replies.write(LENGTH.pack(len(body)) + body)
        replies.flush()


def _failure(error: BaseException, request: Request) -> Reply:
    memory = isinstance(error, MemoryError)
    reason = "it uses more memory than MODEL_MEMORY_MB allows" if memory else reason_of(error)
    if not isinstance(request, Load):
        return Failed(reason, memory)
    transient = getattr(error, "errno", None) in _TRANSIENT
    return Refused(reason, transient, not isinstance(error, (Unusable, ImportError)))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipes of requests and replies. What the model reads or prints no longer touches them."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, replies


def _protect_the_predictor() -> None:
    """If memory runs out, the kernel ends this process and not the predictor. Ctrl+C is for the predictor alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _import_libraries() -> None:
    """Import what most models need, in a thread of low priority, because the model before is scoring meanwhile."""
    os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)  # of this thread; it could not be raised again
    for library in _LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(library)


def _give_way(nice: int) -> None:
    """Set the priority of this process where the kernel groups processes by session (see sched(7), autogroup)."""
    for _ in range(10):
        try:
            Path("/proc/self/autogroup").write_text(str(nice))
            return
        except BlockingIOError:  # it accepts one change in a tenth of a second
            time.sleep(0.1)
        except OSError:
            return


def _tidy() -> None:
    """Give memory back that only loading needed, and let the garbage collector ignore what is loaded."""
    gc.collect()
    gc.freeze()
    with suppress(AttributeError, OSError):  # C libraries other than glibc have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
