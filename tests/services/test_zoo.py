"""Models as people log them: each is served with its own answers, or refused with the reason."""

import uuid
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import make_transactions
from served import frame
from zoo import WAYS

from sandbox.registry import Registry as Server
from services.predictor.model import Prediction, UnusableModel
from services.predictor.registry import Found, Registry
from services.predictor.settings import ModelSettings
from shared.records import Transaction

ROWS = 1000
REFUSALS = (
    "its input columns are unknown",
    "it needs columns that transactions do not have",
    "one of its inputs is is_fraud, which is what it has to predict",
    "the recorded transactions do not fit its signature",
    "a label that is neither 0 nor 1",
    "its classes are ..., not 0 and 1",
    "the model was logged with a threshold, but does not return a probability",
    "it has no predict_proba, so the threshold that it was logged with cannot be applied",
    "it returns only 0 and 1, which are labels, so the threshold that it was logged with cannot be applied",
    "which is no number in (0, 1]",
    "the model does not return one prediction for each row",
    "the model returns predictions with an index that is not the index of the rows",
    "its answer to a transaction depends on the others of a batch, or changes when it is asked again",
    "it fails on the recorded transactions",
    "its process ended with exit code",
    "its process was ended by SIGSEGV",
    "it did not answer within",
    "it uses more memory than MODEL_MEMORY_MB allows",
    "which is not installed here",
)
COMPILED = ("narrow_numbers", "classes_as_text")  # others have tests of their own


def transactions() -> list[Transaction]:
    """Transactions that no model has been trained with."""
    return make_transactions(ROWS, seed=11)


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_it_is_served_with_its_own_answers_or_refused(registry: Server, tmp_path: Path, way: str) -> None:
    name = f"zoo-{uuid.uuid4().hex[:8]}"
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("zoo")
    logged = WAYS[way](name, tmp_path)
    settings = ModelSettings(mlflow_tracking_uri=registry.uri, model_name=name)
    ours = Registry(settings, cache=tmp_path / "models", compiled=way in COMPILED)

    if logged.refused:
        with pytest.raises(UnusableModel) as refused:
            ours.load(Found("1", None))
        assert logged.refused in str(refused.value)
        return

    model = ours.load(Found("1", None))
    batch = transactions()
    try:
        found = [model.score(part) for part in (batch[:1], batch[1:30], batch[30:])]
    finally:
        model.end()

    assert logged.own
    labels, chances = logged.own(frame(batch))
    results = [each for part in found for each in part if isinstance(each, Prediction)]
    assert len(results) == ROWS
    assert [each.label for each in results] == np.asarray(labels).astype(int).tolist()
    assert {each.label for each in results} == {0, 1}
    if chances is None:
        assert {each.probability for each in results} == {None}
    else:
        assert [each.probability for each in results] == pytest.approx(np.asarray(chances).tolist(), abs=5e-7)


def test_each_refusal_is_in_the_documents_with_its_words() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "models.md").read_text().split())

    for reason in REFUSALS:
        for part in reason.split("..."):
            assert part.strip() in text
