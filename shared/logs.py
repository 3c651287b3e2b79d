"""Formats logs: one line per event, as `key=value` pairs or JSON, without full card numbers or logins."""

import logging
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import structlog
from structlog.typing import Processor

from shared.privacy import without_cards, without_credentials
from shared.settings import ServiceSettings

_REMINDER_S = 60.0
_NAMES = re.compile("replica|group|topic")  # the settings that contain names


def configure(service: str, settings: ServiceSettings) -> None:
    """Write all log lines to stdout in one format, whether from structlog, the standard library or librdkafka."""
    shared_steps: list[Processor] = [
        lambda _logger, _method, event: {"service": service, **event},  # applies to lines from every thread
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]
    last: Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "service", "event"])
    )
    structlog.configure(
        processors=[*shared_steps, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared_steps,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                masking(own_names(settings)),
                last,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    librdkafka = logging.getLogger("librdkafka")
    librdkafka.filters[:] = [Sparingly()]
    for chatty in ("mlflow", "urllib3", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class Sparingly(logging.Filter):
    """Passes each kind of line once per minute, because librdkafka repeats lines many times per second in an outage."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = re.sub(r"\d+", "#", record.getMessage())
        now = time.monotonic()
        if now - self._said_at.get(kind, -_REMINDER_S) < _REMINDER_S:
            return False
        self._said_at[kind] = now
        return True


def own_names(settings: ServiceSettings) -> list[str]:
    """Return those names of replicas, groups and topics that look as if they contained a card number."""
    fields = settings.model_dump(include={name for name in type(settings).model_fields if _NAMES.search(name)})
    return [name for name in map(str, fields.values()) if without_cards(name) != name]


def masking(own: Sequence[str]) -> Processor:
    """Return a step that masks card numbers and logins in URLs, in every value of a line except in the names `own`.

    A card number has 11 to 19 digits that pass the Luhn test.
    """
    names = re.compile("|".join(rf"(?<!\d){re.escape(name)}(?!\d)" for name in own) or "(?!)")

    def masked(text: str) -> str:
        parts, at = [], 0
        for name in names.finditer(text):
            parts += [without_cards(text[at : name.start()]), name[0]]
            at = name.end()
        return without_credentials("".join([*parts, without_cards(text[at:])]))

    def value_of(value: Any) -> Any:
        large = isinstance(value, int) and abs(value) >= 10**10
        if not (large or isinstance(value, str)):
            return value
        text = masked(str(value))
        return value if text == str(value) else text

    return lambda _logger, _method, event: {key: value_of(value) for key, value in event.items()}
