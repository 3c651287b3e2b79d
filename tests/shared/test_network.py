"""Connection errors are reported in plain words, without the URL."""

import socket
from threading import Thread

import pytest
import requests

from sandbox.processes import free_port
from shared.network import why_unreachable


def failure(url: str) -> str:
    with pytest.raises(requests.RequestException) as raised:
        requests.get(url, timeout=0.5)
    return why_unreachable(raised.value)


def test_the_reason_is_that_of_the_system() -> None:
    secret = f"http://user:password@127.0.0.1:{free_port()}/?key=secret"

    assert failure(secret) == "connection refused"
    assert failure("http://nobody.invalid/") == "host name not resolved"
    assert failure("http://") == "invalid url"


@pytest.mark.parametrize(
    ("answer", "scheme", "reason"),
    [
        (None, "http", "timed out"),
        (b"", "http", "connection closed by the server"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut", "http", "connection closed by the server"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "https", "TLS failed: "),
    ],
)
def test_a_server_that_does_not_speak_as_it_should(answer: bytes | None, scheme: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(10_000)
            if answer is not None:
                connection.sendall(answer)
                connection.close()
            kept.append(connection)

        kept: list[socket.socket] = []
        serving = Thread(target=serve)
        serving.start()

        found = failure(f"{scheme}://127.0.0.1:{server.getsockname()[1]}/")

        serving.join()
        kept[0].close()
    assert found.startswith(reason)
