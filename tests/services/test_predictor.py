"""topic_1 to topic_2, on a real broker with a real registry."""

import importlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import cloudpickle
import mlflow
import mlflow.lightgbm
import mlflow.pyfunc
import msgspec
import numpy as np
import pandas as pd
import pytest
import requests
from confluent_kafka import Message, Producer
from conftest import Rig, dead_letter_topic, make_transactions, until
from mlflow.models import infer_signature
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from rehearsal.stack import service
from sandbox.generator import training_frame
from sandbox.processes import Process, free_port
from sandbox.registry import Registry
from shared.kafka import topics
from shared.kafka.messages import NOTHING, headers
from shared.provenance import from_headers
from shared.records import FEATURES, REFERENCE, Transaction, decode_prediction, encode_transaction

NUMERIC = ["cc_num", "amt", "zip", "lat", "long", "city_pop", "unix_time", "merch_lat", "merch_long"]

AT_ONCE = {"MAX_BATCH_WAIT_MS": "1000"}  # a challenger passes over what comes while it is busy


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
    assert b"merchant" in (by_value[rubbish[3]] or b"")


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
    history = training_frame(seed=3).head(4000)
    forest = Pipeline([("scale", StandardScaler()), ("forest", RandomForestClassifier(20, random_state=0))])
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


def promote(registry: Registry, name: str, model: Any, *, alias: str = "champion", **metadata: object) -> str:
    """Log the model under that name and give it the alias; returns its version."""
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
    mlflow.MlflowClient().set_registered_model_alias(name, alias, version)
    return version


@pytest.fixture
def name(rig: Rig, registry: Registry) -> str:
    """The name of a model of this test's own, which its predictors serve."""
    name = f"fussy-{rig.topic_1}"
    rig.environment |= {"MLFLOW_TRACKING_URI": registry.uri, "MODEL_NAME": name}
    return name


class Fussy:
    """A model that says `label` of all rows, but raises for some amounts, and for all of them once a file is there."""

    def __init__(
        self, *, label: int = 0, refuses: Sequence[float] = (), broken: Path | None = None, takes_s: float = 0
    ):
        self.label = label
        self.refuses = set(refuses)
        self.broken = broken
        self.takes_s = takes_s

    def predict(self, rows: pd.DataFrame) -> "np.ndarray[Any, Any]":
        if rows["amt"].isin(self.refuses).any() or (self.broken and self.broken.exists()):
            raise ValueError("too fussy")
        time.sleep(self.takes_s)
        return np.full(len(rows), self.label)


cloudpickle.register_pickle_by_value(sys.modules[__name__])


def versions(messages: Sequence[Message]) -> Counter[str | None]:
    """How many of these predictions each version made."""
    return Counter(from_headers(headers(message)).model_version for message in messages)


def test_a_broken_model_is_not_taken_out_on_the_rows(rig: Rig, registry: Registry, name: str, tmp_path: Path) -> None:
    promote(registry, name, Fussy(broken=tmp_path / "broken"))
    process = rig.start("predictor", BACKOFF_MAX_SECONDS="0.5")
    (tmp_path / "broken").touch()
    batch = make_transactions(200)
    rig.put_transactions(batch)
    until(lambda: process.said("the model fails on the reference transaction"), what="a word on the model")
    assert process.running

    version = promote(registry, name, Fussy())

    messages = rig.read(rig.topic_2, len(batch), extra_s=1)
    assert versions(messages) == {version: len(batch)}
    assert not process.said("event='dead_letters'")


def test_rows_that_a_model_refuses_now_and_then_are_bad_rows(rig: Rig, registry: Registry, name: str) -> None:
    batch = make_transactions(300)
    dear = sorted(batch, key=lambda each: each.amt)[-5:]
    promote(registry, name, Fussy(refuses=[each.amt for each in dear]))
    rig.put_transactions(batch)
    rig.start("predictor")

    assert len(rig.read(rig.topic_2, len(batch) - 5)) == len(batch) - 5
    dead = rig.read(dead_letter_topic(rig.topic_1), 5)
    assert {message.value() for message in dead} == {encode_transaction(each) for each in dear}


