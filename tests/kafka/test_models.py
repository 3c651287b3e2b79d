"""Models on Apache Kafka: other libraries' ones, versions with modules of the same names, and one of older packages."""

import json
import subprocess
import sys
import textwrap
import time
import uuid
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Event, Thread

import mlflow
import numpy as np
import pytest
from confluent_kafka import Message, Producer
from conftest import Rig, make_transactions, until
from served import frame
from zoo import WAYS

from sandbox.registry import Registry
from shared.kafka import topics
from shared.kafka.messages import headers
from shared.provenance import from_headers
from shared.records import Transaction, decode_prediction, encode_transaction

pytestmark = pytest.mark.kafka

RATE = 1000  # transactions a second
ROWS_A_VERSION = 2000
OLDER = ["scikit-learn==1.5.2", "mlflow-skinny==2.17.0", "mlflow==2.17.0", "pandas==2.2.3", "numpy==1.26.4"]


@pytest.fixture
def name(apache_rig: Rig, registry: Registry) -> str:
    name = f"models-{uuid.uuid4().hex[:8]}"
    apache_rig.environment |= {"MLFLOW_TRACKING_URI": registry.uri, "MODEL_NAME": name}
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("models")
    return name


def answers(messages: list[Message]) -> dict[tuple[str, int], tuple[int, float | None]]:
    """The label and the probability of each transaction."""
    found: dict[tuple[str, int], tuple[int, float | None]] = {}
    for message in messages:
        prediction = decode_prediction(message.value())
        found[prediction.identity] = prediction.prediction, from_headers(headers(message)).probability
    return found


@pytest.mark.parametrize(
    "way",
    ["xgboost_of_categories", "lightgbm_of_categories", "catboost_of_texts", "cards_and_zips", "exported_to_onnx"],
)
def test_other_libraries_models_give_their_own_answers(
    apache_rig: Rig, registry: Registry, name: str, tmp_path: Path, way: str
) -> None:
    logged = WAYS[way](name, tmp_path)
    mlflow.MlflowClient(registry.uri).set_registered_model_alias(name, "champion", "1")
    batch = make_transactions(500, seed=11)
    apache_rig.put_transactions(batch)
    apache_rig.start("predictor")

    found = answers(apache_rig.read(apache_rig.topic_2, len(batch)))

    assert logged.own
    labels, chances = logged.own(frame(batch))
    assert [found[each.identity][0] for each in batch] == np.asarray(labels).astype(int).tolist()
    if chances is not None:
        assert [found[each.identity][1] for each in batch] == pytest.approx(np.asarray(chances).tolist(), abs=5e-7)


LOG_VERSIONS = """
    import sys, pathlib, mlflow, pandas as pd
    from mlflow.models import infer_signature

    uri, name, directory = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("models")
    for version in (1, 2, 3):
        root = pathlib.Path(directory) / str(version)
        (root / "shared" / "privacy").mkdir(parents=True)
        (root / "shared" / "__init__.py").touch()
        (root / "shared" / "privacy" / "__init__.py").write_text(f"VERSION = {version}")
        (root / "shared" / "model.py").write_text(
            "import mlflow\\n\\nclass Model(mlflow.pyfunc.PythonModel):\\n"
            "    def predict(self, context, model_input):\\n"
            "        from shared.privacy import VERSION\\n"
            "        return ((model_input['amt'] * 100).round().astype(int) % 3 + 1) / 10 + VERSION / 1000"
        )
        sys.path.insert(0, str(root))
        from shared.model import Model
        with mlflow.start_run():
            mlflow.pyfunc.log_model(
                name="model", python_model=Model(), code_paths=[str(root / "shared")], pip_requirements=[],
                signature=infer_signature(pd.DataFrame({"amt": [1.0]})), registered_model_name=name,
                metadata={"threshold": 0.25},
            )
        sys.path.remove(str(root))
        for module in [each for each in sys.modules if each.split(".")[0] == "shared"]:
            del sys.modules[module]
"""


@pytest.mark.alone  # models are loaded at a low priority, for which five busy workers leave no time
@pytest.mark.timeout(300)
def test_each_row_has_the_answer_of_the_version_that_it_names(
    apache_rig: Rig, registry: Registry, name: str, tmp_path: Path
) -> None:
    script = [sys.executable, "-I", "-c", textwrap.dedent(LOG_VERSIONS), registry.uri, name, str(tmp_path / "code")]
    subprocess.run(script, check=True, capture_output=True)
    client = mlflow.MlflowClient(registry.uri)
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "challenger", "3")
    apache_rig.launch = subprocess.Popen  # with real processes of the models, whose `shared` is not this project's
    topics.create(apache_rig.properties, [f"{apache_rig.topic_2}.challenger"])
    process = apache_rig.start("predictor", MODEL_REFRESH_SECONDS="0.2")
    until(lambda: process.said("alias='challenger'"), what="the challenger")
    batch = make_transactions(60 * RATE)
    sent: list[Transaction] = []
    over = Event()
    sender = Thread(target=_stream, args=[apache_rig, batch, sent, over])
    sender.start()
    try:
        for version, times in (("1", 1), ("2", 1), ("1", 2)):
            client.set_registered_model_alias(name, "champion", version)
            until(partial(loaded, apache_rig, version, times=times), what=f"version {version}")
            until(partial(longer, sent, len(sent) + ROWS_A_VERSION), what="more rows")
    finally:
        over.set()
        sender.join()

    champions = apache_rig.read(apache_rig.topic_2, len(sent), extra_s=2)
    challengers = apache_rig.read(f"{apache_rig.topic_2}.challenger", 1)

    assert len(champions) == len(answers(champions)) == len(sent)
    by_version: Counter[str | None] = Counter()
    for message in (*champions, *challengers):
        prediction, about = decode_prediction(message.value()), from_headers(headers(message))
        by_version[about.model_version] += 1
        expected = (round(prediction.amt * 100) % 3 + 1) / 10 + int(about.model_version or 0) / 1000
        assert about.probability == pytest.approx(expected, abs=1e-9)
        assert prediction.prediction == int(expected >= 0.25)
    assert by_version.keys() == {"1", "2", "3"}
    assert min(by_version.values()) > 100
    assert {from_headers(headers(each)).model_version for each in challengers} == {"3"}


