"""Measure the speed of the predictor with different settings, and the speed of its computation without Kafka."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
from confluent_kafka import Message, TopicPartition
from mlflow.models import infer_signature
from sklearn.ensemble import RandomForestClassifier

from benchmarks.load import Bench, backlog, memory_bar
from benchmarks.measure import Bar, Figure, Section, side_by_side
from sandbox.generator import training_frame
from services.predictor.host import Served, load
from services.predictor.hosted import Allowance
from services.predictor.model import Model, load_request, named_columns
from services.predictor.registry import Registry
from services.predictor.scoring import predict
from services.predictor.settings import ModelSettings
from shared.dead_letters import Limit
from shared.kafka import topics
from shared.kafka.clients import consumer
from training import train
from training.aliases import Alias

BOOSTING, FOREST = "fraud", "forest"  # the names of the models
FOREST_COLUMNS = ("amt", "lat", "long", "city_pop", "unix_time", "merch_lat", "merch_long", "zip")
BATCH_SIZES = (1, 10, 100, 1000, 5000)
_START = datetime(2024, 1, 1, tzinfo=UTC)
_EMBEDDED_ROWS = 80_000  # the embedded broker does not keep many more records


def register_forest(tracking_uri: str) -> None:
    """Train a random forest of 150 trees on the numeric columns, and register it as the champion of model `forest`."""
    frame = training_frame(rows=30_000, seed=2, start=_START, fraud_rate=0.02)
    rows = frame[list(FOREST_COLUMNS)]
    forest = RandomForestClassifier(150, n_jobs=-1, random_state=0).fit(rows, frame["is_fraud"].astype(int))
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_experiment(FOREST)
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(
            forest,
            name="model",
            signature=infer_signature(rows.head()),
            registered_model_name=FOREST,
            pip_requirements=[],
            serialization_format="cloudpickle",
        )
    mlflow.MlflowClient().set_registered_model_alias(FOREST, "champion", str(logged.registered_model_version))


def another_version(bench: Bench, *, seed: int) -> str:
    """Train and register another version of the boosting model. Returns the new version's number."""
    trained = train.fit(training_frame(seed=seed), seed=seed)
    return train.register(trained, Alias(bench.stack.registry.uri, BOOSTING, "other"))


def load_model(bench: Bench, name: str, *, compiled: bool) -> Model:
    """Load the champion in the same way as the predictor."""
    settings = ModelSettings(mlflow_tracking_uri=bench.stack.registry.uri, model_name=name)
    registry = Registry(settings, cache=bench.directory / "models", compiled=compiled)
    found = registry.find("champion")
    assert found
    return registry.load(found)


def consumed(bench: Bench, topic: str) -> list[Message]:
    """Read all messages of a topic, in the form in which the predictor receives them."""
    ends = topics.ends(bench.properties, [topic])
    reader = consumer(bench.properties, group="ceiling")
    reader.assign([TopicPartition(end.topic, end.partition, 0) for end in ends])
    wanted = sum(end.offset for end in ends)
    found: list[Message] = []
    while len(found) < wanted:
        found += [message for message in reader.consume(10_000, 1.0) if message.error() is None]
    reader.close()
    return found


def without_kafka(model: Model, messages: Sequence[Message], *, batch_size: int) -> dict[str, float]:
    """Measure the rate at which batches are decoded, scored and encoded, without Kafka."""
    limit = Limit(ratio=0.5, consecutive=20)
    began = time.monotonic()
    for start in range(0, len(messages), batch_size):
        batch = messages[start : start + batch_size]
        predicted = predict(
            lambda transactions: (model, model.score(transactions)), batch, topic="t", group="g", now_ms=0, limit=limit
        )
        list(predicted.outcome.outputs)  # which encodes them
    return {"rows/s": len(messages) / (time.monotonic() - began)}


def drained(
    bench: Bench,
    source: str,
    rows: int,
    *,
    replicas: int = 1,
    settings: Mapping[str, str] | None = None,
    at_most_s: float = 60.0,
) -> dict[str, float]:
    """Start this number of predictors, and measure how they process the backlog on `source` in a new consumer group."""
    (target,) = bench.topics("predicted")
    own = {"TOPIC_1": source, "TOPIC_2": target, "PREDICTOR_GROUP": target} | dict(settings or {})
    processes = [bench.service("predictor", own, replica=number) for number in range(1, replicas + 1)]
    return bench.drain(processes, group=target, topic=source, rows=rows, at_most_s=at_most_s).quantities()


def against_its_ceiling(
    bench: Bench, *, rounds: int, rows: int = _EMBEDDED_ROWS, guarantee: str = "at_least_once"
) -> Section:
    """Compare the speed of the predictor with the speed of decoding, scoring and encoding without Kafka."""
    source = bench.backlog(rows)
    model, messages = load_model(bench, BOOSTING, compiled=False), consumed(bench, source)
    found = side_by_side(
        {
            "decode, predict, encode": lambda: without_kafka(model, messages, batch_size=1000),
            "predictor": lambda: _throughput(drained(bench, source, rows, settings={"DELIVERY": guarantee})),
        },
        rounds=rounds,
    )
    model.end()
    seen = found["predictor"]["rows/s"].over(found["decode, predict, encode"]["rows/s"])
    return Section(
        "The predictor and its ceiling without Kafka",
        f"Conditions: {rows:,} rows, gradient boosting, batches of 1,000, {guarantee.replace('_', '-')} delivery. "
        "The ceiling is the speed without Kafka",
        ("rows/s",),
        found,
        [Bar(f"predictor, {guarantee.replace('_', ' ')} / its ceiling", seen, 0.5)],
    )


