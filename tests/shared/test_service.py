"""How a service ends."""

import json
import subprocess
import sys

import pytest

_SERVICE = """
from threading import Event, Thread
from shared import service
from shared.errors import SettingsError
from shared.settings import ServiceSettings

def serve(settings, shutdown):
    {does}

service.run("probe", ServiceSettings, serve)
"""
_HANGS = "Thread(target=Event().wait).start()"


def lines(does: str, environment: dict[str, str], *, exit_code: int) -> list[str]:
    """What such a service says before it ends with this code."""
    done = subprocess.run(
        [sys.executable, "-c", _SERVICE.format(does=does)],
        env=environment | {"METRICS_PORT": "0", "LOG_FORMAT": "json"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    assert done.returncode == exit_code, done.stdout
    return done.stdout.splitlines()


def test_a_thread_that_never_returns_does_not_keep_a_service_from_ending(environment: dict[str, str]) -> None:
    stopped = lines(_HANGS, environment, exit_code=0)
    refused = lines(f'{_HANGS}; raise SettingsError("TOPIC_1: no such")', environment, exit_code=2)

    assert json.loads(stopped[-1])["event"] == "stopped"
    assert refused[-1] == "probe: TOPIC_1: no such"


@pytest.mark.parametrize("thread", [False, True], ids=["itself", "thread"])
def test_an_error_that_nobody_foresaw_is_one_line_that_repeats_no_value(
    environment: dict[str, str], thread: bool
) -> None:
    raises = 'int("card 4539578763621487 of 1955-11-07")'
    does = f"t = Thread(target=lambda: {raises}); t.start(); t.join()" if thread else f"{_HANGS}; {raises}"

    *_, crashed = [json.loads(line) for line in lines(does, environment, exit_code=0 if thread else 1)][:2]

    assert (crashed["event"], crashed["level"]) == ("crashed", "critical")
    assert crashed["reason"].startswith("ValueError: invalid literal for int()")
    assert "line 8, in" in crashed["where"]
    assert "4539578763621487" not in str(crashed)
    assert "1955" not in str(crashed)