def test_the_alias_is_followed_without_a_restart(rig: Rig, registry: Registry, name: str) -> None:
    first = promote(registry, name, Fussy(label=0))
    process = rig.start("predictor", MODEL_REFRESH_SECONDS="0.2")
    batch = make_transactions(200)
    rig.put_transactions(batch[:100])
    assert versions(rig.read(rig.topic_2, 100)) == {first: 100}

    second = promote(registry, name, Fussy(label=1))
    until(lambda: process.said("event='model_loaded'") and process.said(f"version='{second}'"), what="the new version")
    for number, transaction in enumerate(batch[100:], start=101):  # on a busy machine, the old one may score the first
        rig.put_transactions([transaction])
        messages = rig.read(rig.topic_2, number)
        if second in versions(messages):
            break

    assert set(versions(messages)) == {first, second}
    for message in messages:
        label = decode_prediction(message.value()).prediction
        assert label == int(from_headers(headers(message)).model_version == second)
    digests = re.findall(r"digest='([0-9a-f]{64})'", rig.log("predictor"))
    assert len(set(digests)) == 2  # which code ran, whoever moved the alias


class Unconverted(RandomForestClassifier):  # type: ignore[misc]
    """A forest that a predictor reads as any other, but the process that converts it for two minutes."""

    heart: Path  # beats meanwhile

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.loaded = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        if hasattr(self, "loaded"):
            beats = f"for _ in range(2400): pathlib.Path({str(self.heart)!r}).touch(); time.sleep(0.05)"
            return exec, (f"import pathlib, time\n{beats}",)
        return super().__reduce_ex__(protocol)


@pytest.mark.parametrize("serves", [False, True], ids=["at the start", "beside the one that serves"])
def test_sigterm_works_while_a_model_is_converted_and_leaves_nothing_behind(
    rig: Rig, registry: Registry, name: str, tmp_path: Path, serves: bool
) -> None:
    history = frame(make_transactions(200))
    forest = Unconverted(5, random_state=0).fit(history[NUMERIC], history["is_fraud"].astype(int))
    forest.heart = tmp_path / "heart"
    if serves:
        promote(registry, name, Fussy())
    else:
        promote(registry, name, forest)
    (temporary := tmp_path / "temporary").mkdir()
    process = rig.start("predictor", ready=serves, MODEL_REFRESH_SECONDS="0.2", TMPDIR=str(temporary))
    if serves:
        promote(registry, name, forest)
    until(forest.heart.exists, timeout_s=120, what="the conversion")

    assert process.stop(10) == 0

    assert "Traceback" not in rig.log("predictor")
    assert list(temporary.iterdir()) == []
    until(lambda: time.time() - forest.heart.stat().st_mtime > 2, timeout_s=10, what="the end of the conversion")


