"""A model whose call never returns: probes see it, and so does an operator."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import mlflow
import mlflow.sklearn
import numpy as np
import pandas as pd
import pytest
import requests
from command_line import call
from conftest import Rig, make_transactions, until
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from sandbox.processes import free_port
from sandbox.registry import Registry

STALL_S = 3


class Hanging:
    """Calls nothing fraud, and does not return while a file is there."""

    def __init__(self, hang: Path) -> None:
        self._hang = hang

    def predict(self, rows: pd.DataFrame) -> "np.ndarray[Any, Any]":
        while self._hang.exists():
            time.sleep(0.05)
        return np.zeros(len(rows), dtype=int)


cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.mark.alone
def test_a_model_call_that_hangs_is_seen_by_probes_and_operators(
    apache_rig: Rig, registry: Registry, tmp_path: Path
) -> None:
    hang, port = tmp_path / "hang", free_port()
    name = f"hanging-{apache_rig.topic_1}"
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("by-hand")
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            Hanging(hang),
            name="model",
            signature=ModelSignature(Schema([ColSpec("double", "amt")])),
            registered_model_name=name,
            pip_requirements=[],
            serialization_format="cloudpickle",
        )
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", "1")
    apache_rig.environment |= {
        "MLFLOW_TRACKING_URI": registry.uri,
        "MODEL_NAME": name,
        "METRICS_PORT": str(port),
        "STALL_SECONDS": str(STALL_S),
    }
    process = apache_rig.start("predictor")
    apache_rig.put_transactions(make_transactions(100, seed=1))
    apache_rig.read(apache_rig.topic_2, 100)
    batch = make_transactions(100, seed=2)
    live = f"http://127.0.0.1:{port}/live"
    assert requests.get(live, timeout=5).json() == {"live": True, "service": "predictor", "stalled": {}}
    hang.touch()
    began = time.monotonic()
    apache_rig.put_transactions(batch)

    until(lambda: requests.get(live, timeout=5).status_code == 503, timeout_s=3 * STALL_S, what="/live to fail")

    assert time.monotonic() - began < STALL_S + 2
    group = apache_rig.environment["PREDICTOR_GROUP"]
    assert requests.get(live, timeout=5).json()["stalled"][f"{group} handler"] >= STALL_S
    until(lambda: process.said("event='stalled'"), what="the stall in the log")
    metrics = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    assert sum(map(float, re.findall(r"fraud_alarm_lag_records{.*} (\S+)", metrics))) == 100
    assert max(map(float, re.findall(r"fraud_alarm_oldest_unprocessed_seconds{.*} (\S+)", metrics))) >= STALL_S - 1

    status = call("status", cwd=tmp_path, environment=apache_rig.environment)
    assert status.returncode == 1
    assert re.search(rf"unhealthy.*{group}", status.stdout + status.stderr)

    hang.unlink()
    until(lambda: requests.get(live, timeout=5).status_code == 200, what="/live to pass")
    assert len(apache_rig.read(apache_rig.topic_2, 200)) == 200
