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
