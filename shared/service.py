"""Starts and ends a service: loads the settings, sets up the logs, handles SIGTERM and sets the exit code."""

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
    """Run `serve(settings, shutdown)` until it returns. `serve` must return soon after `shutdown` is set.

    The exit code is 0 after SIGTERM or SIGINT, 2 if a setting is missing or wrong, and 1 after any other error. If a
    setting is missing or wrong, one line on stderr names the setting.
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
    sys.setswitchinterval(0.0002)  # after a call to the broker or the database, a thread continues at once
    gc.freeze()  # objects loaded by now stay in use, so the garbage collector can ignore them
    gc.set_threshold(50_000)  # batches contain no reference cycles, so rare collections are enough


def _log_crash(error: BaseException | None) -> None:
    """Log the error's traceback, type and message. Mask the message's digits, because messages may quote values."""
    if error:
        where = "".join(traceback.format_tb(error.__traceback__))
        reason = f"{type(error).__name__}: {without_digits(str(error))}"
        log.critical("crashed", reason=reason, where=f"Traceback (most recent call last):\n{where}")


def _exit(code: int) -> NoReturn:
    """Exit without finalising the interpreter.

    While the interpreter is finalised, threads in C libraries may crash, which would change the exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
