"""The model pipeline: features, training, and which version bears an alias."""

import os

# MLflow's telemetry thread changes os.environ while requests read it; disable it before mlflow is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
