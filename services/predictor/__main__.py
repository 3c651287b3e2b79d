"""The predictor: sets the environment of the libraries, then imports them and serves."""

import os

from services.predictor.settings import PredictorSettings
from shared import service

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # run replicas to use more cores
    # The service has its own backoff; MLflow's retries take minutes and ignore SIGTERM.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # MLflow's telemetry thread changes os.environ while requests reads it.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def main() -> None:
    """Run the predictor. Its libraries read the environment when they are imported, so it is set before."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from services.predictor.serving import serve

    service.run("predictor", PredictorSettings, serve)


if __name__ == "__main__":
    main()
