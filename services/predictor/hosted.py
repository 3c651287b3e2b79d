"""Starts model hosts, and talks to them."""

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

import msgspec

from services.predictor.host import LENGTH, Reply, Request, Score
from shared.errors import Outage
from shared.privacy import without_digits

_HOST = Path(__file__).with_name("host.py")
_LARGEST_REPLY = 64 * 1024 * 1024  # bytes
_PIPE_BYTES = 1024 * 1024  # as much as Linux lets everybody have
_READ_BYTES = 65536
_KEPT_BYTES = 4096  # of what the model has printed
_LOOK_S = 0.5
_GRACE_S = 3.0  # after SIGTERM
# A model sees only these environment variables, because the predictor's own may contain passwords.
_KNOWN = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
_ADDED = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONDONTWRITEBYTECODE": "1"}

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder[Reply](Reply).decode


class HostFailed(Exception):
    """The host has ended, or did not answer in time. It cannot be used any more. The message gives the cause."""


class Allowance(NamedTuple):
    """What a model may use."""

    load_s: float = 120.0
    batch_s: float = 10.0  # for up to a thousand rows
    memory_mb: int = 2048


def launch(python: str) -> "subprocess.Popen[bytes]":
    """Start a host. Raises OSError."""
    known = {name: os.environ[name] for name in _KNOWN if name in os.environ}
    return subprocess.Popen(
        [python, "-I", str(_HOST)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=known | _ADDED,
        start_new_session=True,  # so that it can be ended with whatever the model has started
    )


class Host:
    """A process that runs services/predictor/host.py. Only one thread may talk to it; any thread may end it."""

    def __init__(self, python: str = sys.executable) -> None:
        """Start the host with this interpreter. Raises HostFailed if that is impossible."""
        self.shutdown = Event()  # set after SIGTERM
        try:
            self._process = launch(python)
        except OSError as error:
            raise HostFailed(f"its process cannot be started with {python}: {str(error.strerror).lower()}") from None
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._in, self._out, self._err = (pipe.fileno() for pipe in pipes if pipe)
        for number in (self._in, self._out, self._err):
            os.set_blocking(number, False)
        for number in (self._in, self._out):
            with suppress(OSError):  # a smaller pipe is slower
                fcntl.fcntl(number, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._printed = b""
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._deadline = 0.0  # monotonic time
        self._seconds = 0.0
        self._grace_s = 0.0
        self.busy = False  # whether a request has not been answered

    def ask(self, request: Request) -> Reply:
        """Send the request and wait for the reply. Raises HostFailed, and Outage soon after SIGTERM."""
        self.send(request)
        while not (reply := self.reply()):
            pass
        return reply

    def send(self, request: Request) -> None:
        """Begin to send a request. `reply` must be called until it returns the reply.

        If the reply to the request before has not come yet, waits for it as `reply` does, and drops it.
        """
        while self.busy:
            self.reply()
        body = _encode(request)
        self._unsent = memoryview(LENGTH.pack(len(body)) + body)
        self._received.clear()
        self._seconds = request.seconds
        self._grace_s = _GRACE_S if isinstance(request, Score) else 0.0
        self._deadline = time.monotonic() + request.seconds
        self.busy = True

    def reply(self, within_s: float | None = None) -> Reply | None:
        """Wait for the reply, for `within_s` seconds at most. Returns None if it has not come by then.

        Raises HostFailed if the host has ended, or if it takes longer than the request allows. Raises Outage soon after
        SIGTERM.
        """
        now = time.monotonic()
        until = self._deadline if within_s is None else min(self._deadline, now + within_s)
        ends = None
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        poll.register(self._err, select.POLLIN)
        if self._unsent:
            poll.register(self._in, select.POLLOUT)
        while True:
            ready = dict(poll.poll(1000 * max(0.0, min(until - now, _LOOK_S))))
            if ready.get(self._err) and not self._keep_printed():
                poll.unregister(self._err)
            if self._in in ready and not self._write():
                poll.unregister(self._in)
            if self._out in ready and (body := self._read()) is not None:
                self.busy = False
                return _reply(body)
            now = time.monotonic()
            if now >= self._deadline:
                self.end()
                raise HostFailed(f"it did not answer within {self._seconds:g} s")
            if now >= until:
                return None
            if self.shutdown.is_set():
                ends = ends or now + self._grace_s
                if now >= ends:
                    self.end()
                    raise Outage("the model did not answer before the end")

    @property
    def overdue(self) -> bool:
        """Whether a request has not been answered in time. Any thread may ask."""
        return self.busy and time.monotonic() > self._deadline

    def end(self) -> None:
        """End the process, and whatever it has started, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.busy = False

    def _write(self) -> bool:
        """Write what fits into the pipe. Returns whether something is left."""
        try:
            self._unsent = self._unsent[os.write(self._in, self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            return False  # the other pipe reports the end
        return bool(self._unsent)

    def _read(self) -> bytes | None:
        """Read what there is. Returns the reply once it is complete."""
        part = os.read(self._out, _PIPE_BYTES)
        if not part:
            raise HostFailed(self._cause())
        self._received += part
        if len(self._received) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._received)
        if length > _LARGEST_REPLY:
            self.end()
            raise HostFailed("its process writes something that is no reply")
        end = LENGTH.size + length
        return bytes(self._received[LENGTH.size : end]) if len(self._received) >= end else None

    def _keep_printed(self) -> bool:
        """Keep the end of what the model prints. Returns whether there may be more."""
        try:
            part = os.read(self._err, _READ_BYTES)
        except BlockingIOError:
            return True
        self._printed = (self._printed + part)[-_KEPT_BYTES:]
        return bool(part)

    def _cause(self) -> str:
        """Return why the process has ended."""
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:  # the model has closed the pipe
            self.end()
            return "its process closed the pipe to the predictor"
        self.end()
        while self._keep_printed():
            pass
        last = self._printed.decode(errors="replace").strip().rpartition("\n")[2]
        ended = (
            f"its process ended with exit code {code}" if code >= 0 else f"its process was ended by {_signal(-code)}"
        )
        return f"{ended} ({without_digits(last)})" if last else ended


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name}, as happens when memory runs out" if name == "SIGKILL" else name


def _reply(body: bytes) -> Reply:
    try:
        reply: Reply = _decode(body)
    except msgspec.MsgspecError as error:
        raise HostFailed(f"its process writes something that is no reply: {error}") from None
    return reply
