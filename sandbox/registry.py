"""The model registry: a real MLflow server with an SQLite store."""

import argparse
import os
import sys
from pathlib import Path

import requests

from sandbox.processes import Process, free_port, port_open, python


class Registry(Process):
    """An MLflow server on 127.0.0.1. The server's port and contents survive stop, kill and restart."""

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        self.directory = directory.resolve()
        self._port = port or free_port()
        super().__init__(
            "MLflow",
            python("sandbox.registry", "--directory", str(self.directory), "--port", str(self._port)),
            log=self.directory / "mlflow.log",
            ready=self._healthy,
        )

    @property
    def uri(self) -> str:
        """The MLflow tracking URI."""
        return f"http://127.0.0.1:{self._port}"

    def _healthy(self) -> bool:
        if not port_open(self._port):
            return False
        try:
            return requests.get(f"{self.uri}/health", timeout=2).ok
        except requests.RequestException:
            return False


def main() -> int:
    """Serve until SIGTERM, in this process.

    The command `mlflow server` would start three processes, and would take twice as long to start.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    # MLflow reads these variables when it is imported.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # otherwise MLflow starts more processes
    from mlflow.server import constants

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = f"sqlite:///{arguments.directory / 'mlflow.db'}"
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = str(arguments.directory / "artifacts")
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    import uvicorn
    from mlflow.server.fastapi_app import app

    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
