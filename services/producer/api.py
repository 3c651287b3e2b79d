"""The payments API: one polite call, and what its answer held."""

import email.utils
import time

import requests
import urllib3

from shared.errors import Outage

_CONNECT_TIMEOUT_S = 5.0
_MAX_RETRY_AFTER_S = 300.0
_PIECE_BYTES = 64 * 1024
_MAX_BODY_BYTES = 64 * 1024 * 1024


def fetch(session: requests.Session, url: str, *, timeout_s: float) -> bytes:
    """The body of one answer. Raises Outage for none within `timeout_s`, or one that is not a success."""
    deadline = time.monotonic() + timeout_s
    try:
        with session.get(url, timeout=(_CONNECT_TIMEOUT_S, timeout_s), stream=True) as response:
            if response.status_code != requests.codes.ok:
                asked = retry_after_s(response.headers.get("Retry-After"))
                raise Outage(f"HTTP {response.status_code}", retry_after_s=asked)
            body = bytearray()
            while piece := response.raw.read1(_PIECE_BYTES, decode_content=True):
                body += piece
                unfinished = response.raw.length_remaining != 0
                if len(body) > _MAX_BODY_BYTES or (unfinished and time.monotonic() > deadline):
                    raise Outage("an answer without end")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Outage(type(error).__name__) from None
    return bytes(body)


def retry_after_s(header: str | None) -> float:
    """Seconds asked for by a Retry-After header (RFC 9110, 10.2.3: seconds or a date), at most five minutes."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)
