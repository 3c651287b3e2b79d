"""Compiled scoring: the same answers as the model's own, or none at all."""

import pickle
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import pandas as pd
import pytest
from conftest import make_transactions
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from structlog.testing import capture_logs

from services.predictor import compiled
from services.predictor.compiled import Compiled
from services.predictor.model import Model, UnusableModel, make_model, recorded, score
from shared.errors import Poison
from shared.records import Transaction

COLUMNS = ["amt", "lat", "long", "city_pop", "unix_time"]


def rows_of(transactions: Sequence[Transaction]) -> np.ndarray:
    return np.array([[getattr(each, name) for name in COLUMNS] for each in transactions], dtype=float)


@pytest.fixture(scope="module")
def training() -> tuple[np.ndarray, np.ndarray]:
    rows = rows_of(recorded())
    return rows, (rows[:, 0] * np.sin(rows[:, 4]) > 20).astype(int)


@pytest.fixture(scope="module")
def converted() -> dict[bytes, bytes]:
    """The graphs of the trees, pickled, that were converted."""
    return {}


@pytest.fixture
def converting_once(converted: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert the same trees once: each conversion is a process that imports scikit-learn."""
    genuine = compiled._convert

    def convert(trees: Any, graph: IO[bytes], shutdown: Any) -> None:
        known = pickle.dumps(trees)
        if known not in converted:
            genuine(trees, graph, shutdown)
            graph.seek(0)
            converted[known] = graph.read()
        graph.seek(0)
        graph.write(converted[known])
        graph.flush()

    monkeypatch.setattr(compiled, "_convert", convert)


def model_of(estimator: Any, *, compiled: bool = True, **metadata: Any) -> Model:
    return make_model(
        name="fraud",
        version="1",
        estimator=estimator,
        columns=COLUMNS,
        metadata=metadata,
        logged_at=0,
        compiled=compiled,
    )


@pytest.mark.usefixtures("converting_once")
@pytest.mark.parametrize("threshold", [None, 0.2], ids=["likeliest", "threshold"])
@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(20, random_state=0),
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
    ours, theirs = score(fast, batch), score(own, batch)
    assert [each.label for each in ours] == [each.label for each in theirs]
    assert {each.label for each in ours} == {0, 1}
    assert [each.probability for each in ours] == pytest.approx([each.probability for each in theirs], abs=1e-6)


@pytest.mark.usefixtures("converting_once")
def test_a_row_on_the_very_threshold_is_decided_by_the_model(training: tuple[np.ndarray, np.ndarray]) -> None:
    forest = RandomForestClassifier(20, random_state=0).fit(*training)
    batch = make_transactions(2000)
    on_it = sorted(set(forest.predict_proba(rows_of(batch))[:, 1]))[5]
    fast, own = model_of(forest, threshold=on_it), model_of(forest, threshold=on_it, compiled=False)

    assert [each.label for each in score(fast, batch)] == [each.label for each in score(own, batch)]


@pytest.mark.usefixtures("converting_once")
def test_a_number_too_large_for_the_model_is_so_for_what_is_compiled(training: tuple[np.ndarray, np.ndarray]) -> None:
    forest = RandomForestClassifier(20, random_state=0).fit(*training)
    (transaction,) = make_transactions(1)
    transaction.amt = 1e39

    for compiled_or_not in (True, False):
        with pytest.raises(Poison):
            score(model_of(forest, compiled=compiled_or_not), [transaction])


def test_a_unanimous_forest_is_no_surer_than_sure(training: tuple[np.ndarray, np.ndarray]) -> None:
    rows, labels = training
    forest = RandomForestClassifier(30, random_state=0, bootstrap=False, max_features=None).fit(rows, labels)

    probabilities = [each.probability for each in score(model_of(forest), recorded())]

    assert {0.0, 1.0} <= set(probabilities)
    assert all(probability is not None and 0 <= probability <= 1 for probability in probabilities)


def test_columns_in_another_order_than_they_were_learnt_are_not_mixed_up(
    training: tuple[np.ndarray, np.ndarray],
) -> None:
    rows, labels = training
    forest = RandomForestClassifier(20, random_state=0).fit(pd.DataFrame(rows, columns=COLUMNS), labels)

    with pytest.raises(UnusableModel, match="feature names"):
        make_model(
            name="fraud", version="1", estimator=forest, columns=COLUMNS[::-1], metadata={}, logged_at=0, compiled=True
        )


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

    with capture_logs() as logs:
        model = model_of(estimator)

    assert model.estimator is estimator
    assert reason in next(line["reason"] for line in logs if line["event"] == "scoring_not_compiled")


def test_without_the_extra_the_model_is_served_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    forest = RandomForestClassifier(5, random_state=0).fit(*training)

    with capture_logs() as logs:
        assert model_of(forest).estimator is forest

    assert "onnxruntime is not installed" in str(logs)


@pytest.mark.parametrize(
    ("interpreter", "reason"),
    [("/bin/false", "conversion failed: exit code 1"), ("/bin/cat", "--help"), ("/no", "/no")],
)
def test_a_conversion_that_dies_leaves_the_model_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, interpreter: str, reason: str
) -> None:
    monkeypatch.setattr(compiled.sys, "executable", interpreter)
    forest = RandomForestClassifier(5, random_state=0).fit(*training)

    with capture_logs() as logs:
        assert model_of(forest).estimator is forest

    assert reason in str(logs)


def test_a_conversion_that_takes_too_long_leaves_the_model_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_CONVERSION_TIMEOUT_S", 0.05)
    forest = RandomForestClassifier(5, random_state=0).fit(*training)

    with capture_logs() as logs:
        assert model_of(forest).estimator is forest

    assert "conversion took more than 0.05 s" in str(logs)


@pytest.mark.usefixtures("converting_once")
def test_a_forest_too_large_for_a_container_is_served_as_it_is(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = RandomForestClassifier(5, random_state=0).fit(*training)
    nodes = sum(tree.tree_.node_count for tree in forest.estimators_)
    monkeypatch.setattr(compiled, "_MAX_NODES", nodes - 1)

    with capture_logs() as logs:
        assert model_of(forest).estimator is forest

    assert f"too large: {nodes} nodes" in str(logs)
    monkeypatch.setattr(compiled, "_MAX_NODES", nodes)
    assert isinstance(model_of(forest).estimator, Compiled)


@pytest.mark.usefixtures("converting_once")
@pytest.mark.parametrize("off_by", [2e-6, 0.4])
def test_what_would_answer_otherwise_is_not_served(
    training: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, off_by: float
) -> None:
    forest = RandomForestClassifier(5, random_state=0).fit(*training)
    genuine = compiled._compile

    def skewed(trees: Any, shutdown: Any) -> Any:
        run = genuine(trees, shutdown)
        return lambda rows: run(rows) + np.array([-off_by, off_by])

    monkeypatch.setattr(compiled, "_compile", skewed)

    with capture_logs() as logs:
        assert model_of(forest).estimator is forest

    assert "the compiled model and the original score differently: probabilities differ by up to" in str(logs)
