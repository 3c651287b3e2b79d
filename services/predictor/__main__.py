"""The predictor's process."""

import os

from services.predictor.settings import PredictorSettings
from shared import service

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # replicas, not threads, use more cores
    # The service has its own backoff; MLflow's retries take minutes and ignore SIGTERM.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # MLflow's telemetry thread changes os.environ while requests reads it.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def main() -> None:
    """Set what numpy, scikit-learn and MLflow read when they are imported, then import them and serve."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from services.predictor.serving import serve

    service.run("predictor", PredictorSettings, serve)


if __name__ == "__main__":
    main()
