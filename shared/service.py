"""How each service starts and ends: settings, logs, SIGTERM, exit codes."""

import gc
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
    """Run `serve(settings, shutdown)` until it returns. It must return soon after `shutdown` is set.

    Exit codes: 0 after SIGTERM or SIGINT, 2 for a missing or wrong setting (one line on stderr names it), 1 for any
    other error.
    """
    shutdown = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shutdown.set())
    try:
        loaded = load(settings)
        logs.configure(name, loaded)
        threading.excepthook = lambda unforeseen: _log_crash(unforeseen.exc_value)
        health.serve(name, loaded)
        log.info("started")
        for unknown, meant in unknown_variables().items():
            log.warning("unknown_setting", ignored=unknown, **({"did_you_mean": meant} if meant else {}))
        _tune()
        serve(loaded, shutdown)
    except SettingsError as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 - logs may not be set up yet
        _exit(2)
    except Exception as error:
        _log_crash(error)
        _exit(1)
    log.info("stopped")
    _exit(0)


def _tune() -> None:
    """Tune the interpreter for threads that often wait for each other, and for short-lived batches."""
    sys.setswitchinterval(0.0002)  # a thread that returns from the broker or the database continues at once
    gc.freeze()  # what is loaded by now is never freed, so the collector need not look at it
    gc.set_threshold(50_000)  # batches contain no reference cycles, so collecting rarely is enough


def _log_crash(error: BaseException | None) -> None:
    """Log the error's traceback, type and message. The message's digits are masked, since it may quote values."""
    if error:
        where = "".join(traceback.format_tb(error.__traceback__))
        reason = f"{type(error).__name__}: {without_digits(str(error))}"
        log.critical("crashed", reason=reason, where=f"Traceback (most recent call last):\n{where}")


def _exit(code: int) -> NoReturn:
    """Exit without finalising the interpreter, during which threads in C libraries may crash and change the code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
