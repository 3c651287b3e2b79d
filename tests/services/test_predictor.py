"""topic_1 to topic_2, on a real broker with a real registry."""

import json
import sys
from collections import Counter
from typing import Any

import cloudpickle
import mlflow
import numpy as np
import pandas as pd
import pytest
from confluent_kafka import Producer
from conftest import Rig, dead_letter_topic, make_transactions, until
from mlflow.models import infer_signature
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sandbox.processes import Process
from sandbox.registry import Registry
from sandbox.stack import service
from shared.kafka import NOTHING, headers
from shared.provenance import from_headers
from shared.records import FEATURES, Transaction, decode_prediction, encode_transaction
from training import train

NUMERIC = ["cc_num", "amt", "zip", "lat", "long", "city_pop", "unix_time", "merch_lat", "merch_long"]


def frame(batch: list[Transaction]) -> pd.DataFrame:
    return pd.DataFrame([{name: getattr(each, name) for name in FEATURES} for each in batch])


@pytest.fixture
def champion_rig(rig: Rig, registry: Registry) -> Rig:
    rig.environment["MLFLOW_TRACKING_URI"] = registry.uri
    return rig


def test_every_transaction_is_predicted_as_the_champion_says(champion_rig: Rig, registry: Registry) -> None:
    batch = make_transactions(1000)
    champion_rig.put_transactions(batch)
    champion_rig.start("predictor")

    messages = champion_rig.read(champion_rig.topic_2, len(batch))

    mlflow.set_tracking_uri(registry.uri)
    model = mlflow.sklearn.load_model("models:/fraud@champion")
    threshold = mlflow.models.get_model_info("models:/fraud@champion").metadata["threshold"]
    expected = dict(zip((each.identity for each in batch), model.predict_proba(frame(batch))[:, 1], strict=True))
    sources = set()
    assert len(messages) == len(batch)
    for message in messages:
        prediction = decode_prediction(message.value())
        provenance = from_headers(headers(message))
        assert provenance.probability == pytest.approx(expected[prediction.identity], abs=1e-9)
        assert prediction.prediction == int(expected[prediction.identity] >= threshold)
        assert (provenance.model_name, provenance.model_version) == ("fraud", "1")
        assert message.key() == prediction.key
        sources.add((provenance.source_partition, provenance.source_offset))
    assert len(sources) == len(batch)
    assert 0 < sum(decode_prediction(message.value()).prediction for message in messages) < len(batch) / 4


def test_a_prediction_is_the_transaction_and_one_field_more(champion_rig: Rig) -> None:
    (transaction,) = make_transactions(1)
    champion_rig.put_transactions([transaction])
    champion_rig.start("predictor")

    (message,) = champion_rig.read(champion_rig.topic_2, 1)

    value = json.loads(message.value() or b"")
    assert list(value) == [*FEATURES, "prediction"]
    assert {name: value[name] for name in FEATURES} == json.loads(encode_transaction(transaction))


def test_a_record_that_says_nothing_is_passed_over(champion_rig: Rig) -> None:
    producer = Producer({**champion_rig.properties, "log_level": 0})
    producer.produce(champion_rig.topic_1, headers=NOTHING)
    assert producer.flush(20) == 0
    champion_rig.put_transactions(make_transactions(5))
    process = champion_rig.start("predictor")

    assert len(champion_rig.read(champion_rig.topic_2, 5)) == 5
    assert not process.said("event='dead_letters'")


def test_rubbish_goes_to_the_dead_letters_and_its_neighbours_are_predicted(champion_rig: Rig) -> None:
    before, after, victim = make_transactions(3)
    incomplete = {key: value for key, value in json.loads(encode_transaction(victim)).items() if key != "merchant"}
    rubbish = [b"temperature: 21", b"", b'{"degrees_in_celsion": 21}', json.dumps(incomplete).encode()]
    champion_rig.put(
        champion_rig.topic_1, [encode_transaction(before), *rubbish, encode_transaction(after)], key=b"dummy"
    )
    champion_rig.start("predictor")

    predicted = champion_rig.read(champion_rig.topic_2, 2)
    dead = champion_rig.read(dead_letter_topic(champion_rig.topic_1), 4)

    assert {decode_prediction(message.value()).identity for message in predicted} == {before.identity, after.identity}
    assert Counter(message.value() or b"" for message in dead) == Counter(rubbish)
    for message in dead:
        found = dict(headers(message))
        assert found["dlq-reason"]
        assert found["dlq-topic"] == champion_rig.topic_1.encode()
        assert int(found["dlq-offset"]) in range(1, 5)
        assert message.key() == b"dummy"
    by_value = {message.value() or b"": dict(headers(message))["dlq-reason"] for message in dead}
    assert b"merchant" in by_value[rubbish[3]]


