"""The local stack's parts: they say why they do not start, keep what they must, and never outlive who started them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import until

from sandbox.postgres import Postgres
from sandbox.processes import Process, StandInError, python

PARENT = """
import sys, time
from pathlib import Path
from sandbox.processes import Process
child = Process("child", [sys.executable, "-c", "import time; time.sleep(60)"], log=Path(sys.argv[1]))
print(child.start().pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent_however_that_ends(tmp_path: Path, end: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)

    parent.send_signal(end)
    parent.communicate()

    until(lambda: not alive(child), timeout_s=5)


@pytest.mark.parametrize(
    ("ready", "reason"), [(lambda: False, "part ended at its start: no such port"), (lambda: True, None)]
)
def test_what_ends_at_its_start_tells_its_last_words(
    tmp_path: Path, ready: Callable[[], bool], reason: str | None
) -> None:
    part = Process("part", [sys.executable, "-c", "exit('no such port')"], log=tmp_path / "log", ready=ready)
    if reason is None:
        assert part.start().wait(10) == 1
        return
    with pytest.raises(StandInError, match=reason):
        part.start()


def test_what_never_gets_ready_is_ended(tmp_path: Path) -> None:
    part = Process(
        "part",
        [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)"],
        log=tmp_path / "log",
        ready=lambda: False,
        ready_timeout_s=1,
    )
    with pytest.raises(StandInError, match="part was not ready in 1 s"):
        part.start()
    assert not part.running


def test_a_module_that_is_not_there_is_told(tmp_path: Path) -> None:
    part = Process("part", python("sandbox.nowhere"), log=tmp_path / "log", ready=lambda: False)
    with pytest.raises(StandInError, match=r"No module named sandbox\.nowhere"):
        part.start()


def test_postgresql_keeps_its_rows_over_stop_and_kill(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with Postgres(tmp_path / "database") as database:

        def run(statement: str) -> list[tuple[object, ...]]:
            engine = sa.create_engine(database.url, poolclass=sa.NullPool)
            with engine.begin() as connection:
                found = connection.execute(sa.text(statement))
                return [tuple(row) for row in found] if found.returns_rows else []

        run("CREATE TABLE kept (number int)")
        run("INSERT INTO kept VALUES (1)")
        database.stop()
        database.start()
        run("INSERT INTO kept VALUES (2)")
        database.kill()
        database.start()

        assert run("SELECT number FROM kept ORDER BY number") == [(1,), (2,)]
        assert str(run("SHOW server_version")[0][0]).startswith("18")
    assert database.pid is not None
    assert not alive(database.pid)
    assert os.getpid() != database.pid
