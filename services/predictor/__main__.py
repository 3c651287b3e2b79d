"""The predictor: topic_1 to topic_2, a batch at a time, with the champion in memory."""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from threading import Event

# Before anything imports numpy or scikit-learn: replicas, not threads, use more cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# This service has its own backoff; MLflow's own tries take minutes and hear no SIGTERM.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import structlog
from confluent_kafka import Message
from pydantic import Field, SecretStr

from services.predictor import registry
from services.predictor.model import REFERENCE, Model, Score, UnusableModel, score
from shared import kafka, service
from shared.dead_letters import dead_letter, isolate
from shared.delivery import AtLeastOnce, Delivery, ExactlyOnce
from shared.errors import Outage, Poison
from shared.kafka import Record, coordinates
from shared.provenance import Provenance, to_headers
from shared.records import Transaction, encode_prediction, read_topic_1
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
    transactional_id: str = Field(
        default_factory=lambda: f"predictor-{socket.gethostname()}",
        min_length=1,
        description="Stable over restarts and unique to a replica; the host name tells a container",
    )


def serve(settings: PredictorSettings, shutdown: Event) -> None:
    """Wait for the champion, then predict until shutdown."""
    properties = kafka_properties(settings)
    consumer = kafka.consumer(properties, group=settings.predictor_group)
    delivery: Delivery
    if settings.delivery == "exactly_once":
        delivery = ExactlyOnce(properties=properties, transactional_id=settings.transactional_id, shutdown=shutdown)
    else:
        delivery = AtLeastOnce(consumer=consumer, properties=properties, shutdown=shutdown)
    try:
        model = until_over(
            lambda: _champion(settings),
            shutdown=shutdown,
            initial_s=settings.backoff_initial_seconds,
            max_s=settings.backoff_max_seconds,
        )
    except Outage:
        return
    log.info("model_loaded", model=model.name, version=model.version, columns=len(model.columns))
    Stream(
        consumer=consumer,
        topic=settings.topic_1,
        handle=lambda messages: predict(
            model, messages, topic=settings.topic_2, group=settings.predictor_group, now_ms=time.time_ns() // 1_000_000
        ),
        delivery=delivery,
        settings=settings,
        shutdown=shutdown,
    ).run()


def predict(model: Model, messages: Sequence[Message], *, topic: str, group: str, now_ms: int) -> Outcome:
    """A prediction for every transaction of the batch, a dead letter for every message that holds what is none.

    Raises Outage if it is the model that is broken, not the rows.
    """
    transactions: list[Transaction] = []
    sources: list[int] = []  # for each transaction, the number of its message
    faults: defaultdict[int, list[str]] = defaultdict(list)
    for number, message in enumerate(messages):
        try:
            rows = read_topic_1(message.value())
        except Poison as poison:
            faults[number].append(str(poison))
            continue
        transactions += rows.transactions
        sources += [number] * len(rows.transactions)
        for row in rows.bad:
            faults[number].append(row.reason)
    records = []
    common = to_headers(Provenance(model_name=model.name, model_version=model.version, predicted_at_ms=now_ms))
    for number, transaction, result in zip(sources, transactions, _scores(model, transactions), strict=True):
        if isinstance(result, Poison):
            faults[number].append(str(result))
        else:
            _, partition, offset = coordinates(messages[number])
            source = Provenance(probability=result.probability, source_partition=partition, source_offset=offset)
            value = encode_prediction(transaction, result.label)
            records.append(Record(topic, value, transaction.key, common + to_headers(source)))
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


def _champion(settings: PredictorSettings) -> Model:
    if settings.mlflow_tracking_username and settings.mlflow_tracking_password:  # which MLflow wants in its environment
        os.environ["MLFLOW_TRACKING_USERNAME"] = settings.mlflow_tracking_username
        os.environ["MLFLOW_TRACKING_PASSWORD"] = settings.mlflow_tracking_password.get_secret_value()
    try:
        return registry.load(
            tracking_uri=settings.mlflow_tracking_uri, name=settings.model_name, alias=settings.model_alias
        )
    except UnusableModel as error:
        raise Outage(f"no usable model: {error}") from None


if __name__ == "__main__":
    service.run("predictor", PredictorSettings, serve)
