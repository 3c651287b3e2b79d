"""Where a prediction comes from. It travels in topic_2's record headers, so that the value stays N+2 features."""

from collections.abc import Callable
from typing import Any, NamedTuple

from shared.kafka import Headers


class Provenance(NamedTuple):
    """Which model said so, how surely, when, and from which record."""

    model_name: str | None = None
    model_version: str | None = None
    probability: float | None = None  # of fraud
    predicted_at_ms: int | None = None  # epoch
    source_partition: int | None = None
    source_offset: int | None = None


def _up_to(limit: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if not 0 <= number <= limit:
            raise ValueError(f"not in 0..{limit}")
        return number

    return read


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise ValueError("not in 0..1")
    return number


_LAST_MOMENT_MS = 253_402_300_799_999  # of the year 9999
_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "model-name": ("model_name", str),
    "model-version": ("model_version", str),
    "probability": ("probability", _share),
    "predicted-at-ms": ("predicted_at_ms", _up_to(_LAST_MOMENT_MS)),
    "source-partition": ("source_partition", _up_to(2**31 - 1)),
    "source-offset": ("source_offset", _up_to(2**63 - 1)),
}


def to_headers(provenance: Provenance) -> Headers:
    """The headers of a topic_2 record; what is not known is left out."""
    return [(name, str(value).encode()) for name, value in zip(_READERS, provenance, strict=True) if value is not None]


def from_headers(headers: Headers) -> Provenance:
    """Read what is there; an unreadable or missing header is None, since the prediction stands without it."""
    found: dict[str, Any] = {}
    for name, raw in headers:
        if name in _READERS and isinstance(raw, bytes):
            field, read = _READERS[name]
            try:
                found[field] = read(raw.decode())
            except ValueError:
                continue
    return Provenance(**found)
