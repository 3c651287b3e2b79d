"""Moving an alias, and moving it back."""

import uuid

import mlflow
import pandas as pd
import pytest
from sklearn.dummy import DummyClassifier

from sandbox.registry import Registry
from shared.errors import Outage
from training import aliases
from training.aliases import Alias, NoSuchVersion


@pytest.fixture
def champion(registry: Registry) -> Alias:
    """The alias of a model with three versions, used by this test alone."""
    champion = Alias(registry.uri, f"moved-{uuid.uuid4().hex[:8]}", "champion")
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("moved")
    model = DummyClassifier().fit(pd.DataFrame({"amt": [1.0, 2.0]}), [0, 1])
    with mlflow.start_run():
        for _ in range(3):
            mlflow.sklearn.log_model(
                model,
                name="model",
                registered_model_name=champion.name,
                pip_requirements=[],
                serialization_format="cloudpickle",
            )
    return champion


def test_each_rollback_goes_back_one_version_further(champion: Alias) -> None:
    assert aliases.bearer(champion) is None
    for version in ("1", "2", "3"):
        aliases.move(champion, version)
        assert aliases.bearer(champion) == version

    assert aliases.move_back(champion) == "2"
    assert aliases.move_back(champion) == "1"
    assert aliases.bearer(champion) == "1"
    with pytest.raises(NoSuchVersion, match=f"no earlier version of {champion} to go back to"):
        aliases.move_back(champion)
    assert aliases.bearer(champion) == "1"


def test_moving_an_alias_to_its_own_version_is_not_remembered(champion: Alias) -> None:
    for version in ("1", "2", "2"):
        aliases.move(champion, version)

    assert aliases.move_back(champion) == "1"


def test_a_deleted_version_is_skipped(champion: Alias) -> None:
    for version in ("1", "2", "3"):
        aliases.move(champion, version)
    mlflow.MlflowClient(champion.tracking_uri).delete_model_version(champion.name, "2")

    assert aliases.move_back(champion) == "1"


def test_a_registry_that_is_away_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nowhere = Alias("http://127.0.0.1:9", "fraud", "champion")

    with pytest.raises(Outage, match=r"MLflow at http://127\.0\.0\.1:9"):
        aliases.bearer(nowhere)
