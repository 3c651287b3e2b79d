"""Turns a client's reports of broken connections into one error that names the host and the cause."""

import logging
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import KafkaError

OnError = Callable[[KafkaError], None]
log = logging.getLogger("librdkafka")
_SAID = re.compile(r"(?:\w+://)?(?P<host>\S+):(?P<port>\d+)/\w+: (?P<what>.*?)(?: \(after \d+ms in state .*\))?$")
_REFUSED_TOPIC = re.compile(r'Failed to add partition "(.+)" \[\d+\] .*(Broker: Topic authorization failed)').search
# The client also reports the content of these log lines as errors or exceptions.
_REPORTED = frozenset({"ADDPARTS", "ADDOFFSETS", "TXNERR", "ASSIGN"})
_ONE_RUN_S = 5.0  # failures closer together than this are one outage, because a client retries within two seconds
_LOOK_S = 2.0
_HANDSHAKE_S = 5.0


class ConnectionReports:
    """Combines a client's error callback with the client's log.

    The client logs the cause of each broken connection. It calls the error callback only when all connections are
    broken, and does not pass the cause to the callback.
    """

    def __init__(self, properties: Mapping[str, Any], on_error: OnError) -> None:
        self._properties = properties
        self._on_error = on_error
        self._last = ""
        self._broke_at = self._began = 0.0  # monotonic time
        self._all = False

    def log(self, level: int, form: str, facility: str, client: str, text: str) -> None:
        """Receive a line of the client's log. The client uses this object as its logger."""
        if facility == "FAIL" and level > logging.DEBUG:
            now = time.monotonic()
            if now - self._broke_at > _ONE_RUN_S:
                self._began, self._all = now, False
            self._broke_at, self._last = now, text.partition("]: ")[2]
            if self._all or now - self._began < _LOOK_S:
                return
        if refused := _REFUSED_TOPIC(text):
            self._on_error(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, f"{refused[1]}: {refused[2]}"))
        if facility not in _REPORTED:
            log.log(level, form, facility, client, text)

    def error(self, error: KafkaError) -> None:
        """Receive an error from the client. The client uses this method as its `error_cb`."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._all = True
            error = KafkaError(KafkaError._ALL_BROKERS_DOWN, why_broken(self._last, self._properties))
        self._on_error(error)


def why_broken(said: str, properties: Mapping[str, Any]) -> str:
    """Return why a connection broke, according to `said`, which is a line of librdkafka's log.

    Adds causes and remedies that `said` lacks.
    """
    if not (found := _SAID.match(said)):
        return "Kafka: no broker answers"
    host, port, what = found["host"], int(found["port"]), found["what"]
    if "certificate verify failed" in what:
        what = f"its certificate is not accepted: {_refused_because(host, port, properties)}"
    elif "alert" in what and "certificate" in what:
        what = (
            "the broker requires a client certificate that it trusts: set ssl.certificate.location and ssl.key.location"
        )
    elif what.startswith("Disconnected"):
        what += " (if this persists, check security.protocol)"
    return f"Kafka at {host}:{port}: {what}"


def _refused_because(host: str, port: int, properties: Mapping[str, Any]) -> str:
    """Return OpenSSL's reason for rejecting the certificate. librdkafka does not report this reason."""
    try:
        context = ssl.create_default_context(
            cafile=properties.get("ssl.ca.location"), cadata=properties.get("ssl.ca.pem")
        )
        with socket.create_connection((host, port), _HANDSHAKE_S) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return str(error.verify_message)
    except OSError:
        pass
    return "it cannot be verified"
