"""The provenance of a prediction is a header of the topic_2 record.

The value of the topic_2 record has only the N+2 features.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from shared.kafka.messages import Headers
from shared.text import BACKSLASH

HEADER = "provenance"
_MOST_BYTES = 8192


class Provenance(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The model, the probability of fraud, the time of the prediction, and the topic_1 record that was scored."""

    model_name: str | None = None
    model_version: str | None = None
    probability: Annotated[float, Meta(ge=0, le=1)] | None = None  # probability of fraud
    predicted_at_ms: Annotated[int, Meta(ge=0, lt=253_402_300_800_000)] | None = None  # up to the year 9999
    source_partition: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    source_offset: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Provenance).decode
_NONE = Provenance()


def to_headers(provenance: Provenance) -> Headers:
    """Make the headers of a topic_2 record. Fields of `provenance` that are None are left out."""
    return [(HEADER, _encode(provenance))]


def from_headers(headers: Headers) -> Provenance:
    """Read the provenance. If the header is missing, unreadable or cannot be stored, every field is None.

    The prediction is valid even without provenance.
    """
    for name, raw in headers:
        if name == HEADER and isinstance(raw, bytes):
            try:
                found = _decode(raw) if len(raw) <= _MOST_BYTES else _NONE
            except (ValueError, RecursionError):
                break
            if BACKSLASH in raw and "\0" in f"{found.model_name}{found.model_version}":  # PostgreSQL cannot store it
                break
            return found
    return _NONE
