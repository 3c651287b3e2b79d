"""Starts the predictor. Sets the environment variables that libraries read, and only then imports the libraries."""

import os
from functools import partial

from services.predictor.settings import PredictorSettings
from shared import service

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # to use more cores, run more replicas
    # MLflow's own retries take minutes and ignore SIGTERM. The service retries instead, with its own backoff.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # MLflow's telemetry thread changes os.environ while the `requests` library reads os.environ.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def main() -> None:
    """Run the predictor. Set the environment first, because the libraries read it when they are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from services.predictor.hosted import Host

    spare = Host()  # which imports what models need while this process imports what it needs

    from services.predictor.serving import serve

    service.run("predictor", PredictorSettings, partial(serve, spare=spare))


if __name__ == "__main__":
    main()