class NeedsMore:
    """A model of somebody who has a package that is not installed here."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("a_package_of_theirs",)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(NeedsMore(), "needs a_package_of_theirs, which is not installed here", id="a package is missing"),
        pytest.param(Fussy(label=7), "a label that is neither 0 nor 1: 7", id="it does not answer 0 or 1"),
        pytest.param(Fussy(refuses=[REFERENCE.amt]), "fails on the recorded transactions", id="it raises"),
    ],
)
def test_a_version_that_cannot_serve_never_does(
    rig: Rig, registry: Registry, name: str, model: Any, reason: str
) -> None:
    good = promote(registry, name, Fussy())
    process = rig.start("predictor", MODEL_REFRESH_SECONDS="0.2")

    promote(registry, name, model)
    until(lambda: process.said(reason), what="the refusal in the log")
    rig.put_transactions(make_transactions(100))

    assert versions(rig.read(rig.topic_2, 100)) == {good: 100}
    time.sleep(1)  # several looks at the registry
    assert rig.log("predictor").count("event='model_refused'") == 1


def test_the_challenger_scores_the_same_rows_beside_the_champion(rig: Rig, registry: Registry, name: str) -> None:
    champion = promote(registry, name, Fussy(label=0))
    challenger = promote(registry, name, Fussy(label=1), alias="challenger")
    topics.use(rig.properties, [f"{rig.topic_2}.challenger"])
    process = rig.start("predictor", MODEL_REFRESH_SECONDS="0.2", **AT_ONCE)
    until(lambda: process.said("alias='challenger'"), what="the challenger")
    batch = make_transactions(200)
    rig.put_transactions(batch)

    theirs, ours = rig.read(f"{rig.topic_2}.challenger", 200), rig.read(rig.topic_2, 200)

    assert (versions(theirs), versions(ours)) == ({challenger: 200}, {champion: 200})
    assert {decode_prediction(message.value()).prediction for message in theirs} == {1}
    assert {decode_prediction(message.value()).prediction for message in ours} == {0}
    identities = [{decode_prediction(message.value()).identity for message in each} for each in (theirs, ours)]
    assert identities[0] == identities[1] == {each.identity for each in batch}


@pytest.mark.parametrize(
    ("fault", "reason"), [("raises", "the model fails on the reference transaction"), ("is slow", "rows took")]
)
def test_a_challenger_that_fails_rests_and_the_champion_goes_on(
    rig: Rig, registry: Registry, name: str, tmp_path: Path, fault: str, reason: str
) -> None:
    champion = promote(registry, name, Fussy())
    promote(
        registry,
        name,
        Fussy(takes_s=1.2) if fault == "is slow" else Fussy(broken=tmp_path / "broken"),
        alias="challenger",
    )
    process = rig.start("predictor", MODEL_REFRESH_SECONDS="0.2")
    until(lambda: process.said("alias='challenger'"), what="the challenger")
    (tmp_path / "broken").touch()
    for batch in range(5):
        rig.put_transactions(make_transactions(20, seed=batch))

    assert versions(rig.read(rig.topic_2, 100)) == {champion: 100}
    until(lambda: process.said("event='challenger_rests'"), what="the challenger's rest")
    assert process.said(reason)
    assert rig.log("predictor").count("event='challenger_rests'") == 1


def test_a_challenger_whose_alias_was_taken_away_scores_no_more(rig: Rig, registry: Registry, name: str) -> None:
    champion = promote(registry, name, Fussy(label=0))
    challenger = promote(registry, name, Fussy(label=1), alias="challenger")
    topics.use(rig.properties, [f"{rig.topic_2}.challenger"])
    process = rig.start("predictor", MODEL_REFRESH_SECONDS="0.2", **AT_ONCE)
    until(lambda: process.said("alias='challenger'"), what="the challenger")
    rig.put_transactions(make_transactions(20))
    rig.read(f"{rig.topic_2}.challenger", 20)

    mlflow.MlflowClient(registry.uri).delete_registered_model_alias(name, "challenger")
    until(lambda: process.said("event='model_gone'"), what="the end of the challenger")
    rig.put_transactions(make_transactions(20, seed=2))

    assert versions(rig.read(rig.topic_2, 40)) == {champion: 40}
    time.sleep(1)  # as long as a challenger may take
    assert versions(rig.read(f"{rig.topic_2}.challenger", 20)) == {challenger: 20}


def test_times_in_milliseconds_are_converted_to_seconds_and_reported(champion_rig: Rig) -> None:
    batch = make_transactions(1600)
    old = [encode_transaction(msgspec.structs.replace(each, unix_time=1000 * each.unix_time)) for each in batch]
    champion_rig.put(champion_rig.topic_1, old)

    process = champion_rig.start("predictor")

    found = {decode_prediction(message.value()).identity for message in champion_rig.read(champion_rig.topic_2, 1600)}
    assert found == {each.identity for each in batch}
    until(lambda: process.said("measure='milliseconds'"), what="the drift in the log")


class Halves(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """A model that MLflow alone knows how to ask: a probability by the amount."""

    def predict(self, context: object, model_input: pd.DataFrame) -> "np.ndarray[Any, Any]":  # noqa: ARG002
        return np.where(model_input["amt"] > 50, 0.75, 0.25)


def test_a_model_that_only_mlflow_can_ask_is_served(rig: Rig, registry: Registry, name: str) -> None:
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("by-hand")
    with mlflow.start_run():
        mlflow.pyfunc.log_model(
            name="model",
            python_model=Halves(),
            signature=infer_signature(frame(make_transactions(2))[["amt"]]),
            registered_model_name=name,
            pip_requirements=[],
            metadata={"threshold": 0.5},
        )
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", "1")
    rig.put_transactions(make_transactions(100))
    rig.start("predictor")

    for message in rig.read(rig.topic_2, 100):
        prediction = decode_prediction(message.value())
        dear = prediction.amt > 50
        assert (prediction.prediction, from_headers(headers(message)).probability) == (dear, 0.75 if dear else 0.25)


@pytest.mark.parametrize("kind", ["lightgbm", "imblearn"])
def test_other_libraries_models_are_served_with_their_probabilities(
    rig: Rig, registry: Registry, name: str, kind: str
) -> None:
    history = training_frame(seed=3).head(4000)
    rows, labels = history[NUMERIC].astype(float), history["is_fraud"].astype(int)
    mlflow.set_tracking_uri(registry.uri)
    mlflow.set_experiment("by-hand")
    if kind == "lightgbm":
        from lightgbm import LGBMClassifier

        model: Any = LGBMClassifier(n_estimators=10, verbose=-1).fit(rows, labels)
        log: Any = mlflow.lightgbm.log_model
    else:
        from imblearn.over_sampling import RandomOverSampler
        from imblearn.pipeline import Pipeline as Resampled

        model = Resampled([("more", RandomOverSampler(random_state=0)), ("trees", RandomForestClassifier(10))])
        model.fit(rows, labels)
        log = partial(mlflow.sklearn.log_model, serialization_format="cloudpickle")
    with mlflow.start_run():
        log(
            model,
            name="model",
            signature=infer_signature(rows.head()),
            registered_model_name=name,
            pip_requirements=[],
        )
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", "1")
    batch = make_transactions(100)
    rig.put_transactions(batch)
    rig.start("predictor")

    wanted = model.predict_proba(frame(batch)[NUMERIC].astype(float))[:, 1]
    likely = {each.identity: chance for each, chance in zip(batch, wanted, strict=True)}
    for message in rig.read(rig.topic_2, 100):
        chance = from_headers(headers(message)).probability
        assert chance == pytest.approx(likely[decode_prediction(message.value()).identity])


def test_a_last_good_model_that_was_changed_is_not_served(rig: Rig, registry: Registry, name: str) -> None:
    promote(registry, name, Fussy())
    first = rig.start("predictor")
    first.kill()
    rig.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    (pickle,) = (rig.directory / "models").rglob("model.pkl")
    pickle.write_bytes(pickle.read_bytes() + b".")

    process = rig.start("predictor", ready=False)

    until(lambda: process.said("event='outage'"), what="the outage in the log")
    assert not process.said("event='last_good_model'")


def test_a_changed_model_is_fetched_anew(rig: Rig, registry: Registry, name: str) -> None:
    promote(registry, name, Fussy())
    rig.start("predictor").kill()
    (pickle,) = (rig.directory / "models").rglob("model.pkl")
    good = pickle.read_bytes()
    pickle.write_bytes(b"")

    rig.start("predictor")

    assert pickle.read_bytes() == good


def test_a_version_that_does_not_load_never_takes_the_place_of_the_last_good_one(
    rig: Rig, registry: Registry, name: str
) -> None:
    version = promote(registry, name, Fussy())
    rig.start("predictor").kill()
    promote(registry, name, Fussy(), threshold="high")

    process = rig.start("predictor")

    assert process.said("logged with the threshold 'high', which is no number in (0, 1]")
    assert process.said(f"version='{version}'")


def test_a_cache_that_cannot_be_written_is_named(rig: Rig) -> None:
    (rig.directory / "file").write_text("no folder")
    process = rig.start("predictor", ready=False, MODEL_CACHE_DIRECTORY=str(rig.directory / "file"))

    assert process.wait(90) == 2
    assert "MODEL_CACHE_DIRECTORY: " in process.last_line()


def test_without_a_registry_it_waits_and_then_catches_up(rig: Rig, registry: Registry) -> None:
    batch = make_transactions(20)
    rig.put_transactions(batch)
    port = free_port()
    process = rig.start("predictor", ready=False, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    until(lambda: "event='outage'" in rig.log("predictor"), what="the outage in the log")
    assert process.running

    with leading_to(registry, port):
        assert len(rig.read(rig.topic_2, len(batch), timeout_s=60)) == len(batch)


@contextmanager
def leading_to(registry: Registry, port: int) -> Iterator[None]:
    """The registry at another port as well: others use it meanwhile, so it cannot go away itself."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = requests.request(
                self.command, registry.uri + self.path, data=body, headers=dict(self.headers), timeout=30
            )
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MLFLOW_TRACKING_URI": ""}, "MLFLOW_TRACKING_URI: missing"),
        ({"DELIVERY": "at_most_once"}, "DELIVERY: must be exactly_once or at_least_once"),
        ({"CLIENT_PROPERTIES": "/nowhere"}, "CLIENT_PROPERTIES: cannot read /nowhere"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(rig: Rig, changes: dict[str, str], named: str) -> None:
    process: Process = service("predictor", rig.directory, rig.environment | changes)
    process.spawn()

    assert process.wait(90) == 2
    line = rig.log("predictor").splitlines()[-1]
    assert line.startswith("predictor: ")
    assert named in line
    assert "Traceback" not in rig.log("predictor")


def test_an_unknown_kafka_property_is_named(rig: Rig) -> None:
    with (rig.directory / "client.properties").open("a") as file:
        file.write("bootstrap.sevrers=typo\n")
    process = service("predictor", rig.directory, rig.environment)
    process.spawn()

    assert process.wait(90) == 2
    assert "bootstrap.sevrers" in rig.log("predictor").splitlines()[-1]
    assert "Traceback" not in rig.log("predictor")
