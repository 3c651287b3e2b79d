"""Looks up, within seconds, which model version has a given alias in the MLflow registry.

An http(s) registry is queried through its REST API, because importing MLflow takes longer than everything else that
`fraudctl status` does. MLflow's client is used for other registries, and for logins that only this client supports.
"""

import json
import os
import time
from base64 import b64encode

import requests
import urllib3

from shared.errors import Outage
from shared.privacy import without_credentials
from shared.settings import RegistrySettings

_TIMEOUT_S = 5.0
_BACKOFF_S = 0.5
_MOST_BYTES = 1024 * 1024
_PIECE_BYTES = 64 * 1024
_REMEDY = "Check that it runs, and check MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
# The path of aliases in MLflow's REST API, and the API's error codes for an unknown model and an unknown alias.
_PATH = "/api/2.0/mlflow/registered-models/alias"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_REST_SETTINGS = frozenset(f"MLFLOW_TRACKING_{name}" for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"))


def version_with_alias(settings: RegistrySettings, alias: str, *, timeout_s: float = _TIMEOUT_S) -> str | None:
    """Return the model version that has the alias, or None. Raises Outage if the registry does not respond."""
    others = [name for name in os.environ if name.startswith("MLFLOW_TRACKING_") and name not in _REST_SETTINGS]
    if others or not settings.mlflow_tracking_uri.startswith(("http://", "https://")):
        return _by_client(settings, alias, timeout_s)
    return _by_rest(settings, alias, timeout_s)


def limit_mlflow(timeout_s: float = _TIMEOUT_S) -> None:
    """Make MLflow's client try only once, with a short timeout, because an operator is waiting.

    If the environment already sets the number of retries or the timeout, that value is kept.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{timeout_s:.0f}")
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"


def _by_client(settings: RegistrySettings, alias: str, timeout_s: float) -> str | None:
    limit_mlflow(timeout_s)
    settings.set_up_mlflow()

    from training import aliases

    return aliases.bearer(aliases.Alias(settings.mlflow_tracking_uri, settings.model_name, alias))


def _by_rest(settings: RegistrySettings, alias: str, timeout_s: float) -> str | None:
    where = f"MLflow at {without_credentials(settings.mlflow_tracking_uri)}"
    timeout_s = float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", timeout_s))
    attempts = int(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"))
    retries = urllib3.Retry(attempts, read=False, backoff_factor=_BACKOFF_S)
    with requests.Session() as session:
        for prefix in ("http://", "https://"):
            session.mount(prefix, requests.adapters.HTTPAdapter(max_retries=retries))
        try:
            status, body = _answer(session, settings, alias, timeout_s=timeout_s)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise Outage(f"Cannot reach {where}: {_reason(error, timeout_s)}. {_REMEDY}") from None
    try:
        found = json.loads(body)
        if status == requests.codes.ok:
            return str(found["model_version"]["version"])
        if found.get("error_code") in _ABSENT:
            return None
    except (ValueError, LookupError, AttributeError, TypeError):
        pass  # not the response of an MLflow server
    raise Outage(f"{where} responded with {_meaning(status)}. {_REMEDY}")


def _answer(
    session: requests.Session, settings: RegistrySettings, alias: str, *, timeout_s: float
) -> tuple[int, bytes]:
    """Return the response's HTTP status and body.

    Raises requests.Timeout if the response takes too long or is too large.
    """
    deadline = time.monotonic() + timeout_s
    with session.get(
        settings.mlflow_tracking_uri.rstrip("/") + _PATH,
        params={"name": settings.model_name, "alias": alias},
        headers=_login(settings),
        timeout=timeout_s,
        stream=True,
    ) as response:
        body = bytearray()
        while piece := response.raw.read1(_PIECE_BYTES, decode_content=True):
            body += piece
            if len(body) > _MOST_BYTES or time.monotonic() > deadline:
                raise requests.Timeout
        return response.status_code, bytes(body)


def _login(settings: RegistrySettings) -> dict[str, str]:
    """Return the Authorization header that MLflow's client would send, or no header if there is no login."""
    username, password = settings.mlflow_tracking_username, settings.mlflow_tracking_password
    if username and password:
        login = b64encode(f"{username}:{password.get_secret_value()}".encode()).decode()
        return {"Authorization": f"Basic {login}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _reason(error: Exception, timeout_s: float) -> str:
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted, or it does not speak TLS"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return f"no complete response within {timeout_s:g} s"
    text = str(error)
    if "Connection refused" in text:
        return "connection refused"
    if "NameResolutionError" in text or "getaddrinfo" in text:
        return "its host name is unknown"
    return f"the connection failed ({type(error).__name__})"


def _meaning(status: int) -> str:
    if status == requests.codes.ok:
        return "something that is not a registry's response"
    if status in (requests.codes.unauthorized, requests.codes.forbidden):
        return f"HTTP {status}: it refuses the login"
    return f"HTTP {status}"
