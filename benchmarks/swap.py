"""Measure the cost of moving the champion's alias while the predictor is working."""

from collections import defaultdict
from contextlib import suppress
from functools import partial
from itertools import pairwise
from threading import Event, Thread

from mlflow.tracking import MlflowClient

from benchmarks.latency import stream, wait_until
from benchmarks.load import Bench, together_mb
from benchmarks.measure import Bar, Figure, Section, percentiles, side_by_side
from benchmarks.predictor import BOOSTING, another_version
from rehearsal.ledger import TopicReader
from sandbox.processes import Process
from shared.kafka import topics
from shared.kafka.messages import headers
from shared.kafka.offsets import read_to_end
from shared.provenance import from_headers

_REFRESH_S = 0.5
_WATCH_S = 0.5
_EVERY_S = 8.0  # enough to load a version while the one before scores


def swaps(bench: Bench, *, rounds: int, rate: int, moves: int) -> Section:
    """Measure the latency while the alias stays on one version, and while the alias moves between three versions."""
    versions = [
        "1",
        *(another_version(bench, seed=seed) for seed in (2, 3)),
    ]  # never the one that was there just before
    found = side_by_side(
        {
            "the alias stays": partial(_streamed, bench, rate, moves, ["1"]),
            f"the alias moves {moves} times": partial(_streamed, bench, rate, moves, versions),
        },
        rounds=rounds,
    )
    stays, moved = found.values()
    added = Figure(tuple(high - low for high, low in zip(moved["p99"].values, stays["p99"].values, strict=True)))
    wrong = [Figure(tuple(sum(each) for each in zip(*(moved[name].values for name in _WRONG), strict=True)))]
    return Section(
        "The champion's alias moves",
        f"Conditions: {rate:,} tx/s for {(moves + 2) * _EVERY_S:.0f} s, Apache Kafka, exactly-once delivery. "
        "The times are in milliseconds, from `topic_1` to `topic_2`",
        ("p50", "p99", "p99.9", "MB", "swaps", *_WRONG),
        found,
        [
            Bar("added to p99 while the alias moves, ms", added, 100, at_most=True),
            Bar("swaps seen", moved["swaps"], moves),
            Bar("rows lost or doubled, batches of two versions", wrong[0], 0, at_most=True),
            Bar("peak memory, one version, MB", stays["MB"], 450, at_most=True),
            Bar("peak memory, while versions are swapped, MB", moved["MB"], 750, at_most=True),
        ],
    )


_WRONG = ("lost", "doubled", "mixed")


def _streamed(bench: Bench, rate: int, moves: int, versions: list[str]) -> dict[str, float]:
    topic_1, topic_2 = bench.topics("in", "out")
    own = {"TOPIC_1": topic_1, "TOPIC_2": topic_2, "PREDICTOR_GROUP": topic_2}
    process = bench.service("predictor", own | {"MODEL_REFRESH_SECONDS": str(_REFRESH_S)})
    starts = topics.ends(bench.properties, [topic_1, topic_2])
    reader = TopicReader(bench.properties, topic_1=topic_1)
    reader.start(starts)
    over = Event()
    megabytes: list[float] = []
    beside = [
        Thread(target=_move, args=[bench, versions, moves, over]),
        Thread(target=_watch, args=[process, megabytes, over]),
    ]
    rows = int(rate * (moves + 2) * _EVERY_S)  # the last version, too, has time to load
    try:
        process.start()
        for each in beside:
            each.start()
        stream(bench, topic_1, rate, rows)
        wait_until(lambda: len(reader.topics.visible_ms) >= rows, "predictions", [process])
    finally:
        over.set()
        for each in beside:
            each.join()
        process.stop()
        seen = reader.stop()
        MlflowClient(bench.stack.registry.uri).set_registered_model_alias(BOOSTING, "champion", "1")
    by_batch: defaultdict[int | None, set[str | None]] = defaultdict(set)
    for message in read_to_end(bench.properties, [each for each in starts if each.topic == topic_2], group="swaps"):
        about = from_headers(headers(message))
        by_batch[about.predicted_at_ms].add(about.model_version)
    in_order = [found for _, found in sorted(by_batch.items(), key=lambda batch: batch[0] or 0)]
    took = [seen.visible_ms[identity] - at for identity, at in seen.produced_ms.items() if identity in seen.visible_ms]
    return {
        **percentiles(took),
        "MB": max(megabytes),
        "swaps": sum(before != after for before, after in pairwise(in_order)),
        "lost": rows - len(seen.visible_ms),
        "doubled": len(seen.repeated),
        "mixed": sum(len(found) > 1 for found in by_batch.values()),
    }


def _watch(process: Process, megabytes: list[float], over: Event) -> None:
    while not over.wait(_WATCH_S):
        with suppress(OSError):  # a host that has just been ended
            megabytes.append(together_mb(process))


def _move(bench: Bench, versions: list[str], moves: int, over: Event) -> None:
    client = MlflowClient(bench.stack.registry.uri)
    for turn in range(1, moves + 1):
        if over.wait(_EVERY_S):
            return
        client.set_registered_model_alias(BOOSTING, "champion", versions[turn % len(versions)])
