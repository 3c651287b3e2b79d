"""What every service in the catalogue does, whatever it is for: it starts without its dependencies, and it stops."""

import pytest
import requests
from conftest import Rig, until

from sandbox.processes import free_port
from services.catalogue import BY_NAME

_STOP_S = 10.0  # what `docker stop` gives a container


def is_live(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/live", timeout=5).ok
    except requests.ConnectionError:
        return False


@pytest.mark.parametrize("name", BY_NAME)
def test_it_is_live_while_its_dependencies_are_away_and_exits_0_on_sigterm(rig: Rig, name: str) -> None:
    port = free_port()
    process = rig.start(name, ready=False, METRICS_PORT=str(port))
    until(lambda: is_live(port), what="/live")

    assert process.stop(_STOP_S) == 0


@pytest.mark.parametrize("name", BY_NAME)
def test_a_wrong_setting_is_one_line_that_names_it_and_exit_code_2(rig: Rig, name: str) -> None:
    process = rig.start(name, ready=False, STALL_SECONDS="soon")

    assert process.wait(60) == 2
    assert rig.log(name) == f"{name}: STALL_SECONDS: not a number\n"