def guarantees(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Compare exactly-once with at-least-once delivery on Apache Kafka."""
    source = bench.backlog(rows)
    found = side_by_side(
        {
            guarantee: partial(drained, bench, source, rows, settings={"DELIVERY": guarantee})
            for guarantee in ("exactly_once", "at_least_once")
        },
        rounds=rounds,
    )
    seen = found["exactly_once"]["rows/s"].over(found["at_least_once"]["rows/s"])
    return Section(
        "What exactly once costs",
        f"Conditions: {rows:,} rows, Apache Kafka, 6 partitions, gradient boosting, batches of 1,000",
        ("rows/s", "CPU s a million", "MB"),
        found,
        [Bar("exactly once / at least once", seen, 0.85), memory_bar("predictor", found["exactly_once"]["MB"])],
    )


def batch_sizes(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Measure the predictor with both models, at several batch sizes."""
    source = bench.backlog(rows)
    found = side_by_side(
        {
            f"{model}, batches of {size:,}": partial(
                drained, bench, source, rows, settings={"MODEL_NAME": model, "MAX_BATCH_SIZE": str(size)}, at_most_s=8
            )
            for model in (BOOSTING, FOREST)
            for size in BATCH_SIZES
        },
        rounds=rounds,
    )
    return Section(
        "The predictor at every size of batch",
        f"Conditions: up to {rows:,} rows, Apache Kafka, exactly-once delivery. `{BOOSTING}` is the gradient boosting "
        f"model, and `{FOREST}` is a random forest of 150 trees",
        ("rows/s", "CPU s a million", "MB"),
        found,
        [memory_bar(f"predictor, {model}", found[f"{model}, batches of 1,000"]["MB"]) for model in (BOOSTING, FOREST)],
    )


def logging(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Compare the predictor with and without its INFO log lines."""
    source = bench.backlog(rows)
    found = side_by_side(
        {level: partial(drained, bench, source, rows, settings={"LOG_LEVEL": level}) for level in ("INFO", "ERROR")},
        rounds=rounds,
    )
    seen = found["INFO"]["rows/s"].over(found["ERROR"]["rows/s"])
    return Section(
        "What logging costs",
        f"Conditions: {rows:,} rows, Apache Kafka, 6 partitions, gradient boosting, exactly-once delivery. "
        "The first column is LOG_LEVEL",
        ("rows/s", "CPU s a million"),
        found,
        [Bar("predictor, INFO / ERROR", seen, 0.97)],
    )


def compiled_scoring(bench: Bench, *, rounds: int) -> Section:
    """Compare scoring with the compiled forest and with the original forest, in batches of 100 rows."""
    columns = named_columns(backlog(20_000))
    compiled, own = (_loaded(bench, FOREST, compiled=flag) for flag in (True, False))
    found = side_by_side(
        {"compiled": lambda: _scored(compiled, columns), "as it is": lambda: _scored(own, columns)},
        rounds=rounds,
    )
    labels = [model.score(_chosen(model, columns, 0, 20_000)).labels for model in (compiled, own)]
    gain = found["compiled"]["rows/s"].over(found["as it is"]["rows/s"])
    return Section(
        "Scoring, compiled",
        "A random forest of 150 trees scores 20,000 rows in batches of 100. "
        "The compiled and the original forest predict "
        + ("the same labels" if labels[0] == labels[1] else "DIFFERENT labels")
        + '. "As it is" means the original forest',
        ("rows/s",),
        found,
        [
            Bar("scoring, compiled / as it is", gain, 8),
            Bar("labels that differ, compiled", Figure((float(labels[0] != labels[1]),)), 0, at_most=True),
        ],
    )


def _loaded(bench: Bench, name: str, *, compiled: bool) -> Served:
    """Load the champion in this process, in the same way as its own process does."""
    folder = mlflow.artifacts.download_artifacts(
        f"models:/{name}@champion", dst_path=str(bench.directory / "here"), tracking_uri=bench.stack.registry.uri
    )
    served, problem = load(load_request(Path(folder), threshold=None, compiled=compiled, allowance=Allowance()))
    assert not problem
    return served


def _scored(model: Served, columns: Mapping[str, list[Any]]) -> dict[str, float]:
    began = time.monotonic()
    for start in range(0, 20_000, 100):
        model.score(_chosen(model, columns, start, start + 100))
    return {"rows/s": 20_000 / (time.monotonic() - began)}


def _chosen(model: Served, columns: Mapping[str, list[Any]], start: int, end: int) -> list[list[Any]]:
    return [columns[column.name][start:end] for column in model.columns]


def _throughput(quantities: Mapping[str, float]) -> dict[str, float]:
    return {"rows/s": quantities["rows/s"]}