def longer(rows: list[Transaction], than: int) -> bool:
    """Whether there are at least so many rows."""
    return len(rows) >= than


def loaded(rig: Rig, version: str, *, times: int) -> bool:
    """Whether a version has been loaded as champion so many times."""
    lines = rig.log("predictor").splitlines()
    found = ["event='model_loaded' alias='champion'" in line and f" version='{version}'" in line for line in lines]
    return sum(found) == times


def _stream(rig: Rig, batch: list[Transaction], sent: list[Transaction], over: Event) -> None:
    producer = Producer({**rig.properties, "linger.ms": 0, "log_level": 0})
    began = time.monotonic()
    for number, each in enumerate(batch):
        if over.is_set():
            break
        while number > RATE * (time.monotonic() - began):
            time.sleep(0.002)
        producer.produce(rig.topic_1, value=encode_transaction(each), key=each.key)
        producer.poll(0)
        sent.append(each)
    assert producer.flush(20) == 0


LOG_OLDER = """
    import sys, json, mlflow, pandas as pd, sklearn
    from mlflow.models import infer_signature
    from sklearn.ensemble import GradientBoostingClassifier

    uri, name, rows, out = sys.argv[1:]
    frame = pd.read_csv(rows)
    columns = ["amt", "lat", "long", "city_pop", "merch_lat", "merch_long"]
    model = GradientBoostingClassifier(n_estimators=30, random_state=0)
    model.fit(frame[columns], (frame["amt"] > 60) & (frame["lat"] > 38))
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("models")
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            model, artifact_path="model", signature=infer_signature(frame[columns]), registered_model_name=name,
            pip_requirements=["mlflow==" + mlflow.__version__, "scikit-learn==" + sklearn.__version__],
            metadata={"threshold": 0.2},
        )
    json.dump(model.predict_proba(frame[columns])[:, 1].tolist(), open(out, "w"))
"""


def older_python() -> str:
    """An interpreter with older packages. They are installed once."""
    home = Path.home() / ".cache" / "fraud-alarm" / "older-models"
    if not (home / "complete").exists():
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(home)], check=True)
        packages = [*OLDER, "msgspec", "setuptools<80"]
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", str(home / "bin" / "python"), *packages], check=True
        )
        (home / "complete").touch()
    return str(home / "bin" / "python")


@pytest.mark.timeout(300)
def test_a_model_of_older_packages_is_served_from_an_environment_of_its_own(
    apache_rig: Rig, registry: Registry, name: str, tmp_path: Path
) -> None:
    python = older_python()
    batch = make_transactions(1000, seed=11)
    frame(batch).to_csv(tmp_path / "rows.csv")
    script = [python, "-I", "-c", textwrap.dedent(LOG_OLDER), registry.uri, name]
    subprocess.run([*script, str(tmp_path / "rows.csv"), str(tmp_path / "own.json")], check=True, capture_output=True)
    mlflow.MlflowClient(registry.uri).set_registered_model_alias(name, "champion", "1")
    apache_rig.put_transactions(batch)

    without = apache_rig.start("predictor", ready=False, REPLICA="without")
    until(lambda: without.said("no usable model"), what="the refusal")
    line = next(line for line in apache_rig.log("predictor").splitlines() if "event='model_refused'" in line)
    assert "logged with mlflow 2.17.0, here" in line
    assert "scikit-learn 1.5.2, here" in line
    assert 'build with MODEL_REQUIREMENTS="mlflow==2.17.0 scikit-learn==1.5.2"' in line
    without.stop()

    apache_rig.start("predictor", MODEL_PYTHON=python)
    found = answers(apache_rig.read(apache_rig.topic_2, len(batch)))

    own = json.loads((tmp_path / "own.json").read_text())
    assert [found[each.identity][1] for each in batch] == pytest.approx(own, abs=5e-7)
    assert [found[each.identity][0] for each in batch] == [int(chance >= 0.2) for chance in own]
    assert {0, 1} == {label for label, _ in found.values()}
