"""Starts services as forks of a process that has imported their libraries: to import them anew takes seconds each time.

The services' own code is imported by each service, as after any start.
"""

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import coverage
import hosts

from sandbox.processes import Child, die_with_parent

_LIBRARIES = [
    *("alembic.command", "confluent_kafka.admin", "jinja2", "mlflow.artifacts", "mlflow.pyfunc", "mlflow.tracking"),
    *("prometheus_client", "pydantic_settings", "requests", "sklearn.ensemble", "sklearn.linear_model", "sqlalchemy"),
    *("structlog", "psycopg2"),
]
_context = get_context("forkserver")
_context.set_forkserver_preload(_LIBRARIES)


class Forked:
    """What `Process` uses of subprocess.Popen, for `python -m MODULE`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[bytes],
        env: Mapping[str, str],
        cwd: Path,
        prepare: Callable[[], None] | None = None,
        **_: object,
    ) -> None:
        """`prepare` is called in the fork before the service's code is imported, for example to break some of it."""
        module = command[-1]
        ready, in_child = _context.Pipe(duplex=False)
        arguments = (module, Path(stdout.name), dict(env), cwd, in_child, prepare)
        self._process = _context.Process(target=_run, args=arguments, daemon=True)
        with unmeasured():  # the server of the forks, which the first of them starts
            self._process.start()
        in_child.close()
        ready.recv()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send it a signal if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, sig)


def launch(command: Sequence[str], **given: Any) -> Child:
    """Start a service as a fork, and everything else as always."""
    return Forked(command, **given) if command[-1].startswith("services.") else subprocess.Popen(command, **given)


def host_server() -> hosts.Server:
    """A server of model hosts, for a process that has many threads itself."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with unmeasured():
        _context.Process(target=hosts.serve, args=[theirs], daemon=True).start()
    theirs.close()
    return hosts.Server(ours)


@contextmanager
def unmeasured() -> Iterator[None]:
    """No coverage of the interpreters that are started meanwhile."""
    measured = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("COVERAGE_")}
    try:
        yield
    finally:
        os.environ.update(measured)


def _run(
    module: str,
    log: Path,
    environment: dict[str, str],
    directory: Path,
    ready: Connection,
    prepare: Callable[[], None] | None,
) -> None:
    """What the fork does: be as if it had been started by `subprocess`, and run the module."""
    os.setsid()
    die_with_parent()
    with log.open("ab", buffering=0) as output:
        for number in 1, 2:
            os.dup2(output.fileno(), number)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]  # as PYTHONUNBUFFERED does
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if module == "services.predictor":
        hosts.use(hosts.server())
    coverage.process_startup()
    sys.argv = [module]
    ready.send(None)
    ready.close()
    if prepare:
        prepare()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
