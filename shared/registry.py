"""Describes in plain words why the MLflow registry did not do what it was asked to do."""

import re

from shared.network import why_unreachable

_STATUS = re.compile(r"error code (\d{3})|(\d{3}) (?:Client|Server) Error")  # in messages of MLflow and requests


def why_registry_failed(error: Exception, *, default: str) -> str:
    """Return why a request of MLflow's client failed, for example `HTTP 502` or `connection refused`.

    If the cause is unknown, returns `default`. MLflow's own message may contain the response, or a URL with a login.
    """
    if found := _STATUS.search(str(error)):
        status = found[1] or found[2]
        refused = status in ("401", "403")
        return f"HTTP {status}" + (". Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if refused else "")
    return why_unreachable(error, default=default)
