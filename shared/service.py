"""How each service starts and ends: settings, logs, SIGTERM, exit codes."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from threading import Event
from typing import NoReturn, TypeVar

import structlog

from shared import health, logs
from shared.errors import SettingsError
from shared.privacy import without_digits
from shared.settings import ServiceSettings, load, unknown_variables

S = TypeVar("S", bound=ServiceSettings)
log = structlog.get_logger()


def run(name: str, settings: type[S], serve: Callable[[S, Event], None]) -> NoReturn:
    """Run `serve(settings, shutdown)` until it returns, which it does soon after `shutdown` is set.

    Exits with 0 after SIGTERM or SIGINT, with 2 and one line on stderr for a missing or wrong setting, with 1 for an
    error that nobody foresaw.
    """
    shutdown = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shutdown.set())
    try:
        loaded = load(settings)
        logs.configure(name, loaded)
        threading.excepthook = lambda unforeseen: _tell(unforeseen.exc_value)
        health.serve(name, loaded)
        log.info("started")
        for unknown, meant in unknown_variables().items():
            log.warning("unknown_setting", ignored=unknown, **({"did_you_mean": meant} if meant else {}))
        serve(loaded, shutdown)
    except SettingsError as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 - logs may not be set up yet
        _end(2)
    except Exception as error:
        _tell(error)
        _end(1)
    log.info("stopped")
    _end(0)


def _tell(error: BaseException | None) -> None:
    """Where it was raised, and why, without the values that it may quote."""
    if error:
        where = "".join(traceback.format_tb(error.__traceback__))
        reason = f"{type(error).__name__}: {without_digits(str(error))}"
        log.critical("crashed", reason=reason, where=f"Traceback (most recent call last):\n{where}")


def _end(code: int) -> NoReturn:
    """End as a whole: threads that are inside of C libraries may crash while the interpreter is taken down piece by
    piece, and make an exit code of their own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
