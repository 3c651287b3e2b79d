"""Sends HTTP requests to servers that may be broken or hostile: a response is bounded in bytes and in time."""

import socket
from collections.abc import Callable, Mapping
from functools import partial
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple, Self

import requests
import urllib3
from requests.adapters import HTTPAdapter

from shared.errors import Outage
from shared.network import Watch, why_unreachable

_CONNECT_TIMEOUT_S = 5.0
_PIECE_BYTES = 64 * 1024


class Answer(NamedTuple):
    """A response. `body` is its decompressed body, of which at most as many bytes were read as were asked for."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    cut: bool  # whether the body went on


class Client:
    """Sends one request after another, on one connection while all goes well, and on a new one after each failure.

    Redirects are not followed, because a server could send the client to any other server, and have its answer taken
    for its own. Cookies are not kept. A client must not be used by two threads at once.
    """

    def __init__(self) -> None:
        self._session = _Session()
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._watch = Watch()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(self._watch.opened))

    def send(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float,
        most_bytes: int,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request, and return the response, of whose body at most `most_bytes` are read.

        `timeout_s` is how long everything may take together, from connecting to the last byte. A response that is
        complete is returned, even if its last byte was late. Raises Outage if there is no complete response. The text
        of the Outage does not contain the URL.
        """
        try:
            with (
                self._watch.limit(timeout_s),
                self._session.request(
                    method,
                    url,
                    data=body,
                    headers={"Accept-Encoding": "gzip", **(headers or {})},
                    timeout=(min(_CONNECT_TIMEOUT_S, timeout_s), timeout_s),
                    stream=True,
                ) as response,
            ):
                read = bytearray()
                while len(read) <= most_bytes and (piece := response.raw.read1(_PIECE_BYTES, decode_content=True)):
                    read += piece
                if self._watch.late and not _ends_by_itself(response):
                    raise TimeoutError
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            self.close()
            late = f"no complete response within {timeout_s:g} s"
            raise Outage(late if self._watch.late else why_unreachable(error)) from None
        cut = len(read) > most_bytes
        if cut or self._watch.late:
            self.close()
        del read[most_bytes:]
        return Answer(response.status_code, response.reason or "", response.headers, bytes(read), cut)

    def close(self) -> None:
        """Close the connection. The next request opens another one."""
        self._session.close()
        self._watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ends_by_itself(response: requests.Response) -> bool:
    """Whether the response says where it ends, so that its end cannot be mistaken for the end of the connection."""
    return response.raw.length_remaining is not None or bool(response.raw.chunked)


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return that there is none. Otherwise the whole body is read before the next request, which is never sent."""


class _Adapter(HTTPAdapter):
    """Calls `opened` with each new connection, before anything is sent."""

    def __init__(self, opened: Callable[[socket.socket], None]) -> None:
        self._opened = opened
        super().__init__(max_retries=urllib3.Retry(0, read=False))

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        return self._watch(super().proxy_manager_for(*args, **kwargs))

    def _watch(self, manager: Any) -> Any:
        manager.pool_classes_by_scheme = {
            scheme: partial(_watched_pool, pool, self._opened)
            for scheme, pool in urllib3.poolmanager.pool_classes_by_scheme.items()
        }
        return manager


def _watched_pool(pool: Callable[..., Any], opened: Callable[[socket.socket], None], *args: Any, **kwargs: Any) -> Any:
    made = pool(*args, **kwargs)

    class Watched(made.ConnectionCls):  # type: ignore[misc, name-defined]
        def _new_conn(self) -> socket.socket:
            connection: socket.socket = super()._new_conn()
            opened(connection)
            return connection

    made.ConnectionCls = Watched
    return made