def test_each_row_of_an_older_message_is_predicted(champion_rig: Rig) -> None:
    first, second = make_transactions(2)
    rows = [json.loads(encode_transaction(each)) for each in (first, second)]
    older = {
        "columns": list(FEATURES),
        "index": [1, 2],
        "data": [[*row.values()] for row in ({**row, "unix_time": row["unix_time"] * 1000 + 25} for row in rows)],
    }
    champion_rig.put(champion_rig.topic_1, [json.dumps(json.dumps(older)).encode()], key=b"dummy")
    champion_rig.start("predictor")

    predicted = champion_rig.read(champion_rig.topic_2, 2)

    assert {decode_prediction(message.value()).identity for message in predicted} == {first.identity, second.identity}


def test_a_row_that_the_model_cannot_score_is_isolated(champion_rig: Rig) -> None:
    batch = make_transactions(50)
    batch[20].trans_date_trans_time = "2024-99-99 12:00:00"
    champion_rig.put_transactions(batch)
    champion_rig.start("predictor")

    predicted = champion_rig.read(champion_rig.topic_2, 49)
    (dead,) = champion_rig.read(dead_letter_topic(champion_rig.topic_1), 1)

    assert len(predicted) == 49
    assert dead.value() == encode_transaction(batch[20])


@pytest.mark.parametrize("with_signature", [True, False])
def test_a_model_made_by_hand_is_served_as_it_was_logged(rig: Rig, registry: Registry, with_signature: bool) -> None:
    history = train.generate(seed=3).head(4000)
    forest = Pipeline([("scale", StandardScaler()), ("forest", RandomForestClassifier(150, n_jobs=-1, random_state=0))])
    forest.fit(history[NUMERIC], history["is_fraud"].astype(int))
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("by-hand")
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            forest,
            name="model",
            input_example=history[NUMERIC].head(2) if with_signature else None,
            registered_model_name="by-hand",
            pip_requirements=[],
            serialization_format="skops" if with_signature else "cloudpickle",
            skops_trusted_types=["sklearn.tree._tree.Tree"] if with_signature else None,
        )
    version = mlflow.MlflowClient().search_model_versions("name='by-hand'")[0].version
    mlflow.MlflowClient().set_registered_model_alias("by-hand", "champion", version)
    batch = make_transactions(300)
    rig.put_transactions(batch)
    rig.start("predictor", MLFLOW_TRACKING_URI=registry.uri, MODEL_NAME="by-hand")

    messages = rig.read(rig.topic_2, len(batch))

    wanted = dict(zip((each.identity for each in batch), forest.predict(frame(batch)[NUMERIC]), strict=True))
    probabilities = forest.predict_proba(frame(batch)[NUMERIC])[:, 1]
    likely = dict(zip((each.identity for each in batch), probabilities, strict=True))
    for message in messages:
        prediction = decode_prediction(message.value())
        assert prediction.prediction == wanted[prediction.identity]
        assert from_headers(headers(message)).probability == pytest.approx(likely[prediction.identity])
    assert not np.isclose(probabilities, probabilities[0]).all()


def promote(registry: Registry, name: str, model: Any, **metadata: object) -> str:
    """Log the model as the champion of that name; returns its version."""
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("by-hand")
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            model,
            name="model",
            signature=infer_signature(frame(make_transactions(2))[NUMERIC]),
            registered_model_name=name,
            pip_requirements=[],
            serialization_format="cloudpickle",
            metadata=metadata,
        )
    version = str(mlflow.MlflowClient().search_model_versions(f"name='{name}'")[0].version)
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", version)
    return version


@pytest.fixture
def name(rig: Rig, registry: Registry) -> str:
    """The name of a model of this test's own, which its predictors serve."""
    name = f"fussy-{rig.topic_1}"
    rig.environment |= {"MLFLOW_TRACKING_URI": registry.uri, "MODEL_NAME": name}
    return name


class Fussy:
    """A model that scores the reference transaction and raises for other amounts above its limit."""

    def __init__(self, most: float) -> None:
        self.most = most

    def predict(self, rows: pd.DataFrame) -> "np.ndarray[Any, Any]":
        if ((rows["amt"] > self.most) & (rows["amt"] != 104.32)).any():
            raise ValueError("too large")
        return np.zeros(len(rows), dtype=int)


cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_a_broken_model_is_not_taken_out_on_the_rows(rig: Rig, registry: Registry, name: str) -> None:
    promote(registry, name, Fussy(-1.0))
    batch = make_transactions(200)
    rig.put_transactions(batch)
    process = rig.start("predictor", BACKOFF_MAX_SECONDS="0.5")
    until(lambda: process.said("rows refused, it is not the rows: ValueError: too large"), what="a word on the model")
    assert process.running

    version = promote(registry, name, Fussy(1e9))

    messages = rig.read(rig.topic_2, len(batch), extra_s=1)
    assert {from_headers(headers(message)).model_version for message in messages} == {version}
    assert len(messages) == len(batch)
    assert not process.said("event='dead_letters'")


