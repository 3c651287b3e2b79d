"""What a client reports of its connections, made into one error that names the host and the cause."""

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
# What these lines of the log say comes back as an error as well.
_TOLD = frozenset({"ADDPARTS", "ADDOFFSETS", "TXNERR"})
_ONE_RUN_S = 5.0  # a client tries again within two seconds
_LOOK_S = 2.0
_HANDSHAKE_S = 5.0


class Heard:
    """What a client says of its connections, in its errors and in its log, as one thing.

    Broken connections are in its log as long as not all of them are broken, which the error then says.
    """

    def __init__(self, properties: Mapping[str, Any], tell: OnError) -> None:
        self._properties = properties
        self._tell = tell
        self._last = ""
        self._broke_at = self._began = 0.0  # monotonic
        self._all = False

    def log(self, level: int, form: str, facility: str, client: str, text: str) -> None:
        """Take the place of a logger."""
        if facility == "FAIL" and level > logging.DEBUG:
            now = time.monotonic()
            if now - self._broke_at > _ONE_RUN_S:
                self._began, self._all = now, False
            self._broke_at, self._last = now, text.partition("]: ")[2]
            if self._all or now - self._began < _LOOK_S:
                return
        if refused := _REFUSED_TOPIC(text):
            self._tell(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, f"{refused[1]}: {refused[2]}"))
        if facility not in _TOLD:
            log.log(level, form, facility, client, text)

    def error(self, error: KafkaError) -> None:
        """Take the place of `error_cb`."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._all = True
            error = KafkaError(KafkaError._ALL_BROKERS_DOWN, why_broken(self._last, self._properties))
        self._tell(error)


def why_broken(said: str, properties: Mapping[str, Any]) -> str:
    """What librdkafka said of a connection, in short, and what it leaves out."""
    if not (found := _SAID.match(said)):
        return "Kafka: no broker answers"
    host, port, what = found["host"], int(found["port"]), found["what"]
    if "certificate verify failed" in what:
        what = f"its certificate is refused: {_refused_because(host, port, properties)}"
    elif "alert" in what and "certificate" in what:
        what = "it wants a certificate that it trusts (ssl.certificate.location, ssl.key.location)"
    elif what.startswith("Disconnected"):
        what += " (if it goes on: does security.protocol fit?)"
    return f"Kafka at {host}:{port}: {what}"


def _refused_because(host: str, port: int, properties: Mapping[str, Any]) -> str:
    """In the words of OpenSSL, which librdkafka does not pass on."""
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
