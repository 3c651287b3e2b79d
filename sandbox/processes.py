"""Child processes that can be waited for, stopped, killed and restarted, and that end with their parent."""

import ctypes
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_held: list[socket.socket] = []


class StandInError(Exception):
    """A part of the local stack did not start, or has failed.

    The message is one line that names the part and the reason.
    """


class Child(Protocol):
    """The part of `subprocess.Popen` that `Process` uses."""

    pid: int

    @property
    def returncode(self) -> int | Any: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class Process:
    """One child process with its output in a log file.

    Ctrl+C in the terminal reaches only the parent, not the child. On Linux, the child is killed when the thread that
    started it ends. Therefore, start the child from a thread that lives as long as the child should live.
    """

    launch: Callable[..., Child] = staticmethod(subprocess.Popen)  # takes the arguments of subprocess.Popen

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        account: pwd.struct_passwd | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        ready: Callable[[], bool] = lambda: True,
        ready_timeout_s: float = 90.0,
    ) -> None:
        self.name = name
        self._command = list(command)
        self._log = log
        self._env = None if env is None else dict(env)
        self._cwd = cwd
        self._account = account
        self._stop_signal = stop_signal
        self._ready = ready
        self._ready_timeout_s = ready_timeout_s
        self._child: Child | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """The child's process id, or None before the first start."""
        return self._child.pid if self._child else None

    @property
    def running(self) -> bool:
        """True from the child's start until its exit."""
        return self._child is not None and self._child.poll() is None

    @property
    def ready(self) -> bool:
        """True if the child is running and ready."""
        return self.running and self._ready()

    def spawn(self) -> None:
        """Start the child without waiting until it is ready."""
        if self.running:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            self._log_start = output.tell()
            self._child = self.launch(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                **as_account(self._account),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_ready(self) -> None:
        """Wait until the child is ready. Raises StandInError if the child ends first, or takes too long."""
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._ready():
            if not self.running:
                raise StandInError(f"{self.name} ended during its start: {self.last_line()}")
            if time.monotonic() > deadline:
                self.kill()
                raise StandInError(f"{self.name} was not ready after {self._ready_timeout_s:.0f} s: {self.last_line()}")
            time.sleep(_POLL_S)

    def start(self) -> Self:
        """Start the child and wait until it is ready. Raises StandInError."""
        self.spawn()
        self.wait_ready()
        return self

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait until the child ends by itself. Returns the exit code, or None if `timeout_s` passes first."""
        if self._child is None:
            return None
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, timeout_s: float = 15.0) -> int | None:
        """Stop the child, and kill it if it has not ended after `timeout_s` seconds.

        Returns the child's exit code, or None if the child was never started.
        """
        if self._child is None:
            return None
        if self.running:
            self._child.send_signal(self._stop_signal)
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._child.returncode

    def kill(self) -> None:
        """Kill the child and its own children (SIGKILL)."""
        if self._child and self.running:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def suspend(self) -> None:
        """Freeze the running child with all its threads (SIGSTOP). Its connections stay open."""
        if self._child:
            self._child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._child.pid, os.WSTOPPED)  # before it has stopped, a thread may still respond

    def resume(self) -> None:
        """Let the child continue after `suspend`."""
        if self._child:
            self._child.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def said(self, text: str) -> bool:
        """True if the child's output since its last start contains `text`."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return text.encode() in log.read()

    def last_line(self) -> str:
        """The last line of the child's output."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


def as_account(account: pwd.struct_passwd | None) -> dict[str, Any]:
    """Return the `subprocess.Popen` arguments that run a child as this account, without the current user's groups.

    Returns no arguments if `account` is None.
    """
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def free_port() -> int:
    """Return a free TCP port on 127.0.0.1.

    On Linux, the port stays reserved while this process lives. Only a server that explicitly binds to this port number
    can use the port.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    if sys.platform == "linux":
        _held.append(held)  # on other systems, even a server that asks for the number would be refused
    return int(held.getsockname()[1])


def port_open(port: int) -> bool:
    """True if something on 127.0.0.1 accepts connections on `port`."""
    with closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def die_with_parent() -> None:
    """On Linux, let the kernel kill this process when its parent ends."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
