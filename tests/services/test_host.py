"""How a model is asked, and what is made of its answers."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from conftest import make_transactions
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, Schema
from mlflow.utils.proto_json_utils import cast_df_types_according_to_schema
from served import TYPES, answers, faults, frame, made, request
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from services.predictor.host import Served, Unusable, column_of, read_answer, reason_of, serve
from shared.records import REFERENCE

BATCH = 3


class Answers:
    """A model with a constant answer, for as many rows as it gets or for a fixed number."""

    def __init__(self, answer: Any, *, rows: int | None = None) -> None:
        self._answer = answer
        self._rows = rows

    def predict(self, rows: Any) -> Any:
        return np.array([self._answer] * (self._rows or len(rows)))


class Keeps:
    """A model that keeps what it is given."""

    def predict(self, rows: Any) -> Any:
        self.given = rows
        return np.zeros(len(rows))


def signature(*columns: ColSpec) -> ModelSignature:
    return ModelSignature(Schema(list(columns)))


@pytest.mark.parametrize("answer", [1, True, 1.0, [1], "1"])
def test_labels_of_any_type_are_labels(answer: Any) -> None:
    served, _ = made(Answers(answer), ["amt"])

    assert answers(served, [REFERENCE] * BATCH) == [(1, None)] * BATCH


def test_probabilities_are_labelled_by_the_logged_threshold() -> None:
    assert answers(made(Answers(0.4), ["amt"], threshold=0.3)[0], [REFERENCE]) == [(1, 0.4)]
    assert answers(made(Answers(0.4), ["amt"], threshold=0.5)[0], [REFERENCE]) == [(0, 0.4)]


@pytest.mark.parametrize(
    ("estimator", "threshold", "reason"),
    [
        pytest.param(Answers(0.4), None, "log the model with a threshold", id="a probability without a threshold"),
        pytest.param(Answers([0, 1]), None, "does not return one prediction for each row", id="two columns"),
        pytest.param(Answers(1, rows=2), None, "does not return one prediction for each row", id="too few"),
        pytest.param(Answers(7), 0.5, "does not return a probability: 7", id="no probability"),
        pytest.param(Answers(np.nan), 0.5, "does not return a probability: nan", id="not a number"),
        pytest.param(Answers("fraud"), None, "neither 0 nor 1: 'fraud'", id="words"),
        pytest.param(Answers(1), 0.5, "only 0 and 1, which are labels", id="labels with a threshold"),
        pytest.param(Answers(0.0), 0.5, "only 0 and 1, which are labels", id="labels with a point"),
    ],
)
def test_other_answers_are_refused(estimator: Any, threshold: float | None, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        made(estimator, ["amt"], threshold=threshold)


FOUR = pd.Series([0.1, 0.9, 0.2, 0.6])


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(FOUR.tolist(), id="list"),
        pytest.param(FOUR.to_numpy().reshape(4, 1), id="column"),
        pytest.param(FOUR.to_numpy(dtype=np.float32), id="float32"),
        pytest.param(np.column_stack([1 - FOUR, FOUR]), id="both classes"),
        pytest.param(FOUR.to_frame("p"), id="DataFrame"),
        pytest.param(FOUR.sort_values(), id="in another order, but with the rows' index"),
        pytest.param({"probability": FOUR}, id="dictionary"),
        pytest.param({"label": [0, 1, 0, 1], "probabilities": [{0: 1 - p, 1: p} for p in FOUR]}, id="as ONNX does"),
        pytest.param(pd.DataFrame({"0": 1 - FOUR, "1": FOUR}), id="a column for each class"),
        pytest.param(pd.DataFrame({"proba_0": 1 - FOUR, "proba_1": FOUR, "prediction": 0}), id="with labels"),
    ],
)
def test_probabilities_are_found_in_whatever_a_model_returns(answer: Any) -> None:
    labels, probabilities = read_answer(answer, 4, 0.5)

    assert labels.tolist() == [0, 1, 0, 1]
    assert probabilities.tolist() == pytest.approx(FOUR.tolist(), abs=1e-7)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (pd.Series(FOUR.to_numpy(), index=[7, 8, 9, 10]), "an index that is not the index of the rows"),
        (pd.Series(FOUR.to_numpy(), index=[0, 0, 1, 2]), "an index that is not the index of the rows"),
        (np.ones((4, 3)), "one prediction for each row"),
        (np.column_stack([FOUR, FOUR]), "one prediction for each row"),
        (0.5, "one prediction for each row"),
        (None, "one prediction for each row"),
        ({}, "returns nothing"),
        ({"a": FOUR, "b": FOUR}, "none is clearly the answer: a, b"),
        ([{"no": 0.1, "yes": 0.9}] * 4, "of the classes no, yes"),
        ([0.1, None, 0.2, 0.3], "does not return a probability"),
        ([0.1, float("inf"), 0.2, 0.3], "does not return a probability: inf"),
    ],
)
def test_what_is_no_answer_is_named(answer: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_answer(answer, 4, 0.5)


def test_a_label_beside_a_probability_decides_without_a_threshold() -> None:
    labels, probabilities = read_answer({"label": ["0", "1"], "probability": [0.4, 0.3]}, 2, None)

    assert (labels.tolist(), probabilities.tolist()) == ([0, 1], [0.4, 0.3])


@pytest.mark.parametrize("classes", [("0", "1"), (False, True), (0.0, 1.0), (1, 0)])
def test_the_threshold_applies_whatever_the_classes_are_called(classes: tuple[Any, Any]) -> None:
    history = frame(make_transactions(300))
    fraud = (history["amt"] > 60).to_numpy()
    tree = DecisionTreeClassifier(max_depth=1).fit(history[["amt"]], np.where(fraud, True, False))
    tree.classes_ = np.array(sorted(classes)) if classes != (1, 0) else np.array([0, 1])

    served, _ = made(tree, threshold=0.3)

    assert answers(served, make_transactions(300)) == [(int(each), float(each)) for each in fraud]


@pytest.mark.parametrize(
    ("labels", "named"), [(["no", "yes"], "no, yes"), ([0, 1, 2], "0, 1, 2"), ([1, 2], "1, 2"), ([0], "0")]
)
def test_other_classes_are_named(labels: list[Any], named: str) -> None:
    rows = frame(make_transactions(60))[["amt"]]
    tree = DecisionTreeClassifier().fit(rows, [labels[number % len(labels)] for number in range(60)])

    with pytest.raises(Unusable, match=f"its classes are {named}, not 0 and 1"):
        made(tree, threshold=0.3)


def test_a_threshold_needs_probabilities() -> None:
    history = frame(make_transactions(60))
    classifier = LinearSVC().fit(history[["lat", "long"]], [0, 1] * 30)

    assert {label for label, _ in answers(made(classifier)[0], make_transactions(60))} <= {0, 1}
    with pytest.raises(Unusable, match="has no predict_proba, so the threshold that it was logged with cannot be"):
        made(classifier, threshold=0.3)


def test_the_columns_are_those_that_the_model_was_fitted_with() -> None:
    history = frame(make_transactions(200))
    numbers = ["merch_lat", "amt", "zip"]
    model = LogisticRegression().fit(history[numbers].astype(float), [0, 1] * 100)
    everything = [name for name in TYPES if name != "trans_num"]

    served, _ = made(model, everything)

    assert [column.name for column in served.columns] == numbers
    expected = model.predict_proba(history[numbers].astype(float))[:, 1]
    assert [chance for _, chance in answers(served, make_transactions(200))] == pytest.approx(expected.tolist())


def test_what_is_to_be_predicted_is_no_input() -> None:
    history = frame(make_transactions(100))
    model = LogisticRegression().fit(history[["amt", "is_fraud"]], history["is_fraud"].astype(int))

    with pytest.raises(Unusable, match="one of its inputs is is_fraud, which is what it has to predict"):
        made(model)
    with pytest.raises(Unusable, match="one of its inputs is is_fraud"):
        serve(Keeps(), signature(ColSpec("double", "amt"), ColSpec("long", "is_fraud")), request())


def test_optional_columns_that_transactions_do_not_have_are_left_out() -> None:
    model = Keeps()
    columns = [ColSpec("double", "amt"), *(ColSpec("long", name, required=False) for name in ("colour", "is_fraud"))]

    serve(model, signature(*columns, ColSpec("long", "zip", required=False)), request())

    assert list(model.given.columns) == ["amt", "zip"]
    with pytest.raises(Unusable, match="needs columns that transactions do not have: colour"):
        serve(model, signature(ColSpec("double", "amt"), ColSpec("long", "colour")), request())


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        *[("amt", kind) for kind in ("double", "float", "long", "integer")],
        *[("zip", kind) for kind in ("double", "float", "long", "integer")],
        *[("cc_num", kind) for kind in ("double", "long")],
        *[("city_pop", kind) for kind in ("double", "integer")],
        *[("category", "string"), ("trans_date_trans_time", "string"), ("trans_date_trans_time", "datetime")],
        *[("dob", "datetime"), ("unix_time", "long")],
    ],
)
def test_a_column_is_cast_as_mlflow_casts_it(column: str, kind: str) -> None:
    model = Keeps()
    batch = make_transactions(50)
    served, _ = serve(model, signature(ColSpec(kind, column)), request())
    answers(served, batch)

    rows = pd.DataFrame(json.loads(msgspec.json.encode(batch)))[[column]]
    expected = cast_df_types_according_to_schema(rows, Schema([ColSpec(kind, column)]))  # type: ignore[no-untyped-call]
    pd.testing.assert_frame_equal(model.given, expected)


def test_a_zip_may_be_text_and_a_time_in_seconds_a_time() -> None:
    model = Keeps()
    served, _ = serve(model, signature(ColSpec("string", "zip"), ColSpec("datetime", "unix_time")), request())
    answers(served, [REFERENCE])

    assert model.given["zip"].tolist() == ["28372"]
    assert model.given["unix_time"].tolist() == [pd.Timestamp("2024-05-17 13:45:12")]


@pytest.mark.parametrize(
    ("column", "kind", "value"),
    [
        ("cc_num", "long", 2**63 + 7),
        ("cc_num", "integer", 4_000_000_000_000_002),
        ("city_pop", "integer", 2**40),
        ("amt", "float", 1e39),
        ("trans_date_trans_time", "datetime", "2024-99-99 12:00:00"),
        ("merchant", "double", "a shop"),
    ],
)
def test_what_cannot_be_cast_is_a_fault_of_its_row(column: str, kind: str, value: Any) -> None:
    bad = msgspec.structs.replace(REFERENCE, **{column: value})
    good = msgspec.structs.replace(REFERENCE, cc_num=11, merchant="12.5")
    served = Served(Keeps(), [column_of(column, kind, TYPES[column])], threshold=None)

    found = faults(served, [good, bad, good])

    assert found == {1: f"{column} cannot be cast to {kind}, which the model's signature wants"}


def test_a_signature_that_no_transaction_fits_is_refused() -> None:
    with pytest.raises(Unusable, match="do not fit its signature: merchant cannot be cast to double"):
        serve(Keeps(), signature(ColSpec("double", "merchant")), request())
    with pytest.raises(Unusable, match="the type boolean for gender"):
        serve(Keeps(), signature(ColSpec("boolean", "gender")), request())


def caused() -> None:
    try:
        raise KeyError("colour")
    except KeyError as error:
        raise RuntimeError("the model cannot be loaded, and this is said at great length") from error


def missing() -> None:
    try:
        __import__("a_package_of_theirs")
    except ImportError as error:
        raise RuntimeError("Failed to load") from error


def long() -> None:
    raise ValueError("Failed to enforce the schema of " + "data " * 500 + "Error: zip is text")


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (caused, "KeyError: 'colour' (and therefore RuntimeError: the model cannot be loaded"),
        (missing, "it needs a_package_of_theirs, which is not installed here"),
        (long, "ValueError: zip is text"),
    ],
)
def test_the_cause_comes_first(fails: Callable[[], None], reason: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as found:
        fails()

    assert reason_of(found.value).startswith(reason)


def test_a_model_without_names_is_refused() -> None:
    with pytest.raises(Unusable, match="its input columns are unknown"):
        serve(Answers(1), SimpleNamespace(inputs=None), request())
