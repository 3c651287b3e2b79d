"""The model pipeline: features, training, and which version bears an alias."""

import os

# It would tell its makers of its use, from a thread that changes the environment under a request's feet. Before mlflow
# is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
