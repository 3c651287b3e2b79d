"""How a service ends."""

import subprocess
import sys

import pytest

_SERVICE = """
from threading import Event, Thread
from shared import service
from shared.errors import SettingsError
from shared.settings import ServiceSettings

def serve(settings, shutdown):
    Thread(target=Event().wait).start()
    {ends}

service.run("probe", ServiceSettings, serve)
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [("pass", 0, "event='stopped'"), ('raise SettingsError("TOPIC_1: no such")', 2, "probe: TOPIC_1: no such")],
)
def test_a_thread_that_never_returns_does_not_keep_the_service_from_ending(
    ends: str, code: int, said: str, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SERVICE.format(ends=ends)],
        env=environment | {"METRICS_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )

    assert done.returncode == code
    assert said in done.stdout.splitlines()[-1]
