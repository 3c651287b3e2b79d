"""Measure what versions cost that crash, hang, leak or answer nonsense after they have become champion."""

import ctypes
import os
import sys
import time
from collections import Counter
from functools import partial
from threading import Event, Thread
from typing import Any

import cloudpickle
import mlflow
import numpy as np
import pandas as pd
from mlflow.models import infer_signature
from mlflow.tracking import MlflowClient

from benchmarks.latency import stream, wait_until
from benchmarks.load import Bench, backlog
from benchmarks.measure import Bar, Figure, Section, percentiles, side_by_side
from rehearsal.ledger import TopicReader
from services.predictor.model import recorded
from shared.kafka import topics
from shared.kafka.messages import headers
from shared.kafka.offsets import read_to_end
from shared.provenance import from_headers

NAME = "misbehaving"
_ONE_IN = 1000  # rows
_EVERY_S = 8.0
_WARM_UP_S = 3.0


def leak() -> None:
    """Use ten gigabytes."""
    np.ones(10 * 1024**3, dtype=np.int8)


def end() -> None:
    """End as programs do."""
    raise SystemExit(1)


_DEEDS = {
    "exits": lambda: os._exit(1),
    "crashes": lambda: ctypes.string_at(0),
    "hangs": lambda: time.sleep(600),
    "leaks": leak,
    "raises SystemExit": end,
    "answers NaN": None,
}


class Misbehaving:
    """A model that does something to one row in a thousand, and calls the others legitimate."""

    def __init__(self, deed: str | None, number: int) -> None:
        self.deed = deed
        self.number = number

    def predict(self, rows: pd.DataFrame) -> Any:
        """Return probabilities (n,)."""
        chances = np.full(len(rows), 0.1)
        if self.deed:
            chosen = _number(rows["amt"]) == self.number
            deed = _DEEDS[self.deed]
            if deed is None:
                chances[chosen] = np.nan
            elif chosen.any():
                deed()
        return chances


def _number(amounts: Any) -> Any:
    return np.round(np.asarray(amounts) * 100).astype(int) % _ONE_IN


def misbehaving(bench: Bench, *, rounds: int, rate: int) -> Section:
    """Measure the latency while the alias stays, and while it moves to versions that misbehave, one after the other."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    known = set(_number([each.amt for each in recorded()]).tolist())
    seen = Counter(_number([each.amt for each in backlog(20_000)]).tolist())
    number = next(each for each, _ in seen.most_common() if each not in known)
    good = _log(bench, Misbehaving(None, number))
    bad = [_log(bench, Misbehaving(deed, number)) for deed in _DEEDS]
    found = side_by_side(
        {
            "the alias stays": partial(_streamed, bench, rate, good, []),
            f"the alias moves to {len(bad)} versions that misbehave": partial(_streamed, bench, rate, good, bad),
        },
        rounds=rounds,
    )
    stays, moved = found.values()
    wrong = Figure(tuple(map(sum, zip(*(moved[name].values for name in ("lost", "doubled", "dead")), strict=True))))
    return Section(
        "Versions that misbehave",
        f"Conditions: {rate:,} tx/s, Apache Kafka, exactly-once delivery. Every {_EVERY_S:.0f} s, the alias moves to a "
        f"version that does something to about one row in {_ONE_IN:,}: {', '.join(_DEEDS)}. The version before then "
        "scores every row. The times are in milliseconds, from `topic_1` to `topic_2`",
        ("p50", "p99", "p99.9", "took over", "lost", "doubled", "dead"),
        found,
        [
            Bar("p99, versions that misbehave / the alias stays", moved["p99"].over(stays["p99"]), 1.25, at_most=True),
            Bar("versions that took over, and gave way", moved["took over"], len(bad)),
            Bar("rows lost, doubled or set aside", wrong, 0, at_most=True),
        ],
    )


def _log(bench: Bench, model: Misbehaving) -> str:
    mlflow.set_tracking_uri(bench.stack.registry.uri)
    mlflow.set_experiment(NAME)
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(
            model,
            name="model",
            signature=infer_signature(pd.DataFrame({"amt": [1.0]})),
            registered_model_name=NAME,
            pip_requirements=[],
            metadata={"threshold": 0.5},
            serialization_format="cloudpickle",
        )
    return str(logged.registered_model_version)


def _streamed(bench: Bench, rate: int, good: str, bad: list[str]) -> dict[str, float]:
    topic_1, topic_2 = bench.topics("in", "out")
    client = MlflowClient(bench.stack.registry.uri)
    client.set_registered_model_alias(NAME, "champion", good)
    own = {"TOPIC_1": topic_1, "TOPIC_2": topic_2, "PREDICTOR_GROUP": topic_2, "MODEL_NAME": NAME}
    process = bench.service("predictor", own | {"MODEL_REFRESH_SECONDS": "0.5", "MODEL_BATCH_SECONDS": "3"})
    topics.create(bench.properties, [f"{topic_1}.dlq"], partitions=1)
    starts = topics.ends(bench.properties, [topic_1, topic_2])
    reader = TopicReader(bench.properties, topic_1=topic_1)
    reader.start(starts)
    over = Event()
    rows = int(rate * (_WARM_UP_S + _EVERY_S * len(_DEEDS)))
    mover = Thread(target=_move, args=[client, bad, over])
    try:
        process.start()
        mover.start()
        since_ms = time.time() * 1000 + 1000 * _WARM_UP_S
        stream(bench, topic_1, rate, rows)
        wait_until(lambda: len(reader.topics.visible_ms) >= rows, "predictions", [process])
    finally:
        over.set()
        mover.join()
        process.stop()
        seen = reader.stop()
    took = [
        seen.visible_ms[identity] - at
        for identity, at in seen.produced_ms.items()
        if identity in seen.visible_ms and at >= since_ms
    ]
    versions = Counter(
        from_headers(headers(message)).model_version
        for message in read_to_end(bench.properties, [each for each in starts if each.topic == topic_2], group="bad")
    )
    return {
        **percentiles(took),
        "took over": sum(version in versions for version in bad),
        "lost": rows - len(seen.visible_ms),
        "doubled": len(seen.repeated),
        "dead": sum(each.offset for each in topics.ends(bench.properties, [f"{topic_1}.dlq"])),
    }


def _move(client: MlflowClient, versions: list[str], over: Event) -> None:
    over.wait(_WARM_UP_S)
    for version in versions:
        client.set_registered_model_alias(NAME, "champion", version)
        if over.wait(_EVERY_S):
            return
