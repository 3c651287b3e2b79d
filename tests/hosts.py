"""Starts model hosts as forks of a process that has imported their libraries: to import them anew takes seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any

from sandbox.processes import die_with_parent
from services.predictor import hosted

genuine: Callable[[str], Any] = hosted.launch
_LONGEST = 4096
_RUNS = 1000  # no exit code


class Server:
    """The other end of a process that forks hosts."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = Lock()

    def ask(self, request: str, descriptors: tuple[int, ...] = ()) -> int:
        """Send a request, and return the number that is the answer."""
        with self._lock:
            socket.send_fds(self._connection, [request.encode()], descriptors)
            return int(self._connection.recv(_LONGEST))

    def launch(self, python: str) -> Any:
        """Start a host. What is to run with another interpreter is started as always."""
        return Fork(self) if python == sys.executable else genuine(python)


class Fork:
    """What `Host` uses of subprocess.Popen."""

    def __init__(self, server: Server) -> None:
        (own_in, self._in), (self._out, own_out), (self._err, own_err) = (os.pipe() for _ in range(3))
        self.pid = server.ask("start", (own_in, own_out, own_err))
        for descriptor in (own_in, own_out, own_err):
            os.close(descriptor)
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(number, mode, buffering=0)
            for number, mode in ((self._in, "wb"), (self._out, "rb"), (self._err, "rb"))
        )
        self._server = server

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus the signal that ended it. Raises subprocess.TimeoutExpired."""
        until = time.monotonic() + (60 if timeout is None else timeout)
        while (code := self._server.ask(f"exit code {self.pid}")) == _RUNS:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("the host", timeout or 0)
            time.sleep(0.005)
        return code


def use(server: Server) -> None:
    """From now on, hosts are forks."""
    hosted.launch = server.launch


def server() -> Server:
    """Fork a server from this process, which must have one thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        serve(theirs)
    theirs.close()
    return Server(ours)


def serve(connection: socket.socket) -> None:
    """Fork a host whenever one is asked for, until the other end is closed."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes: dict[int, int] = {}
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, _LONGEST, 3)
        if not request:
            os._exit(0)
        if request == b"start":
            pid = os.fork()
            if pid == 0:
                connection.close()
                _be_host(*descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            answer = pid
        else:
            pid = int(request.split()[-1])
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid, _RUNS)
        connection.send(str(answer).encode())


def _be_host(*descriptors: int) -> None:
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, _LONGEST)
    from services.predictor import host

    with suppress(BaseException):
        host.main()
    os._exit(1)
