"""Sends requests to the payments API."""

import email.utils
import time

from shared.errors import Outage
from shared.http import Answer, Client

_MAX_RETRY_AFTER_S = 300.0


def fetch(client: Client, url: str, *, timeout_s: float, most_bytes: int) -> Answer:
    """Send a GET request. Returns the response, of whose body at most `most_bytes` are read.

    Raises Outage if the API does not respond, if the status is not 2xx, or if the response is not complete within
    `timeout_s` seconds. The message of the Outage does not contain the URL.
    """
    answer = client.send("GET", url, timeout_s=timeout_s, most_bytes=most_bytes)
    if 300 <= answer.status < 400:
        raise Outage(f"HTTP {answer.status}, a redirect, which is not followed. Check API_URL")
    if not 200 <= answer.status < 300:
        raise Outage(f"HTTP {answer.status}", retry_after_s=retry_after_s(answer.headers.get("Retry-After")))
    if not answer.body:
        raise Outage(f"HTTP {answer.status} without content")
    return answer


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
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if seconds == seconds else 0.0
