"""The challenger: scores some batches in the background, without delaying or changing the champion's predictions."""

import random
import time
from collections.abc import Mapping, Sequence
from functools import cache
from queue import Full, Queue
from threading import Event, Thread

import structlog
from confluent_kafka import Message

from services.predictor.followed import Followed
from services.predictor.model import Ended, Model
from services.predictor.scoring import predict
from shared import metrics
from shared.dead_letters import Limit
from shared.errors import Outage
from shared.privacy import without_digits
from shared.stream.delivery import AtLeastOnce

log = structlog.get_logger()

_MAX_WAITING = 2  # batches
_MAX_BATCH_S = 1.0
_REST_S = 300.0


class Shadow:
    """Scores a sample of the champion's batches with the challenger. Writes the challenger's predictions to `topic`."""

    def __init__(
        self, challenger: Followed, *, sample: float, topic: str, properties: Mapping[str, str], shutdown: Event
    ) -> None:
        self._challenger = challenger
        self._sample = sample
        self._topic = topic
        self._make_delivery = cache(lambda: AtLeastOnce(properties=properties, shutdown=shutdown))
        self._batches: Queue[Sequence[Message]] = Queue(_MAX_WAITING)
        self._rests_until = 0.0
        self._resting: Model | None = None  # the model that rests until `_rests_until`
        Thread(target=self._run, daemon=True, name="challenger").start()

    def offer(self, messages: Sequence[Message]) -> None:
        """Queue a batch that the champion has scored, unless the challenger is resting or busy. Never blocks."""
        chosen = random.random() < self._sample  # noqa: S311 - not used for security
        if not chosen or not self._challenger.model:
            return
        if self._rests(self._challenger.model):
            outcome = "rests"
        else:
            try:
                self._batches.put_nowait(messages)
                outcome = "scored"
            except Full:
                outcome = "busy"
        metrics.CHALLENGED.labels(outcome).inc()

    def _run(self) -> None:
        while True:
            messages, model = self._batches.get(), self._challenger.model
            if model is None or self._rests(model):
                continue
            if problem := self._score(model, messages):
                self._resting, self._rests_until = model, time.monotonic() + _REST_S
                log.warning("challenger_rests", seconds=_REST_S, reason=problem, version=model.version)

    def _rests(self, model: Model) -> bool:
        return model is self._resting and time.monotonic() < self._rests_until

    def _score(self, model: Model, messages: Sequence[Message]) -> str | None:
        """Score a batch. Returns the reason if the challenger should rest after this batch, otherwise None."""
        began = time.monotonic()
        try:
            now_ms, limit = time.time_ns() // 1_000_000, Limit(ratio=1, consecutive=len(messages))
            predicted = predict(
                lambda transactions: (model, model.score(transactions)),
                messages,
                topic=self._topic,
                group="challenger",
                now_ms=now_ms,
                limit=limit,
            )
            took_s = time.monotonic() - began
            self._make_delivery().deliver(predicted.outcome.outputs)
        except Ended:
            return None
        except Outage as outage:
            return str(outage)
        except Exception as error:  # a failure of the challenger must not end this thread
            return without_digits(f"{type(error).__name__}: {error}")
        return f"too slow: {len(messages)} rows took {took_s:.1f} s" if took_s > _MAX_BATCH_S else None
