"""Where a prediction comes from. It travels in topic_2's record headers, so that the value stays N+2 features."""

from typing import NamedTuple

from shared.kafka import Headers


class Provenance(NamedTuple):
    """Which model said so, how surely, when, and from which record."""

    model_name: str | None = None
    model_version: str | None = None
    probability: float | None = None  # of fraud
    predicted_at_ms: int | None = None  # epoch
    source_partition: int | None = None
    source_offset: int | None = None


_READERS = {
    "model-name": ("model_name", str),
    "model-version": ("model_version", str),
    "probability": ("probability", float),
    "predicted-at-ms": ("predicted_at_ms", int),
    "source-partition": ("source_partition", int),
    "source-offset": ("source_offset", int),
}


def to_headers(provenance: Provenance) -> Headers:
    """The headers of a topic_2 record; what is not known is left out."""
    return [(name, str(value).encode()) for name, value in zip(_READERS, provenance, strict=True) if value is not None]


def from_headers(headers: Headers) -> Provenance:
    """Read what is there; an unreadable or missing header is None, since the prediction stands without it."""
    found = {}
    for name, raw in headers:
        if name in _READERS and isinstance(raw, bytes):
            field, read = _READERS[name]
            try:
                found[field] = read(raw.decode())
            except ValueError:
                continue
    return Provenance(**found)
