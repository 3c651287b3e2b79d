"""Which version has an alias, asked of the registry through its REST API, and of servers that are no registry."""

import base64
import os
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command_line import call

from fraudctl.registry import version_with_alias
from sandbox.registry import Registry
from shared.errors import Outage
from shared.settings import RegistrySettings

Serve = Callable[..., RegistrySettings]


@pytest.fixture
def headers() -> list[str | None]:
    """The logins that the server was sent."""
    return []


@pytest.fixture
def serve(headers: list[str | None]) -> Iterator[Serve]:
    """Settings for a server that gives this answer."""
    servers: list[HTTPServer] = []

    def start(status: int, body: bytes, *, endless: bool = False, **settings: str) -> RegistrySettings:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers.append(self.headers["Authorization"])
                self.send_response(status)
                self.end_headers()
                try:
                    self.wfile.write(body)
                    while endless:
                        self.wfile.write(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass  # the client has had enough

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        server = HTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return RegistrySettings(mlflow_tracking_uri=f"http://127.0.0.1:{server.server_port}", **settings)  # type: ignore[arg-type]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_rest_api_says_what_the_client_says(registry: Registry) -> None:
    settings = RegistrySettings(mlflow_tracking_uri=registry.uri)

    assert version_with_alias(settings, "champion") == "1"
    assert version_with_alias(settings, "nobody") is None
    assert version_with_alias(settings.model_copy(update={"model_name": uuid.uuid4().hex}), "champion") is None


def test_settings_that_only_mlflow_knows_are_left_to_its_client(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    assert version_with_alias(RegistrySettings(mlflow_tracking_uri=registry.uri), "champion") == "1"


def test_the_login_is_sent_as_mlflow_sends_it(
    serve: Serve, headers: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = b'{"model_version": {"version": "7"}}'
    settings = serve(200, answer, mlflow_tracking_username="ana", mlflow_tracking_password="pässword")

    assert version_with_alias(settings, "champion") == "7"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    version_with_alias(serve(200, answer), "champion")

    assert headers == [f"Basic {base64.b64encode('ana:pässword'.encode()).decode()}", "Bearer token"]


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b"<html>", "responded with something that is not a registry's response"),
        (200, b'{"model_version": []}', "responded with something that is not a registry's response"),
        (401, b"who are you", "responded with HTTP 401: it refuses the login"),
        (404, b"not found", "responded with HTTP 404"),
        (500, b'{"error_code": "INTERNAL_ERROR"}', "responded with HTTP 500"),
    ],
)
def test_a_server_that_is_no_registry_is_an_outage(serve: Serve, status: int, body: bytes, reason: str) -> None:
    with pytest.raises(Outage, match=reason) as outage:
        version_with_alias(serve(status, body), "champion")

    assert "Check that it runs, and check MLFLOW_TRACKING_URI" in str(outage.value)


@pytest.mark.parametrize("command", [["promote", "1"], ["rollback"], ["models", "check", "1"]], ids=" ".join)
def test_a_refused_login_is_named_by_every_command(serve: Serve, tmp_path: Path, command: list[str]) -> None:
    uri = serve(401, b"who are you").mlflow_tracking_uri

    done = call(*command, cwd=tmp_path, environment=os.environ | {"MLFLOW_TRACKING_URI": uri})

    assert done.returncode == 2
    remedy = "Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    assert done.stderr == f"fraudctl: MLflow at {uri}: HTTP 401. {remedy}\n"


@pytest.mark.parametrize("body", [b"", b"x" * 2_000_000])
def test_an_answer_without_end_is_an_outage(serve: Serve, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    began = time.monotonic()

    with pytest.raises(Outage, match="no complete response within 1 s"):
        version_with_alias(serve(200, body, endless=True), "champion")

    assert time.monotonic() - began < 10
