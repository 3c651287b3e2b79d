"""The predictor: scores transactions from topic_1 with the champion model, and writes the predictions to topic_2."""

import os
import time
from collections.abc import Sequence
from threading import Event

import structlog
from confluent_kafka import Message

from services.predictor.drift import Monitor
from services.predictor.followed import Followed, keep_up
from services.predictor.hosted import Host
from services.predictor.model import Model
from services.predictor.registry import Registry
from services.predictor.scoring import predict
from services.predictor.settings import PredictorSettings
from services.predictor.shadow import Shadow
from shared import health
from shared.dead_letters import Limit
from shared.errors import Outage
from shared.retry import OutageLog, retry_outages
from shared.settings import kafka_properties
from shared.stream import delivery
from shared.stream.flight import Outcome
from shared.stream.loop import open_stream

log = structlog.get_logger()

_JOIN_S = 3.0


def serve(settings: PredictorSettings, shutdown: Event, *, spare: Host | None = None) -> None:
    """Wait for a model, then score transactions until shutdown. `spare` is a process for the first model.

    Raises SettingsError if a setting is invalid.
    """
    properties = kafka_properties(settings)
    stream = open_stream(
        settings,
        properties,
        group=settings.predictor_group,
        topic=settings.topic_1,
        delivery=delivery.delivery(
            settings.delivery,
            properties=properties,
            transactional_id=f"{settings.predictor_group}-{settings.replica}",
            shutdown=shutdown,
        ),
        shutdown=shutdown,
    )
    settings.set_up_mlflow()
    if settings.model_python and not os.access(settings.model_python, os.X_OK):
        log.warning("model_python_missing", setting="MODEL_PYTHON", path=settings.model_python)
    registry = Registry(
        settings,
        cache=settings.model_cache_directory,
        compiled=settings.compiled_scoring,
        spare=spare,
        shutdown=shutdown,
    )
    champion = Followed(registry, settings.model_alias, required=True)
    challenger = Followed(registry, "challenger", required=False)
    try:
        retry_outages(
            champion.first,
            shutdown=shutdown,
            initial_s=settings.backoff_initial_seconds,
            max_s=settings.backoff_max_seconds,
            outage_log=OutageLog("a model"),
        )
    except Outage:
        stream.close()
        champion.end()
        return
    look_now = Event()
    following = keep_up(
        [champion, challenger],
        every_s=settings.model_refresh_seconds,
        now=look_now,
        shutdown=shutdown,
        settings=settings,
    )
    shadow = Shadow(
        challenger,
        sample=settings.challenger_sample,
        topic=settings.challenger_topic,
        properties=properties,
        shutdown=shutdown,
    )
    stream.run(Scorer(champion, shadow, look_now, settings).handle, ahead=True)
    look_now.set()
    following.join(_JOIN_S)
    champion.end()
    challenger.end()


class Scorer:
    """Scores batches with the current champion. A new champion never takes effect in the middle of a batch."""

    def __init__(self, champion: Followed, shadow: Shadow, look_now: Event, settings: PredictorSettings) -> None:
        self._champion = champion
        self._shadow = shadow
        self._look_now = look_now
        self._settings = settings
        self._model: Model | None = None
        self._monitor = Monitor(None, psi_limit=settings.drift_psi, rows=settings.drift_rows)

    def handle(self, messages: Sequence[Message]) -> Outcome:
        """Score the batch. If the champion is broken, raises Outage until the alias has moved to another version."""
        model = self._champion.model
        if model is None:
            raise Outage("no model is loaded yet")
        if model is not self._model:
            self._begin_with(model)
        try:
            predicted = predict(
                lambda transactions: self._champion.score(transactions, alive=self._alive),
                messages,
                topic=self._settings.topic_2,
                group=self._settings.predictor_group,
                now_ms=time.time_ns() // 1_000_000,
                limit=self._limit,
            )
        except Outage as outage:
            self._look_now.set()
            raise Outage(
                f"{outage}; the alias still points to version {model.version}. Promote a different version"
            ) from None
        self._monitor.add(predicted.seen)
        self._shadow.offer(messages)
        return predicted.outcome

    def _alive(self) -> None:
        health.turned(f"{self._settings.predictor_group} handler")

    def _begin_with(self, model: Model) -> None:
        if self._model:
            log.info("model_swapped", version=model.version, before=self._model.version)
        self._model = model
        self._limit = Limit.from_settings(self._settings)
        self._monitor = Monitor(
            model.logged.profile,
            psi_limit=self._settings.drift_psi,
            rows=self._settings.drift_rows,
            before=self._monitor,
        )
