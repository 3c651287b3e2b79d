"""Formats logs: one line per event, as `key=value` pairs or JSON, without full card numbers or logins."""

import logging
import re
import sys
import time
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from shared.privacy import without_cards, without_credentials
from shared.settings import ServiceSettings

_REMINDER_S = 60.0


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
                mask_cards,
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


def mask_cards(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Mask card numbers (11 to 19 digits that pass the Luhn test) and logins in URLs, in every log line."""
    return {key: _masked(value) for key, value in event.items()}


def _masked(value: Any) -> Any:
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) and abs(value) >= 10**10 else None
    if text is None:
        return value
    masked = without_credentials(without_cards(text))
    return value if masked == text else masked
