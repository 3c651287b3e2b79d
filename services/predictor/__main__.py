"""The predictor: topic_1 to topic_2, a batch at a time, with the champion in memory."""

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from threading import Event

# Before anything imports numpy or scikit-learn: replicas, not threads, use more cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# This service has its own backoff; MLflow's own tries take minutes and hear no SIGTERM.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# It would tell its makers of its use, from a thread that changes the environment under a request's feet.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import structlog
from confluent_kafka import Message
from pydantic import Field, SecretStr

from services.predictor.model import REFERENCE, Model, Score, UnusableModel, score
from services.predictor.registry import Registry
from shared import delivery, kafka, service
from shared.dead_letters import Limit, dead_letter, isolate
from shared.errors import Outage, Poison
from shared.kafka import Record, coordinates, says_nothing
from shared.provenance import Provenance, to_headers
from shared.records import Transaction, encode_prediction, encode_transaction, read_topic_1
from shared.retry import until_over
from shared.settings import DeliveryGuarantee, StreamSettings, kafka_properties
from shared.stream import Outcome, Stream

log = structlog.get_logger()


class PredictorSettings(StreamSettings):
    """What the predictor reads from its environment."""

    mlflow_tracking_uri: str = Field(min_length=1, description="The MLflow registry")
    mlflow_tracking_username: str | None = Field(None, description="Login, if the registry wants one")
    mlflow_tracking_password: SecretStr | None = Field(None, description="Its password")
    model_name: str = Field("fraud", min_length=1, description="Registered model to serve")
    model_alias: str = Field("champion", min_length=1, description="Alias of the version to serve")
    predictor_group: str = Field("predictor", min_length=1, description="Consumer group on topic_1")
    delivery: DeliveryGuarantee = Field("exactly_once", description="exactly_once or at_least_once")
    compiled_scoring: bool = Field(True, description="Whether trees are compiled where that changes no answer")
    model_cache_directory: Path = Field(
        Path("models"), description="Where the last good model is kept; outlives a container"
    )


def serve(settings: PredictorSettings, shutdown: Event) -> None:
    """Wait for the champion, then predict until shutdown."""
    properties = kafka_properties(settings)
    stream = Stream(
        make_consumer=lambda: kafka.consumer(properties, group=settings.predictor_group, replica=settings.replica),
        topic=settings.topic_1,
        delivery=delivery.delivery(
            settings.delivery,
            properties=properties,
            transactional_id=f"{settings.predictor_group}-{settings.replica}",
            shutdown=shutdown,
        ),
        settings=settings,
        shutdown=shutdown,
    )
    if settings.mlflow_tracking_username and settings.mlflow_tracking_password:  # which MLflow wants in its environment
        os.environ["MLFLOW_TRACKING_USERNAME"] = settings.mlflow_tracking_username
        os.environ["MLFLOW_TRACKING_PASSWORD"] = settings.mlflow_tracking_password.get_secret_value()
    registry = Registry(
        tracking_uri=settings.mlflow_tracking_uri,
        name=settings.model_name,
        alias=settings.model_alias,
        cache=settings.model_cache_directory,
        compiled=settings.compiled_scoring,
    )
    try:
        model = until_over(
            lambda: first_model(registry),
            shutdown=shutdown,
            initial_s=settings.backoff_initial_seconds,
            max_s=settings.backoff_max_seconds,
        )
    except Outage:
        return
    stream.run(Scorer(model, registry, settings).handle, ahead=True)


def first_model(registry: Registry) -> Model:
    """The champion, or the last good model while there is none to be had. Raises Outage if there is neither."""
    try:
        model = _champion(registry)
    except Outage as outage:
        last_good = registry.last_good()
        if last_good is None:
            raise
        log.warning("last_good_model", model=last_good.name, version=last_good.version, reason=str(outage))
        return last_good
    log.info("model_loaded", model=model.name, version=model.version, columns=len(model.columns))
    return model


class Scorer:
    """Scores batch after batch with one model, until that turns out to be broken."""

    def __init__(self, model: Model, registry: Registry, settings: PredictorSettings) -> None:
        self._model = model
        self._registry = registry
        self._settings = settings
        self._broken: Outage | None = None
        self._limit = self._new_limit()

    def handle(self, messages: Sequence[Message]) -> Outcome:
        """Predict the batch. Raises Outage while the model is broken and the registry has no other champion."""
        if self._broken:
            self._replace(self._broken)
        try:
            return predict(
                self._model,
                messages,
                topic=self._settings.topic_2,
                group=self._settings.predictor_group,
                now_ms=time.time_ns() // 1_000_000,
                limit=self._limit,
            )
        except Outage as outage:
            self._broken = outage
            raise

    def _replace(self, broken: Outage) -> None:
        try:
            self._model = _champion(self._registry, but_not=self._model.version)
        except Outage as outage:
            raise Outage(f"{broken}; {outage}") from None
        self._broken = None
        self._limit = self._new_limit()
        log.info("model_replaced", model=self._model.name, version=self._model.version)

    def _new_limit(self) -> Limit:
        return Limit(
            ratio=self._settings.dead_letter_limit_ratio, consecutive=self._settings.dead_letter_limit_consecutive
        )


def predict(model: Model, messages: Sequence[Message], *, topic: str, group: str, now_ms: int, limit: Limit) -> Outcome:
    """A prediction for every transaction of the batch, a dead letter for every message that holds what is none.

    Raises Outage if it is the model that is broken, not the rows.
    """
    transactions: list[Transaction] = []
    values: list[bytes] = []
    sources: list[int] = []  # for each transaction, the number of its message
    faults: defaultdict[int, list[str]] = defaultdict(list)
    for number, message in enumerate(messages):
        if says_nothing(message):
            continue
        try:
            rows = read_topic_1(message.value())
        except Poison as poison:
            faults[number].append(str(poison))
            continue
        transactions += rows.transactions
        values += [rows.canonical] if rows.canonical else map(encode_transaction, rows.transactions)
        sources += [number] * len(rows.transactions)
        for row in rows.bad:
            faults[number].append(row.reason)
    results = _scores(model, transactions)
    limit.check(results)
    records = []
    for number, transaction, value, result in zip(sources, transactions, values, results, strict=True):
        if isinstance(result, Poison):
            faults[number].append(str(result))
        else:
            _, partition, offset = coordinates(messages[number])
            about = Provenance(model.name, model.version, result.probability, now_ms, partition, offset)
            record = Record(topic, encode_prediction(value, result.label), transaction.key, to_headers(about))
            records.append(record)
    dead = [dead_letter(messages[number], "; ".join(reasons), group=group) for number, reasons in faults.items()]
    return Outcome(len(messages), records, dead)


def _scores(model: Model, transactions: Sequence[Transaction]) -> Sequence[Score | Poison]:
    if not transactions:
        return []
    try:
        return score(model, transactions)
    except Poison:
        _check(model)
        return isolate(transactions, lambda rows: score(model, rows))


def _check(model: Model) -> None:
    """Before rows are blamed: does the model still score what it scored when it was loaded?"""
    try:
        score(model, [REFERENCE])
    except Poison as poison:
        raise Outage(f"the model fails on the reference transaction: {poison}") from None


def _champion(registry: Registry, *, but_not: str | None = None) -> Model:
    try:
        return registry.champion(but_not=but_not)
    except UnusableModel as error:
        raise Outage(f"no usable model: {error}") from None


if __name__ == "__main__":
    service.run("predictor", PredictorSettings, serve)
