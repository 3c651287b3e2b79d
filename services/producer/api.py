"""Sends requests to the payments API."""

import email.utils
import time

import requests
import urllib3

from shared.errors import Outage
from shared.network import why_unreachable

_CONNECT_TIMEOUT_S = 5.0
_MAX_RETRY_AFTER_S = 300.0
_PIECE_BYTES = 64 * 1024
_MAX_BODY_BYTES = 64 * 1024 * 1024


def fetch(session: requests.Session, url: str, *, timeout_s: float) -> bytes:
    """Send a GET request. Returns the body of the response (at most 64 MB).

    Raises Outage if the API does not respond, or if the status is not 200. Also raises Outage if the response is too
    large, or is not complete within `timeout_s` seconds. The message of the Outage does not contain the URL.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with session.get(url, timeout=(_CONNECT_TIMEOUT_S, timeout_s), stream=True) as response:
            if response.status_code != requests.codes.ok:
                wanted_s = retry_after_s(response.headers.get("Retry-After"))
                raise Outage(f"HTTP {response.status_code}", retry_after_s=wanted_s)
            body = bytearray()
            while piece := response.raw.read1(_PIECE_BYTES, decode_content=True):
                body += piece
                unfinished = response.raw.length_remaining != 0
                if len(body) > _MAX_BODY_BYTES:
                    raise Outage(f"response larger than {_MAX_BODY_BYTES // 1024**2} MB")
                if unfinished and time.monotonic() > deadline:
                    raise Outage(f"response not complete after {timeout_s:g} s")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Outage(f"no response: {why_unreachable(error)}") from None
    return bytes(body)


def retry_after_s(header: str | None) -> float:
    """Return how many seconds to wait according to a Retry-After header, but at most 300.

    The header contains a number of seconds or a date (RFC 9110, 10.2.3).
    """
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
