"""fraudctl as an operator calls it: what it does, and what it says of a wrong call."""

import uuid
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from command_line import call
from conftest import START, Rig

from sandbox.generator import training_frame
from sandbox.registry import Registry
from shared.kafka import topics


def fraudctl(*arguments: str, cwd: Path, **environment: str) -> CompletedProcess[str]:
    return call(*arguments, cwd=cwd, environment={"COLUMNS": "120", **environment})


def test_train_makes_a_champion_of_a_training_file_and_leaves_one_that_is_there(
    tmp_path: Path, registry: Registry
) -> None:
    data = tmp_path / "history.csv"
    training_frame(rows=6000, seed=3, start=START, fraud_rate=0.05).to_csv(data)
    name = f"fraud-{uuid.uuid4().hex[:8]}"
    call = ("train", "--data", str(data), "--name", name, "--if-absent")

    first = fraudctl(*call, cwd=tmp_path, MLFLOW_TRACKING_URI=registry.uri)
    second = fraudctl(*call, cwd=tmp_path, MLFLOW_TRACKING_URI=registry.uri)

    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert f"{name} version 1 is now champion" in first.stdout
    assert "average precision" in first.stdout
    assert second.stdout.strip() == f"{name} version 1 is already champion"


def test_train_refuses_by_name(tmp_path: Path, registry: Registry) -> None:
    unset = fraudctl("train", cwd=tmp_path)
    away = fraudctl("train", "--tracking-uri", "http://127.0.0.1:9", cwd=tmp_path)
    no_file = fraudctl("train", "--tracking-uri", registry.uri, "--data", "/nowhere.csv", cwd=tmp_path)
    history = training_frame(rows=100, seed=3, start=START)
    history.loc[50, "dob"] = None
    history.to_csv(tmp_path / "gaps.csv")
    gaps = fraudctl("train", "--tracking-uri", registry.uri, "--data", "gaps.csv", cwd=tmp_path)

    (tmp_path / "empty.csv").touch()
    empty = fraudctl("train", "--tracking-uri", registry.uri, "--data", "empty.csv", cwd=tmp_path)

    refused = (unset, away, no_file, gaps, empty)
    assert [done.returncode for done in refused] == [2] * len(refused)
    assert "empty.csv: the file is empty" in empty.stderr
    assert "gaps.csv: empty values" in gaps.stderr
    assert "MLFLOW_TRACKING_URI: missing" in unset.stderr
    assert "MLflow at http://127.0.0.1:9" in away.stderr
    assert "/nowhere.csv" in no_file.stderr
    assert not any("Traceback" in done.stderr for done in refused)


@pytest.mark.kafka
def test_topics_are_created_once_with_their_dead_letters(tmp_path: Path, apache_rig: Rig) -> None:
    environment = apache_rig.environment | {"TOPIC_1": "orders", "TOPIC_2": "verdicts"}

    first = fraudctl("topics", "create", cwd=tmp_path, **environment)
    second = fraudctl("topics", "create", cwd=tmp_path, **environment)

    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout.strip() == "created: orders, orders.dlq, verdicts, verdicts.dlq, verdicts.challenger"
    assert second.stdout.strip() == "all topics exist"


def test_topics_refuses_without_a_broker_and_without_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "_TIMEOUT_S", 1.0)
    unset = fraudctl("topics", "create", cwd=tmp_path)
    (tmp_path / "client.properties").write_text("bootstrap.servers=127.0.0.1:9\n")
    away = fraudctl("topics", "create", cwd=tmp_path)
    (tmp_path / "client.properties").write_text("bootstrap.servers=127.0.0.1:9\nno.such.property=1\n")
    unknown = fraudctl("topics", "create", cwd=tmp_path)

    assert unset.returncode == away.returncode == unknown.returncode == 2
    assert "no.such.property" in unknown.stderr
    assert "client.properties" in unset.stderr
    assert "Kafka at 127.0.0.1:9" in away.stderr
    assert "Traceback" not in unset.stderr + away.stderr + unknown.stderr
