"""A container's health check: `python -m shared.probe` checks that the service in this container is live.

`python -m shared.probe ready` checks that the service is ready, and prints what the service waits for.
"""

import sys
from http.client import HTTPConnection, HTTPException

from shared.errors import SettingsError
from shared.settings import ServiceSettings, load

_TIMEOUT_S = 5.0


def main() -> int:
    """Print the service's response. Returns the exit code, which is 0 if the check passes or if METRICS_PORT is 0."""
    what = sys.argv[1] if len(sys.argv) > 1 else "live"
    try:
        settings = load(ServiceSettings)
    except SettingsError as error:
        print(error)  # noqa: T201 - `docker inspect` shows what a probe prints
        return 2
    if settings.metrics_port == 0:
        return 0
    host = "127.0.0.1" if settings.metrics_host == "0.0.0.0" else settings.metrics_host  # noqa: S104
    connection = HTTPConnection(host, settings.metrics_port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", f"/{what}")
        answer = connection.getresponse()
        print(answer.read().decode().strip())  # noqa: T201
    except (OSError, HTTPException) as error:
        print(f"no response: {error}")  # noqa: T201
        return 1
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
