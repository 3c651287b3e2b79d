"""Alarms as signed JSON to a URL, by the Standard Webhooks specification (https://www.standardwebhooks.com)."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec
import requests

from services.alerter.alarm import Alarm, digest_of, fields
from shared.errors import Outage, Poison
from shared.privacy import without_digits

_PREFIX = "whsec_"
_CONTENT_REFUSED = (400, 413, 422)


class Webhook:
    """One URL, which is sent some alarms at a time."""

    def __init__(self, *, url: str, secret: str, timeout_s: float) -> None:
        """`secret` is `whsec_` and base64, or any other text. Raises ValueError for base64 that is none."""
        self._url = url
        self._key = key_of(secret)
        self._timeout_s = timeout_s
        self._session = requests.Session()

    def post(self, alarms: Sequence[Alarm], *, kind: str = "fraud.alarms") -> None:
        """Have it accept the alarms. Raises Poison if it refuses these for good, Outage for anything else."""
        now = datetime.now(UTC)
        body = payload(alarms, kind=kind, now=now)
        try:
            answer = self._session.post(
                self._url,
                data=body,
                headers=signed(body, identity=digest_of(alarms), now=now, key=self._key),
                timeout=self._timeout_s,
                allow_redirects=False,  # which would become GETs
            )
        except requests.RequestException as error:
            raise Outage(f"webhook: {type(error).__name__}") from None  # its words hold the URL, and that a secret
        if answer.status_code in _CONTENT_REFUSED:
            raise Poison(f"webhook: {answer.status_code} {without_digits(answer.reason)}")
        if not 200 <= answer.status_code < 300:
            raise Outage(f"webhook: {answer.status_code} {without_digits(answer.reason)}")

    def close(self) -> None:
        """Hang up."""
        self._session.close()


def key_of(secret: str) -> bytes:
    """What is signed with. Raises ValueError."""
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError(f"behind {_PREFIX}, expected base64") from None


def payload(alarms: Sequence[Alarm], *, kind: str, now: datetime) -> bytes:
    """`{"type": kind, "timestamp": ..., "data": {"alarms": [...]}}`."""
    return msgspec.json.encode(
        {"type": kind, "timestamp": now.isoformat(), "data": {"alarms": list(map(fields, alarms))}}
    )


def signed(body: bytes, *, identity: str, now: datetime, key: bytes) -> Mapping[str, str]:
    """The headers; the signature covers id, time and body."""
    seconds = str(int(now.timestamp()))
    signature = hmac.new(key, f"{identity}.{seconds}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "webhook-id": identity,
        "webhook-timestamp": seconds,
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
