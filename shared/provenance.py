"""Where a prediction comes from. It travels in a record header of topic_2, so that the value stays N+2 features."""

from typing import Annotated

import msgspec
from msgspec import Meta

from shared.kafka.messages import Headers

HEADER = "provenance"


class Provenance(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Which model said so, how surely, when, and from which record of topic_1."""

    model_name: str | None = None
    model_version: str | None = None
    probability: Annotated[float, Meta(ge=0, le=1)] | None = None  # of fraud
    predicted_at_ms: Annotated[int, Meta(ge=0, lt=253_402_300_800_000)] | None = None  # epoch, up to the year 9999
    source_partition: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    source_offset: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Provenance).decode
_NONE = Provenance()


def to_headers(provenance: Provenance) -> Headers:
    """The headers of a topic_2 record; what is not known is left out."""
    return [(HEADER, _encode(provenance))]


def from_headers(headers: Headers) -> Provenance:
    """Read it; nothing is known if it is missing or cannot be read, since the prediction stands without it."""
    for name, raw in headers:
        if name == HEADER and isinstance(raw, bytes):
            try:
                return _decode(raw)
            except (ValueError, RecursionError):
                break
    return _NONE
