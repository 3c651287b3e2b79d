"""Starts the predictor: sets the environment variables of its libraries before it imports them."""

import os

from services.predictor.settings import PredictorSettings
from shared import service

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # to use more cores, run more replicas
    # The service retries with its own backoff; MLflow's retries take minutes and ignore SIGTERM.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # MLflow's telemetry thread changes os.environ while the library requests reads it.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def main() -> None:
    """Run the predictor. Set the environment first, because the libraries read it when they are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from services.predictor.serving import serve

    service.run("predictor", PredictorSettings, serve)


if __name__ == "__main__":
    main()