def test_rows_that_a_model_refuses_now_and_then_are_bad_rows(rig: Rig, registry: Registry, name: str) -> None:
    batch = make_transactions(300)
    dear = sorted(batch, key=lambda each: each.amt)[-5:]
    promote(registry, name, Fussy(sorted(each.amt for each in batch)[-6]))
    rig.put_transactions(batch)
    rig.start("predictor")

    assert len(rig.read(rig.topic_2, len(batch) - 5)) == len(batch) - 5
    dead = rig.read(dead_letter_topic(rig.topic_1), 5)
    assert {message.value() for message in dead} == {encode_transaction(each) for each in dear}


def test_while_the_registry_is_away_the_last_good_model_serves(rig: Rig, registry: Registry, name: str) -> None:
    version = promote(registry, name, Fussy(1e9))
    first = rig.start("predictor")
    first.kill()
    rig.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    batch = make_transactions(50)
    rig.put_transactions(batch)

    process = rig.start("predictor")

    messages = rig.read(rig.topic_2, len(batch))
    assert {from_headers(headers(message)).model_version for message in messages} == {version}
    assert process.said("event='last_good_model'")


def test_a_last_good_model_that_was_changed_is_not_served(rig: Rig, registry: Registry, name: str) -> None:
    promote(registry, name, Fussy(1e9))
    first = rig.start("predictor")
    first.kill()
    rig.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    (pickle,) = (rig.directory / "models").rglob("model.pkl")
    pickle.write_bytes(pickle.read_bytes() + b".")

    process = rig.start("predictor", ready=False)

    until(lambda: process.said("event='outage'"), what="the outage in the log")
    assert not process.said("event='last_good_model'")


def test_a_changed_model_is_fetched_anew(rig: Rig, registry: Registry, name: str) -> None:
    promote(registry, name, Fussy(1e9))
    rig.start("predictor").kill()
    (pickle,) = (rig.directory / "models").rglob("model.pkl")
    good = pickle.read_bytes()
    pickle.write_bytes(b"")

    rig.start("predictor")

    assert pickle.read_bytes() == good


def test_a_version_that_does_not_load_never_takes_the_place_of_the_last_good_one(
    rig: Rig, registry: Registry, name: str
) -> None:
    version = promote(registry, name, Fussy(1e9))
    rig.start("predictor").kill()
    promote(registry, name, Fussy(1e9), threshold="high")

    process = rig.start("predictor")

    assert process.said("could not convert string to float")
    assert process.said(f"version='{version}'")


def test_a_cache_that_cannot_be_written_is_named(rig: Rig) -> None:
    (rig.directory / "file").write_text("no folder")
    process = rig.start("predictor", ready=False, MODEL_CACHE_DIRECTORY=str(rig.directory / "file"))

    assert process.wait(30) == 2
    assert "MODEL_CACHE_DIRECTORY: " in process.last_line()


def test_without_a_registry_it_waits_and_then_catches_up(rig: Rig, session_registry_port: Registry) -> None:
    batch = make_transactions(20)
    rig.put_transactions(batch)
    away = session_registry_port
    process = rig.start("predictor", ready=False, MLFLOW_TRACKING_URI=away.uri)
    until(lambda: "event='outage'" in rig.log("predictor"), what="the outage in the log")
    assert process.running

    away.start()

    assert len(rig.read(rig.topic_2, len(batch), timeout_s=60)) == len(batch)


@pytest.fixture
def session_registry_port(registry: Registry) -> Registry:
    """The registry, stopped; it is there again at the end."""
    registry.stop()
    return registry


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MLFLOW_TRACKING_URI": ""}, "MLFLOW_TRACKING_URI: missing"),
        ({"DELIVERY": "at_most_once"}, "DELIVERY: input should be 'exactly_once' or 'at_least_once'"),
        ({"CLIENT_PROPERTIES": "/nowhere"}, "CLIENT_PROPERTIES: cannot read /nowhere"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(rig: Rig, changes: dict[str, str], named: str) -> None:
    process: Process = service("predictor", rig.directory, rig.environment | changes)
    process.spawn()

    assert process.wait(30) == 2
    line = rig.log("predictor").splitlines()[-1]
    assert line.startswith("predictor: ")
    assert named in line
    assert "Traceback" not in rig.log("predictor")


def test_an_unknown_kafka_property_is_named(rig: Rig) -> None:
    with (rig.directory / "client.properties").open("a") as file:
        file.write("bootstrap.sevrers=typo\n")
    process = service("predictor", rig.directory, rig.environment)
    process.spawn()

    assert process.wait(30) == 2
    assert "bootstrap.sevrers" in rig.log("predictor").splitlines()[-1]
    assert "Traceback" not in rig.log("predictor")
