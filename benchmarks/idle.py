"""Measure the CPU and memory usage of the services while there is nothing to process."""

import time
import uuid

from benchmarks.load import Bench, cpu_s, memory_bar, rss_mb
from benchmarks.measure import Bar, Figure, Section
from benchmarks.sink import database
from services.catalogue import CORE

_SETTLE_S = 15.0


def idle(bench: Bench, *, rounds: int, seconds: float) -> Section:
    """Measure all core services while they poll and wait."""
    topic_1, topic_2 = bench.topics("in", "out")
    found: dict[str, dict[str, list[float]]] = {name: {"% of a core": [], "MB": []} for name in CORE}
    with database(bench) as url:
        own = {"TOPIC_1": topic_1, "TOPIC_2": topic_2, "DATABASE_URL": url, "POLL_INTERVAL_SECONDS": "15"}
        own |= {group: f"idle-{uuid.uuid4().hex}" for group in ("PREDICTOR_GROUP", "ALERTER_GROUP", "DB_SINK_GROUP")}
        services = {name: bench.service(name, own) for name in CORE}
        try:
            for each in services.values():
                each.spawn()
            for each in services.values():
                each.wait_ready()
            time.sleep(_SETTLE_S)
            for _ in range(rounds):
                before = {name: cpu_s(each) for name, each in services.items()}
                time.sleep(seconds)
                for name, each in services.items():
                    found[name]["% of a core"].append(100 * (cpu_s(each) - before[name]) / seconds)
                    found[name]["MB"].append(rss_mb(each))
        finally:
            for each in services.values():
                each.stop()
    rows = {name: {quantity: Figure(tuple(values)) for quantity, values in row.items()} for name, row in found.items()}
    bars = [
        bar
        for name, row in rows.items()
        for bar in (
            Bar(f"{name}, % of a core", row["% of a core"], 1.0, at_most=True),
            memory_bar(name, row["MB"]),
        )
    ]
    settings = (
        f"Conditions: Apache Kafka, 6 partitions. Each round takes {seconds:.0f} s. "
        "The memory is the resident memory at the end of the round"
    )
    return Section("Idle", settings, ("% of a core", "MB"), rows, bars)
