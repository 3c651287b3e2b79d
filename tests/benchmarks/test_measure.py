"""The figures of the benchmarks: what is counted, in which order, and when the guard fails."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import guard
from benchmarks.measure import Bar, Figure, Section, percentiles, side_by_side


def test_variants_take_turns_and_the_first_round_is_not_counted() -> None:
    ran: list[str] = []

    def run(name: str) -> dict[str, float]:
        ran.append(name)
        return {"rows/s": float(len(ran))}

    found = side_by_side({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=3)

    assert "".join(ran) in {"abbaabba", "baabbaab"}
    assert sorted(found["a"]["rows/s"].values + found["b"]["rows/s"].values) == [3, 4, 5, 6, 7, 8]


def test_a_ratio_is_taken_within_each_round() -> None:
    slow_minute = Figure((10.0, 5.0, 10.0)).over(Figure((20.0, 10.0, 40.0)))

    assert slow_minute.values == (0.5, 0.5, 0.25)
    assert slow_minute.median == 0.5


def test_percentiles_are_those_of_the_values() -> None:
    assert percentiles([float(number) for number in range(1001)]) == {"p50": 500, "p99": 990, "p99.9": 999}


@pytest.mark.parametrize(
    ("seen", "code"), [([0.71], 0), ([0.69, 0.69, 0.69], 1), ([0.69, 0.71], 0)], ids=["well", "fallen", "busy minute"]
)
def test_the_guard_fails_when_a_ratio_has_fallen_by_a_third_and_falls_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[float], code: int
) -> None:
    (tmp_path / "guard.json").write_text(json.dumps({"this / that": 1.0}))
    monkeypatch.setattr(guard, "_COMMITTED", tmp_path / "guard.json")
    other = Bar("another", Figure((0.0,)), 9)

    def measure() -> Section:
        return section(Bar("this / that", Figure((seen.pop(0),)), 0.5), other)

    assert guard.guarded([measure], Console(file=io.StringIO())) == code
    assert not seen


def test_the_guard_fails_when_a_limit_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guard.json").write_text("{}")
    monkeypatch.setattr(guard, "_COMMITTED", tmp_path / "guard.json")
    wrong = Bar("labels that differ", Figure((1.0,)), 0, at_most=True)

    assert guard.guarded([lambda: section(wrong)], Console(file=io.StringIO())) == 1


def test_the_guard_fails_when_a_ratio_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guard.json").write_text(json.dumps({"this / that": 1.0}))
    monkeypatch.setattr(guard, "_COMMITTED", tmp_path / "guard.json")

    renamed = Bar("renamed / that", Figure((1.0,)), 0.5)

    assert guard.guarded([lambda: section(renamed)], Console(file=io.StringIO())) == 1


def section(*bars: Bar) -> Section:
    return Section("Measured", "somehow", (), {}, bars)
