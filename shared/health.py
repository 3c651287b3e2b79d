"""Serves /live (whether a loop or call has stalled), /ready (what the service waits for) and /metrics."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import msgspec
import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from shared import metrics
from shared.errors import SettingsError
from shared.privacy import without_cards, without_credentials
from shared.settings import ServiceSettings

log = structlog.get_logger()

_CLIENT_TIMEOUT_S = 10.0
_WATCH_S = 1.0

# Like the metrics, these variables are shared by the whole process. Several threads write here, each under its own
# names.
_turns: dict[str, float] = {}  # monotonic time at which a loop last made progress, or a call began
_waiting_for: dict[str, str] = {}
_was_ready = Event()


def turned(loop: str) -> None:
    """Report that the loop has made progress. If this is not reported again soon, the loop counts as stalled."""
    _turns[loop] = time.monotonic()


def ended(loop: str) -> None:
    """Report that the loop has ended, so that it does not count as stalled."""
    _turns.pop(loop, None)


@contextmanager
def call(name: str) -> Iterator[None]:
    """Watch the call in the `with` block. If the call does not return soon, it counts as stalled."""
    turned(name)
    try:
        yield
    finally:
        ended(name)


def slow(longer_than_s: float = 0.0) -> dict[str, float]:
    """Return how many seconds ago each loop last made progress, and each running call began, by name.

    Loops and calls with at most `longer_than_s` seconds are left out.
    """
    now = time.monotonic()
    return {name: now - at for name, at in list(_turns.items()) if now - at > longer_than_s}


def waits_for(what: str, reason: str) -> None:
    """Mark the service as not ready until `has(what)` is called.

    The reason is shown on /ready, which requires no login. Credentials and card numbers are therefore removed from
    the reason.
    """
    _waiting_for[what] = without_cards(without_credentials(reason))


def has(what: str) -> None:
    """Clear what `waits_for(what)` reported. The service is ready once it waits for nothing."""
    _waiting_for.pop(what, None)
    if not _waiting_for:
        _was_ready.set()


def serve(service: str, settings: ServiceSettings) -> None:
    """Serve the endpoints on METRICS_PORT until the process ends. Raises SettingsError if the port cannot be used."""
    stall_s = settings.stall_seconds
    metrics.LOOP_AGE.set_function(lambda: max(slow().values(), default=0.0))
    Thread(target=_watch, args=[stall_s], daemon=True, name="watch").start()
    if settings.metrics_port == 0:
        return

    class Answers(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest())
            elif self.path == "/live":
                stalled = {name: round(seconds, 1) for name, seconds in slow(stall_s).items()}
                self._report(not stalled, {"live": not stalled, "service": service, "stalled": stalled})
            elif self.path == "/ready":
                was_ready = _was_ready.is_set()
                reasons = dict(_waiting_for) if _waiting_for or was_ready else {"start": "the service has just started"}
                answer = {"ready": not reasons, "service": service, "waiting_for": reasons, "was_ready": was_ready}
                self._report(not reasons, answer)
            else:
                self._answer(404, "text/plain", b"not found: use /live, /ready or /metrics\n")

        def _report(self, good: bool, answer: dict[str, object]) -> None:
            self._answer(200 if good else 503, "application/json", msgspec.json.encode(answer) + b"\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Do not log probes."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Do not log that a client disconnected before the response."""

    try:
        server = Server((settings.metrics_host, settings.metrics_port), Answers)
    except (OSError, OverflowError) as error:
        address = f"{settings.metrics_host}:{settings.metrics_port}"
        raise SettingsError(f"METRICS_PORT: cannot listen on {address}: {getattr(error, 'strerror', error)}") from None
    Thread(target=server.serve_forever, daemon=True, name="health").start()


def _watch(stall_s: float) -> None:
    """Log when a loop or call stalls, and when a stalled loop or call continues."""
    said: set[str] = set()
    while True:
        stalled = slow(stall_s)
        for name in stalled.keys() - said:
            log.error("stalled", what=name, seconds=round(stalled[name], 1))
        for name in said - stalled.keys():
            log.info("stalled_over", what=name)
        said = set(stalled)
        time.sleep(_WATCH_S)
