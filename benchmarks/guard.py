"""The guard measures a few performance ratios in about a minute, and compares them with the ratios in guard.json."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from benchmarks import predictor, sink
from benchmarks.load import Suite
from benchmarks.measure import Section
from benchmarks.report import show

GUARD: dict[str, Suite] = {
    "ceiling": lambda bench, rounds: predictor.against_its_ceiling(
        bench, rounds=rounds, rows=60_000, guarantee="exactly_once"
    ),
    "sink": lambda bench, rounds: sink.against_postgres(bench, rounds=rounds, rows=60_000),
    "compiled": lambda bench, rounds: predictor.compiled_scoring(bench, rounds=rounds),
}
_COMMITTED = Path(__file__).with_name("guard.json")
_STILL_GOOD = 0.7  # share of each ratio in guard.json that must be reached
_TRIES = 3


def guarded(suites: Iterable[Callable[[], Section]], console: Console) -> int:
    """Run the suites, and return the exit code: 0 if each suite passes in at least one of three tries, otherwise 1.

    A suite passes if each of its ratios is at least 70 % of the value in guard.json, and no upper limit is exceeded. A
    real regression makes all three tries fail. A busy machine is unlikely to make all three tries fail.
    """
    least = {what: _STILL_GOOD * ratio for what, ratio in json.loads(_COMMITTED.read_text()).items()}
    measured: set[str] = set()

    def holds(suite: Callable[[], Section]) -> bool:
        section = suite()
        show(section, console)
        good = all(bar.reached for bar in section.bars if bar.at_most)
        for bar in section.bars:
            if bar.what in least:
                measured.add(bar.what)
                fallen = bar.seen.median < least[bar.what]
                good = good and not fallen
                verdict = "[red]has fallen" if fallen else "[green]holds"
                console.print(f"{bar.what}: {bar.seen.median:.2f} (>= {least[bar.what]:.2f}) {verdict}")
        return good

    held = [any(holds(suite) for _ in range(_TRIES)) for suite in suites]
    for what in least.keys() - measured:
        console.print(f"{what}: [red]not measured")
    return int(not all(held) or measured != least.keys())
