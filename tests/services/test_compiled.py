"""Compiled scoring: the same answers as the model's own, or none at all."""

import pickle
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import pandas as pd
import pytest
from conftest import make_transactions
from served import answers, made
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from services.predictor import compiled, host
from services.predictor.compiled import Compiled
from services.predictor.host import Served
from services.predictor.model import recorded
from shared.records import Transaction

COLUMNS = ["amt", "lat", "long", "city_pop", "unix_time"]
RECORDED = recorded()


def rows_of(transactions: Sequence[Transaction]) -> np.ndarray:
    return np.array([[getattr(each, name) for name in COLUMNS] for each in transactions], dtype=float)


@pytest.fixture(scope="module")
def training() -> tuple[np.ndarray, np.ndarray]:
    rows = rows_of(RECORDED)
    return rows, (rows[:, 0] * np.sin(rows[:, 4]) > 20).astype(int)


@pytest.fixture(scope="module")
def converted() -> dict[bytes, bytes]:
    """The graphs of the trees, pickled, that were converted."""
    return {}


@pytest.fixture
def converting_once(converted: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in this process, and the same trees once: each process that converts imports scikit-learn anew."""

    def convert(trees: Any, graph: IO[bytes]) -> None:
        known = pickle.dumps(trees)
        if known not in converted:
            converted[known] = compiled._onnx(trees)
        graph.write(converted[known])
        graph.flush()

    monkeypatch.setattr(compiled, "_convert", convert)


@pytest.fixture(autouse=True)
def _this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that these tests break is the one that is used: a model's process loads the file by itself."""
    monkeypatch.setattr(host, "_module", lambda _: compiled)


def model_of(estimator: Any, *, compiled: bool = True, **metadata: Any) -> Served:
    return made(estimator, COLUMNS, compiled=compiled, **metadata)[0]


def not_compiled(estimator: Any) -> str:
    """Why it is served as it is."""
    model, reason = made(estimator, COLUMNS, compiled=True)
    assert model.estimator is estimator
    return reason


@pytest.mark.usefixtures("converting_once")
@pytest.mark.parametrize("threshold", [None, 0.2], ids=["likeliest", "threshold"])
@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(300, max_depth=8, random_state=0),  # sums in float32 would be wrong by 5e-7
        ExtraTreesClassifier(20, random_state=0),
        GradientBoostingClassifier(n_estimators=20, random_state=0),
        DecisionTreeClassifier(max_depth=6, random_state=0),
        make_pipeline(StandardScaler(), RandomForestClassifier(20, random_state=0)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_is_compiled_answers_as_the_model_does(
    training: tuple[np.ndarray, np.ndarray], estimator: Any, threshold: float | None
) -> None:
    metadata = {} if threshold is None else {"threshold": threshold}
    if not hasattr(estimator, "classes_"):  # the other threshold's test has fitted the same one
        estimator.fit(*training)
    fast, own = model_of(estimator, **metadata), model_of(estimator, compiled=False, **metadata)
    batch = make_transactions(2000)

    assert isinstance(fast.estimator, Compiled)
    assert not isinstance(own.estimator, Compiled)
    ours, theirs = answers(fast, batch), answers(own, batch)
    assert [label for label, _ in ours] == [label for label, _ in theirs]
    assert {label for label, _ in ours} == {0, 1}
    assert [chance for _, chance in ours] == pytest.approx([chance for _, chance in theirs], abs=2e-7)


@pytest.mark.usefixtures("converting_once")
def test_trees_that_split_between_neighbours_in_float32_split_there() -> None:
    times = 1.37e9 + 64.0 * np.arange(2000)  # in float32, two and two are the same
    rows = np.column_stack([times] * len(COLUMNS))
    labels = np.random.default_rng(0).integers(0, 2, len(rows))
    forest = RandomForestClassifier(3, random_state=0).fit(rows, labels)

    ours = Compiled(forest, threshold=0.7).predict_proba(rows)

    assert ours == pytest.approx(forest.predict_proba(rows), abs=2e-7)


@pytest.mark.usefixtures("converting_once")
def test_a_row_on_the_very_threshold_is_decided_by_the_model(training: tuple[np.ndarray, np.ndarray]) -> None:
    forest = RandomForestClassifier(20, random_state=0).fit(*training)
    batch = make_transactions(2000)
    on_it = sorted(set(forest.predict_proba(rows_of(batch))[:, 1]))[5]
    fast, own = model_of(forest, threshold=on_it), model_of(forest, threshold=on_it, compiled=False)

    assert [label for label, _ in answers(fast, batch)] == [label for label, _ in answers(own, batch)]


@pytest.mark.usefixtures("converting_once")
def test_a_number_too_large_for_the_model_is_so_for_what_is_compiled(training: tuple[np.ndarray, np.ndarray]) -> None:
    forest = RandomForestClassifier(20, random_state=0).fit(*training)
    (transaction,) = make_transactions(1)
    transaction.amt = 1e39

    for compiled_or_not in (True, False):
        with pytest.raises(ValueError, match="too large"):
            answers(model_of(forest, compiled=compiled_or_not), [transaction])


@pytest.mark.usefixtures("converting_once")
def test_a_unanimous_forest_is_no_surer_than_sure(training: tuple[np.ndarray, np.ndarray]) -> None:
    rows, labels = training
    forest = RandomForestClassifier(30, random_state=0, bootstrap=False, max_features=None).fit(rows, labels)

    probabilities = [chance for _, chance in answers(model_of(forest), RECORDED)]

    assert {0.0, 1.0} <= set(probabilities)
    assert all(probability is not None and 0 <= probability <= 1 for probability in probabilities)


def test_columns_in_another_order_than_they_were_learnt_are_not_mixed_up(
    training: tuple[np.ndarray, np.ndarray],
) -> None:
    rows, labels = training
    forest = RandomForestClassifier(20, random_state=0).fit(pd.DataFrame(rows, columns=COLUMNS), labels)

    served, _ = made(forest, COLUMNS[::-1])

    assert answers(served, RECORDED) == answers(model_of(forest, compiled=False), RECORDED)


@pytest.mark.parametrize(
    ("labels", "estimator", "reason"),
    [
        ((0, 1), HistGradientBoostingClassifier(), "HistGradientBoostingClassifier is not one of"),
        ((0, 1, 2), RandomForestClassifier(5), "the model has 3 classes"),
    ],
)
def test_what_cannot_be_compiled_is_served_as_it_is(
    training: tuple[np.ndarray, np.ndarray], labels: tuple[int, ...], estimator: Any, reason: str
) -> None:
    rows, _ = training
    classes = np.array(labels)[np.arange(len(rows)) % len(labels)]
    estimator.fit(rows, classes)
    if len(labels) > 2:  # which could not be served at all
        with pytest.raises(compiled.NotCompiled, match=reason):
            Compiled(estimator, threshold=0.5)
        return

    assert reason in not_compiled(estimator)


def test_without_the_extra_the_model_is_served_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    forest = RandomForestClassifier(5, random_state=0).fit(*training)

    assert "onnxruntime is not installed" in not_compiled(forest)


@pytest.mark.parametrize(
    ("interpreter", "reason"),
    [("/bin/false", "conversion failed: exit code 1"), ("/bin/cat", "--help"), ("/no", "/no")],
)
def test_a_conversion_that_dies_leaves_the_model_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, interpreter: str, reason: str
) -> None:
    monkeypatch.setattr(compiled.sys, "executable", interpreter)
    forest = RandomForestClassifier(5, random_state=0).fit(*training)

    assert reason in not_compiled(forest)


def test_a_conversion_that_takes_too_long_leaves_the_model_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_CONVERSION_TIMEOUT_S", 0.05)
    forest = RandomForestClassifier(5, random_state=0).fit(*training)

    assert "conversion took more than 0.05 s" in not_compiled(forest)


@pytest.mark.usefixtures("converting_once")
def test_a_forest_too_large_for_a_container_is_served_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = RandomForestClassifier(5, random_state=0).fit(*training)
    nodes = sum(tree.tree_.node_count for tree in forest.estimators_)
    monkeypatch.setattr(compiled, "_MAX_NODES", nodes - 1)

    assert f"too large: {nodes} nodes" in not_compiled(forest)
    monkeypatch.setattr(compiled, "_MAX_NODES", nodes)
    assert isinstance(model_of(forest).estimator, Compiled)


@pytest.mark.usefixtures("converting_once")
@pytest.mark.parametrize("off_by", [6e-7, 0.4])
def test_what_would_answer_otherwise_is_not_served(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, off_by: float
) -> None:
    forest = RandomForestClassifier(5, random_state=0).fit(*training)
    genuine = compiled._compile

    def skewed(trees: Any) -> Any:
        run = genuine(trees)
        return lambda rows: run(rows) + np.array([-off_by, off_by])

    monkeypatch.setattr(compiled, "_compile", skewed)

    assert "the compiled model and the original score differently: probabilities differ by up to" in not_compiled(
        forest
    )
