"""Fault campaigns: a short one in which every promise holds, and how broken promises are reported."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from command_line import call
from conftest import Rig

from rehearsal.campaign import broken_promises
from rehearsal.faults import Run
from rehearsal.ledger import Ledger
from rehearsal.scenarios import SCENARIOS
from services.catalogue import CORE

pytestmark = pytest.mark.server

HELD = Ledger(
    served=10, fetched=10, skipped_repeats=0, topic_1=10, topic_2=10, predicted_frauds=2, emails=2, mailed_frauds=2,
    rows=10, repeated_mails=0, dead_letters=0, lost=0, duplicates=0, out_of_order=0, seconds=1.0, latency_ms={},
    suspects={}, mail_delays=[], dead_letter_places={},
)  # fmt: skip
PLACE = ("predictor", "topic_1", 0, 7)
ANSWER = ("producer", "payments API", 0, 3)
LETTER = ("topic_1.dlq", 0, 1)


def run(**changes: Any) -> Run:
    return cast(Run, SimpleNamespace(**({"kills": Counter(alerter=1), "rubbish": set()} | changes)))


@pytest.mark.parametrize(
    ("changes", "of_the_run", "log", "said"),
    [
        ({}, {}, "", ""),
        ({"suspects": {"missing on topic_2": [("abc", 5)]}}, {}, "", "missing on topic_2: 1: abc 5"),
        ({"mailed_frauds": 1}, {}, "", "1 of 2 frauds mailed"),
        ({"repeated_mails": 1}, {}, "", ""),
        ({"repeated_mails": 2}, {}, "", "2 mails repeated, but the alerter was killed 1 times"),
        (
            {"dead_letter_places": {PLACE: [LETTER]}},
            {},
            "",
            "valid records in the dead letters: 1: predictor topic_1 0 7",
        ),
        ({"dead_letter_places": {PLACE: [LETTER]}}, {"rubbish": {PLACE}}, "", ""),
        (
            {"dead_letter_places": {PLACE: [LETTER, LETTER]}},
            {"rubbish": {PLACE}},
            "",
            "records with several dead letters",
        ),
        ({}, {"rubbish": {PLACE}}, "", "rubbish without a dead letter: 1: predictor topic_1 0 7"),
        ({}, {"rubbish": {ANSWER}, "kills": Counter(producer=1)}, "", ""),
        ({}, {"rubbish": {ANSWER}}, "", "rubbish without a dead letter: 1: producer payments API 0 3"),
        ({}, {}, "Traceback (most recent call last)", "a service logged a traceback"),
        ({}, {}, "%4|MAXPOLL|", "a consumer was evicted"),
    ],
)
def test_a_promise_that_does_not_hold_is_named(
    changes: dict[str, Any], of_the_run: dict[str, Any], log: str, said: str
) -> None:
    broken = broken_promises(run(**of_the_run), dataclasses.replace(HELD, **changes), [log])

    assert len(broken) == bool(said)
    assert said in "".join(broken)


def test_a_service_that_does_not_stop_cleanly_is_named() -> None:
    broken = SCENARIOS["stop"].broken(run(bad_stops=["alerter"]), HELD)

    assert broken == ["alerter did not exit with 0 within 10 s of SIGTERM"]


def test_an_unknown_scenario_is_refused_by_name(tmp_path: Path) -> None:
    done = call("chaos", "--scenario", "kill-everybody", cwd=tmp_path, environment=os.environ)

    assert done.returncode == 2
    assert done.stderr.startswith(
        "fraudctl: --scenario: there is no scenario kill-everybody. Choose from: kill-predictor, "
    )


def campaign(trained_directory: Path, scenario: str, *, minutes: float) -> dict[str, Any]:
    """The report of a campaign of one scenario, in which every promise held."""
    directory = trained_directory.parent / "campaign"
    directory.mkdir()
    trained_directory.rename(directory / scenario)
    report = directory / "report.json"
    options = ["--scenario", scenario, "--minutes", str(minutes), "--seed", "5"]
    options += ["--report", str(report), "--work-dir", str(directory)]
    done = call("chaos", *options, cwd=directory, environment=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(report.read_text())
    return cast(dict[str, Any], result)


@pytest.mark.kafka
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("forking")
def test_services_stop_in_time_on_sigterm_and_lose_and_repeat_nothing(trained_directory: Path, apache_rig: Rig) -> None:
    del apache_rig  # requested so that the test is skipped where Apache Kafka cannot run

    stop = campaign(trained_directory, "stop", minutes=0.6)

    assert {f"{name} stopped" for name in CORE} <= stop["faults"].keys()
    assert stop["served"] > 3000
    assert stop["topic_2"] == stop["rows"] == stop["served"]
    assert stop["lost"] == stop["duplicates"] == stop["out_of_order"] == stop["repeated_mails"] == 0


@pytest.mark.kafka
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("forking")
def test_a_short_campaign_holds(trained_directory: Path, apache_rig: Rig) -> None:
    del apache_rig

    poison = campaign(trained_directory, "poison", minutes=0.3)

    assert poison["rubbish"] == poison["dead_letters"] > 5
    assert poison["faults"]["fixed and replayed"] == 1
    assert poison["served"] > 3000
    assert poison["lost"] == poison["duplicates"] == poison["out_of_order"] == 0
    assert poison["mailed_frauds"] == poison["predicted_frauds"] > 20


@pytest.mark.kafka
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("forking")
def test_hostile_input_stops_nothing_and_costs_nothing(trained_directory: Path, apache_rig: Rig) -> None:
    del apache_rig

    hostile = campaign(trained_directory, "hostile", minutes=0.4)

    assert hostile["rubbish"] == hostile["dead_letters"] > 50
    assert hostile["faults"]["hostile records"] > 50
    assert hostile["faults"]["answers or rows refused"] > 0  # few, if the machine is slow
    assert hostile["lost"] == hostile["duplicates"] == hostile["out_of_order"] == hostile["repeated_mails"] == 0
    assert hostile["mailed_frauds"] == hostile["predicted_frauds"] > 20
