"""fraudctl train, promote and rollback, against a real registry."""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import mlflow
import pandas as pd
import pytest
from command_line import call
from mlflow.models import infer_signature
from sklearn.linear_model import LogisticRegression

from sandbox.generator import training_frame
from sandbox.registry import Registry
from training import aliases
from training.aliases import Alias

Fraudctl = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def champion(registry: Registry) -> Alias:
    """The alias of a model of this test's own."""
    return Alias(registry.uri, f"compared-{uuid.uuid4().hex[:8]}", "champion")


@pytest.fixture
def fraudctl(champion: Alias, tmp_path: Path) -> Fraudctl:
    own = {"MLFLOW_TRACKING_URI": champion.tracking_uri, "MODEL_NAME": champion.name}

    def run(*arguments: str) -> "CompletedProcess[str]":
        return call(*arguments, cwd=tmp_path, environment=os.environ | own)

    return run


def log_version(
    champion: Alias, *, amounts: tuple[float, float], columns: str = "amt", requirements: Sequence[str] = ()
) -> None:
    """A version for which the larger amount is a fraud."""
    mlflow.set_tracking_uri(champion.tracking_uri)
    mlflow.set_experiment("compared")
    rows = pd.DataFrame({columns: list(amounts)})
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            LogisticRegression().fit(rows, [0, 1]),
            name="model",
            signature=infer_signature(rows),
            registered_model_name=champion.name,
            pip_requirements=list(requirements),
            serialization_format="cloudpickle",
        )


def test_promote_compares_and_moves_and_rollback_moves_back(champion: Alias, fraudctl: Fraudctl) -> None:
    log_version(champion, amounts=(10.0, 1000.0))
    log_version(champion, amounts=(10.0, 20.0))
    assert fraudctl("promote", "1").returncode == 0

    promoted = fraudctl("promote", "2")

    assert promoted.returncode == 0, promoted.stderr
    assert "version 1" in promoted.stdout
    assert "different predictions" in promoted.stdout
    assert promoted.stdout.endswith(f"{champion.name} version 2 is now champion\n")
    assert aliases.bearer(champion) == "2"

    back = fraudctl("rollback")

    assert back.stdout == f"{champion.name} version 1 is champion again\n"
    assert aliases.bearer(champion) == "1"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("2", "needs columns that transactions do not have: colour"), ("9", "has no version 9")],
)
def test_a_version_that_cannot_serve_is_refused(champion: Alias, fraudctl: Fraudctl, version: str, reason: str) -> None:
    log_version(champion, amounts=(10.0, 1000.0))
    log_version(champion, amounts=(10.0, 20.0), columns="colour")
    aliases.move(champion, "1")

    refused = fraudctl("promote", version)

    assert refused.returncode == 2
    assert refused.stderr.startswith("fraudctl: ")
    assert reason in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert aliases.bearer(champion) == "1"


def test_check_compares_with_the_model_s_own_predictions(champion: Alias, fraudctl: Fraudctl) -> None:
    log_version(champion, amounts=(10.0, 1000.0))

    checked = fraudctl("models", "check", "1")

    assert checked.returncode == 0, checked.stderr
    assert "the predictor can serve it" in checked.stdout
    rows = {line.split("│")[1].strip(): line for line in checked.stdout.splitlines() if line.startswith("│")}
    assert rows["rows"].count("400") == 2
    assert rows["different predictions"].split("│")[-2].strip() == "0"
    assert aliases.bearer(champion) is None


def test_check_says_what_is_missing_and_why_a_version_would_be_refused(champion: Alias, fraudctl: Fraudctl) -> None:
    log_version(champion, amounts=(10.0, 20.0), columns="colour", requirements=["scikit-learn==1.5.2", "colours==3.1"])

    checked = fraudctl("models", "check", "1")

    assert checked.returncode == 1
    assert "packages: logged with scikit-learn 1.5.2, here 1." in checked.stdout
    assert 'build with MODEL_REQUIREMENTS="scikit-learn==1.5.2 colours==3.1"' in checked.stdout
    assert "colours 3.1, here none" in checked.stdout
    assert "refused: models:/" in checked.stdout
    assert "it needs columns that transactions do not have: colour" in checked.stdout
    assert fraudctl("models", "check", "9").stderr == f"fraudctl: {champion.name} has no version 9\n"


def test_there_is_no_way_back_from_the_first(champion: Alias, fraudctl: Fraudctl) -> None:
    log_version(champion, amounts=(10.0, 1000.0))
    assert fraudctl("promote", "1").returncode == 0

    back = fraudctl("rollback")

    assert (back.returncode, back.stderr) == (2, f"fraudctl: no earlier version of {champion} to go back to\n")


def test_train_takes_files_and_confirmed_rows(champion: Alias, fraudctl: Fraudctl, tmp_path: Path) -> None:
    history = training_frame(seed=1).head(9000)
    history.head(4000).to_csv(tmp_path / "spring.csv")
    history.iloc[4000:8000].to_csv(tmp_path / "summer.csv")
    history.tail(1000).to_csv(tmp_path / "validated.csv")

    trained = fraudctl(
        "train", "--data", "spring.csv", "summer.csv", "--validated", "validated.csv", "--target-precision", "0.8"
    )

    assert trained.returncode == 0, trained.stderr
    assert f"{champion.name} version 1 is now champion" in trained.stdout
    assert "average precision" in trained.stdout
    logged = mlflow.models.get_model_info(f"models:/{champion.name}@champion")
    assert 0 < logged.metadata["threshold"] < 1
    assert set(json.loads(logged.metadata["reference_profile"])) == {"numbers", "names"}


def test_a_file_that_cannot_be_had_is_named(champion: Alias, fraudctl: Fraudctl) -> None:
    for source, named in (("nowhere.csv", "nowhere.csv"), ("http://127.0.0.1:9/x.csv", "127.0.0.1:9")):
        refused = fraudctl("train", "--data", source)

        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        assert "refused" in refused.stderr or named in refused.stderr
    assert aliases.bearer(champion) is None
