"""What a probe, an operator and Prometheus see."""

import subprocess
import sys
from collections.abc import Iterator
from threading import Event

import pytest
import requests
from conftest import until
from structlog.testing import capture_logs

from sandbox.processes import free_port
from shared import health, metrics
from shared.errors import SettingsError
from shared.retry import OutageLog
from shared.settings import ServiceSettings

STALL_S = 1.0


@pytest.fixture(scope="module")
def port() -> int:
    """Where a service of this process answers."""
    chosen = free_port()
    health.serve("tests", ServiceSettings(metrics_port=chosen, stall_seconds=STALL_S))
    return chosen


@pytest.fixture
def loop() -> Iterator[str]:
    """The name of a loop that is forgotten after the test."""
    with capture_logs() as lines:
        yield "a loop"
        health.ended("a loop")
        until(lambda: (said := [line["event"] for line in lines]).count("stalled") == said.count("stalled_over"))


def ask(port: int, path: str) -> requests.Response:
    return requests.get(f"http://127.0.0.1:{port}{path}", timeout=5)


def test_a_loop_that_does_not_turn_is_named_and_again_live_when_it_does(port: int, loop: str) -> None:
    health.turned(loop)
    assert ask(port, "/live").status_code == 200

    until(lambda: ask(port, "/live").status_code == 503, timeout_s=20)
    stalled = ask(port, "/live").json()["stalled"]
    assert stalled[loop] >= STALL_S

    health.turned(loop)
    assert ask(port, "/live").json()["live"]


def test_a_call_that_hangs_is_logged_once_and_its_end_once(port: int) -> None:
    with capture_logs() as lines:
        with health.call("a call"):
            until(lambda: [line for line in lines if line["event"] == "stalled"], timeout_s=20)
            assert "a call" in ask(port, "/live").json()["stalled"]
        until(lambda: [line for line in lines if line["event"] == "stalled_over"], timeout_s=20)

    assert [line["event"] for line in lines if line.get("what") == "a call"] == ["stalled", "stalled_over"]
    assert ask(port, "/live").json() == {"live": True, "service": "tests", "stalled": {}}


def test_ready_says_what_it_waits_for(port: int) -> None:
    outage_log = OutageLog("the database")
    outages, seconds = metrics.OUTAGES._value.get(), metrics.OUTAGE_SECONDS._value.get()
    others = metrics.OUTAGES_UNDER_WAY._value.get()

    outage_log.failed("connection refused")
    during = ask(port, "/ready")
    outage_log.failed("connection refused")
    outage_log.over()
    outage_log.over()

    assert during.status_code == 503
    assert during.json()["waiting_for"]["the database"] == "connection refused"
    assert "the database" not in ask(port, "/ready").json()["waiting_for"]
    assert metrics.OUTAGES._value.get() == outages + 1
    assert metrics.OUTAGE_SECONDS._value.get() > seconds
    assert f"fraud_alarm_outages_under_way {others}" in ask(port, "/metrics").text


def test_a_service_is_not_ready_before_it_has_had_all_that_it_waits_for(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_was_ready", Event())
    monkeypatch.setattr(health, "_waiting_for", {})  # other tests of this process may have left something
    at_its_start = ask(port, "/ready")
    health.waits_for("the database", "connection refused")
    health.waits_for("the group", "not joined yet")
    health.has("the database")
    joining = ask(port, "/ready")
    health.has("the group")
    at_work = ask(port, "/ready")
    health.waits_for("the database", "connection refused")
    in_an_outage = ask(port, "/ready")
    health.has("the database")

    answers = [at_its_start, joining, at_work, in_an_outage]
    assert [answer.status_code for answer in answers] == [503, 503, 200, 503]
    assert [answer.json()["was_ready"] for answer in answers] == [False, False, True, True]
    assert at_its_start.json()["waiting_for"]


@pytest.mark.parametrize("password", ["secret-word", "sec/ret-word", "sec?ret-word", "sec@ret-word"])
def test_ready_gives_no_login_away(port: int, password: str) -> None:
    outage_log = OutageLog("the registry")

    outage_log.failed(f"API request to http://operator:{password}@127.0.0.1:9/api failed for 4539578763621486")
    reason = ask(port, "/ready").json()["waiting_for"]["the registry"]
    outage_log.over()

    assert reason == "API request to http://127.0.0.1:9/api failed for **** 1486"


def test_a_port_that_is_taken_is_named(port: int) -> None:
    with pytest.raises(SettingsError, match=f"METRICS_PORT: cannot listen on 127.0.0.1:{port}"):
        health.serve("tests", ServiceSettings(metrics_port=port))


def test_other_paths_are_not_there(port: int) -> None:
    assert ask(port, "/").status_code == 404


def test_a_containers_probe_distinguishes_dead_from_alive(port: int, loop: str) -> None:
    def probe(at: int, *what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shared.probe", *what]
        return subprocess.run(command, env={"METRICS_PORT": str(at)}, capture_output=True, text=True, check=False)

    alive = probe(port)
    health.turned(loop)
    until(lambda: ask(port, "/live").status_code == 503, timeout_s=20)
    stalled = probe(port)

    assert (alive.returncode, stalled.returncode, probe(free_port()).returncode, probe(0).returncode) == (0, 1, 1, 0)
    assert loop in stalled.stdout
    assert '"waiting_for":' in probe(port, "ready").stdout
