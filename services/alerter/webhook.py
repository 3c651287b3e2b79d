"""Posts alarms as signed JSON, following the Standard Webhooks specification (https://www.standardwebhooks.com)."""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from services.alerter.alarm import Alarm, batch_id, fields
from shared.errors import Outage, Poison
from shared.http import Client
from shared.privacy import without_digits

_PREFIX = "whsec_"
_HOST = re.compile(r"https?://(?:[^/?#]*@)?([^/?#:]*)")
_MOST_BYTES = 64 * 1024  # of an answer, which nobody reads
_CONTENT_REFUSED = (400, 413, 422)  # HTTP status codes


class Webhook:
    """A client for one webhook."""

    def __init__(self, *, url: str, secret: str, timeout_s: float) -> None:
        """`secret` is either `whsec_` followed by a base64 key, or any other text, which is then the key itself.

        Raises ValueError for invalid base64.
        """
        self._url = url
        found = _HOST.match(url)
        self._host = found[1] if found else ""  # messages show the host only, since the rest of the URL may be secret
        self._key = key_of(secret)
        self._timeout_s = timeout_s
        self._client = Client()

    def post(self, alarms: Sequence[Alarm], *, kind: str = "fraud.alarms") -> None:
        """Post the alarms as an event of type `kind`, and return once the webhook has accepted them.

        Raises Poison if the webhook refuses the content (status 400, 413 or 422), and Outage after any other failure.
        """
        now = datetime.now(UTC)
        body = payload(alarms, kind=kind, now=now)
        headers = signed(body, identity=batch_id(alarms), now=now, key=self._key)
        try:
            answer = self._client.send(
                "POST", self._url, body=body, headers=headers, timeout_s=self._timeout_s, most_bytes=_MOST_BYTES
            )
        except Outage as outage:
            raise Outage(
                f"cannot reach the webhook at {self._host}: {outage}. Check that it runs, and check WEBHOOK_URL"
            ) from None
        problem = f"webhook at {self._host} answered {answer.status} {without_digits(answer.reason)}"
        if answer.status in _CONTENT_REFUSED:
            raise Poison(problem)
        if not 200 <= answer.status < 300:
            raise Outage(problem)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def key_of(secret: str) -> bytes:
    """Return the signing key that a webhook secret contains. Raises ValueError if the key is not valid base64."""
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError(f"the part after {_PREFIX} is not base64") from None


def payload(alarms: Sequence[Alarm], *, kind: str, now: datetime) -> bytes:
    """Return the body of a post: `{"type": kind, "timestamp": ..., "data": {"alarms": [...]}}`."""
    return msgspec.json.encode(
        {"type": kind, "timestamp": now.isoformat(), "data": {"alarms": list(map(fields, alarms))}}
    )


def signed(body: bytes, *, identity: str, now: datetime, key: bytes) -> Mapping[str, str]:
    """Return a post's headers, which include an HMAC-SHA256 signature of the identity, time and body."""
    seconds = str(int(now.timestamp()))
    signature = hmac.new(key, f"{identity}.{seconds}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "webhook-id": identity,
        "webhook-timestamp": seconds,
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
