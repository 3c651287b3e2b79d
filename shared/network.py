"""Ends connections that take too long, and describes in plain words why a connection failed.

The messages of client libraries hide the operating system's error, and quote URLs with logins.
"""

import http.client
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer


class Watch:
    """Ends a connection if the other side takes too long, however few bytes it sends at a time.

    The timeout of a socket begins anew with each byte that arrives.
    """

    def __init__(self) -> None:
        self.late = False  # whether the last limit has passed
        self._connection: socket.socket | None = None  # a copy, which stays usable when TLS takes over the original

    def opened(self, connection: socket.socket) -> None:
        """Watch this connection from now on. Raises TimeoutError if the limit has passed already."""
        self.close()
        self._connection = socket.fromfd(connection.fileno(), connection.family, connection.type)
        if self.late:
            raise TimeoutError

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """End the connection if the block takes longer. What has arrived by then can still be read."""
        self.late = False
        timer = Timer(seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        """Watch no connection any more."""
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    def _end(self) -> None:
        self.late = True
        if self._connection:
            with suppress(OSError):  # it is closed already
                self._connection.shutdown(socket.SHUT_RDWR)


def why_unreachable(error: BaseException, *, default: str | None = None) -> str:
    """Return why a connection failed, for example `connection refused`.

    The reason comes from the first system error among `error` and its causes. If there is no system error, the reason
    is `default`. If there is no `default` either, the reason is the name of the error's type, in words. The reason is
    never a library's message, because a message may contain a secret.
    """
    at: BaseException | None = error
    while at is not None:
        if reason := _system_reason(at):
            return reason
        at = at.__cause__ or at.__context__
    return default or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()


def _system_reason(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {(error.reason or 'connection closed').lower().replace('_', ' ')}"
    if isinstance(error, socket.gaierror):
        return "host name not resolved"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, (ConnectionResetError, BrokenPipeError, http.client.IncompleteRead)):
        return "connection closed by the server"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return None
